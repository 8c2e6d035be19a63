"""Token ids as text for people: the pieces of a sample, what trains, and which are control tokens or only look so."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from sft_fast.errors import TokenizerError

if TYPE_CHECKING:
    import sft_fast


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """A sample as it is shown. All lists have one entry a token."""

    number: int
    source: str
    """Where the record is: `file:line`."""
    input_ids: list[int]
    label_mask: list[bool]
    """True where a token is trained on."""
    pieces: list[str]
    """The text of each token; together they are the text of the sample."""
    is_control: list[bool]
    """True for control tokens, such as the one that ends a turn."""
    is_spelled: list[bool]
    """True for ordinary tokens whose text spells a control token: text of the record that was made plain."""

    @property
    def num_trained(self) -> int:
        """Tokens that are trained on."""
        return sum(self.label_mask)

    def to_json(self) -> dict[str, Any]:
        """The sample for programs; `control` and `spelled` are positions of tokens."""
        return {
            "sample": self.number,
            "source": self.source,
            "num_tokens": len(self.input_ids),
            "num_trained_tokens": self.num_trained,
            "input_ids": self.input_ids,
            "label_mask": self.label_mask,
            "tokens": self.pieces,
            "control": [at for at, holds in enumerate(self.is_control) if holds],
            "spelled": [at for at, holds in enumerate(self.is_spelled) if holds],
        }


class Reader:
    """A tokenizer, for reading what it wrote.

    Args:
        directory: model directory with `tokenizer.json`.

    Raises:
        TokenizerError: it is not there, or it cannot be read.
    """

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, "tokenizer.json")
        self.tokenizer = load_tokenizer(directory)
        added = self.tokenizer.get_added_tokens_decoder()
        self.control_tokens = {
            token: entry.content for token, entry in added.items() if entry.special or _has_bars(entry.content)
        }
        texts = sorted(self.control_tokens.values(), key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")

    def view(
        self, dataset: sft_fast.Dataset, number: int, source: str | None = None, max_tokens: int | None = None
    ) -> SampleView:
        """Sample `number` of a data set, under the name `source` if that is given, or its first `max_tokens`."""
        sample = dataset[number]
        input_ids = sample.input_ids[:max_tokens].tolist()
        pieces = list(token_texts(self.tokenizer, input_ids))
        is_control = [token in self.control_tokens for token in input_ids]
        return SampleView(
            number=number,
            source=source or sample.source,
            input_ids=input_ids,
            label_mask=sample.label_mask[:max_tokens].tolist(),
            pieces=pieces,
            is_control=is_control,
            is_spelled=self._spelled(pieces, is_control),
        )

    def _spelled(self, pieces: list[str], is_control: list[bool]) -> list[bool]:
        """Which ordinary tokens take part in text that spells a control token."""
        is_spelled = [False] * len(pieces)
        # A control token in between parts the text: one place holds what no control token can spell.
        text = "".join("\0" if control else piece for piece, control in zip(pieces, is_control, strict=True))
        matches = [match.span() for match in self._control_pattern.finditer(text)]
        at, remaining = 0, iter(matches)
        start, end = next(remaining, (len(text), len(text)))
        for number, (piece, control) in enumerate(zip(pieces, is_control, strict=True)):
            piece_end = at + (1 if control else len(piece))
            while end <= at and end < len(text):
                start, end = next(remaining, (len(text), len(text)))
            is_spelled[number] = start < piece_end and at < end and not control
            at = piece_end
        return is_spelled

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each token stands for, where every token stands for its own: in byte-level tokenizers."""
        with open(self._path, encoding="utf-8") as file:
            decoder = json.load(file).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            return None
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for text, token in vocabulary.items():
            # A token with a character that stands for no byte is its own text, as the decoder of the library has it.
            table[token] = (
                bytes(_BYTE_OF_CHARACTER[character] for character in text)
                if all(character in _BYTE_OF_CHARACTER for character in text)
                else text.encode()
            )
        return table


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


def _has_bars(text: str) -> bool:
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a byte as a character: printable ones as themselves, others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
