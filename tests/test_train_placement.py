"""Where ranks run, on what network, and with how many micro-batches when machines are lost; without Ray."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from sft_fast import ClusterError, ConfigError
from sft_fast.config import SFTConfig
from sft_fast.train import cluster as clusters
from sft_fast.train import network
from sft_fast.train.actor import RankActor, last_output
from sft_fast.train.checkpoint import mark_written, missing_parts
from sft_fast.train.cluster import Cluster
from sft_fast.train.placement import (
    Machine,
    layout_of,
    machines_of,
    shrink,
    usable,
    visible_device,
    with_layout,
)
from tests.train_helpers import Workspace


def node(name: str, address: str, gpus: int = 4, cores: int = 8, *, is_alive: bool = True) -> dict[str, Any]:
    """A machine, in Ray's words."""
    resources = {kind: float(number) for kind, number in (("CPU", cores), ("GPU", gpus)) if number}
    return {
        "NodeID": name,
        "NodeManagerAddress": address,
        "NodeManagerHostname": f"host-{name}",
        "NodeManagerPort": 1,
        "Alive": is_alive,
        "Resources": resources,
    }


NODES = [node("b", "10.0.0.2"), node("a", "10.0.0.1"), node("c", "10.0.0.0", is_alive=False)]


def machine(number: int, *, gpus: int = 0, cores: int = 2) -> Machine:
    """One of several."""
    return Machine(f"n{number}", f"host{number}", f"10.0.0.{number}", 1, cores, gpus, is_ours=number == 1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Only its configurations are used."""
    root = tmp_path_factory.mktemp("placement")
    return Workspace(root, root / "model", root / "records.jsonl")


def batch(config: SFTConfig) -> tuple[int, int, int]:
    """Ranks, micro-batches and rows a step."""
    training = config.sft_train.training_args
    return config.sft_train.world_size, training.gradient_accumulation_steps, config.num_rows_per_step


def test_devices_are_where_the_mapping_says(workspace: Workspace) -> None:
    """Device d is GPU d % n of machine d // n: this machine first, dead ones never, ranks in the mapping's order."""
    config = workspace.config(num_gpus_per_node=4)
    config.sft_train.device_mapping = [5, 0, 3]
    machines = usable(config, machines_of(NODES, "b"))
    layout = layout_of(config, machines)

    assert [(machines[seat.machine].node_id, seat.gpu) for seat in layout.seats] == [("a", 1), ("b", 0), ("b", 3)]
    infos = layout.infos()
    assert [info.rank for info in infos] == [0, 1, 2]
    assert [(info.local_rank, info.local_world_size) for info in infos] == [(0, 1), (0, 2), (1, 2)]
    assert {info.device for info in infos} == {"cuda"}
    assert [(found.node_id, what) for found, what in layout.bundles(machines)] == [("b", {"GPU": 2}), ("a", {"GPU": 1})]


def test_machines_come_in_one_order() -> None:
    """The driver's machine is the first, the others follow by the numbers of their addresses, not by their letters."""
    nodes = [node("x", "10.0.0.10"), node("y", "10.0.0.9"), node("z", "10.0.0.11")]
    assert [found.node_id for found in machines_of(nodes, "z")] == ["z", "y", "x"]


@pytest.mark.parametrize(
    ("mapping", "gpus", "message"), [([8], 4, "machine 3"), ([6], 8, "GPU 6 of a machine that has 4")]
)
def test_a_device_that_is_not_there_is_refused(
    workspace: Workspace, mapping: list[int], gpus: int, message: str
) -> None:
    """A machine or a GPU that Ray does not have is an error before any process starts, which says what there is."""
    config = workspace.config(num_gpus_per_node=gpus)
    config.sft_train.device_mapping = mapping
    with pytest.raises(ConfigError, match=message) as caught:
        layout_of(config, machines_of(NODES, "b"))
    assert caught.value.location == "sft_train.device_mapping"
    assert "host-b (10.0.0.2): 4 GPUs, 8 cores; host-a (10.0.0.1): 4 GPUs, 8 cores" in caught.value.message


def test_a_machine_without_what_is_needed_does_not_count(workspace: Workspace) -> None:
    """A head without GPUs is not machine 0 of a run on GPUs, nor one without cores of a run on the CPU."""
    nodes = [node("head", "10.0.0.1", gpus=0, cores=0), node("a", "10.0.0.2"), node("b", "10.0.0.3", gpus=0)]
    machines = machines_of(nodes, "head")

    assert [found.node_id for found in usable(workspace.config(num_gpus_per_node=4), machines)] == ["a"]
    assert [found.node_id for found in usable(workspace.config(num_gpus_per_node=None), machines)] == ["a"]
    assert [found.node_id for found in usable(workspace.config(), machines)] == ["a", "b"]
    with pytest.raises(ConfigError, match="2 ranks need a core, but no machine of Ray that answers has one"):
        layout_of(workspace.config(ranks=2), usable(workspace.config(), machines[:1]))


@pytest.mark.parametrize(
    ("num_ranks", "num_machines", "expected"),
    [(2, 1, [0, 0]), (2, 2, [0, 1]), (2, 3, [0, 1]), (5, 2, [0, 0, 0, 1, 1]), (6, 3, [0, 0, 1, 1, 2, 2])],
)
def test_ranks_of_the_cpu_are_spread(
    workspace: Workspace, num_ranks: int, num_machines: int, expected: list[int]
) -> None:
    """Neighbours share a machine, all machines have ranks if there are enough, and none has two more than another."""
    machines = [machine(number) for number in range(1, num_machines + 1)]
    layout = layout_of(workspace.config(ranks=num_ranks), machines)

    assert [seat.machine for seat in layout.seats] == expected
    assert {info.device for info in layout.infos()} == {"cpu"}
    for found, what in layout.bundles(machines):
        assert what == {"CPU": min(2, expected.count(machines.index(found)))}, "no more cores than there are"


@pytest.mark.parametrize(("num_left", "micro_batches"), [(4, 3), (3, 4), (2, 6), (1, 12)])
def test_fewer_machines_do_more_micro_batches(workspace: Workspace, num_left: int, micro_batches: int) -> None:
    """Four machines with two GPUs each become fewer, with the rows of each step that they had."""
    config = workspace.config(ranks=8, rows=5, micro_batches=3, num_gpus_per_node=2, min_nodes=1)
    began = layout_of(config, [machine(number, gpus=2) for number in range(4)])
    changed, layout = shrink(config, began, [machine(number, gpus=2) for number in range(num_left)])

    assert batch(config) == (8, 3, 120)
    assert batch(changed) == (2 * num_left, micro_batches, 120)
    assert len(layout.seats) == 2 * num_left
    assert batch(config) == (8, 3, 120), "the configuration of the run stays as it is"


def test_the_batch_decides_how_many_machines(workspace: Workspace) -> None:
    """Where the rows of a step can't be dealt to three machines, two of them go on."""
    config = workspace.config(ranks=4, rows=2, micro_batches=1, min_nodes=1)
    began = layout_of(config, [machine(number) for number in range(4)])
    changed, layout = shrink(config, began, [machine(number) for number in range(3)])

    assert batch(changed) == (2, 2, 8)
    assert layout.num_machines == 2


@pytest.mark.parametrize(
    ("num_left", "changes", "code", "message"),
    [
        (2, {"min_nodes": 3}, "too_few_machines", r"needs 3 machines, of 4 .* 2 are there: host0 \(10.0.0.0\), host1"),
        (3, {}, "too_few_machines", "needs 4 machines"),
        (0, {"min_nodes": 1}, "too_few_machines", "0 are there: none"),
        (3, {"min_nodes": 3}, "global_batch", r"8 rows a step .* cannot be dealt to 3 ranks in micro-batches of 2"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(
    workspace: Workspace, num_left: int, changes: dict[str, Any], code: str, message: str
) -> None:
    """Too few machines, and a global batch that does not divide, are refused with the numbers."""
    config = workspace.config(ranks=4, rows=2, micro_batches=1, **changes)
    began = layout_of(config, [machine(number) for number in range(4)])
    with pytest.raises(ClusterError, match=message) as caught:
        shrink(config, began, [machine(number) for number in range(num_left)])
    assert caught.value.code == code


def test_groups_that_split_weights_stay_whole(workspace: Workspace) -> None:
    """Ranks that are left must be a multiple of those that share weights or rows."""
    config = workspace.config(ranks=6, rows=1, micro_batches=2)
    config.sft_train.strategy_args.strategy_config["tensor_parallel"] = {"autotp_size": 2}
    began = layout_of(config, [machine(number) for number in range(2)])
    half = began.on_first(1)
    assert half is not None
    with pytest.raises(ClusterError, match="3 ranks in groups of 2"):
        with_layout(config, half)


@pytest.mark.parametrize(("patience", "num_machines"), [(60.0, 3), (0.0, 1)])
def test_lost_machines_are_waited_for(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, patience: float, num_machines: int
) -> None:
    """A run that starts again waits for all its machines, and goes on with fewer only when the time is over."""
    machines = [machine(number) for number in range(3)]
    there: list[Machine] = []

    def look(_cluster: Cluster, _config: SFTConfig) -> list[Machine]:
        there.append(machines[len(there)])  # one more at each look
        return list(there)

    monkeypatch.setattr(Cluster, "_look", look)
    monkeypatch.setattr(clusters, "_WATCH_SECONDS", 0.01)
    config = workspace.config(ranks=3, rows=2, micro_batches=1, min_nodes=1, rejoin_timeout=patience)
    began = layout_of(config, machines)
    notes: list[str] = []
    changed, layout, _ = Cluster._wait_for_machines(Cluster.__new__(Cluster), config, began, notes.append)

    assert layout.num_machines == num_machines
    assert changed.num_rows_per_step == config.num_rows_per_step
    assert ("waiting for the others" in notes[0]) == (patience > 0)
    assert len(notes) == 1


def test_visible_devices_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processes of a machine may use only some GPUs, device numbers count those."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [visible_device(gpu) for gpu in (0, 1)] == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_device(1) == "1"


def test_the_interface_is_that_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo and NCCL use the interface that has Ray's address, unless the environment names another."""
    name = network.interface_of("127.0.0.1")
    assert name in {name for _, name in socket.if_nameindex()}
    assert network.interface_of("192.0.2.1") is None

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    network.use_interface_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={name}"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")


def test_who_answers_is_there() -> None:
    """Of the machines of a cluster, those count whose port takes connections; this one always."""
    with network.listen() as listening:
        port = listening.getsockname()[1]
        there = Machine("a", "h", "127.0.0.1", port, 1, 0, is_ours=False)
        gone = Machine("b", "h", "127.0.0.1", network.free_port(), 1, 0, is_ours=False)
        ours = Machine("c", "h", "127.0.0.1", network.free_port(), 1, 0, is_ours=True)
        assert network.answering([gone, ours, there]) == [ours, there]


def test_what_a_machine_does_not_see_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor says which of the files that it is to read are not on its machine."""
    monkeypatch.setattr("sft_fast.train.actor._SEE_SECONDS", 0.0)
    paths = {"the model": str(tmp_path), "the data": str(tmp_path / "no")}
    assert RankActor.unseen(RankActor.__new__(RankActor), paths) == ["the data"]


def test_a_checkpoint_without_a_part_is_known(tmp_path: Path) -> None:
    """The ranks whose part is not seen on the driver's machine are those that are missing."""
    mark_written(tmp_path, 1)
    assert missing_parts(tmp_path, 3) == [0, 2]


def test_the_last_words_are_those_of_the_last_start(tmp_path: Path) -> None:
    """Of a log with several starts, the end of the last one is shown."""
    log = tmp_path / "rank-0.log"
    log.write_text("---- first\nold\n---- second\nnew 1\nnew 2\n")
    assert last_output(log) == "new 1\nnew 2"
    assert last_output(tmp_path / "none") == ""
