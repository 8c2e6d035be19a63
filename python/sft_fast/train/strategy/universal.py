"""A DeepSpeed checkpoint for another number of ranks, by DeepSpeed's own conversion to its universal format."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sft_fast.errors import TrainError


def convert_checkpoint(source: Path, target: Path) -> None:
    """Rewrites what ranks have saved so that any number of ranks can load it.

    Args:
        source: the cluster's directory in a complete checkpoint.
        target: a new directory, of about the same size.

    Raises:
        TrainError: the conversion failed; the hint is the end of what it said.
    """
    num_processes = str(min(4, len(os.sched_getaffinity(0))))
    command = [
        *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
        *("--input_folder", str(source), "--output_folder", str(target)),
        *("--num_extract_workers", num_processes, "--num_merge_workers", num_processes),
    ]
    # A process of its own: DeepSpeed's import is slow, and the driver has no need of it or of a GPU.
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TrainError(
            "the checkpoint could not be converted for another number of ranks",
            code="checkpoint",
            path=str(source),
            hint="\n".join(done.stderr.strip().splitlines()[-8:]) or None,
        )


def read_universal_weights(source: Path) -> dict[str, Any]:
    """The weights in a checkpoint, whole, by the names of `SFTModel`: float32 tensors, the master weights.

    Args:
        source: the cluster's directory in a complete checkpoint, whatever the ranks that have saved it.

    Raises:
        TrainError: see `convert_checkpoint`.
    """
    import torch

    with tempfile.TemporaryDirectory(dir=source.parent.parent, prefix="export-") as temporary:
        target = Path(temporary, "universal")
        convert_checkpoint(source, target)
        files = {file.parent.name: file for file in (target / "zero").glob("*/fp32.pt")}
        return {name: torch.load(file, map_location="cpu", weights_only=False)["param"] for name, file in files.items()}
