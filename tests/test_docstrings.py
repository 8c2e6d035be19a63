"""The library as documentation: types that are those of the extension, and docstrings whose examples run."""

import doctest
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from sft_fast import errors
from tests.conftest import make_tokenizer_dir

# What a user of the library imports; `sft_fast` itself brings the names of the first five.
MODULES = ["chat_template", "data", "errors", "mixing", "records", "arrow", "stream", "views"]
RECORDS = [
    {"instruction": "What is the capital of France?", "output": "The capital of France is Paris."},
    {"instruction": "Add two and three.", "output": "Two and three are five."},
    {"messages": [{"role": "user", "content": "Write a poem."}, {"role": "assistant", "content": "The sea is wide."}]},
]


def examples_of(module: str) -> list[doctest.DocTest]:
    """The docstrings of a module that have examples."""
    loaded = importlib.import_module(f"sft_fast.{module}")
    found = doctest.DocTestFinder(exclude_empty=True).find(loaded, globs={"sft_fast": sft_fast})
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example gives what stands below it, where `path/to/model`, `data.jsonl` and its dataset `out` are."""
    make_tokenizer_dir(tmp_path / "path" / "to" / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    sft_fast.preprocess("data.jsonl", "out", tokenizer="path/to/model", sequence_length=256)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)

    for test in examples_of(module):
        runner.run(test, out=report.append)

    assert runner.tries > 0
    assert runner.failures == 0, "".join(report)


def test_every_public_name_has_an_example() -> None:
    """A function of `sft_fast`, and a class with its methods, has an example; of the errors the root has one."""
    names = {test.name for module in MODULES for test in examples_of(module)}
    leaves = {name for name, value in vars(errors).items() if inspect.isclass(value)} - {"SftFastError"}
    # Values that are returned, and what a callback is given.
    values = {"Progress", "Report", "Sample", "__version__"}

    for name in set(sft_fast.__all__) - leaves - values:
        owner = f"{getattr(sft_fast, name).__module__}.{name}"
        assert any(found == owner or found.startswith(f"{owner}.") for found in names), f"{name} has no example"


def test_every_public_name_says_what_it_takes() -> None:
    """A public function or method has a docstring, which says what its arguments are, or where that is said."""
    for name in sft_fast.__all__:
        value: Any = getattr(sft_fast, name)
        if not callable(value):
            continue
        assert inspect.getdoc(value), name
        members = inspect.getmembers(value, inspect.isroutine) if inspect.isclass(value) else [(name, value)]
        for member, function in members:
            if member.startswith("_") or not getattr(function, "__module__", "").startswith("sft_fast"):
                continue
            text = inspect.getdoc(function) or ""
            arguments = set(inspect.signature(function).parameters) - {"self", "cls"}
            assert text, f"{name}.{member} has no docstring"
            refers = (
                "`preprocess`" in text or "those of `pack`" in text or "As `batch`" in text or "see `arrow." in text
            )
            missing = [argument for argument in arguments if f"{argument}:" not in text]
            assert refers or not missing or len(arguments) < 2, f"{name}.{member} does not say what {missing} are"


def test_types_of_the_extension_are_those_of_its_stub(tmp_path: Path) -> None:
    """Stubtest (mypy) finds no name, argument or default of the extension that `_core.pyi` has otherwise."""
    # What the stub and its package import says nothing about the extension, and takes most of a minute to read.
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nfollow_imports = skip\n", encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "sft_fast._core", "--concise", "--mypy-config-file", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr
    assert (Path(sft_fast.__file__).parent / "py.typed").is_file()


def test_types_are_seen_by_users(tmp_path: Path) -> None:
    """Code that uses the library is checked by mypy in strict mode, which finds a wrong use and only that."""
    program = (
        "import sft_fast\n"
        "dataset = sft_fast.Dataset('out')\n"
        "ids = dataset[0].input_ids.tolist()\n"
        "template = sft_fast.ChatTemplate.from_pretrained('model')\n"
        "number: int = template.render([])[0]\n"
        "sft_fast.preprocess('a', 'b', tokenizer='c', sequence_length=1, on_error='ignore')\n"
    )
    (tmp_path / "program.py").write_text(program)
    # What the library is built on is not what is looked at, and takes mypy most of a minute to read.
    below = ",".join(f"{name}.*" for name in "torch transformers ray deepspeed fsspec rich hydra omegaconf".split())
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{below}]\nfollow_imports = skip\n")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=mypy.ini", "program.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    lines = [line.split(": ")[0] for line in result.stdout.splitlines() if ": error: " in line]
    assert lines == ["program.py:5", "program.py:6"], result.stdout
