"""The code of docs/recipes.md and docs/masks.md, run. That of docs/views.md is run in tests/test_views.py."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data_helpers import plain_samples
from tests.train_helpers import make_model_dir, ray_here

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "recipes.md").read_text(encoding="utf-8")
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the code of the page is given, and what it leaves for the sections below, in a directory of its own."""
    directory = tmp_path_factory.mktemp("recipes")
    before = Path.cwd()
    os.chdir(directory)
    yield {"model_dir": str(make_model_dir(directory / "model")), "storage_dir": str(directory / "storage")}
    os.chdir(before)


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Gives Ctrl-C back what it did before: Ray Train takes it for a training run even when that has ended."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGABRT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(title: str, names: dict[str, Any]) -> None:
    """Runs the code below a title."""
    for block in SECTIONS[title]:
        exec(compile(block, "docs/recipes.md", "exec"), names)


def test_records_from_memory(names: dict[str, Any]) -> None:
    """A generator becomes a dataset with the sources that the page names."""
    run("Records from memory", names)

    assert names["report"].num_samples == len(names["dataset"]) == 200
    assert names["dataset"][2].source == "<records>:3"


def test_parquet_and_datasets(names: dict[str, Any]) -> None:
    """Rows of a Parquet file and of a dataset of `datasets` give the same samples."""
    run("Records from memory", names)
    run("A Parquet file, or a dataset of `datasets`", names)

    opened = names["sft_fast"].Dataset
    assert plain_samples(opened("from_parquet")) == plain_samples(opened("from_datasets"))
    assert len(opened("from_parquet")) == 2


def test_the_chat_template_alone(names: dict[str, Any]) -> None:
    """Texts and ids are those of `apply_chat_template`, as the code itself asserts; each has labels."""
    run("Records from memory", names)
    run("The chat template alone", names)

    assert len(names["texts"]) == len(names["labels"]) == 1000
    assert all(any(label != -100 for label in labels) for labels in names["labels"])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_ray_train(names: dict[str, Any]) -> None:
    """Two workers of a `TorchTrainer` train on their shares of each step, and report one loss that is finite."""
    run("Records from memory", names)
    with ray_here(num_cpus=2):
        run("Ray Train", names)

    metrics = names["result"].metrics
    num_rows = len(names["dataset"].pack(sequence_length=512))
    assert metrics["step"] == -(-num_rows // 8)
    assert 0 < metrics["loss"] < 10
    assert Path(names["result"].checkpoint.path, "model.safetensors").is_file()


def test_templates_and_masks(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The code of the page about masks prints what its comments say."""
    page = (DOCS / "masks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    variables = {"model_dir": names["model_dir"]}

    for block in blocks:
        exec(compile(block, "docs/masks.md", "exec"), variables)

    printed = capsys.readouterr().out.splitlines()
    promised = re.findall(r"^print\(.+\)  # (\[.+\])$", "".join(blocks), flags=re.MULTILINE)
    assert len(blocks) == 5
    assert len(promised) == 2
    assert all(text in printed for text in promised)


def test_every_section_is_run() -> None:
    """No section of the page has code that no test runs."""
    source = Path(__file__).read_text(encoding="utf-8")

    assert len(SECTIONS) == 4
    assert all(f'run("{title}"' in source for title, blocks in SECTIONS.items() if blocks)
