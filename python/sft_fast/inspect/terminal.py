"""Samples in a terminal: every token, those that train in colour, and the line of the file that each sample is from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from sft_fast.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    import sft_fast

# Two shades, so that neighbouring tokens can be told apart.
TRAINED = ("black on green", "black on bright_green")
NOT_TRAINED = ("", "dim")
# What stands around the trained part where there are no colours.
OPEN, CLOSE = "⟦", "⟧"

# Records are written by strangers: a control character must not reach the terminal. Each shows as its own picture.
_CONTROL_PICTURES = (
    {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), "�")
)
_CONTROL_PICTURES[ord("\n")] = "⏎\n"


def show_samples(
    dataset: sft_fast.Dataset,
    console: Console,
    *,
    first: int = 0,
    num_samples: int = 3,
    tokenizer: str | None = None,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Prints some samples of a data set.

    Args:
        dataset: the data set.
        console: where to print.
        first: number of the first sample.
        num_samples: how many; fewer where the data set ends.
        tokenizer: directory of the tokenizer. None takes the one that the data set was made with.
        renamed: files of the data set that are to be shown under another name.

    Raises:
        ConfigError: there is no sample `first`.
        TokenizerError: the tokenizer cannot be read.
    """
    if first >= len(dataset):
        raise ConfigError(
            f"there is no sample {first}: the data set has {len(dataset)}, counted from 0", code="out_of_range"
        )
    reader = load_tokenizer(tokenizer or dataset.manifest["tokenizer"])
    for number in range(first, min(first + num_samples, len(dataset))):
        sample = dataset[number]
        mask = sample.label_mask.tolist()
        file, _, line = sample.source.rpartition(":")
        source = f"{(renamed or {}).get(file, file)}:{line}"
        title = Text.assemble((f"sample {number}", "bold"), f"  {source}  {len(mask):,} tokens, {sum(mask):,} trained")
        console.print(title, soft_wrap=True)
        text = sample_text(reader, sample.input_ids.tolist(), mask, in_colour=_has_colours(console))
        # Not wrapped at words, which would swallow spaces: what is shown is what is trained on.
        console.print(text, soft_wrap=True, end="\n" if text.plain.endswith("\n") else "\n\n")


def load_tokenizer(directory: str) -> Tokenizer:
    """Reads the `tokenizer.json` of a model directory.

    Raises:
        TokenizerError: it is not there, or it cannot be read.
    """
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
        raise TokenizerError(
            "the tokenizer of the data set is not here",
            code="missing",
            path=path,
            hint="give its directory: --tokenizer DIR",
        )
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing more precise
        raise TokenizerError(f"cannot read the tokenizer: {error}", code="broken", path=path) from error


def sample_text(tokenizer: Tokenizer, input_ids: Sequence[int], label_mask: Sequence[bool], in_colour: bool) -> Text:
    """A sample as text: trained tokens stand out by colour, or between `⟦` and `⟧`."""
    text = Text()
    was_trained = False
    for number, (piece, is_trained) in enumerate(zip(token_texts(tokenizer, input_ids), [*label_mask], strict=True)):
        shown = piece.translate(_CONTROL_PICTURES)
        if in_colour:
            text.append(shown, style=(TRAINED if is_trained else NOT_TRAINED)[number % 2])
            continue
        if is_trained != was_trained:
            text.append(OPEN if is_trained else CLOSE)
        text.append(shown)
        was_trained = is_trained
    if was_trained:
        text.append(CLOSE)
    return text


def token_texts(tokenizer: Tokenizer, input_ids: Sequence[int]) -> Iterator[str]:
    """The text of each token, special tokens included.

    Where several tokens make one character, the last of them has it; what completes no character is `�`.
    """
    stream = DecodeStream(skip_special_tokens=False)
    num_waiting = 0
    for token in input_ids:
        piece = stream.step(tokenizer, token)
        if piece is None:
            num_waiting += 1
            continue
        yield from [""] * num_waiting
        yield piece
        num_waiting = 0
    yield from ["�"] * num_waiting


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color
