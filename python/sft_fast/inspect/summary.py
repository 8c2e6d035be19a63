"""A data set in numbers: exact, from the lengths and one pass over all samples, whatever their number."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_fast.inspect.find import rejected_records

if TYPE_CHECKING:
    import sft_fast

# Bars of a histogram at most.
MAX_BINS = 48
# Numbers of ranks for which the balance is told, and packs of a rank in a step.
RANKS = (2, 4, 8, 16, 32, 64)
ROWS_PER_RANK = 4
# Samples, groups of duplicates, files and rejected records of a reason that are listed.
NUM_EXTREMES, NUM_GROUPS, MAX_SOURCES, NUM_REJECTED_EXAMPLES = 15, 10, 200, 4


@dataclass(frozen=True)
class Histogram:
    """Counts of what lies between edges; the last edge belongs to the last bin."""

    edges: list[float]
    counts: list[int]

    def bins(self) -> list[tuple[float, float, int]]:
        """(start, end, count) of each bin."""
        return [
            (start, end, count) for (start, end), count in zip(itertools.pairwise(self.edges), self.counts, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Packs:
    """The packs of the first epoch."""

    sequence_length: int
    seed: int
    num_packs: int
    fill_ratio: float
    num_padding_tokens: int
    fill: Histogram
    """Packs by the part of them that holds tokens, 0 to 1, but for those that are less full than its first edge."""
    num_less_full: int
    balance: list[tuple[int, float, float]]
    """(ranks, how much longer the slowest rank takes than the mean: packs dealt in order, and as planned)."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What came of a file."""

    path: str
    num_records: int
    num_rejected: int
    num_samples: int
    num_tokens: int
    num_label_tokens: int
    max_sample_tokens: int


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Samples with the same token ids."""

    num_groups: int
    num_redundant: int
    """Samples beyond the first of each group."""
    largest: list[tuple[int, list[int]]]
    """(how many, the first of them) of the largest groups."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the page tells of a data set. Sample numbers count from 0."""

    lengths: Histogram
    label_shares: Histogram
    """Samples by the part of their tokens that has a loss, 0 to 1."""
    answers: Histogram
    """Samples by the number of their answers: runs of trained tokens. The last bin has all beyond."""
    packs: Packs | None
    """None where the data set is empty, or has a sample longer than a pack."""
    sources: list[Source]
    """Those with most tokens first."""
    duplicates: Duplicates
    longest: list[int]
    emptiest: list[int]
    """Those with the fewest tokens that have a loss."""
    rejected: dict[str, list[dict[str, Any]]]
    """The first records of each reason, as `rejected.jsonl` has them."""

    def to_json(self) -> dict[str, Any]:
        """The summary for programs."""
        return asdict(self)


def summarize(dataset: sft_fast.Dataset, *, sequence_length: int | None = None, seed: int = 42) -> Summary:
    """Counts everything once; some 60 bytes of memory a sample.

    Args:
        dataset: the data set.
        sequence_length: tokens of a pack; None takes that of the preprocessing.
        seed: of the packs.
    """
    lengths = dataset.lengths
    survey = dataset._core.survey()
    num_labels, num_runs = survey["num_label_tokens"], survey["num_label_runs"]
    shares = num_labels / np.maximum(lengths, 1)
    rejected, rejected_of = _rejected(dataset)
    return Summary(
        lengths=_lengths_histogram(lengths),
        label_shares=_histogram(shares, np.linspace(0, 1, 21)),
        answers=_answers_histogram(num_runs),
        packs=_packs(dataset, sequence_length or dataset.manifest["recipe"]["sequence_length"], seed),
        sources=_sources(dataset, survey, rejected_of),
        duplicates=_duplicates(survey["ids_hashes"]),
        longest=_first_by(-lengths.astype(np.int64)),
        emptiest=_first_by(num_labels.astype(np.int64)),
        rejected=rejected,
    )


def _histogram(values: Any, edges: Any) -> Histogram:
    counts, _ = np.histogram(values, edges)
    return Histogram([float(edge) for edge in edges], counts.tolist())


def _lengths_histogram(lengths: Any) -> Histogram:
    """Bins of a round width that begin at 0."""
    longest = int(lengths.max()) if len(lengths) else 1
    width = next(step * 10**power for power in range(10) for step in (1, 2, 5) if longest < MAX_BINS * step * 10**power)
    edges = np.arange(0, longest + width + 1, width) - 0.5  # whole numbers lie between them
    histogram = _histogram(lengths, edges)
    return Histogram([edge + 0.5 for edge in histogram.edges], histogram.counts)


