"""Ranks under Ray: two are one, and the first cause of a failure is what is reported."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_fast import ClusterError, ConfigError, TrainError
from sft_fast.config import SFTConfig
from sft_fast.train import cluster as clusters
from sft_fast.train import pipeline as pipelines
from sft_fast.train.checkpoint import TrainState, commit, staging_directory
from sft_fast.train.cluster import Cluster
from sft_fast.train.failure import Failure, first_cause, to_error
from sft_fast.train.metrics import StepFile
from sft_fast.train.pipeline import SFTPipeline
from sft_fast.train.ranks import LocalCluster
from sft_fast.train.worker import TrainStepReport
from tests.train_helpers import Workspace, broken_workspace, dataset_of, ray_here, run_worker, start_worker


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny model and records."""
    return Workspace.create(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Any]:
    """Ray, started once for all clusters of this file."""
    with ray_here(num_cpus=8) as ray:
        yield ray


@pytest.fixture(scope="module")
def two_ranks(ray_session: Any, workspace: Workspace) -> Iterator[Cluster]:
    """Two processes, which several tests initialise anew."""
    cluster = Cluster(workspace.config(ranks=2))
    yield cluster
    cluster.shutdown()


def failure(rank: int, kind: str, message: str, seconds: float, error: Any = None) -> Failure:
    """What the driver is told of a rank that fails."""
    return Failure(rank, f"host{rank}", kind, message, "Traceback ...\nlast line", seconds, error)


def two_rank_config(workspace: Workspace, **changes: Any) -> SFTConfig:
    """Two ranks with one micro-batch of two rows each: the global batch of one rank with two."""
    return workspace.config(ranks=2, micro_batches=1, **changes)


def values(reports: list[TrainStepReport]) -> tuple[float, float]:
    """The loss of a step and its gradient norm, from the reports of all ranks."""
    assert len({report.grad_norm for report in reports}) == 1
    return sum(report.loss for report in reports), reports[0].grad_norm


def test_the_first_cause_is_no_echo() -> None:
    """A connection that broke because its other side was gone is never the cause, even if it is seen first."""
    echo = failure(0, "RuntimeError", "[gloo/transport/tcp/pair.cc] Connection closed by peer", 1.0)
    cause = failure(1, "ZeroDivisionError", "division by zero", 2.0)
    died = failure(1, "died", "SIGKILL", 3.0)

    assert first_cause([echo, cause]) is cause
    assert first_cause([echo, died]) is died
    lost = failure(1, "lost", "its machine does not answer any more: connection reset", 4.0)
    assert first_cause([echo, lost]) is lost
    assert first_cause([echo]) is echo
    assert first_cause([cause, failure(2, "ValueError", "x", 1.5)]).rank == 2


def test_errors_name_rank_and_host() -> None:
    """What a rank's own code raised comes with rank, host and the end of its traceback."""
    error = to_error(failure(3, "KeyError", "'x'", 0.0))
    assert isinstance(error, TrainError)
    assert "rank 3 on host3 failed: KeyError: 'x'" in str(error)
    assert "last line" in str(error)

    ours = to_error(failure(1, "TrainError", "", 0.0, TrainError("not finite", code="not_finite", hint="lower it")))
    assert (ours.message, ours.code, ours.hint) == ("rank 1 on host1: not finite", "not_finite", "lower it")


def test_a_lost_machine_has_a_code_of_its_own() -> None:
    """What became of a rank decides the code, by which programs sort and the run starts again."""
    codes = {kind: to_error(failure(1, kind, "x", 0.0)).code for kind in ("lost", "died", "hung", "KeyError")}
    assert codes == {"lost": "machine_lost", "died": "rank_died", "hung": "rank_hung", "KeyError": "rank_failed"}
    assert str(to_error(failure(1, "lost", "no answer", 0.0))).startswith("rank 1 on host1 is lost: no answer")


def test_what_the_user_can_put_right_stays_as_it_is() -> None:
    """A configuration error in a rank keeps its class, and with it the exit status 2."""
    error = ConfigError("unknown dtype", location="sft_train.model_args.dtype")
    assert to_error(failure(0, "ConfigError", "unknown dtype", 0.0, error)) is error


