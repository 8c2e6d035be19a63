"""Requests to object storage, through fsspec: each is bounded in time, and made again where that may help.

The libraries below would try again on their own, unseen. They are told not to, so that every failure is counted, said
and bounded in one place. Credentials, regions and endpoints are theirs to find: environment, profiles, roles.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from sft_fast.errors import ConfigError, FileError, SftFastError
from sft_fast.objects.transfer import Transfer
from sft_fast.redact import has_secrets, without_secrets

Result = TypeVar("Result")
logger = logging.getLogger("sft_fast.objects")

NUM_TRIES = 8
"""How often a request is made in all. The waits between add up to about half a minute."""
FIRST_WAIT_SECONDS = 0.25
"""Before the second try; it doubles with each further one, and is drawn between a half and the whole of that."""
TIMEOUT_SECONDS = 60.0
"""Longest time of a request for a piece or a listing; a network of 140 kB/s brings the largest piece within it."""
SEND_TIMEOUT_SECONDS = 900.0
"""Longest time for sending one object."""

# A file of up to twice this size is sent in one part, which is held in memory.
_PART_BYTES = 96 << 20
# What a version of an object is known by, in the words of the various libraries.
_VERSION_KEYS = ("ETag", "etag", "VersionId", "version_id", "generation", "LastModified", "last_modified", "mtime")
_PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_MD5 = re.compile(r"[0-9a-f]{32}")
# Libraries whose errors are those of a request.
_NETWORK = frozenset(("aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "s3fs", "ssl", "urllib3"))
# Tries would only repeat these.
_HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
_NO_CREDENTIALS = frozenset(
    ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")
)


class NotWholeError(OSError):
    """An answer that is not what was asked for: too short, too long, or with another checksum."""


@dataclass(frozen=True, kw_only=True)
class Object:
    """An object as it was when we asked."""

    address: str
    num_bytes: int
    version: str
    """Tells two contents of one address apart, where the store tells."""
    md5: str | None
    """Of its bytes, in hexadecimal, where the store tells."""
    modified: float
    """Seconds since 1970; 0 where it is not known."""


class Store:
    """The objects of the store that an address is in.

    Args:
        address: Any address there.
        transfer: Where retries are counted.

    Raises:
        ConfigError: The library for such addresses is not installed, or there is none.
    """

    def __init__(self, address: str, transfer: Transfer) -> None:
        self._transfer = transfer
        protocol = address.partition("://")[0].lower()
        package = f"sft-fast[{_PACKAGES.get(protocol, 's3')}]"
        if protocol in _PACKAGES and "@" in address.split("/")[2]:
            raise ConfigError(
                "expected a bucket, found credentials in the address", code="unknown_value", path=address,
                hint="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, or a role; of Google, its own ways",
            )  # fmt: skip
        try:
            import fsspec
            import fsspec.core
        except ModuleNotFoundError as error:
            raise _missing(address, "fsspec", package) from error
        options: dict[str, Any] = {}
        if protocol in ("s3", "s3a"):
            once = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": TIMEOUT_SECONDS}
            options = {"use_listings_cache": False, "config_kwargs": once}
        elif protocol in ("gs", "gcs"):
            options = {"use_listings_cache": False}
        try:
            self._fs: Any
            self._fs, _ = fsspec.core.url_to_fs(address, **options)
        except ImportError as error:
            name = error.name or "a library that fsspec names"
            raise _missing(address, name, package if protocol in _PACKAGES else str(error)) from error
        except ValueError as error:
            raise ConfigError(
                f"could not tell what kind of storage this is: {error}", code="unknown_value", path=address
            ) from error
        if protocol in ("s3", "s3a"):
            self._fs.retries = 1
        elif protocol in ("gs", "gcs"):
            # Its tries are wrapped around this method, and their number is no option.
            once_only = getattr(type(self._fs)._request, "__wrapped__", None)
            if once_only is not None:
                self._fs._request = once_only.__get__(self._fs)

    def find(self, address: str) -> Object | None:
        """The object at an address, or None where there is none."""
        try:
            info = self._try("look up", address, lambda: self._call("info", self._path(address)))
        except FileNotFoundError:
            return None
        return self._object(info) if info["type"] == "file" else None

    def members(self, address: str, *, below: bool = False) -> tuple[list[Object], list[str]]:
        """The objects under an address, in alphabetical order, and the addresses of what is divided further.

        Args:
            address: As if it were a directory.
            below: Whether all that is further below is listed, too; then nothing is divided further.
        """
        path = self._path(address)
        try:
            if below:
                found = self._try("list", address, lambda: self._call("find", path, detail=True)).values()
            else:
                found = self._try("list", address, lambda: self._call("ls", path, detail=True))
        except FileNotFoundError:
            return [], []
        # A store may have an empty object that stands for the directory itself.
        infos = sorted((info for info in found if info["name"].rstrip("/") != path.rstrip("/")), key=_name)
        objects = [self._object(info) for info in infos if info["type"] == "file"]
        return objects, [self._fs.unstrip_protocol(info["name"]) for info in infos if info["type"] != "file"]

    def glob(self, pattern: str) -> list[str]:
        """The addresses of objects that a pattern matches, in alphabetical order."""
        path = self._path(pattern)
        found = self._try("list", pattern, lambda: self._call("glob", path, detail=True))
        files = (name for name, info in found.items() if info["type"] == "file")
        return sorted(self._fs.unstrip_protocol(name) for name in files)

    def read(self, address: str, start: int, end: int) -> bytes:
        """The bytes `start..end`, all of them."""
        path = self._path(address)

        def request() -> bytes:
            content: bytes = self._call("cat_file", path, start=start, end=end) if end > start else b""
            if len(content) != end - start:
                raise NotWholeError(f"expected {end - start:,} bytes from byte {start:,} on, found {len(content):,}")
            return content

        content = self._try("read", address, request)
        self._transfer.count(fetched=len(content))
        return content

    def send(self, path: str, address: str) -> None:
        """Puts a file of this machine there, whole, and asks what has arrived."""
        target, num_bytes = self._path(address), os.path.getsize(path)
        # What is sent in one part, as every shard is, has its MD5 there. Longer files are sent in parts of this size.
        options = {"chunksize": _PART_BYTES} if getattr(self._fs, "async_impl", False) else {}

        def request() -> None:
            self._call("put_file", path, target, timeout=SEND_TIMEOUT_SECONDS, **options)
            found = self._object(self._call("info", target))
            if found.num_bytes != num_bytes:
                raise NotWholeError(f"sent {num_bytes:,} bytes, and found {found.num_bytes:,} there")
            if found.md5 and self.has_md5(address) and found.md5 != file_hash(path, "md5"):
                raise NotWholeError(f"what arrived has another checksum: {found.md5}")

        self._try("write", address, request)
        self._transfer.count(sent=num_bytes)

    def send_bytes(self, content: bytes, address: str) -> None:
        """Puts bytes there, at once: who reads sees what was there before, or these."""
        target = self._path(address)
        self._try("write", address, lambda: self._call("pipe_file", target, content, timeout=SEND_TIMEOUT_SECONDS))
        self._transfer.count(sent=len(content))

    def remove(self, address: str) -> None:
        """Removes an object; no matter if it is gone."""
        path = self._path(address)
        try:
            self._try("remove", address, lambda: self._call("rm_file", path))
        except FileNotFoundError:
            return

    def has_md5(self, address: str) -> bool:
        """Whether `Object.md5` of an address that has one is really the MD5 of its bytes.

        An ETag of S3 looks like one and is none where the object is encrypted by a key of its own, or its bucket is a
        directory bucket.
        """
        if not hasattr(self._fs, "call_s3"):
            return True
        bucket, _, key = self._path(address).partition("/")
        head = self._try("look up", address, lambda: self._fs.call_s3("head_object", Bucket=bucket, Key=key))
        by_key = head.get("SSECustomerAlgorithm") or str(head.get("ServerSideEncryption", "")).startswith("aws:")
        return not by_key and not bucket.endswith("--x-s3")

    def _path(self, address: str) -> str:
        path: str = self._fs._strip_protocol(address)
        return path

    def _call(self, name: str, *arguments: Any, timeout: float | None = None, **options: Any) -> Any:
        if not getattr(self._fs, "async_impl", False):
            return getattr(self._fs, name)(*arguments, **options)
        from fsspec.asyn import sync

        method = getattr(self._fs, f"_{name}")
        return sync(self._fs.loop, method, *arguments, timeout=timeout or TIMEOUT_SECONDS, **options)

    def _try(self, what: str, address: str, request: Callable[[], Result]) -> Result:
        for number, wait in enumerate(_waits(), start=1):
            if self._transfer.is_stopped:
                raise FileError(f"could not {what} this: stopped", code="storage", path=address)
            try:
                return request()
            except _HOPELESS as error:
                if isinstance(error, FileNotFoundError) and what != "write":  # which needs a bucket
                    raise
                raise FileError(f"could not {what} this: {_said(error)}", code="storage", path=address) from _cause(
                    error, address
                )
            except Exception as error:
                if isinstance(error, SftFastError) or not _is_of_a_request(error):
                    raise
                if type(error).__name__ in _NO_CREDENTIALS:
                    raise FileError(
                        f"could not {what} this: {_said(error)}", code="no_credentials", path=address,
                        hint="the usual ways: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, a role",
                    ) from _cause(error, address)  # fmt: skip
                if wait is None or not _may_pass(error):
                    tries = f" in {number} tries" if number > 1 else ""
                    raise FileError(
                        f"could not {what} this{tries}: {_said(error)}",
                        code="not_whole" if _is_not_whole(error) else "storage", path=address,
                    ) from _cause(error, address)  # fmt: skip
                self._transfer.count(retries=1)
                logger.warning(
                    "could not %s %s (%s); trying again in %.1f s, %d of %d",
                    what, without_secrets(address), _said(error), wait, number + 1, NUM_TRIES,
                )  # fmt: skip
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _object(self, info: dict[str, Any]) -> Object:
        known = [f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None]
        return Object(
            address=self._fs.unstrip_protocol(info["name"]),
            num_bytes=int(info["size"]),
            version=" ".join(known),
            md5=_md5(info),
            modified=_modified(info),
        )


def file_hash(path: str | os.PathLike[str], algorithm: str) -> str:
    """The hash of a file, in hexadecimal."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while content := file.read(1 << 20):
            digest.update(content)
    return digest.hexdigest()


