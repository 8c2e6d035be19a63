"""Which rank runs on which machine: read from `device_mapping`, and again from what is left when machines are lost.

Plain values and arithmetic; Ray is asked in `cluster.py`.

With GPUs, device `d` is GPU `d % n` of machine `d // n`, where n is `num_gpus_per_node`. On the CPU, the ranks are cut
into blocks of neighbours, one a machine, as equal as can be. Machines are counted without those that have nothing to
offer (no GPU, or no core): the driver's first, the others by address.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft_fast.console import count
from sft_fast.errors import ClusterError, ConfigError
from sft_fast.train.strategy.base import RankInfo

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig


@dataclass(frozen=True)
class Machine:
    """A node of the Ray cluster."""

    node_id: str
    host: str
    address: str
    port: int  # where Ray listens on it
    num_cores: int
    num_gpus: int
    is_ours: bool  # whether this process runs on it

    @property
    def name(self) -> str:
        """Host and address, for people."""
        return f"{self.host} ({self.address})"


@dataclass(frozen=True)
class Seat:
    """What one rank has."""

    device: int  # its number in `device_mapping`
    machine: int  # from 0
    gpu: int | None  # its number on that machine; None for a rank on the CPU


@dataclass(frozen=True)
class Layout:
    """The seats of all ranks, in the order of the ranks."""

    seats: tuple[Seat, ...]

    @property
    def num_machines(self) -> int:
        """Machines that there have to be."""
        return 1 + max(seat.machine for seat in self.seats)

    def on_first(self, num_machines: int) -> Layout | None:
        """The seats that are on the first machines, for a run without the others; None where there are none."""
        seats = tuple(seat for seat in self.seats if seat.machine < num_machines)
        return Layout(seats) if seats else None

    def missing_from(self, machines: Sequence[Machine]) -> str | None:
        """What the first machines lack for it, in words; None where it fits."""
        for seat in self.seats:
            if seat.machine >= len(machines):
                return f"device {seat.device} is on machine {seat.machine + 1}, but Ray has {len(machines)}"
            machine = machines[seat.machine]
            if seat.gpu is not None and seat.gpu >= machine.num_gpus:
                return f"device {seat.device} is GPU {seat.gpu} of a machine that has {machine.num_gpus}"
        return None

    def infos(self) -> list[RankInfo]:
        """What each rank is among the others, but for the place where they meet."""
        num_on = Counter(seat.machine for seat in self.seats)
        num_before: Counter[int] = Counter()
        infos = []
        for rank, seat in enumerate(self.seats):
            infos.append(
                RankInfo(
                    rank=rank,
                    world_size=len(self.seats),
                    local_rank=num_before[seat.machine],
                    local_world_size=num_on[seat.machine],
                    device="cpu" if seat.gpu is None else "cuda",
                )
            )
            num_before[seat.machine] += 1
        return infos

    def bundles(self, machines: Sequence[Machine]) -> list[tuple[Machine, dict[str, float]]]:
        """What to reserve: of each machine that has ranks, their GPUs, or a core for each as far as there are."""
        reserved = []
        for number, num_ranks in sorted(Counter(seat.machine for seat in self.seats).items()):
            machine = machines[number]
            has_gpus = any(seat.gpu is not None for seat in self.seats)
            kind, amount = ("GPU", num_ranks) if has_gpus else ("CPU", min(num_ranks, machine.num_cores))
            reserved.append((machine, {kind: float(amount)}))
        return reserved


def machines_of(nodes: Sequence[dict[str, Any]], driver_node: str) -> list[Machine]:
    """The machines that are alive, from what `ray.nodes()` says: the driver's first, the others by address."""
    machines = [
        Machine(
            node_id=node["NodeID"],
            host=node.get("NodeManagerHostname", ""),
            address=node["NodeManagerAddress"],
            port=int(node.get("NodeManagerPort", 0)),
            num_cores=int(node["Resources"].get("CPU", 0)),
            num_gpus=int(node["Resources"].get("GPU", 0)),
            is_ours=node["NodeID"] == driver_node,
        )
        for node in nodes
        if node["Alive"]
    ]
    return sorted(machines, key=lambda machine: (not machine.is_ours, _order(machine.address), machine.node_id))


def usable(config: SFTConfig, machines: Sequence[Machine]) -> list[Machine]:
    """Those that the run can use."""
    if _has_gpus(config, machines):
        return [machine for machine in machines if machine.num_gpus]
    return [machine for machine in machines if machine.num_cores]