def test_several_ranks_need_ray(workspace: Workspace) -> None:
    """The cluster without Ray has one rank and refuses two."""
    with pytest.raises(ConfigError, match="2 ranks need Ray"):
        LocalCluster(workspace.config(ranks=2))


@pytest.mark.ray
@pytest.mark.parametrize(("stage", "packed"), [(1, True), (1, False), (2, True), (3, True)])
def test_two_ranks_are_one(workspace: Workspace, two_ranks: Cluster, stage: int, packed: bool) -> None:
    """Loss, gradient norm and validation loss of two ranks are those of one with the same global batch."""
    config = two_rank_config(workspace, stage=stage, packed=packed, validation=True)
    alone = workspace.config(stage=stage, packed=packed, validation=True)
    expected = [(report.loss, report.grad_norm) for report in run_worker(alone)]
    worker = start_worker(alone)
    before = worker.val_step()
    worker.close()

    path = dataset_of(config).path
    two_ranks.initialize(config, path, {"validation": path})
    validation = two_ranks.submit("val_step").result()
    calls = [two_ranks.submit("train_step", step) for step in range(len(expected))]
    actual = [values(call.result()) for call in calls]

    counts = [report.num_label_tokens["validation"] for report in validation]
    assert sum(counts) == before.num_label_tokens["validation"]
    assert min(counts) > 0, "both ranks validate"
    total = sum(report.loss_sums["validation"] for report in validation)
    assert total == pytest.approx(before.loss_sums["validation"], rel=1e-5)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)


@pytest.mark.ray
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_resume_to_the_last_bit(workspace: Workspace, two_ranks: Cluster, tmp_path: Path, stage: int) -> None:
    """A checkpoint of two ranks continues on two ranks with the very losses and norms of a run that never stopped."""
    config = two_rank_config(workspace, stage=stage, model={"dtype": "bf16"}, output_dir=str(tmp_path))
    path = dataset_of(config).path

    def steps(numbers: range) -> list[tuple[float, float]]:
        return [values(two_ranks.submit("train_step", step).result()) for step in numbers]

    two_ranks.initialize(config, path)
    straight = steps(range(4))
    two_ranks.initialize(config, path)
    first = steps(range(2))
    staging = staging_directory(config.output_dir, 2)
    two_ranks.submit("do_checkpoint", str(staging)).result()
    state = {field.name: None for field in dataclasses.fields(TrainState)} | {"step": 2}
    saved = commit(staging, TrainState(**state))
    two_ranks.initialize(config, path, None, str(saved.path))

    assert first + steps(range(2, 4)) == straight


