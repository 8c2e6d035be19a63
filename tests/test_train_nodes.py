"""Training on machines in network namespaces: as on one, and on what is left when one is killed or cut off."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft_fast import ClusterError, ConfigError
from sft_fast.config import SFTConfig
from sft_fast.train.metrics import StepFile
from sft_fast.train.pipeline import SFTPipeline
from tests.node_helpers import Machines, ip, machines_here
from tests.train_helpers import Workspace

# Each starts processes of ranks up to four times.
pytestmark = [pytest.mark.nodes, pytest.mark.ray, pytest.mark.timeout(900)]

NUM_ROWS = 12  # of a global batch: dealt to 1, 2, 3, 4 or 6 ranks in micro-batches of one or two rows
SAME = ("step", "epoch", "learning_rate", "num_tokens", "num_label_tokens", "num_skipped_steps")
CLOSE = ("loss", "grad_norm")


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """The machines of all tests of this file."""
    with machines_here(2) as machines:
        yield machines


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny model and records, on storage that all machines see."""
    return Workspace.create(tmp_path_factory.mktemp("nodes"), num_records=60)


def config_of(workspace: Workspace, out: Path, ranks: int, **changes: Any) -> SFTConfig:
    """Six steps of twelve rows, saved at every second."""
    values = {
        "output_dir": str(out),
        "logging_dir": str(out),
        "export_dir": str(out / "model"),
        "save_steps": 2,
        "heartbeat_timeout": 12.0,
        "rejoin_timeout": 0.0,
        "training": {"max_steps": 6},
    }
    return workspace.config(packed=False, rows=2, ranks=ranks, micro_batches=NUM_ROWS // 2 // ranks, **values | changes)


def metrics_of(config: SFTConfig) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    lines = (Path(config.logging_dir) / "sft" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> SFTConfig:
    """The run on one rank in this process, never disturbed."""
    config = config_of(workspace, tmp_path_factory.mktemp("alone"), 1)
    SFTPipeline(config, use_ray=False).run()
    return config


def assert_equal_runs(run: SFTConfig, other: SFTConfig) -> None:
    """The same samples in the same steps, and to the rounding of float32 the same losses and weights."""
    mine, theirs = metrics_of(run), metrics_of(other)
    assert [line["step"] for line in mine] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(mine, theirs, strict=True):
        assert {name: one[name] for name in SAME} == {name: two[name] for name in SAME}
        for name in CLOSE:
            assert one[name] == pytest.approx(two[name], rel=5e-5)
    weights, others = (load_file(Path(config.export_dir or "") / "model.safetensors") for config in (run, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-3, atol=1e-4)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> list[int]:
    """Acts once, when a step is written down; gives the list that then has it."""
    write, done = StepFile.write, []

    def write_and_act(self: StepFile, metrics: dict[str, Any]) -> None:
        write(self, metrics)
        if metrics["step"] == number and not done:
            done.append(number)
            act()

    monkeypatch.setattr(StepFile, "write", write_and_act)
    return done


def log_of(config: SFTConfig, name: str = "train.log") -> str:
    """A file of the run."""
    return (Path(config.logging_dir) / "sft" / name).read_text()


@pytest.mark.parametrize("stage", [1, 3])
def test_two_machines_are_one(
    machines: Machines, workspace: Workspace, alone: SFTConfig, tmp_path: Path, stage: int
) -> None:
    """A rank on each of two machines trains to the losses and the weights of one process, at ZeRO-1 and ZeRO-3."""
    config = config_of(workspace, tmp_path, 2, ray_address=machines.address, stage=stage)
    SFTPipeline(config).run()

    assert_equal_runs(config, alone)
    addresses = [machines.address_of(number) for number in machines.alive[:2]]
    for rank, address in enumerate(addresses):
        assert f"rank {rank} on " in log_of(config, f"ranks/rank-{rank}.log")
        assert f"({address})" in log_of(config, f"ranks/rank-{rank}.log")


@pytest.mark.parametrize(
    ("num_machines", "loss", "goes_on"),
    [
        pytest.param(
            3, Machines.kill, "going on with 2 of 3 machines: 2 ranks, 3 micro-batches a step each", id="killed"
        ),
        pytest.param(2, Machines.cut, "going on with 1 of 2 machines: 1 ranks, 6 micro-batches a step each", id="cut"),
    ],
)
def test_a_lost_machine_is_done_without(
    machines: Machines,
    workspace: Workspace,
    alone: SFTConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_machines: int,
    loss: Callable[[Machines, Any], object],
    goes_on: str,
) -> None:
    """When a machine is lost, the run is started again on the others, with the same samples in the same steps.

    Its power fails, or its cable is pulled, which closes no connection.
    """
    machines.have(num_machines)
    lost = machines.alive[-1]
    done = at_step(monkeypatch, 3, lambda: loss(machines, lost))
    config = config_of(workspace, tmp_path, num_machines, ray_address=machines.address, min_nodes=num_machines - 1)
    SFTPipeline(config).run()

    assert done
    log = log_of(config)
    assert f"({machines.address_of(lost)}) is lost" in log
    assert goes_on in log
    assert "resuming after step 2" in log
    assert_equal_runs(config, alone)
    assert log_of(config, "ranks/rank-0.log").count("---- ") == 2, "both starts are in one file"


def test_a_short_cut_is_no_loss(
    machines: Machines, workspace: Workspace, alone: SFTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cable that is pulled and put back before anybody gives up costs that time, and no restart."""
    machines.have(2)
    link = machines.link(machines.alive[1])

    def cut_and_heal() -> None:
        ip("link", "set", link, "down")
        threading.Timer(0.5, ip, ("link", "set", link, "up")).start()

    done = at_step(monkeypatch, 3, cut_and_heal)
    config = config_of(workspace, tmp_path, 2, ray_address=machines.address)
    SFTPipeline(config).run()

    assert done
    assert "starting again" not in log_of(config)
    assert_equal_runs(config, alone)


def test_a_lost_machine_is_waited_for(
    machines: Machines, workspace: Workspace, alone: SFTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run waits for a machine that comes back in time, here another in its place, and is then what it was."""
    machines.have(2)
    lost = machines.alive[1]
    adding = threading.Timer(5.0, machines.add)

    def replace() -> None:
        machines.kill(lost)
        adding.start()

    done = at_step(monkeypatch, 3, replace)
    config = config_of(workspace, tmp_path, 2, ray_address=machines.address, rejoin_timeout=120.0)
    SFTPipeline(config).run()
    adding.join()

    assert done
    log = log_of(config)
    assert f"({machines.address_of(lost)}) is lost" in log
    assert "1 of 2 machines are there: waiting for the others" in log
    assert "ranks ready: 2 on 2 machines" in log.rpartition("waiting for the others")[2]
    assert_equal_runs(config, alone)


@pytest.mark.parametrize("what", ["cache", "out"])
def test_a_machine_that_does_not_see_the_files_is_named(
    machines: Machines, workspace: Workspace, tmp_path: Path, what: str
) -> None:
    """A machine with a disk of its own, where the others share one, is refused by name before anything is loaded."""
    config = config_of(workspace, tmp_path / "out", 2, ray_address=machines.address)
    config.data_cache_dir = str(tmp_path / "cache")
    for name in ("cache", "out"):
        (tmp_path / name).mkdir()
    while len(machines.alive) > 1:
        machines.kill(machines.alive[-1])
    number = machines.add(private=tmp_path / what)
    named = rf"rank 1 on .*\({machines.address_of(number)}\) does not see "
    with pytest.raises(ConfigError, match=named + {"cache": "the training data", "out": "what this machine"}[what]):
        SFTPipeline(config).run()
    machines.kill(number)


def test_a_rank_that_does_not_reach_the_first_is_named(
    machines: Machines, workspace: Workspace, tmp_path: Path
) -> None:
    """Where a firewall or a route is between two machines, the run ends at once and names both."""
    machines.have(2)
    first, second = machines.alive[:2]
    route = f"{machines.address_of(first)}/32"
    ip("-n", machines.space(second), "route", "add", "unreachable", route)
    first_name, second_name = (rf"\({machines.address_of(number)}\)" for number in (first, second))
    config = config_of(workspace, tmp_path, 2, ray_address=machines.address)
    words = rf"rank 1 on .*{second_name} cannot reach rank 0 on .*{first_name}: No route to host"
    try:
        with pytest.raises(ClusterError, match=words):
            SFTPipeline(config).run()
    finally:
        ip("-n", machines.space(second), "route", "del", "unreachable", route)
