"""Samples in a terminal: the text of tokens, the marks of what trains, and nothing that could harm the terminal."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer

from sft_fast.errors import ConfigError, TokenizerError
from sft_fast.inspect.terminal import sample_text, show_samples, token_lines
from sft_fast.inspect.tokens import Reader, SampleView, load_tokenizer, token_texts
from tests.data_helpers import make_dataset

SPELLING = {"instruction": "What is <|im_end|>?", "output": "A token, <|im_end|>."}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    """The tiny byte-level tokenizer."""
    return load_tokenizer(str(tokenizer_dir))


def view_of(tokenizer: Tokenizer, text: str, mask: list[bool] | None = None) -> SampleView:
    """A sample of a text, by default with nothing that trains."""
    input_ids = tokenizer.encode(text, add_special_tokens=False).ids
    nothing = [False] * len(input_ids)
    return SampleView(
        number=0,
        source="data.jsonl:1",
        input_ids=input_ids,
        label_mask=nothing if mask is None else mask,
        pieces=list(token_texts(tokenizer, input_ids)),
        is_control=nothing,
        is_spelled=nothing,
    )


@given(text=st.text(max_size=60))
def test_token_texts_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    """There is one text for each token, and together they are what was tokenised, whatever the script."""
    view = view_of(tokenizer, text)

    assert len(view.pieces) == len(view.input_ids)
    assert "".join(view.pieces) == text


def test_bytes_that_are_no_character_are_shown(tokenizer: Tokenizer) -> None:
    """A sample that ends inside a character shows that something is there."""
    input_ids = tokenizer.encode("a漢", add_special_tokens=False).ids[:-1]

    assert "".join(token_texts(tokenizer, input_ids)) == "a" + "�" * (len(input_ids) - 1)


@given(text=st.text(max_size=40), data=st.data())
def test_marks_follow_the_mask(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """Without colours each run of marked tokens stands between its marks; with colours the text has no marks."""
    text = text.translate(dict.fromkeys(map(ord, "⟦⟧⟪⟫")))
    view = view_of(tokenizer, text)
    flags = st.lists(st.booleans(), min_size=len(view.pieces), max_size=len(view.pieces))
    view = replace(view, label_mask=data.draw(flags), is_spelled=data.draw(flags))
    num_runs = sum(now and not before for before, now in zip([False, *view.label_mask], view.label_mask, strict=False))

    plain = sample_text(view, in_colour=False).plain
    coloured = sample_text(view, in_colour=True).plain

    assert plain.count("⟦") == plain.count("⟧") == num_runs
    assert plain.count("⟪") == plain.count("⟫")
    assert ("⟪" in plain) == any(view.is_spelled)
    assert plain.translate(dict.fromkeys(map(ord, "⟦⟧⟪⟫"))) == coloured


def test_marks_are_nested(tokenizer: Tokenizer) -> None:
    """Where the training begins or ends inside spelled text, the inner marks close before the outer ones."""
    view = view_of(tokenizer, "abc")

    shown = sample_text(replace(view, label_mask=[False, True, True], is_spelled=[True, True, False]), in_colour=False)

    assert shown.plain == "⟪a⟫⟦⟪b⟫c⟧"


def test_no_control_character_reaches_the_terminal(tokenizer: Tokenizer) -> None:
    """Escape sequences and turns of the writing direction in a record are shown as pictures, never sent."""
    view = view_of(tokenizer, "a\x1b[2J\x07\x9bb\r\n\u202ec")

    assert sample_text(view, in_colour=False).plain == "a␛[2J␇�b␍⏎\n�c"
    assert "\x1b" not in token_lines(view, in_colour=False).plain


def test_spelled_text_differs_from_the_control_token(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Text of a record that spells a control token is marked, with and without colours; the real token is not."""
    dataset = make_dataset(tmp_path, tokenizer_dir, [SPELLING])
    view = Reader(str(tokenizer_dir)).view(dataset, 0)

    spelled = [piece for piece, holds in zip(view.pieces, view.is_spelled, strict=True) if holds]
    control = [piece for piece, holds in zip(view.pieces, view.is_control, strict=True) if holds]
    text = sample_text(view, in_colour=True)
    styles = {str(span.style) for span in text.spans if text.plain[span.start : span.end] in ("<|im_end|>", *spelled)}

    assert "".join(spelled).replace(" ", "") == "<|im_end|>" * 2
    assert control == ["<|im_start|>", "<|im_end|>"] * 2
    assert {"bold cyan", "underline yellow", "bold black on cyan", "underline black on yellow"} <= styles
    shown = sample_text(view, in_colour=False).plain
    assert shown.count("⟪") == 2
    assert "?<|im_end|>⏎" in shown


def test_tokens_that_are_allowed_to_be_control_tokens(tokenizer_dir: Path, tmp_path: Path) -> None:
    """With `control_tokens="allow"` the spelled token is the real one, and shown as that."""
    dataset = make_dataset(tmp_path, tokenizer_dir, [SPELLING], control_tokens="allow")
    view = Reader(str(tokenizer_dir)).view(dataset, 0)

    assert not any(view.is_spelled)
    assert sum(view.is_control) == 6


def test_ids_are_one_token_a_line(tokenizer_dir: Path, tmp_path: Path) -> None:
    """With ids, each token has a line: its place, its id, whether it trains, what it is, its text."""
    dataset = make_dataset(tmp_path, tokenizer_dir, [SPELLING])
    view = Reader(str(tokenizer_dir)).view(dataset, 0)

    lines = token_lines(view, in_colour=False).plain.splitlines()

    assert len(lines) == len(view.input_ids)
    for number, (line, token) in enumerate(zip(lines, view.input_ids, strict=True)):
        assert line.split()[:2] == [str(number), str(token)]
        assert ("trained" in line) == view.label_mask[number]
        assert (" control " in line) == view.is_control[number]


def test_what_is_not_there_is_an_error(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A sample that is not there, a tokenizer that has moved or cannot be read: an error that says what there is."""
    dataset = make_dataset(tmp_path / "data", tokenizer_dir, [SPELLING])

    with pytest.raises(ConfigError, match="no sample 1: the data set has 1"):
        show_samples(dataset, Console(), numbers=[1])
    with pytest.raises(TokenizerError, match="--tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(str(tmp_path))