@pytest.mark.ray
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_goes_on_with_another_number_of_ranks(
    workspace: Workspace, ray_session: Any, tmp_path: Path, stage: int
) -> None:
    """The whole pipeline on two ranks, then on one from its checkpoint, writes the metrics of one rank alone."""
    metrics = []
    for name, several_ranks in (("alone", (1,)), ("changing", (2, 1))):
        for ranks in several_ranks:
            config = workspace.config(
                stage=stage,
                ranks=ranks,
                micro_batches=2 // ranks,
                output_dir=str(tmp_path / name),
                logging_dir=str(tmp_path / name),
                resume_from_checkpoint=True,
                export_dir=str(tmp_path / f"model-{name}"),
                training={"max_steps": 2 if ranks == 2 else 5, "lr_scheduler_type": "constant"},
            )
            SFTPipeline(config, use_ray=ranks > 1).run()
        lines = (tmp_path / name / "sft" / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line) for line in lines])

    assert [line["step"] for line in metrics[1]] == [1, 2, 3, 4, 5]
    for one, changing in zip(*metrics, strict=True):
        for name in ("step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "num_label_tokens"):
            assert changing[name] == pytest.approx(one[name], rel=5e-5)
    checkpoints_left = sorted(path.name for path in (tmp_path / "changing" / "sft_train").iterdir())
    assert checkpoints_left == ["checkpoint-2", "checkpoint-5"]
    assert ray_session.is_initialized(), "what the pipeline did not start it does not stop"


@pytest.mark.ray
def test_an_error_in_one_rank_ends_the_run(workspace: Workspace, ray_session: Any) -> None:
    """While the other rank waits for it in a collective, the error of a rank is reported within seconds."""
    config = two_rank_config(workspace)
    cluster = Cluster(config)
    cluster.initialize(config, dataset_of(config).path)
    waiting, failing = cluster._actors
    start = time.monotonic()
    references = [waiting.call.remote("train_step", 0), failing.call.remote("no_such_method")]

    with pytest.raises(TrainError, match=r"rank 1 on .* failed: AttributeError.*no_such_method"):
        cluster.wait(references)

    assert time.monotonic() - start < clusters.GRACE_SECONDS
    with pytest.raises(ray_session.exceptions.RayActorError):
        ray_session.get(waiting.locate.remote(), timeout=30)


@pytest.mark.ray
def test_a_killed_rank_is_the_first_cause(workspace: Workspace, ray_session: Any) -> None:
    """A rank that is killed in the middle of training is named, not the broken connection that others report."""
    config = two_rank_config(workspace, training={"max_steps": 100_000})
    cluster = Cluster(config)
    cluster.initialize(config, dataset_of(config).path)
    cluster.submit("train_step", 0).result()
    calls = [cluster.submit("train_step", step) for step in range(1, 2000)]
    calls[10].result()
    os.kill(cluster._locations[1].pid, signal.SIGKILL)
    start = time.monotonic()

    def wait_for_all() -> None:
        for call in calls:
            call.result()

    with pytest.raises(TrainError, match=r"rank 1 on .* died"):
        wait_for_all()
    assert time.monotonic() - start < 3 * clusters.GRACE_SECONDS


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["stopped", "endless"])
def test_a_hung_rank_is_named(workspace: Workspace, ray_session: Any, kind: str) -> None:
    """A process that is stopped, and one that works for ever at one step, end the run within the time that is set."""
    timeouts = {"stopped": {"heartbeat_timeout": 5.0}, "endless": {"hang_timeout": 5.0}}
    config = two_rank_config(workspace, training={"max_steps": 1000}, **timeouts[kind])
    cluster = Cluster(config)
    cluster.initialize(config, dataset_of(config).path)
    cluster.submit("train_step", 0).result()

    def sleep_in_training(actor: Any) -> None:
        def train_step_that_never_ends(step: int) -> None:
            time.sleep(1e6)

        actor._worker.train_step = train_step_that_never_ends

    if kind == "stopped":
        os.kill(cluster._locations[1].pid, signal.SIGSTOP)
    else:
        ray_session.get(cluster._actors[1].__ray_call__.remote(sleep_in_training))
    pids = [location.pid for location in cluster._locations]
    start = time.monotonic()
    with pytest.raises(TrainError, match=r"rank 1 on .*: it ha") as caught:
        cluster.submit("train_step", 1).result()

    assert caught.value.code == "rank_hung"
    assert time.monotonic() - start < 30
    if kind == "endless":
        assert "train_step_that_never_ends" in str(caught.value.hint)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "no process is left"


