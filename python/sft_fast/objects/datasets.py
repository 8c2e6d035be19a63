"""Data sets in object storage: `DIR/manifest.json`, and the other files in a directory that is named by the manifest.

A store has no rename, but it replaces one object at once. So all files but the manifest lie in a directory called by
the first 32 digits of the manifest's SHA-256, where no other data set writes, and putting the manifest publishes them.
Who reads sees the old data set or the new one; who reads the old one meanwhile finds the new. Files that lie beside the
manifest, as on a disk, are read too: somebody copied them there.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_fast import _core
from sft_fast.errors import DatasetError, FileError
from sft_fast.lease import MANIFEST_NAME
from sft_fast.objects.address import joined
from sft_fast.objects.cache import Held, ObjectCache
from sft_fast.objects.fetch import Wanted, fetch
from sft_fast.objects.store import Object, Store, file_hash
from sft_fast.objects.transfer import Transfer

REJECTED_NAME = "rejected.jsonl"
_SEGMENTS_NAME = "segments.jsonl"
_SHARD = re.compile(r"shard-[0-9]{5,}\.safetensors")
_PART = re.compile(r"(?:[0-9a-f]{32}/)?(?:rejected\.jsonl|segments\.jsonl|shard-[0-9]{5,}\.safetensors)")
_DIGITS = 32
_MAX_MANIFEST_BYTES = 256 << 20
# Files that are sent at once: each is held in memory.
_NUM_SENT = 3
# How often reading begins again because the data set was replaced meanwhile.
_NUM_READS = 3
# Files of a data set that was never published are the leavings of a killed run after so long.
_LEAVING_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Manifest:
    """A manifest as it is in the store."""

    content: bytes
    values: dict[str, Any]

    @property
    def directory(self) -> str:
        """The directory of the other files."""
        return hashlib.sha256(self.content).hexdigest()[:_DIGITS]


def open_dataset(address: str, transfer: Transfer) -> Held:
    """A copy of a data set in the cache of this machine, its checksums proved.

    Raises:
        DatasetError: There is none, or it is damaged.
        FileError: The store can't be reached, or the cache is full.
    """
    store, cache = Store(address, transfer), ObjectCache.of_environment()
    manifest = _required(store, address)
    for _ in range(_NUM_READS):
        try:
            return _copy(store, cache, address, manifest, transfer)
        except FileNotFoundError as error:
            before, manifest = manifest, _required(store, address)
            if manifest.content == before.content:
                raise DatasetError(f"damaged dataset: expected a file, found none: {error}", path=address) from error
    raise DatasetError(f"replaced {_NUM_READS} times while it was read", path=address)


def read_manifest(store: Store, address: str) -> Manifest | None:
    """The manifest of the data set at an address; None where there is none."""
    place = joined(address, MANIFEST_NAME)
    found = store.find(place)
    if found is None:
        return None
    if found.num_bytes > _MAX_MANIFEST_BYTES:
        raise DatasetError(f"expected a manifest of at most 256 MiB, found {found.num_bytes:,} bytes", path=place)
    content = store.read(place, 0, found.num_bytes)
    after = store.find(place)
    if after != found:  # replaced this moment
        return read_manifest(store, address)
    if found.md5 and store.has_md5(place) and hashlib.md5(content, usedforsecurity=False).hexdigest() != found.md5:
        raise FileError("the manifest arrived with another checksum", code="not_whole", path=place)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"damaged manifest: {error}", path=place) from error
    return Manifest(content, values if isinstance(values, dict) else {})


def check_place(address: str, transfer: Transfer) -> None:
    """Raises a `DatasetError` for a place that holds anything but a data set, which is never touched."""
    objects, _ = Store(address, transfer).members(address, below=True)
    names = [_name_below(address, one) for one in objects]
    strangers = [name for name in names if name != MANIFEST_NAME and not _PART.fullmatch(name)]
    if strangers:
        raise DatasetError(
            f"expected a dataset or nothing here, found '{strangers[0]}'",
            path=address, hint="choose another place; nothing in this one was touched",
        )  # fmt: skip


def publish(directory: Path, address: str, transfer: Transfer) -> None:
    """Sends a data set, its manifest last, and then removes what it replaced.

    Files that an earlier try has sent are left as they are.

    Raises:
        FileError: It could not be sent. What was there before is there still.
    """
    store = Store(address, transfer)
    content = (directory / MANIFEST_NAME).read_bytes()
    manifest = Manifest(content, {})
    before, _ = store.members(address, below=True)
    there = {_name_below(address, one): one for one in before}

    def send(path: Path) -> None:
        name = f"{manifest.directory}/{path.name}"
        if not _is_sent(path, there.get(name)):
            store.send(str(path), joined(address, name))

    with ThreadPoolExecutor(_NUM_SENT, thread_name_prefix="send") as pool:
        try:
            list(pool.map(send, sorted(path for path in directory.iterdir() if path.name != MANIFEST_NAME)))
        except BaseException:
            transfer.stop()
            raise
    old = read_manifest(store, address)
    store.send_bytes(content, joined(address, MANIFEST_NAME))
    for name, one in there.items():
        is_old = old is not None and name.startswith(f"{old.directory}/")
        is_left = "/" in name and one.modified < time.time() - _LEAVING_SECONDS
        if _PART.fullmatch(name) and not name.startswith(f"{manifest.directory}/") and (
            is_old or is_left or "/" not in name
        ):  # fmt: skip
            store.remove(one.address)


def _is_sent(path: Path, there: Object | None) -> bool:
    """Whether a file is there, to the byte; where the store does not tell, it is not."""
    is_alike = there is not None and there.num_bytes == path.stat().st_size and there.md5 is not None
    return is_alike and there is not None and there.md5 == file_hash(path, "md5")


def _required(store: Store, address: str) -> Manifest:
    manifest = read_manifest(store, address)
    if manifest is None:
        raise DatasetError(f"expected a dataset, found no {MANIFEST_NAME}", path=address)
    if manifest.values.get("format") != _core.DATASET_FORMAT:
        raise DatasetError(
            "expected the manifest of a dataset, found another file", path=joined(address, MANIFEST_NAME)
        )
    return manifest


def _copy(store: Store, cache: ObjectCache, address: str, manifest: Manifest, transfer: Transfer) -> Held:
    place = joined(address, manifest.directory)
    rejected = store.find(joined(place, REJECTED_NAME))
    if rejected is None:
        place = address.rstrip("/")
        rejected = store.find(joined(place, REJECTED_NAME))
    if rejected is None:
        raise FileNotFoundError(joined(place, REJECTED_NAME))
    wanted = [*_listed(manifest, place), _of_object(rejected, store)]
    num_bytes = len(manifest.content) + sum(one.num_bytes for one in wanted)

    def fill(directory: Path) -> None:
        fetch(wanted, directory, store, transfer)
        (directory / MANIFEST_NAME).write_bytes(manifest.content)

    held = cache.get(manifest.directory, num_bytes, address, fill)
    if held.was_there:
        transfer.count(cached=num_bytes)
    return held


def _listed(manifest: Manifest, place: str) -> list[Wanted]:
    """The files that a manifest lists with their checksums."""
    try:
        listed = [(one["name"], one["num_bytes"], one["sha256"]) for one in manifest.values["shards"]]
        segments = manifest.values["segments"]
        is_right = all(isinstance(name, str) and _SHARD.fullmatch(name) for name, _, _ in listed)
        listed.append((_SEGMENTS_NAME, segments["num_bytes"], segments["sha256"]))
        is_right &= all(type(size) is int and size >= 0 and isinstance(sha, str) for _, size, sha in listed)
    except (KeyError, TypeError, ValueError):
        is_right = False
    if not is_right:
        raise DatasetError("damaged manifest: the list of shards can't be read", path=joined(place, MANIFEST_NAME))
    return [
        Wanted(address=joined(place, name), name=name, num_bytes=size, algorithm="sha256", checksum=sha)
        for name, size, sha in listed
    ]


def _of_object(one: Object, store: Store) -> Wanted:
    is_known = one.md5 is not None and store.has_md5(one.address)
    return Wanted(
        address=one.address, name=REJECTED_NAME, num_bytes=one.num_bytes,
        algorithm="md5" if is_known else None, checksum=one.md5 if is_known else None,
    )  # fmt: skip


def _name_below(address: str, one: Object) -> str:
    """The name of an object as it is below an address."""
    return one.address.partition("://")[2].removeprefix(address.partition("://")[2].rstrip("/") + "/")
