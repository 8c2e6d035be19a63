"""Two data sets of the same records, compared: other templates, tokenizers, policies. Where do ids or masks part?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from sft_fast.inspect.terminal import has_colours, legend, sample_text
from sft_fast.inspect.tokens import Reader, SampleView

if TYPE_CHECKING:
    import sft_fast

# Pairs of samples whose texts are compared; the counts of equal ids and masks are of all.
MAX_EXAMINED = 10_000
# Tokens that are shown before and from the place where two samples part.
TOKENS_BEFORE, TOKENS_AFTER = 6, 18

Kind = Literal["same", "tokens", "mask", "text"]
KINDS: dict[Kind, str] = {
    "text": "other text",
    "mask": "same text, other parts of it trained on",
    "tokens": "same text and mask, other tokens",
    "same": "same text, mask and tokens",
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A record of which the two data sets have made something else."""

    source: str
    kind: Kind
    samples: tuple[int, int]
    tokens: tuple[int, int]
    """Where they part: the token in each, from 0."""
    excerpts: tuple[SampleView, SampleView]
    """The tokens around that place."""


@dataclass(kw_only=True)
class Comparison:
    """What two data sets have in common. Samples belong together by file, line and place among those of the record."""

    num_samples: tuple[int, int]
    num_tokens: tuple[int, int]
    num_label_tokens: tuple[int, int]
    same_tokenizer: bool
    num_only_here: int = 0
    num_only_there: int = 0
    num_matched: int = 0
    num_identical: int = 0
    """Pairs with the same ids and the same mask, of all pairs; 0 where the tokenizers differ."""
    num_examined: int = 0
    """Pairs that are not identical whose texts were compared: all of them, or a random part."""
    num_to_examine: int = 0
    kinds: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """What the examined pairs are."""
    differences: list[Difference] = field(default_factory=list)
    """The first ones."""

    def to_json(self) -> dict[str, Any]:
        """The comparison for programs."""
        values = {key: value for key, value in vars(self).items() if key != "differences"}
        differences = [
            {**asdict(difference), "excerpts": [view.to_json() for view in difference.excerpts]}
            for difference in self.differences
        ]
        return {**values, "differences": differences}


def compare(
    here: sft_fast.Dataset,
    there: sft_fast.Dataset,
    readers: tuple[Reader, Reader],
    *,
    max_differences: int = 3,
    max_examined: int = MAX_EXAMINED,
) -> Comparison:
    """Compares two data sets, sample by sample.

    Files belong together by path, or else by content. Ids and masks are compared by hash in all pairs; texts in those
    that differ, or in `max_examined` of them, chosen by a fixed seed.

    Args:
        here: one data set.
        there: the other one.
        readers: their tokenizers.
        max_differences: differences that are kept to be shown.
        max_examined: pairs whose texts are compared at most.
    """
    datasets = (here, there)
    manifests = (here.manifest, there.manifest)
    same_tokenizer = len({manifest["recipe"]["tokenizer_sha256"] for manifest in manifests}) == 1
    surveys = (here._core.survey(), there._core.survey())
    numbers = _matched(surveys, _files_there(*(manifest["files"] for manifest in manifests)))
    result = Comparison(
        num_samples=(len(here), len(there)),
        num_tokens=(manifests[0]["num_tokens"], manifests[1]["num_tokens"]),
        num_label_tokens=(manifests[0]["num_label_tokens"], manifests[1]["num_label_tokens"]),
        same_tokenizer=same_tokenizer,
        num_only_here=len(here) - len(numbers[0]),
        num_only_there=len(there) - len(numbers[1]),
        num_matched=len(numbers[0]),
    )
    candidates = np.arange(len(numbers[0]))
    if same_tokenizer:  # else equal ids say nothing
        differs = np.zeros(len(candidates), bool)
        for name in ("ids_hashes", "mask_hashes"):
            differs |= surveys[0][name][numbers[0]] != surveys[1][name][numbers[1]]
        candidates = np.flatnonzero(differs)
        result.num_identical = len(numbers[0]) - len(candidates)
    result.num_to_examine = len(candidates)
    if len(candidates) > max_examined:
        candidates = np.sort(np.random.default_rng(0).choice(candidates, max_examined, replace=False))
    result.num_examined = len(candidates)
    for pair in candidates.tolist():
        views = tuple(
            reader.view(dataset, int(of_dataset[pair]))
            for reader, dataset, of_dataset in zip(readers, datasets, numbers, strict=True)
        )
        kind, tokens = _parting(*views)
        result.kinds[kind] += 1
        if kind != "same" and len(result.differences) < max_differences:
            result.differences.append(
                Difference(
                    source=views[0].source,
                    kind=kind,
                    samples=(views[0].number, views[1].number),
                    tokens=tokens,
                    excerpts=(_excerpt(views[0], tokens[0]), _excerpt(views[1], tokens[1])),
                )
            )
    return result


def _files_there(files_here: list[dict[str, Any]], files_there: list[dict[str, Any]]) -> dict[int, int]:
    """The file of the other data set that each file is: of the same path, or else of the same content."""
    pairs: dict[int, int] = {}
    for name in ("path", "blake3"):
        known: dict[str, list[int]] = defaultdict(list)
        for number, file in enumerate(files_there):
            if number not in pairs.values():
                known[file[name]].append(number)
        for number, file in enumerate(files_here):
            if number not in pairs and known[file[name]]:
                pairs[number] = known[file[name]].pop(0)
    return pairs


