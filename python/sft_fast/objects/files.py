"""Input files in object storage: what an address names, and copies of them on this machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sft_fast.errors import FileError
from sft_fast.objects.cache import Held, ObjectCache
from sft_fast.objects.fetch import Wanted, fetch
from sft_fast.objects.store import Object, Store
from sft_fast.objects.transfer import Transfer

_PATTERN = re.compile(r"[*?\[]")
_FILE_NAME = "data"
# Files that are looked up and fetched at once; the requests of all of them share the connections.
_NUM_FILES = 8


def named(address: str, transfer: Transfer) -> tuple[list[str], list[str], list[str]]:
    """What an address names: (files, files of a directory, directories in it), each in alphabetical order.

    Raises:
        FileError: Nothing is there.
    """
    store = Store(address, transfer)
    if store.find(address) is not None:
        return [address], [], []
    if _PATTERN.search(address):
        found = store.glob(address)
        if found:
            return found, [], []
    else:
        objects, directories = store.members(address)
        if objects or directories:
            return [], [one.address for one in objects], directories
    raise FileError("expected an object, a directory or a glob that matches one, found nothing", path=address)


def fetch_files(addresses: Sequence[str], transfer: Transfer) -> list[tuple[Path, Held]]:
    """Copies of objects in the cache of this machine, each with what keeps it there.

    Raises:
        FileError: One is not there, can't be had, changed meanwhile, or does not fit beside the others.
    """
    if not addresses:
        return []
    cache = ObjectCache.of_environment()
    with ThreadPoolExecutor(_NUM_FILES, thread_name_prefix="files") as pool:
        try:
            return list(pool.map(lambda address: _fetch_file(address, cache, transfer), addresses))
        except BaseException:
            transfer.stop()  # the other threads need not go on to the end of their files
            raise


def _fetch_file(address: str, cache: ObjectCache, transfer: Transfer) -> tuple[Path, Held]:
    store = Store(address, transfer)
    one = _found(store, address)

    def fill(directory: Path) -> None:
        is_known = one.md5 is not None and store.has_md5(address)
        wanted = Wanted(
            address=address, name=_FILE_NAME, num_bytes=one.num_bytes,
            algorithm="md5" if is_known else None, checksum=one.md5 if is_known else None,
        )  # fmt: skip
        try:
            fetch([wanted], directory, store, transfer)
        except (FileError, FileNotFoundError):
            _check_unchanged(store, one)  # which is then the reason
            raise
        _check_unchanged(store, one)

    key = hashlib.sha256(f"{one.address}\n{one.num_bytes}\n{one.version}".encode()).hexdigest()[:32]
    held = cache.get(key, one.num_bytes, address, fill)
    if held.was_there:
        transfer.count(cached=one.num_bytes)
    return held.path / _FILE_NAME, held


def _found(store: Store, address: str) -> Object:
    found = store.find(address)
    if found is None:
        raise FileError("expected an object, found none", path=address)
    return found


def _check_unchanged(store: Store, before: Object) -> None:
    after = _found(store, before.address)
    if (after.num_bytes, after.version) != (before.num_bytes, before.version):
        raise FileError(
            f"changed while it was read: had {before.num_bytes:,} bytes, and now has {after.num_bytes:,} "
            f"({before.version}; {after.version})",
            code="changed", path=before.address, hint="start again when nobody writes to it",
        )  # fmt: skip
