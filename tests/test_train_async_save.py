"""`async_save`: a checkpoint that is written while training goes on is the one that would have been written at once."""

import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typing_extensions import override

from sft_fast import SftFastError, TrainError
from sft_fast.config import SFTConfig, StrategyArguments, resolved_yaml
from sft_fast.train import pipeline as pipelines
from sft_fast.train import worker as workers
from sft_fast.train.background import BackgroundWriter, copy_to_host
from sft_fast.train.checkpoint import commit, find_checkpoints, staging_directory
from sft_fast.train.cluster import Cluster
from sft_fast.train.metrics import StepFile
from sft_fast.train.pipeline import SFTPipeline
from sft_fast.train.ranks import LocalCluster
from sft_fast.train.worker import SFTWorker
from tests.test_train_pipeline import TrainStopper, config_in, run
from tests.test_train_worker import curve, state_of
from tests.train_helpers import Workspace, broken_workspace, dataset_of, ray_here, start_worker

FSDP2 = StrategyArguments(strategy_name="fsdp2_train")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Qwen2, whose head is its embedding."""
    return Workspace.create(tmp_path_factory.mktemp("async"), kind="qwen2", tie_word_embeddings=True)


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No byte of weights is written before this event is set."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from torch.distributed.checkpoint import FileSystemWriter

    event = threading.Event()

    def held(usual: Any) -> Any:
        def write(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                assert event.wait(60)
            return usual(*arguments, **named)

        return write

    monkeypatch.setattr(TorchCheckpointEngine, "save", held(TorchCheckpointEngine.save))
    monkeypatch.setattr(FileSystemWriter, "write_data", held(FileSystemWriter.write_data))
    yield event
    event.set()


def written_in_background(worker: SFTWorker, config: SFTConfig, event: threading.Event) -> tuple[Path, list[Any]]:
    """A checkpoint of step 2 that is written only when steps 3 and 4 are done, and their reports."""
    staging = staging_directory(config.output_dir, 2)
    worker.do_checkpoint(str(staging), True)
    reports = [worker.train_step(step) for step in (2, 3)]
    assert worker.finish_checkpoint(False) is None
    event.set()
    assert worker.finish_checkpoint(True) is not None
    return commit(staging, state_of(config, 2)).path, reports


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        (1, {}),
        (2, {"dtype": "bf16"}),
        (3, {"dtype": "bf16"}),
        (3, {"lora_target": "q_proj,v_proj", "lora_rank": 4}),
        (0, {"dtype": "bf16"}),
        (0, {"lora_target": "q_proj,v_proj", "lora_rank": 4}),
    ],
)
def test_what_is_written_beside_training_is_the_state_before_it(
    workspace: Workspace, tmp_path: Path, held_back: threading.Event, stage: int, model: dict[str, Any]
) -> None:
    """Written when later steps have changed every weight, a checkpoint resumes to the last bit; stage 0 is FSDP2."""
    config = workspace.config(
        stage=stage, strategy=None if stage else FSDP2, model=model, output_dir=str(tmp_path), validation=True
    )
    worker = start_worker(config)
    for step in range(2):
        worker.train_step(step)
    before = worker.val_step()
    path, later = written_in_background(worker, config, held_back)
    worker.close()
    worker = start_worker(config, path)
    resumed = worker.val_step(), [worker.train_step(step) for step in (2, 3)]
    worker.close()

    assert resumed[0].loss_sums == before.loss_sums
    assert curve(resumed[1]) == curve(later)


def test_a_checkpoint_in_the_background_has_the_tensors_of_one_at_once(
    workspace: Workspace, tmp_path: Path, held_back: threading.Event
) -> None:
    """File by file, what DeepSpeed writes is the same."""
    held_back.set()
    config = workspace.config(stage=2, model={"dtype": "bf16"}, output_dir=str(tmp_path))
    worker = start_worker(config)
    worker.train_step(0)
    worker.do_checkpoint(str(tmp_path / "at-once"))
    worker.do_checkpoint(str(tmp_path / "beside"), True)
    worker.finish_checkpoint(True)
    worker.close()
    names = {path.relative_to(tmp_path / "at-once") for path in (tmp_path / "at-once").rglob("*") if path.is_file()}

    assert names == {
        path.relative_to(tmp_path / "beside") for path in (tmp_path / "beside").rglob("*") if path.is_file()
    }
    states = [name for name in names if name.suffix == ".pt"]
    assert len(states) == 2
    for name in states:
        one, other = (torch.load(tmp_path / place / name, weights_only=False) for place in ("at-once", "beside"))
        assert flat(one) == flat(other)


def flat(value: Any) -> Any:
    """Nested values with tensors as bytes and everything else as text."""
    if torch.is_tensor(value):
        return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: flat(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [flat(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str) else type(value)


def test_a_copy_shares_nothing_with_what_it_copies() -> None:
    """Changing the model afterwards changes no copy, and tensors that are one stay one."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    state: Any = {"module": model.state_dict(), "more": [(1, torch.ones(2)), "text"]}
    copied = copy_to_host(state)
    expected = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.zero_()
    state["more"][0][1].zero_()

    assert isinstance(copied["module"], OrderedDict)
    assert copied["module"]._metadata == state["module"]._metadata
    assert torch.equal(copied["module"]["0.weight"], expected)
    assert copied["module"]["0.weight"] is copied["module"]["1.weight"]
    assert copied["more"][0][1].tolist() == [1, 1]
    assert copied["more"][1] == "text"


