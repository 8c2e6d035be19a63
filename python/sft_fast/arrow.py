"""Datasets to Arrow tables and back, for `datasets` and others. Needs pyarrow, which `datasets` brings.

A table has a row for each sample: `input_ids` and `labels` (-100 where a token is not trained on; `labels[t]` belongs
to token t), lists of int32; `source_file` and `source_line`, where the record is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft_fast import _core
from sft_fast.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import datasets
    import pyarrow

    from sft_fast.data import Dataset

IGNORE_INDEX = -100
# Tokens of a chunk of a table, as nearly as whole samples allow: lists of a chunk are counted by 32 bits.
_CHUNK_TOKENS = 1 << 24
# What a record is called that has no file.
_NO_FILE = "arrow"


def to_arrow(dataset: Dataset) -> pyarrow.Table:
    """All samples as a table; the metadata of its schema has the manifest, as JSON under `sft_fast`.

    It takes 8 bytes a token. Nothing is lost: `from_arrow` makes the same samples of it.

    Raises:
        ConfigError: pyarrow is not installed.

    Examples:
        >>> table = sft_fast.Dataset("out").to_arrow()
        >>> table.column_names, table.num_rows
        (['input_ids', 'labels', 'source_file', 'source_line'], 3)
    """
    pa = _pyarrow()
    lists = pa.list_(pa.int32())
    columns = [
        ("input_ids", lists),
        ("labels", lists),
        ("source_file", pa.string()),
        ("source_line", pa.uint32()),
    ]
    schema = pa.schema(columns, metadata={"sft_fast": json.dumps(dataset.manifest)})
    names = pa.array([file["path"] for file in dataset.manifest["files"]], pa.string())
    batches = []
    for start, end in _chunks(dataset.lengths):
        ids, mask, files, lines = dataset._core.samples(start, end)
        offsets = pa.array(np.concatenate([[0], np.cumsum(dataset.lengths[start:end])]).astype(np.int32))
        values = ids.astype(np.int32)
        labels = np.where(mask, values, np.int32(IGNORE_INDEX))
        arrays = [
            pa.ListArray.from_arrays(offsets, values),
            pa.ListArray.from_arrays(offsets, labels),
            names.take(pa.array(files)),
            pa.array(lines),
        ]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema)


def from_arrow(
    table: pyarrow.Table | datasets.Dataset,
    path: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    sequence_length: int | None = None,
    vocab_size: int | None = None,
    pad_token_id: int | None = None,
) -> str:
    """Make a dataset of a table with the columns `input_ids` and `labels`, lists of integers of equal lengths.

    `labels` are the ids of tokens that are trained on, and -100 for all others, unshifted. `source_file` and
    `source_line` may stand beside them; without them a sample leads back to its row, counted from 1. Other columns are
    left aside. If anything fails, nothing is written.

    Args:
        table: A table, or a dataset of the library `datasets`.
        path: Directory of the new dataset; must be new or empty.
        tokenizer: Directory of the model whose tokenizer made the ids.
        sequence_length: Longest sample allowed; by default the longest there is.
        vocab_size: One more than the largest token id allowed; by default that of the dataset that the table was made
            of, if its schema still says so (`datasets` forgets it), and else one more than the largest id there is.
        pad_token_id: The token that fills rows; by default that of that dataset, or 0.

    Returns:
        The path.

    Raises:
        ConfigError: pyarrow is not installed, or the columns are not as described.
        DatasetError: A row can't be a sample: it has no tokens, an id beyond the vocabulary, a label that is neither
            its token nor -100, or nothing to learn; or there is something in `path`.
        FileError: A file can't be written.

    Examples:
        >>> dataset = sft_fast.Dataset("out")
        >>> first = sft_fast.Dataset.from_arrow(dataset.to_arrow().slice(0, 1), "first")
        >>> first[0].input_ids.tolist() == dataset[0].input_ids.tolist()
        True
    """
    pa = _pyarrow()
    if not isinstance(table, pa.Table):
        table = table.with_format("arrow")[:]
    manifest = json.loads((table.schema.metadata or {}).get(b"sft_fast", b"{}"))
    chunks = [_Chunk(batch, row) for batch, row in _numbered(table.select(_columns(table)))]
    ids = [chunk.ids for chunk in chunks if len(chunk.ids)]
    vocab_size = vocab_size or manifest.get("vocab_size") or max((int(part.max()) for part in ids), default=0) + 1
    longest = max((int(np.diff(chunk.offsets).max(initial=0)) for chunk in chunks), default=0)
    files = list(dict.fromkeys(name for chunk in chunks for name in chunk.file_names))
    assembler = _core.Assembler(
        path,
        files,
        sequence_length or max(longest, 2),
        vocab_size,
        manifest.get("pad_token_id", 0) if pad_token_id is None else pad_token_id,
        fspath(tokenizer) if tokenizer is not None else "",
    )
    try:
        for chunk in chunks:
            numbers = np.array([files.index(name) for name in chunk.file_names], np.uint32)
            assembler.push(chunk.offsets, chunk.ids.astype(np.uint32), chunk.mask(), numbers[chunk.files], chunk.lines)
        assembler.finish()
    finally:
        assembler.close()
    return fspath(path)


def _columns(table: pyarrow.Table) -> list[str]:
    missing = [name for name in ("input_ids", "labels") if name not in table.column_names]
    if missing:
        raise ConfigError(f"expected the columns input_ids and labels, found {', '.join(table.column_names) or 'none'}")
    has_source = {"source_file", "source_line"} <= set(table.column_names)
    return ["input_ids", "labels", *(["source_file", "source_line"] if has_source else [])]


def _numbered(table: pyarrow.Table) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """The parts of a table, each with the number of its first row."""
    row = 0
    for batch in table.to_batches():
        yield batch, row
        row += batch.num_rows


class _Chunk:
    """Rows of a table as arrays: `k` samples with `n` tokens."""

    def __init__(self, batch: pyarrow.RecordBatch, first_row: int) -> None:
        self._first_row = first_row
        self.offsets, self.ids = _lists(batch.column("input_ids"), "input_ids")  # int64 [k + 1], [n]
        label_offsets, self._labels = _lists(batch.column("labels"), "labels")
        wrong = np.flatnonzero(self.offsets != label_offsets)
        if len(wrong):
            raise DatasetError(f"expected as many labels as input_ids, found others in row {first_row + wrong[0] - 1}")
        if len(self.ids) and (self.ids.min() < 0 or self.ids.max() >= 2**32 - 1):
            raise DatasetError(f"expected token ids from 0, found {self.ids.min()} to {self.ids.max()}")
        if "source_file" in batch.schema.names:
            sources, lines = batch.column("source_file"), batch.column("source_line")
            if sources.null_count or lines.null_count:
                raise DatasetError(f"expected a source for each row, found null from row {first_row} on")
            sources = sources.dictionary_encode()
            self.file_names: list[str] = [str(name) for name in sources.dictionary.to_pylist()]
            self.files = sources.indices.to_numpy(zero_copy_only=False).astype(np.int64)  # [k]
            self.lines = lines.to_numpy(zero_copy_only=False).astype(np.uint32)  # [k]
        else:
            self.file_names = [_NO_FILE]
            self.files = np.zeros(batch.num_rows, np.int64)
            self.lines = np.arange(first_row + 1, first_row + 1 + batch.num_rows).astype(np.uint32)

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens are trained on, bool [n]."""
        mask: NDArray[np.bool_] = self._labels != IGNORE_INDEX
        wrong = np.flatnonzero(mask & (self._labels != self.ids))
        if len(wrong):
            token = int(wrong[0])
            row = self._first_row + int(np.searchsorted(self.offsets, token, side="right")) - 1
            raise DatasetError(
                f"expected a label to be its token {self.ids[token]} or {IGNORE_INDEX}, "
                f"found {self._labels[token]} in row {row}",
                hint="labels are not shifted: labels[t] belongs to input_ids[t]",
            )
        return mask


def _lists(column: Any, name: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Bounds and values of a column of lists of integers."""
    pa = _pyarrow()
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_integer(kind.value_type):
        raise ConfigError(f"expected {name} to be lists of integers, found {kind}")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise DatasetError(f"expected lists of integers in {name}, found null")
    offsets = column.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], values.to_numpy()


def _chunks(lengths: NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Ranges of samples of about `_CHUNK_TOKENS` tokens."""
    ends = np.cumsum(lengths, dtype=np.uint64)
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + _CHUNK_TOKENS, side="right")))
        yield start, end
        start = end


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Arrow tables need the package pyarrow", code="missing_package", hint="pip install 'sft-fast[arrow]'"
        ) from error
    return pyarrow
