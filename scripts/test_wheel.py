"""Installs the wheel into every Python that it is for and this machine has, and works with it there.

Run by `make test-wheel`, which builds the wheel first. Each interpreter gets a virtual environment of its own with the
wheel and its base dependencies, nothing else; there a file becomes a dataset, by the command and from Python. All of
them must make the same bytes. The last interpreter also gets `pip install .`, as from a checkout.

Interpreters are those on PATH, and those that pyenv and uv keep. Which of them are missing is said, and is no failure.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import make_tokenizer_dir  # noqa: E402  # the checkout is no package

MINOR_VERSIONS = (10, 11, 12, 13)
RECORDS = [
    {"instruction": "What is the capital of France?", "output": "The capital of France is Paris."},
    {"messages": [{"role": "user", "content": "Add two and three."}, {"role": "assistant", "content": "Five."}]},
]
# What a user does first from Python; run in the new environment.
PROGRAM = """
import importlib.util, sys, sft_fast
assert importlib.util.find_spec("torch") is None, "the base dependencies bring torch"
dataset = sft_fast.Dataset("out")
packing = dataset.pack(sequence_length=256)
batch = packing.batch(list(range(len(packing))))
assert batch["input_ids"].shape == (len(packing), 256) and (batch["labels"] >= 0).sum() > 0
text, spans = sft_fast.ChatTemplate.from_pretrained("model").render(
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
)
assert text[slice(*spans[0])].startswith("Hello"), text
print(sft_fast.__version__, sys.version.split()[0], len(dataset), dataset.manifest["num_tokens"])
"""


def interpreters() -> Iterator[tuple[int, Path]]:
    """(minor version, executable) of the first Python of each version that really runs."""
    homes = [Path.home() / ".pyenv" / "versions", Path.home() / ".local" / "share" / "uv" / "python"]
    for minor in MINOR_VERSIONS:
        name = f"python3.{minor}"
        on_path = [Path(part) / name for part in os.environ["PATH"].split(os.pathsep)]
        kept = [path for home in homes for path in sorted(home.glob(f"*/bin/{name}"), reverse=True)]
        for path in [*on_path, *kept]:
            # A shim of pyenv is there for each version, and runs for those that are switched on.
            program = ["-c", "import sys, venv, ensurepip; print(sys.version_info[:2])"]
            if path.exists() and _output([path, *program]) == f"(3, {minor})":
                yield minor, path
                break


def check(python: Path, package: Path, scratch: Path) -> str:
    """Installs `package` into a new environment of `python`, works there, and returns the hash of what it made."""
    environment = scratch / "venv"
    _run([python, "-m", "venv", environment])
    _run([environment / "bin" / "pip", "install", "--quiet", package])
    make_tokenizer_dir(scratch / "model")
    (scratch / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    command = environment / "bin" / "sft-fast"
    options = ["--output-dir", "out", "--tokenizer", "model", "--sequence-length", "256"]
    _run([command, "preprocess", "data.jsonl", *options, "--json"], scratch)
    _run([command, "verify", "out"], scratch)
    _run([command, "inspect", "out"], scratch)
    print("   ", _run([environment / "bin" / "python", "-c", PROGRAM], scratch).strip())
    shards = sorted((scratch / "out").glob("shard-*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in shards)).hexdigest()


def main(wheel: Path) -> int:
    """Checks all; 1 if an interpreter fails, if they differ, or if there is none."""
    if "abi3" not in wheel.name or "manylinux" not in wheel.name:
        print(f"expected an abi3 wheel for manylinux, found {wheel.name}")
        return 1
    found = dict(interpreters())
    hashes = {}
    for minor, python in found.items():
        print(f"Python 3.{minor} ({python}): {wheel.name}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            hashes[f"3.{minor}"] = check(python, wheel, Path(scratch))
    if found:
        minor, python = list(found.items())[-1]
        print(f"Python 3.{minor} ({python}): pip install .", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            hashes[f"3.{minor}, from the checkout"] = check(python, ROOT, Path(scratch))
    missing = [f"3.{minor}" for minor in MINOR_VERSIONS if minor not in found]
    print(f"works in Python {', '.join(hashes) or 'none'}; not found here: {', '.join(missing) or 'none'}")
    if len(set(hashes.values())) > 1:
        print(f"expected the same bytes from all of them, found {hashes}")
    return int(len(set(hashes.values())) != 1)


def _output(command: list[Path | str]) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def _run(command: list[Path | str], directory: Path = ROOT) -> str:
    """Output of a command that must succeed; what it said is shown if it does not."""
    # Nothing of the environment that runs this script.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in command], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        print(result.stdout, result.stderr, sep="\n")
        raise SystemExit(f"{' '.join(map(str, command))} ended with {result.returncode}")
    return result.stdout


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]).resolve()))
