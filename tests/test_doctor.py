"""`sft-fast doctor`: what it says of a machine, and what it makes of one that lacks something."""

import fcntl
import importlib.metadata
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_fast import doctor
from sft_fast.doctor import Check, examine

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def by_name(checks: list[Check]) -> dict[str, Check]:
    """The checks by what they looked at."""
    return {check.name: check for check in checks}


def test_command_says_the_same_to_programs(run_cli: Run, tmp_path: Path) -> None:
    """The command prints every check as a line, and with `--json` as an object; it leaves nothing in the cache."""
    text = run_cli("doctor", "some/cache")
    printed = json.loads(run_cli("doctor", "some/cache", "--json").stdout)

    assert (text.returncode, printed["ok"]) == (0, True), text.stdout
    assert {check["name"] for check in printed["checks"]} > {"engine", "cores", "memory", "torch", "file locks", "free"}
    for check in printed["checks"]:
        assert check["name"] in text.stdout
    assert list(tmp_path.iterdir()) == []


def test_processor_is_that_of_the_system(tmp_path: Path) -> None:
    """Each instruction set is there if the system names it, and the engine is the best that they allow."""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert flags is not None
    names = {"lzcnt": "abm", "neon": "asimd"}
    features = dict(doctor._core.cpu_features())

    assert {name: names.get(name, name) in flags[1].split() for name in features} == features
    level = by_name(examine(str(tmp_path)))["engine"].value
    best = {"avx512": features.get("avx512bw"), "avx2": features.get("avx2"), "neon": features.get("neon")}
    assert level == next((name for name, is_there in best.items() if is_there), "plain")


@pytest.mark.parametrize(("for_training", "state"), [(False, "missing"), (True, "problem")])
def test_missing_package_comes_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, for_training: bool, state: str
) -> None:
    """A package of an extra that is missing or too old is named with the command that installs it."""
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "torch" else known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = by_name(examine(str(tmp_path), for_training=for_training))

    assert (checks["deepspeed"].value, checks["deepspeed"].state) == ("not installed", state)
    assert checks["torch"].value.startswith("1.0, older than 2.")
    assert {checks[name].state for name in ("deepspeed", "torch")} == {state}
    assert all("pip install 'sft-fast[train]'" in (checks[name].hint or "") for name in ("deepspeed", "torch"))
    assert checks["numpy"].state == "ok"


def test_locks_that_keep_nobody_out_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose locks succeed for everybody, or fail for everybody, has none."""
    assert by_name(examine(str(tmp_path)))["file locks"].state == "ok"

    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert by_name(examine(str(tmp_path)))["file locks"].state == "problem"

    def refuse(*_: object) -> None:
        raise OSError(38, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert by_name(examine(str(tmp_path)))["file locks"].state == "problem"
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written_is_status_1(run_cli: Run) -> None:
    """Where data sets cannot be kept, the command says so and ends with 1."""
    result = run_cli("doctor", "/proc/self/nowhere")

    assert result.returncode == 1
    assert "cannot write" in result.stdout
    assert "do not work" in result.stdout


def test_gpus_are_those_of_the_driver(run_cli: Run, tmp_path: Path) -> None:
    """GPUs are named as the driver names them; an answer that is none, or a failure, is no GPU."""
    program = tmp_path / "nvidia-smi"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for script, value in [
        ("echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 570.1'", "NVIDIA H100 80GB HBM3, 81559 MiB, driver 570.1"),
        ("echo 'No devices were found'", "names none"),
        ("exit 9", "names none"),
    ]:
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)

        assert value in run_cli("doctor", "cache", **environment).stdout


def test_torch_without_cuda_beside_a_gpu_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch for the CPU, on a machine with a GPU, would train on the CPU: it is said before."""
    monkeypatch.setattr(doctor, "_nvidia_gpus", lambda: ["NVIDIA H100"])
    monkeypatch.setattr(doctor, "_torch_cuda", lambda: "CPU only")

    assert by_name(examine(str(tmp_path)))["torch is built for"].state == "problem"


def test_small_shared_memory_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory as small as a container has it is noted, with what to do."""
    monkeypatch.setattr(doctor, "MIN_SHARED_MEMORY_BYTES", 1 << 62)

    check = by_name(examine(str(tmp_path)))["shared memory"]

    assert check.state == "note"
    assert "--shm-size" in (check.hint or "")
