"""Rows of Arrow tables → records as JSON Lines: Parquet files, and data sets of the library `datasets`.

Rows come in small batches, so that memory is bounded. Tables give every row every field: where a record lacks one, its
row has null. So a field that is null is taken for one that is not there, in a record and in every object inside it, as
TRL does. Only the `content` of a message stays: null is a value there, in answers that call tools.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_fast.errors import ConfigError, FileError, SftFastError

if TYPE_CHECKING:
    import pyarrow

# Rows of a batch: enough that its columns are worth it, and few enough for long records.
BATCH_ROWS = 256
PREFIX = "hf:"
"""What the name of a data set of the library `datasets` begins with, `hf:NAME@CONFIG:SPLIT`."""

Batches = Iterator["pyarrow.RecordBatch | pyarrow.Table"]
# Dates, decimals and their kind become texts.
_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode


def json_lines(batches: Batches) -> Iterator[bytes]:
    """One line for each row."""
    for batch in batches:
        for row in _rows(batch):
            yield row + b"\n"


def parquet_batches(path: str) -> Batches:
    """The rows of a Parquet file.

    Raises:
        FileError: It is damaged, or can't be read; the error says behind which row.
        ConfigError: pyarrow is not installed.
    """
    pa = _pyarrow()
    from pyarrow import parquet

    num_rows = 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            columns = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield batch
                num_rows += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        where = f" behind row {num_rows}" if num_rows else ""
        raise FileError(f"could not read the Parquet file{where}: {_one_line(error)}", path=path) from error


def dataset_batches(name: str) -> Batches:
    """The rows of a data set of the library `datasets`: `hf:NAME`, `hf:NAME:SPLIT`, `hf:NAME@CONFIG:SPLIT`.

    NAME is a directory that `save_to_disk` wrote, or what `load_dataset` takes; SPLIT may be a slice such as
    `train[:10%]`. It may be left out where there is only one.

    Raises:
        FileError: It can't be loaded, or has several splits and none is named.
        ConfigError: `datasets` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(
            "data sets of Hugging Face need the library 'datasets', which is not installed",
            code="missing_package", path=name, hint="pip install 'sft-fast[datasets]'",
        ) from error  # fmt: skip
    place, _, split = name.removeprefix(PREFIX).partition(":")
    place, _, config = place.partition("@")
    try:
        if is_saved_dataset(Path(place)):
            loaded: Any = datasets.load_from_disk(place)
            if isinstance(loaded, dict) and split in loaded:
                loaded = loaded[split]
            elif split:
                found = ", ".join(loaded) if isinstance(loaded, dict) else "a data set without splits"
                raise FileError(f"expected the split '{split}', found {found}", path=name)
        else:
            loaded = datasets.load_dataset(place, config or None, split=split or None)
    except SftFastError:
        raise
    except Exception as error:  # the library raises what its parts raise
        raise FileError(f"could not load the data set: {_one_line(error)}", path=name) from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise FileError(
                f"expected one split, found {', '.join(loaded)}",
                path=name, hint=f"name one: {PREFIX}{name.removeprefix(PREFIX)}:{next(iter(loaded), 'train')}",
            )  # fmt: skip
        loaded = next(iter(loaded.values()))
    kept = [field.name for field in loaded.features.arrow_schema if not _holds_bytes(field.type)]
    return iter(loaded.select_columns(kept).with_format("arrow").iter(BATCH_ROWS))


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this directory."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Parquet files need the library 'pyarrow', which is not installed",
            code="missing_package", hint="pip install 'sft-fast[parquet]'",
        ) from error  # fmt: skip
    return pyarrow


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether a column holds bytes, such as images, for which JSON has no value: it is left aside."""
    types = _pyarrow().types
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return True
    return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def _rows(batch: pyarrow.RecordBatch | pyarrow.Table) -> Iterator[bytes]:
    """The JSON of each row."""
    try:
        for row in batch.to_pylist(maps_as_pydicts="strict"):
            yield _encode(_without_nulls(row)).encode()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            # The bytes that are no text, for the engine to refuse like those of any file.
            yield b'"' + error.object[error.start : error.end] + b'"'
            return
        for number in range(batch.num_rows):
            yield from _rows(batch.slice(number, 1))


def _without_nulls(value: Any) -> Any:
    """The value without fields that are null. What is no number (NaN) is null, too: JSON has no word for it."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(field)
            for key, field in value.items()
            if field is not None or (key == "content" and "role" in value)
        }
    if isinstance(value, list):
        return [_without_nulls(field) for field in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
