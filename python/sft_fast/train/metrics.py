"""The metrics of a run, and files of them: one JSON object a line, readable while the run goes on."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What is known of a step when all ranks have answered. The names are those in the file and in the trackers."""

    step: int  # steps done with this one
    epoch: float  # epochs done with this step
    loss: float  # mean over the label tokens of the global batch
    val_loss: float | None  # mean over the label tokens of all validation data, after this step
    val_loss_by_source: dict[str, float]  # the same for each source, by `val_loss/<source>`, where there are several
    learning_rate: float
    grad_norm: float  # before clipping
    num_skipped_steps: int  # of the run so far: their loss or gradient was not finite, and they changed nothing
    num_tokens: int  # of the global batch
    num_label_tokens: int  # of the global batch
    pack_fill: float  # share of the rows' `sequence_length` that holds tokens
    tokens_per_second: float  # of all ranks
    tokens_per_second_per_device: float
    mfu: float | None  # share of the devices' peak arithmetic that the model needed, where the peak is known
    imbalance: float  # by how much the slowest forward pass of a rank takes longer than the mean
    step_seconds: float  # of the slowest rank, as all that follow
    data_wait_seconds: float  # waiting for micro-batches
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    peak_memory_bytes: int  # of the rank that needs most

    def values(self) -> dict[str, Any]:
        """Names and values; `val_loss` only where there was a validation, no value that is not finite."""
        values = asdict(self)
        values |= values.pop("val_loss_by_source")
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


class StepFile:
    """Appends lines to a file, each of which has a `step`, and keeps them in order through resumptions."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Opens the file.

        Args:
            path: the file.
            resumed_step: steps that are done already; the lines of later ones are dropped, since they come again. With
                0 the run is new, and a file that is there is put aside under another name.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if resumed_step == 0:
                stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
                path.rename(path.with_name(f"{path.stem}-until-{stamp}{path.suffix}"))
            else:
                _keep_until(path, resumed_step)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Adds a line."""
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, and a last line that a killed run left half written."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            is_kept = line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            is_kept = False
        if is_kept:
            kept.append(line)
    staging = path.with_name(f"{path.name}.staging")
    staging.write_text("".join(kept), encoding="utf-8")
    os.replace(staging, path)
