"""Locks that tell other processes what is used and what is made: `flock`, which ends with the process that holds it.

Who uses a dataset holds a shared lock on its manifest; who makes, replaces or removes `DIR` holds an exclusive one on
`.DIR.lock` beside it, as `rust/core/src/staging.rs` does. This module imports nothing of the project.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

MANIFEST_NAME = "manifest.json"


class Use:
    """A shared lock on a dataset, as long as the object lives: `sft-fast cache prune` leaves the dataset alone.

    The lock is on its manifest; other directories have another file for it, `name`. Where there is none, or the file
    system knows no locks, nothing is locked: `is_held` is false.
    """

    def __init__(self, dataset: str | PathLike[str], name: str = MANIFEST_NAME) -> None:
        self._descriptor: int | None = None
        manifest = Path(dataset, name)
        while True:
            try:
                descriptor = os.open(manifest, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                return  # who opens the dataset will say what is wrong with it
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            except BaseException as error:  # an interrupt, too, must not leave the descriptor open
                os.close(descriptor)
                if isinstance(error, OSError):
                    return
                raise
            if _is_same_file(descriptor, manifest):
                self._descriptor = descriptor
                return
            os.close(descriptor)  # replaced or removed since we opened it

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def is_held(self) -> bool:
        """Whether the lock is held."""
        return self._descriptor is not None


_kept: dict[str, Use] = {}


def keep(dataset: str | PathLike[str]) -> bool:
    """Hold a dataset until this process ends, and note the time as that of its last use.

    Returns:
        False if it is gone by now.
    """
    path = os.path.abspath(dataset)
    use = Use(path)
    manifest = Path(path, MANIFEST_NAME)
    try:
        os.utime(manifest)
    except FileNotFoundError:
        return False
    except OSError:
        pass  # in a cache of somebody else's, the time stays
    if use.is_held:
        _kept[path] = use
    return True


@contextmanager
def exclusive(target: Path) -> Iterator[bool]:
    """The right to make or remove `target`, without waiting: yields false where another process has it.

    The lock file is gone afterwards.

    Raises:
        OSError: the lock file can't be made.
    """
    path = lock_path(target)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                yield False
                return
            if _is_same_file(descriptor, path):
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return
            # The holder before us removed the file that we opened.
        finally:
            os.close(descriptor)


@contextmanager
def unused(dataset: Path, name: str = MANIFEST_NAME) -> Iterator[bool]:
    """Keeps a dataset from being opened as a `Use`; yields false where a process uses it.

    A dataset without a manifest is used by nobody.
    """
    try:
        # Some network file systems lock only what is open for writing.
        descriptor = os.open(dataset / name, os.O_RDWR | os.O_NONBLOCK)
    except (FileNotFoundError, IsADirectoryError):
        yield True
        return
    try:
        yield _try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def lock_path(target: Path) -> Path:
    """The lock file of a directory."""
    return target.with_name(f".{target.name}.lock")


def is_locked(path: Path, *, for_use: bool = False) -> bool:
    """Whether another process holds a lock on a file; no if there is none.

    Args:
        path: a lock file, or the manifest of a dataset.
        for_use: whether a shared lock counts too.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_EX if for_use else fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
