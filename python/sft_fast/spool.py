"""Records as JSON Lines in a file without a name: how what is in no JSON file reaches the engine, in bounded memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from types import TracebackType

from sft_fast.errors import FileError


class Spool(PathLike[str]):
    """A file that has no name, so that not even a killed process leaves it behind; a context manager, and its path.

    Args:
        name: What errors, samples and the manifest call it: its third record is `name:3`.
        directory: Where its bytes are; has to hold about as much as the records have as JSON.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=1 << 20)  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise FileError(f"could not keep records here: {error.strerror}", path=str(directory)) from error

    def __fspath__(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
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


def existing_parent(path: str | PathLike[str]) -> Path:
    """The nearest directory above `path` that is there: on the disk that has to hold what comes to be there, too."""
    return next(parent for parent in Path(path).absolute().parents if parent.is_dir())