def _matched(surveys: tuple[Any, Any], files: dict[int, int]) -> tuple[Any, Any]:
    """The numbers of the samples, in each data set, that belong together, in the order of the first."""
    renumbered = np.full(max(files, default=0) + 2, -1, np.int64)
    for number, other in files.items():
        renumbered[number] = other
    here, there = surveys
    file_here = renumbered[np.minimum(here["files"], len(renumbered) - 1)]
    keys_here = np.where(file_here >= 0, file_here << 32 | here["lines"], -1)
    keys_there = there["files"].astype(np.int64) << 32 | there["lines"]
    _, records = np.unique(np.concatenate([keys_here, keys_there]), return_inverse=True)
    ordinals = (_ordinals(keys_here), _ordinals(keys_there))
    num_ordinals = 1 + max((int(part.max()) for part in ordinals if len(part)), default=0)
    places = records * num_ordinals + np.concatenate(ordinals)
    _, of_here, of_there = np.intersect1d(
        np.where(keys_here >= 0, places[: len(keys_here)], -1 - np.arange(len(keys_here))),
        places[len(keys_here) :],
        assume_unique=True,
        return_indices=True,
    )
    order = np.argsort(of_here)
    return of_here[order], of_there[order]


def _ordinals(keys: Any) -> Any:
    """How many equal keys stand before each: a record may have several samples."""
    order = np.argsort(keys, kind="stable")
    places = np.arange(len(keys))
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    ordinals = np.empty(len(keys), np.int64)
    ordinals[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return ordinals


def _parting(here: SampleView, there: SampleView) -> tuple[Kind, tuple[int, int]]:
    """What two samples have in common, and the token in each where they part."""
    texts = [np.frombuffer("".join(view.pieces).encode("utf-32-le"), np.uint32) for view in (here, there)]
    at = _first_difference(*texts)
    if at is not None:
        return "text", (_token_at(here, at), _token_at(there, at))
    masks = [np.repeat(view.label_mask, [len(piece) for piece in view.pieces]) for view in (here, there)]
    at = _first_difference(*masks)
    if at is not None:
        return "mask", (_token_at(here, at), _token_at(there, at))
    tokens = zip(here.pieces, here.is_control, strict=True), zip(there.pieces, there.is_control, strict=True)
    for number, (token, other) in enumerate(zip(*tokens, strict=False)):
        if token != other:
            return "tokens", (number, number)
    if len(here.pieces) != len(there.pieces):
        number = min(len(here.pieces), len(there.pieces))
        return "tokens", (number, number)
    return "same", (0, 0)


def _first_difference(here: Any, there: Any) -> int | None:
    length = min(len(here), len(there))
    different = np.flatnonzero(here[:length] != there[:length])
    if len(different):
        return int(different[0])
    return None if len(here) == len(there) else length


def _token_at(view: SampleView, character: int) -> int:
    """The token that has a character; the number of tokens at the end of the text."""
    ends = np.cumsum([len(piece) for piece in view.pieces])
    return int(np.searchsorted(ends, character, side="right"))


def _excerpt(view: SampleView, token: int) -> SampleView:
    part = slice(max(token - TOKENS_BEFORE, 0), token + TOKENS_AFTER)
    return SampleView(
        number=view.number,
        source=view.source,
        input_ids=view.input_ids[part],
        label_mask=view.label_mask[part],
        pieces=view.pieces[part],
        is_control=view.is_control[part],
        is_spelled=view.is_spelled[part],
    )


def show_comparison(result: Comparison, names: tuple[str, str], console: Console, *, with_ids: bool) -> None:
    """Prints the first differences, and the counts of all."""
    from sft_fast.console import count, two_columns

    in_colour = has_colours(console)
    for difference in result.differences:
        place = (
            f"  {KINDS[difference.kind]}, from token {difference.tokens[0]:,} here and {difference.tokens[1]:,} there"
        )
        console.print(Text.assemble((difference.source, "bold"), place), soft_wrap=True)
        for name, view, token in zip(("here ", "there"), difference.excerpts, difference.tokens, strict=True):
            line = Text.assemble((f"  {name} ", "dim"), "…" if token > TOKENS_BEFORE else "")
            line.append_text(sample_text(view, in_colour, on_one_line=True) if view.pieces else Text("(its end)"))
            console.print(line, soft_wrap=True)
            if with_ids:
                console.print(f"        {' '.join(map(str, view.input_ids))}", soft_wrap=True, style="dim")
    if result.differences:
        console.print(legend(in_colour), soft_wrap=True)
    examined = f"of {count(result.num_examined)} pairs that are not identical"
    if not result.same_tokenizer:
        examined = f"of {count(result.num_examined)} pairs (the tokenizers differ)"
    if result.num_examined < result.num_to_examine:
        examined += f", a random part of {count(result.num_to_examine)}"
    rows = [
        ("here", names[0]),
        ("there", names[1]),
        ("samples", " / ".join(map(count, result.num_samples))),
        ("tokens", " / ".join(map(count, result.num_tokens))),
        ("label tokens", " / ".join(map(count, result.num_label_tokens))),
        ("only here / only there", f"{count(result.num_only_here)} / {count(result.num_only_there)}"),
        ("of the same record", count(result.num_matched)),
    ]
    if result.same_tokenizer:
        rows.append(("identical", f"{count(result.num_identical)}, ids and mask"))
    rows.append(("compared", examined))
    rows += [(f"  {KINDS[kind]}", count(number)) for kind, number in result.kinds.items() if number]
    console.print(two_columns("comparison", rows))
    if not result.num_matched:
        console.print("nothing to compare: no file of one has the path or the content of a file of the other")
