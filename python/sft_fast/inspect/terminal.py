"""Samples in a terminal: every token, those that train in colour, and the line of the file that each sample is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sft_fast.errors import ConfigError
from sft_fast.inspect.tokens import Reader, SampleView

if TYPE_CHECKING:
    import sft_fast
    from sft_fast.inspect.find import SearchResult

# Two shades, so that neighbouring tokens can be told apart.
TRAINED = ("black on green", "black on bright_green")
NOT_TRAINED = ("", "dim")
# Control tokens, and text that only spells one: trained on or not.
CONTROL_STYLE = {True: "bold black on cyan", False: "bold cyan"}
SPELLED_STYLE = {True: "underline black on yellow", False: "underline yellow"}
# What stands around the trained part, and around text that spells a control token, where there are no colours.
OPEN, CLOSE = "⟦", "⟧"
OPEN_SPELLED, CLOSE_SPELLED = "⟪", "⟫"

# Records are written by strangers: a control character must not reach the terminal. Each shows as its own picture.
_CONTROL_PICTURES = (
    {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), "�")
)
# Marks that turn the direction of writing can hide what is there.
_CONTROL_PICTURES |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029], "�")
_PICTURES_ON_ONE_LINE = {**_CONTROL_PICTURES, ord("\n"): "⏎"}
_CONTROL_PICTURES[ord("\n")] = "⏎\n"


def show_samples(
    dataset: sft_fast.Dataset,
    console: Console,
    *,
    numbers: Sequence[int],
    tokenizer: str | None = None,
    renamed: Mapping[str, str] | None = None,
    with_ids: bool = False,
) -> None:
    """Prints samples of a data set, and what the colours or marks mean.

    Args:
        dataset: the data set.
        console: where to print.
        numbers: which samples.
        tokenizer: directory of the tokenizer. None takes the one that the data set was made with.
        renamed: files of the data set that are to be shown under another name.
        with_ids: one token a line, with its place and id.

    Raises:
        ConfigError: there is no such sample.
        TokenizerError: the tokenizer cannot be read.
    """
    check_numbers(numbers, len(dataset), "sample", "data set")
    reader = Reader(tokenizer or dataset.manifest["tokenizer"])
    for number in numbers:
        file, _, line = dataset[number].source.rpartition(":")
        view = reader.view(dataset, number, source=f"{(renamed or {}).get(file, file)}:{line}")
        show_view(view, console, with_ids=with_ids)
    console.print(legend(in_colour=has_colours(console)), soft_wrap=True)


def check_numbers(numbers: Sequence[int], length: int, what: str, whole: str) -> None:
    """Raises a `ConfigError` for a number, counted from 0, that is not there."""
    for number in numbers:
        if not 0 <= number < length:
            message = f"there is no {what} {number}: the {whole} has {length:,}, counted from 0"
            raise ConfigError(message, code="out_of_range")


def show_view(view: SampleView, console: Console, *, with_ids: bool = False) -> None:
    """Prints one sample: a title, and its text or its tokens line by line."""
    numbers = f"  {_one_line(view.source)}  {len(view.input_ids):,} tokens, {view.num_trained:,} trained"
    console.print(Text.assemble((f"sample {view.number}", "bold"), numbers), soft_wrap=True)
    in_colour = has_colours(console)
    text = token_lines(view, in_colour) if with_ids else sample_text(view, in_colour)
    # Not wrapped at words, which would swallow spaces: what is shown is what is trained on.
    console.print(text, soft_wrap=True, end="\n" if text.plain.endswith("\n") else "\n\n")


def sample_text(view: SampleView, in_colour: bool, *, on_one_line: bool = False) -> Text:
    """A sample as text: trained tokens in colour, or between `⟦` and `⟧`; spelled ones between `⟪` and `⟫`."""
    pictures = _PICTURES_ON_ONE_LINE if on_one_line else _CONTROL_PICTURES
    text = Text()
    was_trained = was_spelled = False
    tokens = zip(view.pieces, view.label_mask, view.is_control, view.is_spelled, strict=True)
    for number, (piece, is_trained, is_control, is_spelled) in enumerate(tokens):
        shown = piece.translate(pictures)
        if in_colour:
            text.append(shown, style=_style(number, is_trained, is_control, is_spelled))
            continue
        # The inner marks close before the outer ones, and open after them.
        if was_spelled and (not is_spelled or is_trained != was_trained):
            text.append(CLOSE_SPELLED)
            was_spelled = False
        if is_trained != was_trained:
            text.append(OPEN if is_trained else CLOSE)
        if is_spelled and not was_spelled:
            text.append(OPEN_SPELLED)
        text.append(shown)
        was_trained, was_spelled = is_trained, is_spelled
    text.append(CLOSE_SPELLED * was_spelled + CLOSE * was_trained)
    return text


def token_lines(view: SampleView, in_colour: bool) -> Text:
    """A sample as one token a line: its place from 0, its id, what it is, its text."""
    text = Text()
    tokens = zip(view.input_ids, view.pieces, view.label_mask, view.is_control, view.is_spelled, strict=True)
    for number, (token, piece, is_trained, is_control, is_spelled) in enumerate(tokens):
        kind = "control" if is_control else "spelled" if is_spelled else ""
        text.append(f"{number:>7}  {token:>7}  {'trained' if is_trained else '':7}  {kind:7}  ", style="dim")
        style = _style(0, is_trained, is_control, is_spelled) if in_colour else ""
        text.append(f"{piece.translate(_PICTURES_ON_ONE_LINE)}", style=style)
        text.append("\n")
    return text


def legend(in_colour: bool) -> Text:
    """What the colours or marks mean."""
    names = ("trained on", "control token", "spells a control token, but is ordinary text")
    if not in_colour:
        marks = (f"{OPEN}{names[0]}{CLOSE}", f"{OPEN_SPELLED}{names[2]}{CLOSE_SPELLED}")
        return Text(f"marks: {'  '.join(marks)}")
    styles = (TRAINED[0], CONTROL_STYLE[False], SPELLED_STYLE[False])
    parts = [part for name, style in zip(names, styles, strict=True) for part in ((name, style), "  ")]
    return Text.assemble("colours: ", *parts[:-1])


def show_pack(
    packing: sft_fast.Packing, number: int, sequence_length: int, reader: Reader, console: Console, *, with_ids: bool
) -> None:
    """Prints a pack: how full it is, and its samples in their order.

    Raises:
        ConfigError: there is no such pack.
    """
    check_numbers([number], len(packing), "pack", "epoch")
    samples = packing[number].tolist()
    num_tokens = int(packing.dataset.lengths[samples].sum())
    console.print(
        Text.assemble(
            (f"pack {number}", "bold"),
            f" of {len(packing):,}  {len(samples):,} samples, {num_tokens:,} of {sequence_length:,} tokens, "
            f"{num_tokens / sequence_length:.1%} full; attention stays within each sample",
        ),
        soft_wrap=True,
    )
    for sample in samples:
        show_view(reader.view(packing.dataset, sample), console, with_ids=with_ids)
    console.print(legend(in_colour=has_colours(console)), soft_wrap=True)


def show_search(result: SearchResult, console: Console) -> None:
    """Prints the first hits with what is around them, and the counts of all."""
    marked = {"yes": TRAINED[0], "partly": SPELLED_STYLE[True], "no": "reverse"}
    words = {"yes": "trained", "partly": "trained in part", "no": "not trained"}
    for hit in result.hits:
        title = f"  {_one_line(hit.source)}  token {hit.token:,}, {words[hit.trained]}"
        console.print(Text.assemble((f"sample {hit.sample}", "bold"), title), soft_wrap=True)
        before, text, after = (_one_line(part) for part in (hit.before, hit.text, hit.after))
        marks = ("", "") if has_colours(console) else (">>", "<<")
        line = Text.assemble("    ", (before, "dim"), marks[0], (text, marked[hit.trained]), marks[1], (after, "dim"))
        console.print(line, soft_wrap=True)
    shown = f", the first {len(result.hits):,} shown" if result.num_hits > len(result.hits) else ""
    console.print(
        f"{result.num_hits:,} hits in {result.num_samples_with_hits:,} samples{shown}; searched: the decoded text of "
        f"all {result.num_samples_searched:,} samples, {result.num_tokens_searched:,} tokens, trained on or not",
        soft_wrap=True,
        markup=False,
    )


def has_colours(console: Console) -> bool:
    """Whether colours can say something on a console."""
    return console.color_system is not None and not console.no_color


def _style(number: int, is_trained: bool, is_control: bool, is_spelled: bool) -> str:
    if is_control:
        return CONTROL_STYLE[is_trained]
    if is_spelled:
        return SPELLED_STYLE[is_trained]
    return (TRAINED if is_trained else NOT_TRAINED)[number % 2]


def _one_line(text: str) -> str:
    return text.translate(_PICTURES_ON_ONE_LINE)
