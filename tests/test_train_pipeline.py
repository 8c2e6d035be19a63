"""Whole runs on one rank in this process: what they leave, how they stop, and how they go on."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sft_fast import ConfigError, Dataset, TrainError, ensure_dataset
from sft_fast.config import DataArguments, SFTConfig, ValidationConfig, load_config, resolved_yaml
from sft_fast.train import checkpoint, loop
from sft_fast.train import pipeline as pipelines
from sft_fast.train.checkpoint import TrainState, find_checkpoints
from sft_fast.train.metrics import StepFile, StepMetrics
from sft_fast.train.pipeline import SFTPipeline
from sft_fast.train.plan import BatchArithmetic, train_stream
from sft_fast.train.tracking import create_tracker
from tests.train_helpers import Workspace, broken_workspace, dataset_of, plain_loop, write_records

METRICS_PAGE = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")

# What differs between two runs that do the same.
TIMES = {
    *("step_seconds", "data_wait_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"),
    *("tokens_per_second", "tokens_per_second_per_device", "mfu", "imbalance", "peak_memory_bytes"),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny model and records."""
    return Workspace.create(tmp_path_factory.mktemp("pipeline"))


def config_in(workspace: Workspace, directory: Path, **changes: Any) -> SFTConfig:
    """A run that leaves everything below a directory."""
    return workspace.config(output_dir=str(directory / "out"), logging_dir=str(directory / "logs"), **changes)


def run(config: SFTConfig) -> list[dict[str, Any]]:
    """Runs, and gives the lines of the metrics file without what is never the same."""
    SFTPipeline(config, use_ray=False).run()
    return metrics_of(config)