def layout_of(config: SFTConfig, machines: Sequence[Machine]) -> Layout:
    """The seats that `device_mapping` names, on `usable` machines.

    Raises:
        ConfigError: there is no such machine or GPU, or none at all.
    """
    devices = config.sft_train.devices
    if not machines:
        kind = "GPU" if config.num_gpus_per_node else "core"
        raise _no_such_device(f"{count(len(devices))} ranks need a {kind}, but no machine of Ray that answers has one")
    if _has_gpus(config, machines):
        num_gpus = config.num_gpus_per_node or machines[0].num_gpus
        layout = Layout(tuple(Seat(device, *divmod(device, num_gpus)) for device in devices))
    else:
        num_machines = min(len(machines), len(devices))
        machine_of = [rank * num_machines // len(devices) for rank in range(len(devices))]
        layout = Layout(tuple(Seat(device, machine_of[rank], None) for rank, device in enumerate(devices)))
    reason = layout.missing_from(machines)
    if reason is not None:
        offered = "; ".join(f"{m.name}: {m.num_gpus} GPUs, {m.num_cores} cores" for m in machines)
        raise _no_such_device(f"{reason}. What there is: {offered}")
    return layout


def with_layout(config: SFTConfig, layout: Layout) -> SFTConfig:
    """The same run on other ranks: more micro-batches where there are fewer, so that each step has the same samples.

    Raises:
        ClusterError: the rows of a step cannot be dealt to so many ranks alike.
    """
    devices = [seat.device for seat in layout.seats]
    if devices == config.sft_train.devices:
        return config
    changed = copy.deepcopy(config)
    changed.sft_train.device_mapping = list(devices)
    arguments = changed.sft_train.training_args
    rows, num_ranks = config.num_rows_per_step, len(devices)
    group = config.tensor_parallel_size * config.sequence_parallel_size
    rows_at_once = arguments.per_device_train_batch_size * (num_ranks // group)
    if num_ranks % group or rows % rows_at_once:
        raise ClusterError(
            f"{count(rows)} rows a step (the global batch) cannot be dealt to {count(num_ranks)} ranks"
            + (f" in groups of {group}" if group > 1 else "")
            + f" in micro-batches of {arguments.per_device_train_batch_size}",
            code="global_batch",
            hint="a run keeps its samples in their steps: per_device_train_batch_size x gradient_accumulation_steps x "
            "ranks must be the same for the machines that are left",
        )
    arguments.gradient_accumulation_steps = rows // rows_at_once
    return changed


def shrink(config: SFTConfig, began: Layout, machines: Sequence[Machine]) -> tuple[SFTConfig, Layout]:
    """The run on the machines that are left: on as many as the global batch can be dealt to, `min_nodes` at least.

    Args:
        config: of the run as it began.
        began: the seats with which it began.
        machines: those that are there and `usable`.

    Raises:
        ClusterError: there are fewer than `min_nodes`, or the global batch cannot be dealt to any number of them.
    """
    least = began.num_machines if config.min_nodes is None else min(config.min_nodes, began.num_machines)
    if len(machines) < least:
        there = ", ".join(machine.name for machine in machines) or "none"
        raise ClusterError(
            f"the run needs {count(least)} machines, of {count(began.num_machines)} with which it began, but "
            f"{count(len(machines))} are there: {there}",
            code="too_few_machines",
            hint="min_nodes says with how many a run goes on, rejoin_timeout how long it waits for the others; with "
            "resume_from_checkpoint=true the same command goes on when they are back",
        )
    reason: ClusterError | None = None
    for num_machines in range(min(len(machines), began.num_machines), least - 1, -1):
        layout = began.on_first(num_machines)
        if layout is None or layout.missing_from(machines) is not None:
            continue
        try:
            return with_layout(config, layout), layout
        except ClusterError as error:
            reason = reason or error
    raise reason or ClusterError(
        "the machines that are left have none of the devices of the run", code="too_few_machines"
    )


def _has_gpus(config: SFTConfig, machines: Sequence[Machine]) -> bool:
    """Whether the ranks run on GPUs: as configured, else if there are any."""
    if config.num_gpus_per_node is None:
        return any(machine.num_gpus for machine in machines)
    return config.num_gpus_per_node > 0


def _no_such_device(reason: str) -> ConfigError:
    return ConfigError(
        reason,
        code="no_device",
        location="sft_train.device_mapping",
        hint="set device_mapping and num_gpus_per_node to what there is; num_gpus_per_node=0 trains on the CPU",
    )


def _order(address: str) -> tuple[Any, ...]:
    """10.0.0.9 before 10.0.0.10; what is no number stays text, behind them."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in address.split("."))


def visible_device(gpu: int) -> str:
    """GPU number `gpu` as CUDA_VISIBLE_DEVICES says it, where that variable already leaves only some."""
    allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return allowed[gpu].strip() if gpu < len(allowed) else str(gpu)