@pytest.mark.ray
def test_a_run_starts_again_after_a_rank_is_killed(
    workspace: Workspace, ray_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its last checkpoint, by itself, to the very metrics of a run that was never disturbed."""
    clusters_made: list[Cluster] = []

    class Remembered(Cluster):
        """Can be found by the test."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            clusters_made.append(self)

    def options(name: str) -> dict[str, Any]:
        return {"output_dir": str(tmp_path / name), "logging_dir": str(tmp_path / name), "save_steps": 2}

    def run(config: SFTConfig) -> list[dict[str, Any]]:
        SFTPipeline(config).run()
        lines = (Path(config.logging_dir) / "sft" / "metrics.jsonl").read_text().splitlines()
        same = ("step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", "num_skipped_steps")
        return [{name: json.loads(line)[name] for name in same} for line in lines]

    expected = run(two_rank_config(workspace, **options("whole")))
    write = StepFile.write

    def write_and_kill(self: StepFile, metrics: dict[str, Any]) -> None:
        write(self, metrics)
        if metrics["step"] == 3 and len(clusters_made) == 1:
            os.kill(clusters_made[0]._locations[1].pid, signal.SIGKILL)

    monkeypatch.setattr(pipelines, "Cluster", Remembered)
    monkeypatch.setattr(StepFile, "write", write_and_kill)

    assert run(two_rank_config(workspace, **options("killed"))) == expected
    assert len(clusters_made) == 2
    log = (tmp_path / "killed" / "sft" / "train.log").read_text()
    assert "rank 1 on" in log
    assert "starting again, 2 more times at most" in log


@pytest.mark.ray
def test_what_others_hold_is_refused(workspace: Workspace, ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that would wait for cores that others hold ends, with what it asked for and what is free."""
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr(clusters, "_RESERVE_SECONDS", 1.0)
    held = placement_group([{"CPU": 1}])
    assert held.wait(30)
    try:
        with pytest.raises(
            ClusterError, match=r"asked for 8 CPU of .*, which has 8; in .* [0-7] CPU are free"
        ) as caught:
            Cluster(workspace.config(ranks=8))
    finally:
        remove_placement_group(held)
    assert caught.value.code == "no_room"


def restarts_of(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, error: TrainError, fails_at: int, **changes: Any
) -> int:
    """How often the ranks of a run are started whose step `fails_at`, from 0, always fails."""
    starts = []

    class Failing(LocalCluster):
        """One rank that cannot do one of the steps."""

        def __init__(self, config: SFTConfig) -> None:
            super().__init__(config)
            starts.append(1)

        def submit(self, method: str, *arguments: Any) -> Any:
            if method == "train_step" and arguments[0] >= fails_at:
                raise error
            return super().submit(method, *arguments)

    monkeypatch.setattr(pipelines, "LocalCluster", Failing)
    with pytest.raises(TrainError) as caught:
        SFTPipeline(workspace.config(**changes), use_ray=False).run()
    assert caught.value is error
    return len(starts)


@pytest.mark.parametrize(
    ("code", "fails_at", "changes", "num_starts"),
    [
        ("rank_died", 3, {"save_steps": 1}, 2),  # the second start cannot do its first step either
        ("rank_hung", 3, {}, 3),  # no checkpoint: all steps again, and again
        ("rank_hung", 3, {"max_restarts": 0}, 1),
        ("rank_died", 0, {}, 1),  # not a single step was done
        ("machine_lost", 0, {}, 3),  # which says nothing about the next machine
        ("not_finite", 3, {}, 1),  # it is no failure of a process
    ],
)
def test_only_what_may_help_is_tried_again(
    workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    fails_at: int,
    changes: dict[str, Any],
    num_starts: int,
) -> None:
    """Ranks are started again at most `max_restarts` times, after a process failed, and only while steps get done."""
    error = TrainError("rank 0 is gone", code=code)
    places = {"output_dir": str(tmp_path / "out"), "logging_dir": str(tmp_path / "logs")}
    options = {"max_restarts": 2, **places, **changes}
    assert restarts_of(workspace, monkeypatch, error, fails_at, **options) == num_starts


@pytest.mark.ray
def test_two_ranks_leave_out_the_same_step(tmp_path: Path, ray_session: Any) -> None:
    """A sample that makes the loss of one rank infinite makes both leave the step out, and both go on alike."""
    workspace = broken_workspace(tmp_path)
    config = two_rank_config(workspace, stage=2, on_non_finite="skip")
    cluster = Cluster(config)
    path = dataset_of(config).path
    cluster.initialize(config, path)
    reports = [cluster.submit("train_step", step).result() for step in range(4)]
    cluster.shutdown()
    alone = run_worker(workspace.config(stage=2, on_non_finite="skip"))

    skipped = [[report.is_skipped for report in both] for both in reports]
    assert skipped == [[report.is_skipped] * 2 for report in alone[: len(skipped)]]
    assert sum(map(sum, skipped)) >= 2
    for both, one in zip(reports, alone, strict=False):
        if not one.is_skipped:
            assert values(both) == pytest.approx((one.loss, one.grad_norm), rel=2e-5)
