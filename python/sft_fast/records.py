"""Records that are in memory, or come one by one from a generator → a dataset, by the way that files take."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import Any

from sft_fast.data import Report, preprocess
from sft_fast.errors import FileError, InputError, SftFastError

SOURCE = "<records>"
"""What errors, samples and the manifest call records that are in no file: the third one is `<records>:3`."""


def preprocess_records(records: Iterable[dict[str, Any]], output_dir: str | PathLike[str], **options: Any) -> Report:
    """Turn records from memory into a dataset of tokens and label masks.

    The records are those that a JSON Lines file would hold, and become the same bytes. They are taken one by one and
    kept in a file without a name beside `output_dir`, about as large as they are as JSON, which is gone when the work
    is, however it ends. So memory stays bounded, however many a generator yields.

    Args:
        records: Dicts with `messages`, `conversations` or the mapped fields; values are those that JSON has. An
            exception from a generator passes through, and nothing is written.
        output_dir: Directory of the dataset; must be new, empty, or a dataset.
        options: Arguments of `preprocess`: `tokenizer` and `sequence_length` are required.

    Returns:
        Counts and the path.

    Raises:
        InputError: A record is wrong, or JSON can't hold it; `path` is `<records>`, and `line` its number from 1.
        TemplateError, TokenizerError, DatasetError, FileError, ConfigError: as `preprocess` does.

    Examples:
        >>> records = ({"instruction": f"{n} + 1?", "output": f"{n + 1}"} for n in range(100))
        >>> report = sft_fast.preprocess_records(records, "sums", tokenizer="path/to/model", sequence_length=128)
        >>> report.num_samples
        100
        >>> sft_fast.Dataset("sums")[2].source
        '<records>:3'
    """
    with Spool(_existing_parent(output_dir)) as spool:
        spool.write(records)
        try:
            return preprocess(spool, output_dir, **options)
        except SftFastError as error:
            if error.path in (SOURCE, fspath(spool)):
                # A column would count in JSON that the caller never saw.
                error.path, error.column = SOURCE, None
            raise


class Spool(PathLike[str]):
    """Records as JSON Lines in a file that has no name, so that not even a killed process leaves it behind."""

    names = (SOURCE,)

    def __init__(self, directory: Path) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=1 << 20)  # noqa: SIM115  # closed by __exit__
        except OSError as error:
            raise FileError(f"could not keep records here: {error.strerror}", path=str(directory)) from error
        self._directory = directory

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

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Writes one line for each record.

        Raises:
            InputError: JSON can't hold a record.
            FileError: The disk is full, or fails.
        """
        for number, record in enumerate(records, start=1):
            try:
                line = json.dumps(record)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"expected a record that JSON can hold: {error}", code="wrong_type", path=SOURCE, line=number
                ) from error
            self._put(line.encode() + b"\n")
        self._put(b"")

    def _put(self, line: bytes) -> None:
        try:
            self._file.write(line) if line else self._file.flush()
        except OSError as error:
            raise FileError(f"could not keep the records: {error.strerror}", path=str(self._directory)) from error


def _existing_parent(output_dir: str | PathLike[str]) -> Path:
    """The nearest directory above the dataset that is there: on the disk that has to hold the dataset, too."""
    return next(parent for parent in Path(output_dir).absolute().parents if parent.is_dir())
