"""Samples in a terminal: the text of tokens, the marks of what trains, and nothing that could harm the terminal."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sft_fast.errors import TokenizerError
from sft_fast.inspect.terminal import load_tokenizer, sample_text, token_texts


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    """The tiny byte-level tokenizer."""
    return load_tokenizer(str(tokenizer_dir))


@given(text=st.text(max_size=60))
def test_token_texts_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    """There is one text for each token, and together they are what was tokenised, whatever the script."""
    input_ids = tokenizer.encode(text, add_special_tokens=False).ids

    pieces = list(token_texts(tokenizer, input_ids))

    assert len(pieces) == len(input_ids)
    assert "".join(pieces) == text


def test_bytes_that_are_no_character_are_shown(tokenizer: Tokenizer) -> None:
    """A sample that ends inside a character shows that something is there."""
    input_ids = tokenizer.encode("a漢", add_special_tokens=False).ids[:-1]

    assert "".join(token_texts(tokenizer, input_ids)) == "a" + "�" * (len(input_ids) - 1)


@given(text=st.text(max_size=40), data=st.data())
def test_marks_follow_the_mask(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    """Without colours each run of trained tokens stands between marks; with colours the text has no marks."""
    text = text.replace("⟦", "").replace("⟧", "")
    input_ids = tokenizer.encode(text, add_special_tokens=False).ids
    mask = data.draw(st.lists(st.booleans(), min_size=len(input_ids), max_size=len(input_ids)))
    num_runs = sum(now and not before for before, now in zip([False, *mask], mask, strict=False))

    plain = sample_text(tokenizer, input_ids, mask, in_colour=False).plain
    coloured = sample_text(tokenizer, input_ids, mask, in_colour=True).plain

    assert plain.count("⟦") == plain.count("⟧") == num_runs
    assert plain.replace("⟦", "").replace("⟧", "") == coloured


def test_no_control_character_reaches_the_terminal(tokenizer: Tokenizer) -> None:
    """Escape sequences in a record are shown as pictures, never sent."""
    input_ids = tokenizer.encode("a\x1b[2J\x07\x9bb\r\n", add_special_tokens=False).ids

    shown = sample_text(tokenizer, input_ids, [False] * len(input_ids), in_colour=False).plain

    assert shown == "a␛[2J␇�b␍⏎\n"


def test_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    """A tokenizer that has moved, or that cannot be read, is an error that says how to name another."""
    with pytest.raises(TokenizerError, match="--tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(str(tmp_path))
