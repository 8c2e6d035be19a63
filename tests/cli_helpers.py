"""What the tests of the command line share: records, and the options that every direct call needs."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Write = Callable[[str, list[Any]], Path]

RECORDS = [
    {"instruction": "What is the capital of France?", "output": "The capital of France is Paris."},
    {"instruction": "Add the numbers.", "input": "two and three", "output": "Two and three are five."},
    {"messages": [{"role": "user", "content": "Write a poem."}, {"role": "assistant", "content": "The sea is wide."}]},
]


def preprocess_arguments(tokenizer_dir: Path, *more: str | Path) -> list[str | Path]:
    """The options of `sft-fast preprocess` that every direct call needs, and more."""
    return ["preprocess", *more, "--output-dir", "out", "--tokenizer", tokenizer_dir, "--sequence-length", "128"]