def test_an_error_of_the_thread_is_raised_where_it_is_asked_for() -> None:
    """As often as it is asked for, and until the next write begins."""
    writer = BackgroundWriter()
    writer.start(lambda: (_ for _ in ()).throw(OSError("broken")))
    for wait in (True, False):
        with pytest.raises(OSError, match="broken"):
            writer.finish(wait)
    writer.start(lambda: None)

    assert writer.finish(True) is not None
    writer.close()


def test_a_run_that_saves_beside_training_is_the_same_run(workspace: Workspace, tmp_path: Path) -> None:
    """Metrics, checkpoints and model are those of a run that saves at once, and so is what a signal leaves."""
    options: dict[str, Any] = {"save_steps": 2, "validation": True, "eval_steps": 2, "training": {"max_steps": 7}}
    runs = [
        config_in(workspace, tmp_path / name, **options, async_save=name == "b", export_dir=str(tmp_path / f"m{name}"))
        for name in "ab"
    ]
    metrics = [run(config) for config in runs]
    saved = [[one.state for one in find_checkpoints(config.output_dir)] for config in runs]

    assert metrics[0] == metrics[1]
    assert [state.step for state in saved[1]] == [2, 4, 6, 7] == [state.step for state in saved[0]]
    assert [state.val_loss for state in saved[1]] == [state.val_loss for state in saved[0]]
    models = [(tmp_path / f"m{name}" / "model.safetensors").read_bytes() for name in "ab"]
    assert models[0] == models[1]
    log = (tmp_path / "b" / "logs" / "sft" / "train.log").read_text()
    assert log.count("beside training") == 3
    assert log.count("written in") == 4