def _answers_histogram(num_runs: Any) -> Histogram:
    last = min(int(num_runs.max()) if len(num_runs) else 1, 20)
    counts = np.bincount(np.minimum(num_runs, last), minlength=last + 1)
    return Histogram([float(edge) for edge in range(last + 2)], counts.tolist())


def _packs(dataset: sft_fast.Dataset, sequence_length: int, seed: int) -> Packs | None:
    if not len(dataset) or int(dataset.lengths.max()) > sequence_length:
        return None
    packing = dataset.pack(sequence_length=sequence_length, seed=seed)
    row_lengths = packing._core.row_lengths()
    fill = row_lengths / sequence_length
    # The last pack of an epoch has what is left; the plot is of the others.
    lowest = min(float(np.floor(np.quantile(fill, 0.005) * 20) / 20), 0.95)
    balance = []
    for ranks in RANKS:
        if len(packing) >= ranks * ROWS_PER_RANK:
            before, after = packing._core.steps(ranks * ROWS_PER_RANK).imbalance(ranks)
            balance.append((ranks, before, after))
    return Packs(
        sequence_length=sequence_length,
        seed=seed,
        num_packs=len(packing),
        fill_ratio=packing.fill_ratio,
        num_padding_tokens=len(packing) * sequence_length - int(row_lengths.sum(dtype=np.int64)),
        fill=_histogram(fill, np.linspace(lowest, 1, 26)),
        num_less_full=int((fill < lowest).sum()),
        balance=balance,
    )


def _sources(dataset: sft_fast.Dataset, survey: Any, rejected_of: Counter[str]) -> list[Source]:
    files = dataset.manifest["files"]
    numbers, num_files = survey["files"], len(files)
    num_samples = np.bincount(numbers, minlength=num_files)
    num_tokens = np.bincount(numbers, weights=dataset.lengths, minlength=num_files)
    num_labels = np.bincount(numbers, weights=survey["num_label_tokens"], minlength=num_files)
    longest = np.zeros(num_files, np.int64)
    np.maximum.at(longest, numbers, dataset.lengths)
    sources = [
        Source(
            path=file["path"],
            num_records=file["num_records"],
            num_rejected=rejected_of[file["path"]],
            num_samples=int(num_samples[number]),
            num_tokens=int(num_tokens[number]),
            num_label_tokens=int(num_labels[number]),
            max_sample_tokens=int(longest[number]),
        )
        for number, file in enumerate(files)
    ]
    return sorted(sources, key=lambda source: -source.num_tokens)


def _duplicates(hashes: Any) -> Duplicates:
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    repeated = np.flatnonzero(counts > 1)
    largest = repeated[np.lexsort((first[repeated], -counts[repeated]))[:NUM_GROUPS]]
    return Duplicates(
        num_groups=len(repeated),
        num_redundant=int((counts[repeated] - 1).sum()),
        largest=[
            (int(counts[group]), np.flatnonzero(hashes == hashes[first[group]])[:3].tolist()) for group in largest
        ],
    )


def _first_by(keys: Any) -> list[int]:
    """The samples with the lowest keys, in that order; of equal ones the first."""
    numbers = np.arange(len(keys))
    if len(keys) > NUM_EXTREMES:
        bound = np.partition(keys, NUM_EXTREMES)[NUM_EXTREMES]
        numbers = np.concatenate([np.flatnonzero(keys < bound), np.flatnonzero(keys == bound)[:NUM_EXTREMES]])
    chosen: list[int] = numbers[np.lexsort((numbers, keys[numbers]))][:NUM_EXTREMES].tolist()
    return chosen


def _rejected(dataset: sft_fast.Dataset) -> tuple[dict[str, list[dict[str, Any]]], Counter[str]]:
    """The first rejected records of each reason, and how many each file has."""
    examples: dict[str, list[dict[str, Any]]] = {}
    of_file: Counter[str] = Counter()
    for record in rejected_records(dataset):
        of_file[record["path"]] += 1
        known = examples.setdefault(record["reason"], [])
        if len(known) < NUM_REJECTED_EXAMPLES:
            known.append(record)
    return examples, of_file
