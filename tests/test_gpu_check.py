"""The script of `make gpu-check`, as far as a machine without a GPU can run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own that sees no GPU."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    """There is nothing to check: one line and a status of its own, not a success."""
    done = run()
    assert done.returncode == 3
    assert done.stdout.splitlines() == ["gpu-check: torch sees no GPU on this machine; nothing was checked"]


@pytest.mark.slow
def test_its_checks_run() -> None:
    """Each check holds where it runs small on the CPU, so that on a GPU only the GPU can be what fails.

    What compiles, and what starts Ray, has its time in other tests.
    """
    done = run("--device", "cpu", "--skip", "compiled", "--skip", "ranks")
    assert done.returncode == 0, done.stdout + done.stderr
    # DeepSpeed prints lines of its own among ours.
    checked = {line.split(": ")[0] for line in done.stdout.splitlines() if line.startswith("ok ")}
    names = "kernels chunked_loss parity memory quantised masters resume background_save speed"
    assert checked == {f"ok     {name}" for name in names.split()}
    assert done.stdout.splitlines()[-1] == "gpu-check: all holds"