def test_the_next_checkpoint_waits_for_the_one_before(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one is under way; waits are counted and shown, and every checkpoint is complete."""
    num_under_way, most = 0, 0
    usual = SFTWorker._write

    def slow(*arguments: Any) -> None:
        nonlocal num_under_way, most
        num_under_way += 1
        most = max(most, num_under_way)
        threading.Event().wait(0.5)
        usual(*arguments)
        num_under_way -= 1

    monkeypatch.setattr(SFTWorker, "_write", slow)
    config = config_in(workspace, tmp_path, save_steps=1, async_save=True, training={"max_steps": 4})
    run(config)

    assert most == 1
    assert [one.state.step for one in find_checkpoints(config.output_dir)] == [1, 2, 3, 4]
    assert "waits so far: 3" in (tmp_path / "logs" / "sft" / "train.log").read_text()


def test_a_write_that_fails_ends_the_run_with_its_cause(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is what went wrong on the disk; those before are whole, and nothing half-written is left."""
    num_writes = 0
    usual = workers.save_model_files

    def fail_later(*arguments: Any) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 4:
            raise OSError(28, "No space left on device")
        usual(*arguments)

    monkeypatch.setattr(workers, "save_model_files", fail_later)
    config = config_in(workspace, tmp_path, save_steps=1, async_save=True)
    with pytest.raises(OSError, match="No space left"):
        run(config)

    names = sorted(path.name for path in (Path(config.output_dir) / "sft_train").iterdir())
    assert names in (["checkpoint-1", "checkpoint-2"], ["checkpoint-1", "checkpoint-2", "checkpoint-3"])
    assert len(find_checkpoints(config.output_dir)) == len(names)


def test_killed_while_it_writes_a_run_goes_on_from_the_checkpoint_before(workspace: Workspace, tmp_path: Path) -> None:
    """The process ends in the middle of a file of the third checkpoint; the next run gets to the same end."""
    options: dict[str, Any] = {"save_steps": 3, "async_save": True, "training": {"num_train_epochs": 4}}
    expected = run(config_in(workspace, tmp_path / "whole", **options))
    config = config_in(workspace, tmp_path / "killed", **options, resume_from_checkpoint=True)
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    program = f"""
import os, signal, torch
from sft_fast.config import load_config
from sft_fast.train.pipeline import SFTPipeline

usual, num_files = torch.save, 0

def save(state, path, **options):
    global num_files
    num_files += 1
    usual(state, path, **options)
    if num_files == 6:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save
SFTPipeline(load_config({str(tmp_path)!r}, "config"), use_ray=False).run()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    root = Path(config.output_dir) / "sft_train"
    found = [one.state.step for one in find_checkpoints(config.output_dir)]

    assert done.returncode == -signal.SIGKILL, done.stderr
    assert found in ([3], [3, 6])
    assert [path for path in root.iterdir() if path.name.startswith("checkpoint-9.staging-")]
    assert run(config) == expected
    assert not [path for path in root.iterdir() if ".staging" in path.name]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Any]:
    """Ray, started once for all clusters of this file."""
    with ray_here(num_cpus=2) as ray:
        yield ray


@pytest.mark.ray
def test_two_ranks_write_beside_training(workspace: Workspace, ray_session: Any, tmp_path: Path) -> None:
    """By either strategy a checkpoint resumes to the last bit; an error in the thread of one rank names that rank."""
    options: dict[str, Any] = {"ranks": 2, "micro_batches": 1, "stage": 3, "output_dir": str(tmp_path)}
    cluster = Cluster(workspace.config(**options))
    try:
        for strategy in (None, FSDP2):
            config = workspace.config(**options, strategy=strategy)
            path = dataset_of(config).path
            cluster.initialize(config, path)
            cluster.submit("train_step", 0).result()
            staging = staging_directory(config.output_dir, 1)
            calls = [cluster.submit("do_checkpoint", str(staging), True), cluster.submit("train_step", 1)]
            straight = calls[1].result()
            cluster.submit("finish_checkpoint", True).result()
            saved = commit(staging, state_of(config, 1))
            cluster.initialize(config, path, None, str(saved.path))
            resumed = cluster.submit("train_step", 1).result()
            assert curve(resumed) == curve(straight)

        def break_writing(actor: Any) -> None:
            def fail(*arguments: Any) -> None:
                raise ZeroDivisionError("in the thread")

            actor._worker._write = fail

        cluster._ray.get(cluster._actors[1].__ray_call__.remote(break_writing))
        cluster.submit("do_checkpoint", str(staging_directory(config.output_dir, 2)), True).result()
        with pytest.raises(SftFastError, match=r"rank 1 on .* failed: ZeroDivisionError: in the thread"):
            cluster.submit("finish_checkpoint", True).result()
    finally:
        cluster.shutdown()


def test_the_last_checkpoint_is_there_when_the_run_ends(workspace: Workspace, tmp_path: Path) -> None:
    """A step that is saved beside training and turns out to be the last is complete before the signal's error."""
    config = config_in(workspace, tmp_path, save_steps=1, async_save=True)
    with pytest.raises(TrainError, match=r"stopped by SIGTERM.*its checkpoint is complete"):
        TrainStopper(config, 2).run()

    assert [one.state.step for one in find_checkpoints(config.output_dir)][-1] >= 2


@pytest.mark.parametrize("async_save", [True, False])
def test_a_step_that_is_not_finite_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    """The step before it was saved, and is there when the run has ended, however long its writing took."""
    usual = SFTWorker._write

    def slow(*arguments: Any) -> None:
        threading.Event().wait(0.3)
        usual(*arguments)

    monkeypatch.setattr(SFTWorker, "_write", slow)
    config = config_in(broken_workspace(tmp_path), tmp_path, save_steps=1, async_save=async_save)
    with pytest.raises(TrainError, match=r"step \d: the loss or the gradient is not finite") as caught:
        run(config)
    found = find_checkpoints(config.output_dir)

    assert found
    assert f"step {found[-1].state.step + 1}:" in str(caught.value)
    assert not list((tmp_path / "out" / "sft_train").glob("*.staging*"))
    assert not list(found[-1].path.glob("written-*"))


def test_an_error_of_the_driver_loses_no_checkpoint(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_back: threading.Event
) -> None:
    """What goes wrong outside the ranks ends the run when the checkpoint under way is written."""
    usual = StepFile.write

    def write(file: StepFile, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 4:
            threading.Timer(0.3, held_back.set).start()
            raise ZeroDivisionError("in the driver")
        usual(file, metrics)

    monkeypatch.setattr(StepFile, "write", write)
    config = config_in(workspace, tmp_path, save_steps=3, async_save=True)
    with pytest.raises(ZeroDivisionError):
        run(config)

    assert [one.state.step for one in find_checkpoints(config.output_dir)] == [3]


def test_without_the_part_of_a_rank_there_is_no_checkpoint(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one of two ranks has not noted that it has written, the checkpoint is left out, and the log says so."""
    usual = StepFile.write

    def write(file: StepFile, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 4:
            monkeypatch.setattr(LocalCluster, "world_size", 2)
            raise ZeroDivisionError("in the driver")
        usual(file, metrics)

    monkeypatch.setattr(StepFile, "write", write)
    monkeypatch.setattr(SFTWorker, "finish_checkpoint", lambda *_: None)  # nobody asks before the end
    config = config_in(workspace, tmp_path, save_steps=3, async_save=True)
    with pytest.raises(ZeroDivisionError):
        run(config)

    assert not list((tmp_path / "out" / "sft_train").iterdir())
    assert "the checkpoint of step 3 was not written in full" in (tmp_path / "logs" / "sft" / "train.log").read_text()


class RankOneDies(Cluster):
    """Two ranks that write step 2 in the background, and of which rank 1 is killed in step 4, when it has written.

    Rank 0 writes only when `gate` exists, which the driver makes when it waits for what is being written.
    """

    gate: Path

    @override
    def initialize(self, config: SFTConfig, *arguments: Any) -> None:
        """As always; then the ranks are told what to do."""
        super().initialize(config, *arguments)
        gate = self.gate

        def prepare(actor: Any) -> None:
            import os
            import signal
            import time

            worker = actor._worker
            write, train_step = worker._write, worker.train_step

            def write_late(write_files: Any, directory: str) -> None:
                while not gate.exists():
                    time.sleep(0.01)
                write(write_files, directory)

            def die_in_step_4(step: int) -> Any:
                while step == 3:
                    time.sleep(0.01)
                    if list(gate.parent.rglob("written-1")):
                        os.kill(os.getpid(), signal.SIGKILL)
                return train_step(step)

            if actor._rank == 0:
                worker._write = write_late
            else:
                worker.train_step = die_in_step_4

        self._ray.get([actor.__ray_call__.remote(prepare) for actor in self._actors])

    @override
    def finish_writing(self, *arguments: Any) -> None:
        """Opens the gate first."""
        self.gate.touch()
        super().finish_writing(*arguments)


@pytest.mark.ray
def test_a_rank_that_dies_loses_no_checkpoint_that_it_has_written(
    workspace: Workspace, ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank, which waits for it in a collective, is let finish its part; then the error is reported."""
    monkeypatch.setattr(RankOneDies, "gate", tmp_path / "gate", raising=False)
    monkeypatch.setattr(pipelines, "Cluster", RankOneDies)
    options: dict[str, Any] = {"ranks": 2, "micro_batches": 1, "stage": 2, "max_restarts": 0}
    config = config_in(workspace, tmp_path, **options, save_steps=2, async_save=True)
    with pytest.raises(TrainError, match=r"rank 1 on .* died"):
        SFTPipeline(config).run()

    assert [path.name for path in (tmp_path / "out" / "sft_train").iterdir()] == ["checkpoint-2"]
    assert [one.state.step for one in find_checkpoints(config.output_dir)] == [2]
    log = (tmp_path / "logs" / "sft" / "train.log").read_text()
    assert "checkpoint-2, written in full before the run failed" in log
