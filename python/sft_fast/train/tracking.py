"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases or stdout, behind one small interface."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

import yaml

from sft_fast.errors import ConfigError


class Tracker(Protocol):
    """Takes metrics by step."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Records values of a step."""

    def finish(self) -> None:
        """Sends what is left, and ends."""


def create_tracker(
    name: str | None, arguments: dict[str, Any], *, exp_name: str, run_directory: Path, resolved_config: str
) -> Tracker:
    """The tracker that `track_with` names.

    Args:
        name: `track_with`.
        arguments: `tracker_kwargs`.
        exp_name: name of the run.
        run_directory: where the tracker may keep files.
        resolved_config: the configuration as YAML, without secrets, for trackers that keep it with the run.

    Raises:
        ConfigError: the tracker's package is not installed, or it does not take the arguments.
    """
    if name is None:
        return _NoTracker()
    if name == "stdout":
        return _StdoutTracker()
    try:
        if name == "tensorboard":
            return _TensorBoardTracker(Path(arguments.get("log_dir") or run_directory / "tensorboard"))
        return _WandbTracker(arguments, exp_name, run_directory, yaml.safe_load(resolved_config))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"track_with: {name} needs the package {error.name}, which is not installed",
            code="missing_package",
            location="track_with",
            hint=f"pip install {error.name}, or track_with: null (metrics.jsonl is written in any case)",
        ) from error


class _NoTracker:
    """Metrics go to the file alone."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class _StdoutTracker:
    """One JSON object a step on stdout."""

    def log(self, values: dict[str, float], step: int) -> None:
        print(json.dumps({"step": step, **values}), flush=True)

    def finish(self) -> None:
        """Nothing."""


class _TensorBoardTracker:
    """Event files by TensorBoard's own writer; torch's would load torch into the driver."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory), flush_secs=10)

    def log(self, values: dict[str, float], step: int) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=f"sft_train/{name}", simple_value=value) for name, value in values.items()]
        )
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def finish(self) -> None:
        self._writer.close()


class _WandbTracker:
    """A run of Weights & Biases. The key comes from the environment or from `wandb login`, as wandb itself reads it."""

    def __init__(
        self, arguments: dict[str, Any], exp_name: str, run_directory: Path, run_config: dict[str, Any]
    ) -> None:
        import wandb

        arguments = dict(arguments)
        api_key = arguments.pop("api_key", None)
        directory = arguments.pop("log_dir", None) or str(run_directory)
        if api_key:
            wandb.login(key=api_key)
        try:
            self._run = wandb.init(**{"name": exp_name, "dir": directory, "config": run_config, **arguments})
        except TypeError as error:
            raise ConfigError(f"wandb.init: {error}", location="tracker_kwargs") from error

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()
