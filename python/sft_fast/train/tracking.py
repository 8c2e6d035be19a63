"""Where metrics go besides `metrics.jsonl`: the trackers that people use, behind one small interface.

Each tracker is its own library, which is imported when it is asked for.
"""

from __future__ import annotations

import html
import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

import yaml

from sft_fast.errors import ConfigError

# What to install for a tracker, where it is not called as the tracker is.
_PACKAGES = {"mlflow": "mlflow-skinny"}


class Tracker(Protocol):
    """Takes metrics by step."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Records values of a step."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Records a text of a step."""

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
        run_config = yaml.safe_load(resolved_config)
        if name == "swanlab":
            return _SwanLabTracker(arguments, exp_name, run_directory, run_config)
        if name == "mlflow":
            return _MLflowTracker(arguments, exp_name, run_directory, run_config)
        return _WandbTracker(arguments, exp_name, run_directory, run_config)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"track_with: {name} needs the package {error.name}, which is not installed",
            code="missing_package",
            location="track_with",
            hint=f"pip install {_PACKAGES.get(name, name)}, or track_with: null (metrics.jsonl is written in any case)",
        ) from error


class _NoTracker:
    """Metrics go to the file alone."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Nothing."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class _StdoutTracker:
    """One JSON object a step on stdout."""

    def log(self, values: dict[str, float], step: int) -> None:
        print(json.dumps({"step": step, **values}), flush=True)

    def log_text(self, name: str, text: str, step: int) -> None:
        print(json.dumps({"step": step, name: text}, ensure_ascii=False), flush=True)

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

    def log_text(self, name: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        # Indented, so that it is shown as it is: TensorBoard reads Markdown.
        summary = text_pb(f"sft_train/{name}", "\n".join(f"    {line}" for line in text.splitlines()))
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

    def log_text(self, name: str, text: str, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def finish(self) -> None:
        self._run.finish()


class _SwanLabTracker:
    """A run of SwanLab. The key comes from `swanlab login`, from the environment, or as ROLL's `login_kwargs`."""

    def __init__(
        self, arguments: dict[str, Any], exp_name: str, run_directory: Path, run_config: dict[str, Any]
    ) -> None:
        import swanlab

        arguments = dict(arguments)
        login = dict(arguments.pop("login_kwargs", None) or {})
        if "api_key" in arguments:
            login["api_key"] = arguments.pop("api_key")
        directory = arguments.pop("logdir", None) or arguments.pop("log_dir", None) or str(run_directory / "swanlab")
        if login:
            swanlab.login(**login)
        try:
            self._run = swanlab.init(**{"name": exp_name, "log_dir": str(directory), "config": run_config, **arguments})
        except TypeError as error:
            raise ConfigError(f"swanlab.init: {error}", location="tracker_kwargs") from error

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        self._run.log_text(key=name, data=text, step=step)

    def finish(self) -> None:
        self._run.finish()


class _MLflowTracker:
    """A run of MLflow, at `tracking_uri`, at MLFLOW_TRACKING_URI, or in the directory of the run."""

    def __init__(
        self, arguments: dict[str, Any], exp_name: str, run_directory: Path, run_config: dict[str, Any]
    ) -> None:
        from mlflow import MlflowClient

        arguments = dict(arguments)
        uri = arguments.pop("tracking_uri", None) or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            uri = (run_directory / "mlruns").absolute().as_uri()
        if uri.startswith("file:"):
            # MLflow prefers databases, and takes a directory only when told that one is meant.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        experiment = arguments.pop("experiment_name", None) or arguments.pop("project", None) or "sft-fast"
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self._client.create_experiment(experiment)
        try:
            run = self._client.create_run(experiment_id, **{"run_name": exp_name, **arguments})
        except TypeError as error:
            raise ConfigError(f"mlflow.create_run: {error}", location="tracker_kwargs") from error
        self._run_id = run.info.run_id
        self._client.log_dict(self._run_id, run_config, "config.yaml")

    def log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run_id, metrics=[Metric(name, v, now, step) for name, v in values.items()])

    def log_text(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._run_id, text, f"{name}/{step}.txt")

    def finish(self) -> None:
        self._client.set_terminated(self._run_id)
