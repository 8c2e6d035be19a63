"""Checkpoints on disk and the metrics file: complete or absent, and in order through resumptions."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft_fast import ConfigError
from sft_fast.train import checkpoint as checkpoints
from sft_fast.train.checkpoint import (
    CLUSTER_NAME,
    Checkpoint,
    TrainState,
    best_checkpoint,
    check_agreement,
    checkpoint_to_resume,
    clean_up,
    commit,
    find_checkpoints,
    read_checkpoint,
    remove_old,
    staging_directory,
)
from sft_fast.train.metrics import StepFile, StepMetrics
from tests.train_helpers import Workspace


def state(step: int, **changes: Any) -> TrainState:
    """The state of a run after a step."""
    values: dict[str, Any] = {
        "fingerprint": "f" * 8,
        "seed": 1,
        "data_seed": 1,
        "sequence_length": 64,
        "is_packed": True,
        "num_rows_per_step": 4,
        "model_args": {"dtype": "fp32", "lora_target": None},
        "step": step,
        "run_id": "a",
        "best_val_loss": None,
        "world_size": 2,
        "zero_stage": 1,
        "pretrain": "/model",
        "saved_at": float(step),
    }
    return TrainState(**(values | changes))


def written(root: Path, step: int) -> Path:
    """A staging directory as two ranks leave it."""
    staging = staging_directory(str(root), step)
    (staging / CLUSTER_NAME).mkdir(parents=True)
    for rank in range(2):
        (staging / CLUSTER_NAME / f"rank_{rank}.pt").write_bytes(bytes([rank]) * 100 * step)
    return staging


def save(root: Path, step: int, **changes: Any) -> Checkpoint:
    """A committed checkpoint."""
    return commit(written(root, step), state(step, **changes))


def names(root: Path) -> list[str]:
    """What is in the directory of checkpoints."""
    return sorted(path.name for path in (root / CLUSTER_NAME).iterdir())


def test_a_committed_checkpoint_is_found_where_it_should_be(tmp_path: Path) -> None:
    """It is at `sft_train/checkpoint-<step>/sft_train/`, and its state reads back as it was written."""
    saved = save(tmp_path, 3, best_val_loss=1.5)

    assert (tmp_path / "sft_train" / "checkpoint-3" / "sft_train" / "rank_1.pt").stat().st_size == 300
    assert names(tmp_path) == ["checkpoint-3"]
    assert find_checkpoints(str(tmp_path)) == [saved]
    assert read_checkpoint(saved.path / CLUSTER_NAME) == saved


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text('{"format": 1, "fil'),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / CLUSTER_NAME / "rank_1.pt").unlink(),
        lambda path: (path / CLUSTER_NAME / "rank_0.pt").write_bytes(b"short"),
        lambda path: shutil.rmtree(path / CLUSTER_NAME),
    ],
)
def test_an_incomplete_checkpoint_is_never_resumed(tmp_path: Path, damage: Any) -> None:
    """Whatever of the newest checkpoint is missing or short, the one before is resumed; by name it is refused."""
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    damage(newest.path)
    config = Workspace(tmp_path, tmp_path, tmp_path).config(resume_from_checkpoint=True, output_dir=str(tmp_path))

    assert checkpoint_to_resume(config) == older
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        read_checkpoint(newest.path)


def test_a_staging_directory_is_never_resumed(tmp_path: Path) -> None:
    """What the ranks have written is no checkpoint before it is committed, and the next run removes it."""
    save(tmp_path, 1)
    staging = written(tmp_path, 2)

    assert [found.state.step for found in find_checkpoints(str(tmp_path))] == [1]
    clean_up(str(tmp_path))
    assert not staging.exists()
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("last_rename", [1, 2])
def test_replacing_a_checkpoint_leaves_the_old_one_or_the_new_one(
    tmp_path: Path, last_rename: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between any two steps of the replacement, the next run finds the old checkpoint or the new one."""
    save(tmp_path, 1, run_id="old")
    num_renames = 0
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        nonlocal num_renames
        num_renames += 1
        if num_renames == last_rename:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, run_id="new")
    monkeypatch.undo()
    clean_up(str(tmp_path))

    assert [found.state.run_id for found in find_checkpoints(str(tmp_path))] == ["old"]
    assert save(tmp_path, 1, run_id="new") in find_checkpoints(str(tmp_path))
    assert names(tmp_path) == ["checkpoint-1"]


def test_the_newest_is_the_last_saved(tmp_path: Path) -> None:
    """A new run in the directory of an older, longer one is resumed, not the older one."""
    save(tmp_path, 9, run_id="older", saved_at=1.0)
    newer = save(tmp_path, 2, run_id="newer", saved_at=2.0)
    config = Workspace(tmp_path, tmp_path, tmp_path).config(resume_from_checkpoint=True, output_dir=str(tmp_path))

    assert checkpoint_to_resume(config) == newer


