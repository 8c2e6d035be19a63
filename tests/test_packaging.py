"""What is installed: one version, a licence, extras for what is optional, and preprocessing without any of them.

That the wheel works in every Python that it is for is shown by `make test-wheel`, which needs those interpreters.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sft_fast

ROOT = Path(__file__).parent.parent
EXTRAS = {
    *(
        "arrow",
        "datasets",
        "demo",
        "dev",
        "docs",
        "gcs",
        "parquet",
        "quantization",
        "ray",
        "report",
        "s3",
        "tracking",
        "train",
    ),
}


def distributions(name: str, seen: set[str]) -> Iterator[importlib.metadata.Distribution]:
    """An installed distribution and all that it requires without any extra."""
    if name.lower() in seen:
        return
    seen.add(name.lower())
    distribution = importlib.metadata.distribution(name)
    yield distribution
    for requirement in map(Requirement, distribution.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield from distributions(requirement.name, seen)


@pytest.fixture(scope="module")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment that has sft-fast and its base dependencies, linked from this one."""
    environment = tmp_path_factory.mktemp("base") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    for distribution in distributions("sft-fast", set()):
        for root in {Path(file).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(root)))
            # The editable install of sft-fast is a `.pth` file, which names the checkout.
            if not (packages / root).exists():
                (packages / root).symlink_to(source)
    return environment / "bin" / "python"


def test_preprocessing_needs_only_the_base_dependencies(base_python: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Where only the base dependencies are installed, a file becomes a dataset that can be inspected and packed."""
    record = {"instruction": "What is the capital of France?", "output": "The capital of France is Paris."}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    options = ["--output-dir", "out", "--tokenizer", str(tokenizer_dir), "--sequence-length", "128"]
    main = "from sft_fast.cli import main; main()"
    pack = "import sft_fast; print(len(sft_fast.Dataset('out').pack(sequence_length=128).batch([0])['input_ids'][0]))"

    outputs = [
        subprocess.run(
            [base_python, "-I", "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        for program, arguments in (
            ("import torch", []),
            (main, ["preprocess", "data.jsonl", *options, "--json"]),
            (main, ["verify", "out"]),
            (main, ["inspect", "out"]),
            (pack, []),
        )
    ]

    assert "No module named 'torch'" in outputs[0].stderr
    assert [output.returncode for output in outputs] == [1, 0, 0, 0, 0], outputs
    assert json.loads(outputs[1].stdout)["num_samples"] == 1
    assert outputs[4].stdout == "128\n"


def test_training_without_its_packages_says_what_to_install(base_python: Path, tokenizer_dir: Path) -> None:
    """Where the extra is missing, `train` ends with the command that installs it."""
    arguments = ["train", "--config-path", str(ROOT / "configs"), "--config-name", "demo", f"pretrain={tokenizer_dir}"]
    arguments.append("track_with=null")  # TensorBoard is of that extra, too
    result = subprocess.run(
        [base_python, "-I", "-c", "from sft_fast.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert "pip install 'sft-fast[train]'" in result.stderr


def test_the_version_is_in_one_place() -> None:
    """The package, its metadata and the extension have the version of the Cargo workspace; no other file names one."""
    version = re.findall(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text("utf-8"), flags=re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text("utf-8").split("[build-system]")[1].split("[tool.")[0]

    assert version == [sft_fast.__version__]
    assert importlib.metadata.version("sft-fast") == sft_fast.__version__
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version\b", project, flags=re.MULTILINE)
    for crate in ("core", "py"):
        assert "version.workspace = true" in (ROOT / "rust" / crate / "Cargo.toml").read_text("utf-8")


def test_licence_and_changelog() -> None:
    """The package has the licence that its metadata names; the changelog has a place for what is new."""
    distribution = importlib.metadata.distribution("sft-fast")
    licence = (ROOT / "LICENSE").read_text("utf-8")

    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in licence
    assert distribution.metadata.get_all("License-File") == ["LICENSE"]
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_extras() -> None:
    """What is optional is an extra; the base dependencies bring nothing that is for training only."""
    distribution = importlib.metadata.distribution("sft-fast")
    names = {one.metadata["Name"].lower() for one in distributions("sft-fast", set())}

    assert set(distribution.metadata.get_all("Provides-Extra") or []) == EXTRAS
    assert "tokenizers" in names
    assert not names & {"torch", "ray", "deepspeed", "transformers", "pyarrow", "wandb", "peft", "mkdocs"}