def _waits() -> Iterator[float | None]:
    """Seconds after each failure; None after the last."""
    for number in range(NUM_TRIES - 1):
        yield FIRST_WAIT_SECONDS * 2**number * random.uniform(0.5, 1)
    yield None


def _is_of_a_request(error: BaseException) -> bool:
    return (
        isinstance(error, OSError | TimeoutError)
        or type(error).__module__.split(".")[0] in _NETWORK
        or _is_refused_by_google(error)
    )


def _is_refused_by_google(error: BaseException) -> bool:
    """Whether the store has called the request wrong, for which the library for Google's has no class of its own."""
    return type(error) is ValueError and str(error).startswith("Bad Request:")


def _is_not_whole(error: BaseException) -> bool:
    """Whether bytes arrived and were wrong, as we saw or as the library for S3 did, which compares checksums, too."""
    return isinstance(error, NotWholeError) or type(error).__name__ == "FlexibleChecksumError"


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may do better: not where the store says that the request itself is wrong."""
    if _is_refused_by_google(error):
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in (408, 425, 429)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error, or in that which caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        # Others have a `code` that is no answer of the store: aiohttp calls an answer that was cut off a 400.
        code = getattr(error, "code", None) if type(error).__module__.startswith("gcsfs") else None
        for value in (found, getattr(error, "status", None), code):
            if isinstance(value, int) and 100 <= value < 600:
                return value
        error = error.__cause__
    return None


def _said(error: BaseException) -> str:
    """An error in one line."""
    name, text = type(error).__name__, " ".join(without_secrets(str(error)).split())[:300]
    if isinstance(error, NotWholeError):
        return text
    return f"{name}: {text}" if text else name


def _cause(error: Exception, address: str) -> Exception | None:
    """The error for a traceback; None where it may say what is secret in the address."""
    return None if has_secrets(address) else error


def _md5(info: dict[str, Any]) -> str | None:
    """The MD5 that a store gives: S3 as the ETag of what was sent in one part, GCS by its name."""
    if isinstance(info.get("md5Hash"), str):
        return base64.b64decode(info["md5Hash"]).hex()
    tag = str(info.get("ETag", "")).strip('"').lower()
    return tag if _MD5.fullmatch(tag) else None


def _modified(info: dict[str, Any]) -> float:
    for key in ("LastModified", "last_modified", "mtime", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def _name(info: dict[str, Any]) -> str:
    return str(info["name"])


def _missing(address: str, library: str, package: str) -> ConfigError:
    hint = f"pip install '{package}'" if package.startswith("sft-fast[") else package
    return ConfigError(
        f"this address needs the library {library}, which is not installed",
        code="missing_package", path=address, hint=hint,
    )  # fmt: skip
