"""Finding samples: by the file and line that they come from, and by a text that is in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sft_fast.errors import ConfigError, DatasetError
from sft_fast.inspect.tokens import Reader, token_texts

if TYPE_CHECKING:
    import sft_fast

# Tokens that are decoded at once: some tens of megabytes of memory, however large the data set.
CHUNK_TOKENS = 1 << 18
# Bytes of text that are shown on each side of a hit.
CONTEXT_BYTES = 60


@dataclass(frozen=True)
class Found:
    """What became of the record on a line: samples, or the reasons why it was left out."""

    samples: list[int]
    rejected: list[dict[str, Any]]
    """Lines of `rejected.jsonl`."""


def find_source(dataset: sft_fast.Dataset, place: str) -> Found:
    """What became of a record.

    Args:
        dataset: the data set.
        place: `FILE:LINE`; of the path of the file its end is enough, if only one file of the data set has it.

    Raises:
        ConfigError: it is no such place, no file of the data set, or no record begins on that line.
    """
    path, _, digits = place.rpartition(":")
    if not path or not digits.isdecimal():
        raise ConfigError(f"expected FILE:LINE, found {place!r}", code="usage")
    line = int(digits)
    number = _file_number(dataset, path)
    survey = dataset._core.survey()
    of_file = survey["files"] == number
    samples = np.flatnonzero(of_file & (survey["lines"] == line)).tolist()
    name = dataset.manifest["files"][number]["path"]
    rejected = [
        record for record in rejected_records(dataset) if record.get("path") == name and record.get("line") == line
    ]
    if not samples and not rejected:
        before = survey["lines"][of_file & (survey["lines"] < line)]
        nearest = f"the last sample before it is from line {before.max()}" if len(before) else "no sample is before it"
        raise ConfigError(
            f"no record begins on line {line}", code="no_record", path=name, hint=f"{nearest}; lines count from 1"
        )
    return Found(samples, rejected)


def rejected_records(dataset: sft_fast.Dataset) -> Iterator[dict[str, Any]]:
    """The records that were left out, one at a time, as `rejected.jsonl` has them.

    Raises:
        DatasetError: the file is missing or damaged.
    """
    path = os.path.join(dataset.directory, "rejected.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise DatasetError(f"damaged list of rejected records: {error}", path=path) from error


def _file_number(dataset: sft_fast.Dataset, path: str) -> int:
    """The file of a data set that a path, or the end of one, names."""
    paths = [file["path"] for file in dataset.manifest["files"]]
    parts = os.path.normpath(path).split(os.sep)
    matches = [number for number, known in enumerate(paths) if known == path] or [
        number
        for number, known in enumerate(paths)
        if os.path.abspath(known) == os.path.abspath(path) or known.split(os.sep)[-len(parts) :] == parts
    ]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(paths[number] for number in (matches or range(len(paths)))[:5])
    more = ", …" if len(matches or paths) > 5 else ""
    what = "is several files" if matches else "is no file"
    raise ConfigError(f"{path} {what} of the data set", code="no_file", hint=f"it has: {names}{more}")


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A place where the text is."""

    sample: int
    source: str
    token: int
    """The token in which it begins, from 0."""
    num_tokens: int
    """Tokens that it touches."""
    trained: Literal["yes", "partly", "no"]
    before: str
    text: str
    after: str


@dataclass(kw_only=True)
class SearchResult:
    """What a search found. `hits` are the first ones; the counts are of all."""

    text: str
    num_hits: int = 0
    num_samples_with_hits: int = 0
    num_samples_searched: int = 0
    num_tokens_searched: int = 0
    hits: list[Hit] = field(default_factory=list)


def search(
    dataset: sft_fast.Dataset,
    reader: Reader,
    text: str,
    *,
    max_hits: int = 10,
    progress: Callable[[int], object] | None = None,
) -> SearchResult:
    """Looks for a text in all samples as they are decoded, trained on or not, over the borders of tokens.

    Memory does not grow with the data set. Hits do not overlap; upper and lower case differ.

    Args:
        dataset: the data set.
        reader: its tokenizer.
        text: what to look for.
        max_hits: hits that are kept to be shown.
        progress: called with the number of samples that are searched.

    Raises:
        ConfigError: the text is empty.
    """
    if not text:
        raise ConfigError("expected a text to look for, found an empty one", code="usage")
    result = SearchResult(text=text)
    needle = text.encode()
    for first, ids, mask, sample_ends in _chunks(dataset):
        if progress is not None:
            progress(first)
        result.num_samples_searched += len(sample_ends)
        result.num_tokens_searched += len(ids)
        pieces = _token_bytes(reader, ids, sample_ends)
        content = b"".join(pieces)
        at = content.find(needle)
        if at < 0:
            continue
        token_ends = np.fromiter(accumulate(map(len, pieces)), np.int64, len(pieces))
        byte_ends = token_ends[sample_ends - 1]
        last_sample = -1
        while at >= 0:
            within = int(np.searchsorted(byte_ends, at, side="right"))
            if at + len(needle) > byte_ends[within]:  # begun in one sample, ended in the next
                at = content.find(needle, at + 1)
                continue
            result.num_hits += 1
            result.num_samples_with_hits += within != last_sample
            last_sample = within
            if len(result.hits) < max_hits:
                start_token = int(np.searchsorted(token_ends, at, side="right"))
                end_token = int(np.searchsorted(token_ends, at + len(needle) - 1, side="right")) + 1
                sample_start = int(sample_ends[within - 1]) if within else 0
                start_byte = max(at - CONTEXT_BYTES, int(byte_ends[within - 1]) if within else 0)
                end_byte = min(at + len(needle) + CONTEXT_BYTES, int(byte_ends[within]))
                trained = mask[start_token:end_token]
                result.hits.append(
                    Hit(
                        sample=first + within,
                        source=dataset[first + within].source,
                        token=start_token - sample_start,
                        num_tokens=end_token - start_token,
                        trained="yes" if trained.all() else "partly" if trained.any() else "no",
                        before=content[start_byte:at].decode(errors="ignore"),
                        text=text,
                        after=content[at + len(needle) : end_byte].decode(errors="ignore"),
                    )
                )
            at = content.find(needle, at + len(needle))
    return result


def _chunks(dataset: sft_fast.Dataset) -> Iterator[tuple[int, Any, Any, Any]]:
    """(first sample, ids, mask, end of each sample in them) of runs of samples, each of about `CHUNK_TOKENS`."""
    ends = dataset.lengths.cumsum(dtype=np.int64)
    start = 0
    while start < len(dataset):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + CHUNK_TOKENS, side="right")))
        ids, mask, _, _ = dataset._core.samples(start, end)
        yield start, ids, mask, ends[start:end] - before
        start = end


def _token_bytes(reader: Reader, ids: Any, sample_ends: Any) -> list[bytes]:
    """The bytes of each token."""
    table = reader.token_bytes
    if table is not None and ids.max() < len(table):
        return list(map(table.__getitem__, ids.tolist()))
    pieces: list[bytes] = []
    for start, end in zip([0, *sample_ends[:-1]], sample_ends, strict=True):
        pieces += [piece.encode() for piece in token_texts(reader.tokenizer, ids[start:end].tolist())]
    return pieces
