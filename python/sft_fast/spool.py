"""Records as JSON Lines in a file without a name: how what is in no JSON file reaches the engine, in bounded memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import IO

from sft_fast.errors import FileError

# Hidden, beside the data set that is made of it.
_SHARED = ".sft-fast-records-"
_BUFFER_BYTES = 1 << 20


class Spool(PathLike[str]):
    """A file that has no name, so that not even a killed process leaves it behind; a context manager, and its path.

    Args:
        name: What errors, samples and the manifest call it: its third record is `name:3`.
        directory: Where its bytes are; has to hold about as much as the records have as JSON.
        is_shared: Whether other machines have to see it. Then it has a name, and what a killed process leaves is
            removed by the next one that makes such a file there.
    """

    def __init__(self, name: str, directory: Path, *, is_shared: bool = False) -> None:
        self.name = name
        self._directory = directory
        self._path: Path | None = None
        self._file: IO[bytes]
        try:
            if is_shared:
                self._file, self._path = _shared_file(directory)
            else:
                import tempfile  # a tenth of the start-up, and few inputs need a spool

                self._file = tempfile.TemporaryFile(dir=directory, buffering=_BUFFER_BYTES)  # noqa: SIM115  # by __exit__
        except OSError as error:
            raise FileError(f"could not keep records here: {error.strerror}", path=str(directory)) from error

    def __fspath__(self) -> str:
        if self._path is not None:
            return str(self._path)
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            self._file.close()
        except OSError:
            # What can't be flushed has been said by `write`.
            if error is None:
                raise

    def write(self, lines: Iterable[bytes]) -> None:
        """Writes lines, each with its end.

        Raises:
            FileError: The disk is full, or fails.
        """
        for line in lines:
            self._put(line)
        self._put(b"")

    def _put(self, line: bytes) -> None:
        try:
            self._file.write(line) if line else self._file.flush()
        except OSError as error:
            raise FileError(f"could not keep the records: {error.strerror}", path=str(self._directory)) from error


def _shared_file(directory: Path) -> tuple[IO[bytes], Path]:
    """A file with a name, locked as long as this process lives."""
    import tempfile

    for path in directory.glob(f"{_SHARED}*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a process that lives, this fails
            path.unlink()
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_SHARED, dir=directory)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):  # else another process took it for that of a dead one, before we had the lock
            return os.fdopen(descriptor, "wb", buffering=_BUFFER_BYTES), Path(name)
        os.close(descriptor)


def existing_parent(path: str | PathLike[str]) -> Path:
    """The nearest directory above `path` that is there: on the disk that has to hold what comes to be there, too."""
    return next(parent for parent in Path(path).absolute().parents if parent.is_dir())