def metrics_of(config: SFTConfig) -> list[dict[str, Any]]:
    """The lines of the metrics file without what is never the same."""
    lines = (Path(config.logging_dir) / config.exp_name / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def all_metrics_of(config: SFTConfig) -> list[dict[str, Any]]:
    """The lines of the metrics file."""
    lines = (Path(config.logging_dir) / config.exp_name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class TrainStopper:
    """A run that gets SIGTERM when a step has been recorded."""

    def __init__(self, config: SFTConfig, step: int) -> None:
        self._config, self._step = config, step

    def run(self) -> None:
        """Runs until then."""
        with pytest.MonkeyPatch.context() as patch:
            write = StepFile.write

            def write_and_signal(file: StepFile, metrics: dict[str, Any]) -> None:
                write(file, metrics)
                if metrics["step"] == self._step:
                    os.kill(os.getpid(), signal.SIGTERM)

            patch.setattr(StepFile, "write", write_and_signal)
            run(self._config)


def test_a_run_leaves_what_it_promises(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Metrics by the documented names, validation and checkpoints when due and at the end, log, model, arithmetic."""
    config = config_in(
        workspace,
        tmp_path,
        validation=True,
        eval_steps=2,
        save_steps=3,
        max_ckpt_to_keep=2,
        training={"max_steps": 7},
        export_dir=str(tmp_path / "model"),
    )
    metrics = run(config)
    num_steps, num_steps_per_epoch = 7, train_stream(config, dataset_of(config)).num_steps_per_epoch
    directory = Path(config.logging_dir) / "sft"

    assert [line["step"] for line in metrics] == list(range(1, num_steps + 1))
    assert [line["step"] for line in metrics if "val_loss" in line] == [2, 4, 6, 7]
    fields = set(StepMetrics.__dataclass_fields__) - {"val_loss_by_source"}
    assert {field for line in metrics for field in line} | TIMES == fields
    assert metrics[-1]["epoch"] == num_steps / num_steps_per_epoch
    for line, (loss, norm) in zip(metrics, plain_loop(config), strict=True):
        assert (line["loss"], line["grad_norm"]) == pytest.approx((loss, norm), rel=2e-5)
    assert [checkpoint.state.step for checkpoint in find_checkpoints(config.output_dir)] == [6, 7]
    best = min(line["val_loss"] for line in metrics if "val_loss" in line)
    assert find_checkpoints(config.output_dir)[-1].state.best_val_loss == best
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert f"step {num_steps}/{num_steps}" in (directory / "train.log").read_text()
    assert "2 packs a micro-batch x 2 micro-batches x 1 ranks = 4 packs" in " ".join(capsys.readouterr().out.split())


def test_every_metric_is_in_the_table(workspace: Workspace, tmp_path: Path) -> None:
    """The table in the documentation has the names that a run writes, and no others; MFU only where a peak is known."""
    table = re.findall(r"^\| `([\w/<>]+)` \|", METRICS_PAGE.split("## What to look at")[0], flags=re.MULTILINE)
    config = config_in(workspace, tmp_path / "a", training={"max_steps": 2}, device_peak_tflops=0.5)
    run(with_sources(config, tmp_path))
    without = config_in(workspace, tmp_path / "b", training={"max_steps": 1})
    run(without)

    names = {re.sub(r"^val_loss/.*", "val_loss/<source>", name) for line in all_metrics_of(config) for name in line}
    assert names == set(table)
    assert "mfu" not in all_metrics_of(without)[0]


def test_metrics_agree_with_one_another(workspace: Workspace, tmp_path: Path) -> None:
    """Parts of a step are no longer than the step, shares are shares, and rates are numbers over seconds."""
    config = config_in(workspace, tmp_path, training={"max_steps": 3}, device_peak_tflops=0.5)
    run(config)
    for line in all_metrics_of(config):
        parts = [line[f"{part}_seconds"] for part in ("data_wait", "forward", "backward", "optimizer")]
        assert min(parts[1:]) > 0
        assert sum(parts) <= line["step_seconds"]
        assert line["tokens_per_second"] == pytest.approx(line["num_tokens"] / line["step_seconds"])
        assert line["tokens_per_second_per_device"] == line["tokens_per_second"]
        assert 0 < line["pack_fill"] <= 1
        assert 0 < line["mfu"] < 1
        assert line["imbalance"] == pytest.approx(0)
        assert 2**26 < line["peak_memory_bytes"] < 2**36
    assert all_metrics_of(config)[0]["pack_fill"] > 0.8


def test_a_trace_is_written_when_asked_for(workspace: Workspace, tmp_path: Path) -> None:
    """The window of steps is one file a rank that a trace viewer reads; the steps are what they are without it."""
    expected = run(config_in(workspace, tmp_path / "a", training={"max_steps": 4}))
    config = config_in(workspace, tmp_path / "b", training={"max_steps": 4}, profile_first_step=2, profile_num_steps=2)
    assert run(config) == expected
    trace = json.loads((tmp_path / "b" / "logs" / "sft" / "profile" / "rank-0.json").read_text())

    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])


def test_metrics_reach_tensorboard(workspace: Workspace, tmp_path: Path) -> None:
    """TensorBoard shows the values of the metrics file, step by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_in(workspace, tmp_path, track_with="tensorboard", training={"max_steps": 3})
    metrics = run(config)
    events = EventAccumulator(str(Path(config.logging_dir) / "sft" / "tensorboard"))
    events.Reload()

    assert [event.step for event in events.Scalars("sft_train/loss")] == [1, 2, 3]
    for name in ("loss", "grad_norm", "learning_rate", "num_tokens"):
        shown = [event.value for event in events.Scalars(f"sft_train/{name}")]
        assert shown == pytest.approx([line[name] for line in metrics], rel=1e-6)


def test_metrics_reach_stdout(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`track_with: stdout` prints one JSON object a logged step; `logging_steps` says which, the last one included."""
    run(config_in(workspace, tmp_path, track_with="stdout", logging_steps=2, training={"max_steps": 5}))
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"step"')]

    assert [line["step"] for line in printed] == [2, 4, 5]


def test_no_secret_is_left_behind(workspace: Workspace, tmp_path: Path) -> None:
    """The key of a tracker is in no file of the run, and the configuration that is kept reads back."""
    config = config_in(
        workspace, tmp_path, track_with="stdout", tracker_kwargs={"api_key": "S3CRET"}, training={"max_steps": 1}
    )
    run(config)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]

    assert files
    assert not [path for path in files if b"S3CRET" in path.read_bytes()]
    kept = load_config(tmp_path / "logs" / "sft", "config")
    assert yaml.safe_load(resolved_yaml(kept)) == yaml.safe_load(resolved_yaml(config))


def test_metrics_reach_wandb(tmp_path: Path) -> None:
    """`track_with: wandb` writes a run of Weights & Biases; offline, it is a file with the metrics in it."""
    tracker = create_tracker(
        "wandb", {"mode": "offline", "project": "p"}, exp_name="x", run_directory=tmp_path, resolved_config="seed: 42"
    )
    tracker.log({"loss": 1.25, "learning_rate": 1e-4}, 1)
    tracker.finish()

    (kept,) = tmp_path.rglob("*.wandb")
    names = (b"loss", b"learning_rate", b"seed")
    deadline = time.monotonic() + 60  # a process of its own writes the file, on a busy machine after `finish` returns
    while not all(name in kept.read_bytes() for name in names) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(name in kept.read_bytes() for name in names)


def test_metrics_reach_swanlab(tmp_path: Path) -> None:
    """`track_with: swanlab` writes a run of SwanLab; offline, it is files with metrics, texts and settings in them."""
    tracker = create_tracker(
        "swanlab", {"mode": "offline", "project": "p"}, exp_name="x", run_directory=tmp_path, resolved_config="seed: 42"
    )
    tracker.log({"loss": 1.25, "val_loss/a": 2.5}, 1)
    tracker.log_text("generations", "Paris <|im_end|>", 1)
    tracker.finish()

    (kept,) = tmp_path.rglob("*.swanlab")
    assert all(name in kept.read_bytes() for name in (b"loss", b"val_loss/a", b"generations"))
    assert "Paris <|im_end|>" in [path.read_text() for path in tmp_path.rglob("media/text/*.txt")]
    assert "seed" in next(tmp_path.rglob("files/config.yaml")).read_text()


def test_metrics_reach_mlflow(tmp_path: Path) -> None:
    """`track_with: mlflow` makes a run of MLflow with the values by step, the texts and the settings."""
    from mlflow import MlflowClient

    tracker = create_tracker(
        "mlflow", {"project": "p"}, exp_name="x", run_directory=tmp_path, resolved_config="seed: 42"
    )
    for step in (1, 2):
        tracker.log({"loss": 1.25 / step, "val_loss/a": 2.5}, step)
    tracker.log_text("generations", "Paris <|im_end|>", 2)
    tracker.finish()
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("p")
    assert experiment is not None
    (run_of_it,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run_of_it.info.run_id, "loss")

    assert (run_of_it.info.run_name, run_of_it.info.status) == ("x", "FINISHED")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.25), (2, 0.625)]
    assert run_of_it.data.metrics["val_loss/a"] == 2.5
    assert next(tmp_path.rglob("generations/2.txt")).read_text() == "Paris <|im_end|>"
    assert "seed" in next(tmp_path.rglob("config.yaml")).read_text()


@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The error says which package is missing and that metrics are written in any case."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=name) as caught:
        create_tracker(name, {}, exp_name="x", run_directory=tmp_path, resolved_config="{}")
    assert "metrics.jsonl" in str(caught.value.hint)


def with_sources(config: SFTConfig, directory: Path) -> SFTConfig:
    """The run with two sources of validation data of different sizes."""
    files = [str(write_records(directory / name, size, seed=size)) for name, size in SOURCES.items()]
    config.validation = ValidationConfig(data_args=DataArguments(file_name=files))
    return config


SOURCES = {"math.jsonl": 4, "chat.val.jsonl": 9}


def test_each_source_has_its_validation_loss(workspace: Workspace, tmp_path: Path) -> None:
    """It is what the source alone would give, and `val_loss` is the mean over the label tokens of all."""
    options: dict[str, Any] = {"training": {"max_steps": 2}}
    both = run(with_sources(config_in(workspace, tmp_path / "both", **options), tmp_path))[-1]
    losses, num_label_tokens = [], []
    for name in SOURCES:
        config = config_in(workspace, tmp_path / f"{name}-alone", **options)
        config.validation = ValidationConfig(data_args=DataArguments(file_name=str(tmp_path / name)))
        alone = run(config)[-1]
        assert not [key for key in alone if key.startswith("val_loss/")], "one source needs no second name"
        losses.append(alone["val_loss"])
        source = Dataset(
            ensure_dataset(str(tmp_path / name), config.data_cache_dir, **config.preprocess_options()).path
        )
        num_label_tokens.append(sum(int(sample.label_mask.sum()) for sample in source))

    assert [both["val_loss/math"], both["val_loss/chat.val"]] == pytest.approx(losses, rel=1e-6)
    assert both["val_loss"] == pytest.approx(np.average(losses, weights=num_label_tokens), rel=1e-6)


def test_answers_of_a_validation_are_written(workspace: Workspace, tmp_path: Path) -> None:
    """Prompts from all sources, what was expected and what the model says, in a file and in the tracker."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_in(workspace, tmp_path, training={"max_steps": 4}, eval_steps=2, track_with="tensorboard")
    with_sources(config, tmp_path)
    assert config.validation is not None
    config.validation.num_generations, config.validation.max_new_tokens = 3, 5
    with_answers = run(config)
    written = [json.loads(line) for line in (tmp_path / "logs" / "sft" / "generations.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "logs" / "sft" / "tensorboard"))
    events.Reload()
    (first, second) = events.Tensors("sft_train/generations")

    assert [(line["step"], line["source"], line["sample"]) for line in written] == [
        (step, source, sample)
        for step in (2, 4)
        for source, sample in (("validation/math", 0), ("validation/chat.val", 0), ("validation/chat.val", 4))
    ]
    for line in written:
        assert line["prompt"].endswith("<|im_start|>assistant\n")
        assert line["expected"].endswith("<|im_end|>")
        assert line["generated"]
    assert (first.step, second.step) == (2, 4)
    assert written[-1]["generated"][:5] in second.tensor_proto.string_val[0].decode()
    config.validation.num_generations = 0
    config.output_dir, config.logging_dir = str(tmp_path / "out2"), str(tmp_path / "logs2")
    assert run(config) == with_answers, "answers change nothing"


def test_a_run_stops_when_it_no_longer_gets_better(workspace: Workspace, tmp_path: Path) -> None:
    """After `patience` validations without a better loss, with a checkpoint and the export; a resumed run agrees."""
    options: dict[str, Any] = {
        "validation": True,
        "eval_steps": 1,
        "save_steps": 3,
        "early_stopping_patience": 2,
        "training": {"num_train_epochs": 20, "learning_rate": 0.3, "lr_scheduler_type": "constant"},
    }
    config = config_in(workspace, tmp_path / "a", **options, export_dir=str(tmp_path / "model"))
    lines = run(config)
    losses = [line["val_loss"] for line in lines]
    first = next(i for i in range(2, len(losses)) if min(losses[: i - 1]) <= min(losses[i - 1 : i + 1]))

    assert len(lines) == first + 1 < train_stream(config, dataset_of(config)).num_steps
    assert find_checkpoints(config.output_dir)[-1].state.step == len(lines)
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert "stopped early" in (Path(config.logging_dir) / "sft" / "train.log").read_text()
    config.resume_from_checkpoint = True
    assert run(config) == lines, "it is still over"
    config.resume_from_checkpoint = str(Path(config.output_dir) / "sft_train" / "checkpoint-3")
    assert run(config) == lines, "the count is part of a checkpoint"


def test_a_gain_below_the_threshold_is_none() -> None:
    """The count starts anew only with a loss that is lower than the lowest by more than the threshold."""
    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(TrainState)}
    state = TrainState(**(values | {"num_evals_without_gain": 0}))
    counts = []
    for loss in (2.0, 1.95, 1.8, 1.9, 1.75, None):
        state = loop._with_validation(state, loss, 0.1)
        counts.append(state.num_evals_without_gain)

    assert counts == [0, 1, 0, 1, 2, 2]
    assert (state.best_val_loss, state.val_loss) == (1.75, None)


def test_early_stopping_needs_validation_data(workspace: Workspace) -> None:
    """Without validation data there is nothing that could stop the run, so the key is refused."""
    with pytest.raises(ConfigError, match="validation data") as caught:
        workspace.config(early_stopping_patience=1)
    assert caught.value.location == "early_stopping_patience"


def test_resuming_a_run_changes_nothing(workspace: Workspace, tmp_path: Path) -> None:
    """A run that is stopped half way and resumed leaves the metrics and the model of one that is not."""
    options: dict[str, Any] = {"validation": True, "eval_steps": 2, "save_steps": 2}
    straight = config_in(workspace, tmp_path / "a", **options, export_dir=str(tmp_path / "a" / "model"))
    expected = run(straight)

    stopped = config_in(workspace, tmp_path / "b", **options, export_dir=str(tmp_path / "b" / "model"))
    for name in ("checkpoint-2", "checkpoint-4"):  # as if killed after these
        source = Path(straight.output_dir) / "sft_train" / name
        target = Path(stopped.output_dir) / "sft_train" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    logs = Path(stopped.logging_dir) / "sft"
    logs.mkdir(parents=True)
    lines = (Path(straight.logging_dir) / "sft" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (logs / "metrics.jsonl").write_text("".join(lines[:5]))
    stopped.resume_from_checkpoint = True

    assert run(stopped) == expected
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab"]
    assert models[0] == models[1]
    assert {c.state.run_id for c in find_checkpoints(stopped.output_dir)} == {
        c.state.run_id for c in find_checkpoints(straight.output_dir)
    }


def test_a_killed_run_resumes(workspace: Workspace, tmp_path: Path) -> None:
    """Killed without warning (its driver with it), a run goes on from its last checkpoint to the same end."""
    options: dict[str, Any] = {"save_steps": 2, "training": {"num_train_epochs": 3}}
    expected = run(config_in(workspace, tmp_path / "whole", **options))
    config = config_in(workspace, tmp_path / "killed", **options, resume_from_checkpoint=True)
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    program = (
        "from sft_fast.config import load_config\n"
        "from sft_fast.train.pipeline import SFTPipeline\n"
        f"SFTPipeline(load_config({str(tmp_path)!r}, 'config'), use_ray=False).run()\n"
    )
    metrics = Path(config.logging_dir) / "sft" / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()

    assert process.returncode == -signal.SIGKILL, errors.decode()
    assert run(config) == expected


def test_a_signal_ends_a_run_with_a_checkpoint(workspace: Workspace, tmp_path: Path) -> None:
    """SIGTERM saves after the step under way; the run then goes on to the end of one that was not stopped."""
    expected = run(config_in(workspace, tmp_path / "whole"))
    config = config_in(workspace, tmp_path / "stopped", resume_from_checkpoint=True)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainError, match="stopped by SIGTERM"):
        TrainStopper(config, 2).run()

    assert signal.getsignal(signal.SIGTERM) == before
    (checkpoint,) = find_checkpoints(config.output_dir)
    assert checkpoint.state.step == 3
    assert run(config) == expected


def test_a_signal_costs_no_step_and_no_validation(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a signal only the step under way is finished and saved: nobody has time for more."""
    config = config_in(workspace, tmp_path, validation=True)
    calls: list[str] = []

    class Recorder(pipelines.LocalCluster):
        """Notes what is handed out; the signal comes while step 2 is."""

        def submit(self, method: str, *arguments: Any) -> Any:
            calls.append(method)
            if arguments == (1,):
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().submit(method, *arguments)

    monkeypatch.setattr(pipelines, "LocalCluster", Recorder)
    with pytest.raises(TrainError, match="stopped by SIGUSR1 after step 2"):
        run(config)

    assert calls == ["train_step", "train_step", "do_checkpoint"]
    assert [checkpoint.state.step for checkpoint in find_checkpoints(config.output_dir)] == [2]


def test_steps_that_are_left_out_are_counted(tmp_path: Path) -> None:
    """The metrics file and a resumed run know how many there were; values that are not finite are in no line."""
    workspace = broken_workspace(tmp_path)
    options: dict[str, Any] = {"on_non_finite": "skip", "save_steps": 1}
    whole = run(config_in(workspace, tmp_path / "whole", **options))
    config = config_in(workspace, tmp_path / "parts", **options)
    bad = next(line["step"] for line in whole if "loss" not in line)
    stop_after = TrainStopper(config, bad + 1)
    with pytest.raises(TrainError, match="stopped"):
        stop_after.run()
    config.resume_from_checkpoint = True

    assert run(config) == whole
    assert [line["num_skipped_steps"] for line in whole][-1] == 2
    assert sum("loss" not in line for line in whole) == 2
    assert "NaN" not in (Path(config.logging_dir) / "sft" / "metrics.jsonl").read_text()


def test_a_run_that_only_leaves_out_steps_is_given_up(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that have blown up do not come back: after so many steps in a row the run ends."""
    monkeypatch.setattr(loop, "MAX_SKIPPED_IN_A_ROW", 2)
    training = {"learning_rate": 1e30, "warmup_ratio": 0.0, "num_train_epochs": 5}
    config = config_in(workspace, tmp_path, on_non_finite="skip", training=training, max_grad_norm=0.0)
    with pytest.raises(TrainError, match="2 steps in a row") as caught:
        run(config)
    assert caught.value.code == "not_finite"


@pytest.mark.parametrize(("num_free_bytes", "kind"), [(10 * 2**20, TrainError), (10 * 2**30, RuntimeError)])
def test_a_full_disk_is_named(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_free_bytes: int, kind: type[Exception]
) -> None:
    """A checkpoint that finds no room is an error that says so, and leaves no half; other errors stay as they are."""
    from sft_fast.train.strategy.deepspeed import DeepSpeedStrategy  # it reads the environment when it is imported

    config = config_in(workspace, tmp_path, save_steps=2, training={"max_steps": 6})
    save = DeepSpeedStrategy.save

    def save_until_full(self: DeepSpeedStrategy, directory: str, tag: str) -> None:
        save(self, directory, tag)
        if "checkpoint-4" in directory:
            raise RuntimeError("unexpected pos 12160 vs 12052")

    monkeypatch.setattr(DeepSpeedStrategy, "save", save_until_full)
    monkeypatch.setattr(checkpoint, "_num_free_bytes", lambda _: num_free_bytes)
    with pytest.raises(kind, match="the disk is full" if kind is TrainError else "unexpected pos"):
        run(config)

    assert [path.name for path in (Path(config.output_dir) / "sft_train").iterdir()] == ["checkpoint-2"]


def test_a_run_that_is_done_is_not_trained_again(workspace: Workspace, tmp_path: Path) -> None:
    """Resuming a finished run only exports its model once more."""
    config = config_in(workspace, tmp_path, export_dir=str(tmp_path / "model"), training={"max_steps": 2})
    first = run(config)
    exported = (tmp_path / "model" / "model.safetensors").read_bytes()
    config.resume_from_checkpoint = True

    assert run(config) == first
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == exported


def test_other_data_cannot_be_resumed(workspace: Workspace, tmp_path: Path) -> None:
    """A checkpoint of a run over other records is refused before anything is trained or overwritten."""
    config = config_in(workspace, tmp_path, training={"max_steps": 1})
    before = run(config)
    config.resume_from_checkpoint = True
    config.sft_train.data_args.file_name = str(write_records(tmp_path / "other.jsonl", 12, seed=5))

    with pytest.raises(ConfigError, match="the training data") as caught:
        run(config)
    assert caught.value.location == "resume_from_checkpoint"
    assert metrics_of(config) == before


@pytest.mark.parametrize("removed", ["", "config.json", "tokenizer.json"])
def test_a_broken_model_directory_is_refused_at_once(workspace: Workspace, tmp_path: Path, removed: str) -> None:
    """A directory that is missing, or lacks its configuration or tokenizer, is named; nothing is written."""
    directory = tmp_path / "model"
    if removed:
        directory.mkdir()
        for path in workspace.model_dir.iterdir():
            if path.name != removed:
                (directory / path.name).symlink_to(path)
    config = config_in(workspace, tmp_path, pretrain=str(directory))

    with pytest.raises(ConfigError) as caught:
        SFTPipeline(config)
    assert caught.value.path == str(directory / removed)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "logs").exists()


def test_an_unknown_strategy_is_refused_at_once(workspace: Workspace, tmp_path: Path) -> None:
    """The name of the strategy is checked before any work."""
    config = config_in(workspace, tmp_path)
    config.sft_train.strategy_args.strategy_name = "megatron_train"
    with pytest.raises(ConfigError, match="megatron_train"):
        SFTPipeline(config)


def test_the_driver_stays_a_step_ahead(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is handed out before the reports of the one before are read, and no further ahead than that."""
    events: list[tuple[str, int]] = []

    class Recorder(pipelines.LocalCluster):
        """Notes when work is handed out."""

        def submit(self, method: str, *arguments: Any) -> Any:
            if method == "train_step":
                events.append(("out", arguments[0] + 1))
            return super().submit(method, *arguments)

    write = StepFile.write

    def noted(self: StepFile, metrics: dict[str, Any]) -> None:
        events.append(("read", metrics["step"]))
        write(self, metrics)

    monkeypatch.setattr(pipelines, "LocalCluster", Recorder)
    monkeypatch.setattr(StepFile, "write", noted)
    run(config_in(workspace, tmp_path, training={"max_steps": 4}))

    expected = [("out", 1), ("out", 2), ("read", 1), ("out", 3), ("read", 2), ("out", 4), ("read", 3), ("read", 4)]
    assert events == expected


def test_a_run_begins_with_its_report(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run prints one table of its data, packs and steps, and keeps the same numbers for programs in `report.json`."""
    config = config_in(workspace, tmp_path, training={"max_steps": 1})
    run(config)
    content = json.loads((Path(config.logging_dir) / config.exp_name / "report.json").read_text())
    arithmetic = BatchArithmetic.of(config, train_stream(config, dataset_of(config)))
    printed = capsys.readouterr().out

    assert content["plan"] == json.loads(json.dumps(dataclasses.asdict(arithmetic)))
    assert content["data"]["train"]["num_samples"] == 24
    assert printed.count("train data") == 1
    for name, value in arithmetic.rows():
        assert name in printed
        assert value[:40] in printed


def test_the_arithmetic_adds_up(workspace: Workspace) -> None:
    """What is printed before a run is what the run does."""
    config = workspace.config(ranks=2, rows=3, micro_batches=2)
    stream = train_stream(config, dataset_of(config))
    arithmetic = BatchArithmetic.of(config, stream)
    table = dict(arithmetic.rows())

    assert "3 packs a micro-batch x 2 micro-batches x 2 ranks = 12 packs" in table["global batch"]
    assert "at most 1,152 tokens" in table["global batch"]
    assert table["ranks"] == "2"
    assert re.fullmatch(
        r"the slowest rank takes [\d.]+% longer than the mean; packs dealt in order, [\d.]+%", table["balance"]
    )
    assert table["steps"] == f"{stream.num_steps}, {stream.num_steps_per_epoch} an epoch"
    assert arithmetic.num_samples == 24
