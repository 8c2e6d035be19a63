"""The commands of the documentation: each is one that the program takes, and each that can run here is run.

A block of commands is one that is fenced as `console`, or indented with a command in it. `<!-- not run: why -->`
before it says that it needs what a test has not; then its commands are only parsed, as are those with placeholders such
as DIR. `<!-- file: NAME -->` before a block of another kind makes it a file. A page is run from top to bottom, in a
directory with a small model at `path/to/model` and, unless the page makes one, a file `data.jsonl`.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from sft_fast.cli import app
from tests.train_helpers import make_model_dir

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = ("sft-fast", "make", "pip", "python", "ray", "cargo", "rustup", "export", "rm", ".venv/bin/pytest", ".ci/run")
# Commands of a user, on pages that give the files they need.
RUN = ["README.md", "start.md", "resuming.md", "scaling.md", "data.md"]


@dataclass(frozen=True)
class Block:
    """Some lines of a page."""

    commands: tuple[str, ...]
    file: str | None
    text: str
    is_run: bool


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of commands and the files of a page, in order."""
    pattern = (
        r"(?:^<!-- (?P<mark>not run|file): (?P<value>.+?) -->\n+)?"
        r"(?:^```(?P<kind>\w*)\n(?P<fenced>.*?)^```$|(?P<indented>(?:^    [^\n]+\n)+))"
    )
    for found in re.finditer(pattern, page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
        text = found["fenced"] if found["fenced"] is not None else re.sub(r"^    ", "", found["indented"], flags=re.M)
        if found["mark"] == "file":
            yield Block((), found["value"], text, False)
            continue
        lines = [line for line in text.splitlines() if line.split(" ")[0] in TOOLS]
        if found["kind"] == "console":
            assert len(lines) == len([line for line in text.splitlines() if line.strip()]), f"{page.name}: {text}"
        if lines and found["kind"] in (None, "console"):
            shown = [line.split("  #")[0] for line in lines]
            is_usage = any(re.search(r"\b(DIR|NAME|CHECKPOINT|FILE)\b|\.\.\.|…|key=value", line) for line in shown)
            yield Block(tuple(lines), None, text, found["mark"] is None and not is_usage)


COMMANDS = [(page.name, command) for page in PAGES for block in blocks(page) for command in block.commands]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_is_one_that_there_is(page: str, command: str) -> None:
    """A command that is shown has the options, targets, files and extras that it names."""
    words = shlex.split(command, comments=True)
    if words[0] == "sft-fast":
        parse(app, words[1:], "sft-fast")
    elif words[0] == "ray":
        from ray.scripts.scripts import cli

        parse(cli, words[1:], "ray")
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "pip":
        assert words[1] == "install"
        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.MULTILINE))
        named = {extra for word in words for extra in re.findall(r"\[(.+)\]", word)}
        assert {extra for names in named for extra in names.split(",")} <= extras
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "cargo":
        cargo = (ROOT / "rust" / "core" / "Cargo.toml").read_text("utf-8")
        if "--bench" in words:
            assert f'name = "{words[words.index("--bench") + 1]}"' in cargo
        if "-p" in words:
            assert f'name = "{words[words.index("-p") + 1]}"' in cargo
    elif words[0] in (".venv/bin/pytest", ".ci/run"):
        assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", ".ci/")))


def parse(command: click.Command, arguments: list[str], name: str) -> None:
    """Lets the command read its arguments, as far as its own options go, without doing anything."""
    if isinstance(command, click.Group):
        assert arguments, f"{name} needs a command"
        inner = command.get_command(click.Context(command), arguments[0])
        assert inner is not None, f"{name} has no command {arguments[0]}"
        parse(inner, arguments[1:], f"{name} {arguments[0]}")
        return
    with contextlib.suppress(click.exceptions.Exit):  # --help, --version
        command.make_context(name, list(arguments))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if page.name in RUN], ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    """The commands of a page, from top to bottom, all end well."""
    make_model_dir(tmp_path / "path" / "to" / "model")
    (tmp_path / "output" / "data").mkdir(parents=True)  # a cache from earlier runs, empty by now
    programs = tmp_path / "programs"
    programs.mkdir()
    main = f"#!{sys.executable}\nfrom sft_fast.cli import main\nmain()\n"
    (programs / "sft-fast").write_text(main)
    (programs / "sft-fast").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    if "file: data.jsonl" not in page.read_text(encoding="utf-8"):
        record = '{"instruction": "What is the capital of France?", "output": "The capital of France is Paris."}\n'
        (tmp_path / "data.jsonl").write_text(record * 8, encoding="utf-8")
    num_run = 0
    for block in blocks(page):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        for command in block.commands if block.is_run else ():
            if command.split(" ")[0] not in ("sft-fast", "rm"):
                continue
            result = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            num_run += 1

    assert num_run > 0


def test_pages_that_show_commands_of_a_user_are_run() -> None:
    """Guard: a page with commands of a user that could run is one of those that are run."""
    can_run = {
        page.name
        for page in PAGES
        for block in blocks(page)
        if block.is_run and any(command.startswith("sft-fast ") for command in block.commands)
    }

    assert can_run == set(RUN)
    assert len(COMMANDS) > 30
