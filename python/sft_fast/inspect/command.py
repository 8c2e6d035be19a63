"""What `sft-fast inspect` does with its options: one question about a data set, answered as text, JSON or a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sft_fast.console import counting
from sft_fast.errors import ConfigError
from sft_fast.inspect.terminal import check_numbers, show_pack, show_samples, show_search
from sft_fast.inspect.tokens import Reader

if TYPE_CHECKING:
    import sft_fast


@dataclass(frozen=True, kw_only=True)
class Question:
    """The options of the command; at most one of `sample`, `pack`, `source`, `search`, `diff` and `html` is given."""

    sample: Sequence[int] = ()
    first: int = 0
    num_samples: int = 3
    pack: int | None = None
    sequence_length: int | None = None
    seed: int = 42
    epoch: int = 0
    source: str | None = None
    search: str | None = None
    diff: str | None = None
    html: str | None = None
    tokenizer: str | None = None
    diff_tokenizer: str | None = None
    with_ids: bool = False
    as_json: bool = False


def answer(dataset: sft_fast.Dataset, question: Question, console: Console) -> None:
    """Prints what is asked for, or writes the page.

    Raises:
        ConfigError: options that exclude each other, or a number that is not there.
        TokenizerError: the tokenizer cannot be read.
        DatasetError: the other data set is damaged.
    """
    names = ("sample", "pack", "source", "search", "diff", "html")
    given = [name for name in names if getattr(question, name) not in (None, ())]
    if len(given) > 1:
        raise ConfigError(f"expected one of --{' and --'.join(given)}, found both", code="usage")
    answers = {"pack": _pack, "source": _source, "search": _search, "diff": _diff, "html": _html}
    answers.get(given[0] if given else "sample", _samples)(dataset, question, console)


def _reader(dataset: sft_fast.Dataset, question: Question) -> Reader:
    return Reader(question.tokenizer or dataset.manifest["tokenizer"])


def _samples(dataset: sft_fast.Dataset, question: Question, console: Console) -> None:
    numbers = question.sample or [
        question.first,
        *range(question.first + 1, min(question.first + question.num_samples, len(dataset))),
    ]
    _show(dataset, numbers, question, console)


def _show(dataset: sft_fast.Dataset, numbers: Sequence[int], question: Question, console: Console, **more: Any) -> None:
    if question.as_json:
        check_numbers(numbers, len(dataset), "sample", "data set")
        reader = _reader(dataset, question)
        _print_json({**more, "samples": [reader.view(dataset, number).to_json() for number in numbers]})
    else:
        show_samples(dataset, console, numbers=numbers, tokenizer=question.tokenizer, with_ids=question.with_ids)


def _pack(dataset: sft_fast.Dataset, question: Question, console: Console) -> None:
    number = question.pack or 0
    sequence_length = question.sequence_length or dataset.manifest["recipe"]["sequence_length"]
    packing = dataset.pack(sequence_length=sequence_length, seed=question.seed, epoch=question.epoch)
    reader = _reader(dataset, question)
    if not question.as_json:
        show_pack(packing, number, sequence_length, reader, console, with_ids=question.with_ids)
        return
    check_numbers([number], len(packing), "pack", "epoch")
    samples = packing[number].tolist()
    _print_json(
        {
            "pack": number,
            "num_packs": len(packing),
            "sequence_length": sequence_length,
            "seed": question.seed,
            "epoch": question.epoch,
            "num_tokens": int(dataset.lengths[samples].sum()),
            "samples": [reader.view(dataset, sample).to_json() for sample in samples],
        }
    )


def _source(dataset: sft_fast.Dataset, question: Question, console: Console) -> None:
    from sft_fast.inspect.find import find_source

    assert question.source is not None
    found = find_source(dataset, question.source)
    if question.as_json:
        _show(dataset, found.samples, question, console, rejected=found.rejected)
        return
    for record in found.rejected:
        place = f"{record['path']}:{record['line']}:{record['column']}"
        location = f" (at {record['location']})" if record.get("location") else ""
        text = f"{place}: this record was left out, {record['reason']}: {record['message']}{location}"
        console.print(text, soft_wrap=True, markup=False)
    if found.samples:
        _show(dataset, found.samples, question, console)


def _search(dataset: sft_fast.Dataset, question: Question, console: Console) -> None:
    from sft_fast.inspect.find import search

    assert question.search is not None
    reader = _reader(dataset, question)
    with counting("searching", len(dataset)) as progress:
        result = search(dataset, reader, question.search, max_hits=question.num_samples, progress=progress)
    if question.as_json:
        _print_json(dataclasses.asdict(result))
    else:
        show_search(result, console)


def _diff(dataset: sft_fast.Dataset, question: Question, console: Console) -> None:
    import sft_fast
    from sft_fast.inspect.diff import compare, show_comparison

    assert question.diff is not None
    other = sft_fast.Dataset(question.diff)
    readers = (
        _reader(dataset, question),
        Reader(question.diff_tokenizer or other.manifest["tokenizer"]),
    )
    result = compare(dataset, other, readers, max_differences=question.num_samples)
    if question.as_json:
        _print_json(result.to_json())
    else:
        show_comparison(result, (dataset.path, other.path), console, with_ids=question.with_ids)


def _html(dataset: sft_fast.Dataset, question: Question, console: Console) -> None:
    from sft_fast.console import count, size
    from sft_fast.inspect.page import write_page

    assert question.html is not None
    written = write_page(
        dataset,
        question.html,
        _reader(dataset, question),
        sequence_length=question.sequence_length,
        seed=question.seed,
    )
    if question.as_json:
        _print_json(dataclasses.asdict(written))
        return
    console.print(
        f"{written.path}: {size(written.num_bytes)}; statistics of all {count(len(dataset))} samples, and "
        f"{count(written.num_samples)} of them to look at, with {count(written.num_packs)} packs (seed {written.seed})",
        soft_wrap=True,
        markup=False,
    )


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))
