"""`sft-fast inspect` as a command: its answers as text, in colour, and as JSON."""

import json
from pathlib import Path

import pytest

from tests.cli_helpers import RECORDS, Run, Write, preprocess_arguments


def test_inspect_marks_what_trains(run_cli: Run, tokenizer_dir: Path, write_jsonl: Write) -> None:
    """`inspect` prints samples with their source, and the trained part between marks where there are no colours."""
    write_jsonl("data.jsonl", RECORDS)
    run_cli(*preprocess_arguments(tokenizer_dir, "data.jsonl"))

    result = run_cli("inspect", "out", "--first", "2", "--num-samples", "5")

    assert result.returncode == 0, result.stderr
    assert "data.jsonl:3" in result.stdout
    assert (
        "<|im_start|>user⏎\nWrite a poem.<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦The sea is wide.<|im_end|>⟧"
        in result.stdout
    )


@pytest.fixture
def two_datasets(run_cli: Run, tokenizer_dir: Path, write_jsonl: Write) -> None:
    """Data sets `out` and `other` of the same records, two of which are left out, by two policies."""
    talk = [{"role": role, "content": "two <|im_end|>"} for role in ("user", "assistant") * 2]
    write_jsonl("data.jsonl", [*RECORDS, '{"instruction": 3}', {"messages": talk}])
    run_cli(*preprocess_arguments(tokenizer_dir, "data.jsonl", "--on-error", "skip"))
    arguments = preprocess_arguments(tokenizer_dir, "data.jsonl", "--on-error", "skip", "--train-on", "last_answer")
    run_cli(*arguments, "--output-dir", "other")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--sample", "1", "-s", "3"], ["sample 1", "sample 3", "⟦two ⟪<|im_end|>⟫<|im_end|>⟧", "marks: ⟦trained on⟧"]),
        (["--pack", "0", "--sequence-length", "512"], ["pack 0 of 1  4 samples", "% full", "sample 3"]),
        (["--sample", "0", "--ids"], ["    0  ", "trained  control  <|im_end|>"]),
        (["--source", "data.jsonl:5"], ["sample 3", "data.jsonl:5"]),
        (["--source", "data.jsonl:4"], ["data.jsonl:4:17: this record was left out, wrong_type"]),
        (["--search", "capital of"], [">>capital of<<", "2 hits in 1 samples", "all 4 samples", "trained on or not"]),
        (["--search", "capital of", "-n", "1"], ["2 hits in 1 samples, the first 1 shown"]),
        (["--diff", "other"], ["data.jsonl:5", "other parts of it trained on", "identical", "3, ids and mask"]),
        (["--html", "page.html"], ["page.html: ", "statistics of all 4 samples", "4 of them", "2 packs (seed 42)"]),
    ],
)
def test_inspect_answers(run_cli: Run, two_datasets: None, arguments: list[str], parts: list[str]) -> None:
    """`inspect` shows a sample, a pack, a line, a search and a comparison as plain text where there is no terminal."""
    result = run_cli("inspect", "out", *arguments)

    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    for part in parts:
        assert part in result.stdout


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ([], {"samples"}),
        (["--pack", "0"], {"pack", "num_packs", "sequence_length", "seed", "epoch", "num_tokens", "samples"}),
        (["--source", "data.jsonl:4"], {"rejected", "samples"}),
        (["--search", "the"], {"text", "num_hits", "num_samples_with_hits", "num_samples_searched"}),
        (["--diff", "other"], {"num_matched", "num_identical", "kinds", "differences", "same_tokenizer"}),
        (["--html", "page.html"], {"path", "num_bytes", "num_samples", "num_packs", "seed"}),
    ],
)
def test_inspect_as_json(run_cli: Run, two_datasets: None, arguments: list[str], keys: set[str]) -> None:
    """With `--json` each answer of `inspect` is one JSON object, with the keys of docs/inspect.md."""
    result = run_cli("inspect", "out", *arguments, "--json")

    assert result.returncode == 0, result.stderr
    assert keys <= set(json.loads(result.stdout))


def test_inspect_in_a_terminal_has_colours(run_cli: Run, two_datasets: None) -> None:
    """Where there are colours, trained tokens have one and no marks; `NO_COLOR` brings the marks back."""
    coloured = run_cli("inspect", "out", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="").stdout
    plain = run_cli("inspect", "out", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1").stdout

    assert "\x1b[30;42m" in coloured
    assert "⟦" not in coloured
    assert "⟦" in plain
    assert "42m" not in plain
