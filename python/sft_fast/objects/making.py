"""A data set that goes to object storage: found there, or made on this machine and sent.

It is made in a directory that has links to the data sets in the cache of this machine, so that samples of what did not
change are taken from them, as from those of a cache on a disk. None is fetched for that: to encode is often faster.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_fast import _core, lease
from sft_fast.errors import DatasetError, FileError
from sft_fast.objects import datasets
from sft_fast.objects.address import joined
from sft_fast.objects.cache import ObjectCache
from sft_fast.objects.store import Store
from sft_fast.objects.transfer import Transfer

Result = tuple[str, str, bool, int, float, "str | None"]
# In the directory of the cache: data sets that are made and not sent yet. They don't count for its limit.
_OUTGOING_NAME = "outgoing"
_LINK_PREFIX = "older-"


class Making:
    """As `_core.preprocess`, into a place in object storage."""

    def __init__(self, address: str, transfer: Transfer) -> None:
        self._address = address
        self._transfer = transfer
        self._cache = ObjectCache.of_environment()

    def __call__(self, files: Any, _: Any, *, in_cache: bool, overwrite: bool, **arguments: Any) -> Result:
        """Arguments and results of `_core.preprocess`; the path is an address."""
        if not in_cache:
            datasets.check_place(self._address, self._transfer)

        def elsewhere(fingerprint: str) -> str | None:
            return self._found(self._place(fingerprint, in_cache), fingerprint, in_cache or overwrite)

        # A killed run leaves here what it had made, and the next one finds it.
        place = self._cache.made() / _OUTGOING_NAME / hashlib.sha256(self._address.encode()).hexdigest()[:32]
        try:
            with self._older_datasets(place):
                made = _core.preprocess(files, place, in_cache=True, overwrite=True, elsewhere=elsewhere, **arguments)
            address = self._finish(made, in_cache, elsewhere)
        finally:
            with contextlib.suppress(OSError):  # it holds the work of another process, or was not made
                place.rmdir()
        return address, *made[1:]

    @contextlib.contextmanager
    def _older_datasets(self, place: Path) -> Iterator[None]:
        """Links to the data sets of the cache, beside the one that is made."""
        links: list[Path] = []
        older = self._cache.holding(lease.MANIFEST_NAME)
        try:
            place.mkdir(parents=True, exist_ok=True)
            for link in place.glob(f"{_LINK_PREFIX}*"):
                if not link.exists():  # a killed process left it, and what it led to is gone
                    link.unlink(missing_ok=True)
            for held in older:
                link = place / f"{_LINK_PREFIX}{os.getpid()}-{threading.get_ident()}-{held.path.parent.name}"
                link.symlink_to(held.path)
                links.append(link)
        except OSError as error:
            _unlink(links)
            raise FileError(f"could not work here: {error.strerror or error}", path=str(place)) from error
        try:
            yield
        finally:
            _unlink(links)

    def _finish(self, made: Result, in_cache: bool, elsewhere: Callable[[str], str | None]) -> str:
        """Sends what was made, unless it is there; its address."""
        local, manifest, is_reused = made[:3]
        fingerprint = json.loads(manifest)["fingerprint"]
        address = self._place(fingerprint, in_cache)
        if not is_reused or elsewhere(fingerprint) is None:
            self._send(Path(local), address)
        return address

    def _place(self, fingerprint: str, in_cache: bool) -> str:
        return joined(self._address, fingerprint[:32]) if in_cache else self._address.rstrip("/")

    def _found(self, address: str, fingerprint: str, may_replace: bool) -> str | None:
        """The manifest of the data set that is there, if it is the wanted one."""
        try:
            manifest = datasets.read_manifest(Store(address, self._transfer), address)
        except DatasetError:
            if may_replace:
                return None
            raise
        if manifest is None:
            return None
        if manifest.values.get("fingerprint") == fingerprint:
            return manifest.content.decode()
        if may_replace:
            return None
        raise DatasetError(
            "expected the dataset of these files and settings, found another one", path=address,
            hint="choose another place, or replace the dataset with --overwrite (overwrite=True)",
        )  # fmt: skip

    def _send(self, directory: Path, address: str) -> None:
        """Sends what was made; then it is the copy of this machine."""
        num_bytes = sum(path.stat().st_size for path in directory.iterdir())
        self._cache.check_room(num_bytes, address)
        datasets.publish(directory, address, self._transfer)
        key = datasets.Manifest((directory / "manifest.json").read_bytes(), {}).directory
        with contextlib.suppress(FileError):  # others use all of the room; who reads it will fetch it
            self._cache.adopt(key, directory, num_bytes, address)
        shutil.rmtree(directory, ignore_errors=True)


def _unlink(links: Sequence[Path]) -> None:
    for link in links:
        link.unlink(missing_ok=True)