def test_only_the_newest_of_a_run_are_kept(tmp_path: Path) -> None:
    """`max_ckpt_to_keep` removes the oldest of the same run; 0 keeps all; other runs' checkpoints stay."""
    save(tmp_path, 9, run_id="other", saved_at=0.0)
    for step in (1, 2, 3):
        save(tmp_path, step)

    remove_old(str(tmp_path), "a", 0)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-9"]
    remove_old(str(tmp_path), "a", 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-9"]


def test_the_best_of_a_run_is_kept(tmp_path: Path) -> None:
    """The checkpoint with the lowest validation loss stays beside the newest ones; without a validation none does."""
    for step, val_loss in enumerate((3.0, 1.0, None, 2.0, 1.0), start=1):
        save(tmp_path, step, val_loss=val_loss)
        remove_old(str(tmp_path), "a", 1)

    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]
    best = best_checkpoint(find_checkpoints(str(tmp_path)))
    assert best is not None
    assert (best.state.step, best.state.val_loss) == (2, 1.0)


def test_nothing_to_resume_is_a_fresh_start(tmp_path: Path) -> None:
    """`true` without a checkpoint starts fresh; `false` starts fresh with one; a wrong path is an error."""
    workspace = Workspace(tmp_path, tmp_path, tmp_path)

    def resumed(value: Any) -> Checkpoint | None:
        return checkpoint_to_resume(workspace.config(resume_from_checkpoint=value, output_dir=str(tmp_path)))

    assert resumed(True) is None
    saved = save(tmp_path, 1)
    assert resumed(False) is None
    assert resumed(True) == saved
    assert resumed(str(saved.path)) == saved
    with pytest.raises(ConfigError):
        resumed(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "g" * 8}, "training data"),
        ({"seed": 2}, "seed"),
        ({"sequence_length": 32}, "sequence_length"),
        ({"num_rows_per_step": 8}, "gradient_accumulation_steps"),
        ({"is_packed": False}, "use_sequence_packing"),
        ({"zero_stage": 3}, "zero_optimization.stage"),
        ({"model_args": {"dtype": "bf16"}}, "dtype"),
        ({"model_args": {"dtype": "fp32", "lora_target": "all-linear"}}, "lora_target"),
    ],
)
def test_a_run_goes_on_only_as_itself(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    """A resumed run that would see other samples in a step, or other weights, is refused with the key that differs."""
    saved = save(tmp_path, 1)
    check_agreement(saved, state(0, run_id="b", world_size=4))

    with pytest.raises(ConfigError, match=named):
        check_agreement(saved, state(0, **change))


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a format to come is refused, not misread."""
    saved = save(tmp_path, 1)
    monkeypatch.setattr(checkpoints, "FORMAT", 2)

    with pytest.raises(ConfigError, match="its format is 1"):
        read_checkpoint(saved.path)


def metrics(step: int, **changes: Any) -> StepMetrics:
    """The metrics of a step."""
    values: dict[str, Any] = {field.name: 0.5 for field in dataclasses.fields(StepMetrics)}
    return StepMetrics(**(values | {"step": step, "val_loss": None, "val_loss_by_source": {}} | changes))


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    """A run killed after step 3 (in the middle of a line) and resumed at step 2 leaves each step once, in order."""
    path = tmp_path / "logs" / "metrics.jsonl"
    first = StepFile(path, 0)
    for step in (1, 2, 3):
        first.write(metrics(step, loss=1.0).values())
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')

    second = StepFile(path, 2)
    for step in (3, 4):
        second.write(metrics(step, loss=2.0).values())
    second.close()

    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_new_run_puts_an_old_file_aside(tmp_path: Path) -> None:
    """Metrics of an earlier run are neither mixed with those of a new one nor lost."""
    path = tmp_path / "metrics.jsonl"
    for loss in (1.0, 2.0):
        file = StepFile(path, 0)
        file.write(metrics(1, loss=loss).values())
        file.close()

    assert [line["loss"] for line in lines(path)] == [2.0]
    (old,) = (other for other in tmp_path.iterdir() if other != path)
    assert [line["loss"] for line in lines(old)] == [1.0]


def test_val_loss_is_there_when_there_is_one(tmp_path: Path) -> None:
    """A line has `val_loss` only where there was a validation, and is on disk as soon as it is written."""
    file = StepFile(tmp_path / "metrics.jsonl", 0)
    file.write(metrics(1).values())
    file.write(metrics(2, val_loss=3.0).values())

    assert [line.get("val_loss") for line in lines(tmp_path / "metrics.jsonl")] == [None, 3.0]
    file.close()
