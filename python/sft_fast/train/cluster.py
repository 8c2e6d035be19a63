"""The ranks of a run, as the driver sees them: one call reaches all, and the first error of any ends them all.

One Ray actor a rank, in a placement group that reserves the devices which `placement` has found. An error in one rank
makes the others fail too, in whatever they were doing together, and often sooner for the driver to see. The error that
is reported is the first cause: see `failure`. A rank that hangs is found by its `heartbeat`, a machine that is lost by
trying to reach it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_fast.console import count, seconds
from sft_fast.errors import ClusterError, ConfigError
from sft_fast.ray_session import cluster_address, connect
from sft_fast.train.actor import ActorOptions, Location, RankActor, last_output
from sft_fast.train.checkpoint import CLUSTER_NAME
from sft_fast.train.failure import Failure, first_cause, to_error
from sft_fast.train.heartbeat import LONG_WORK_FACTOR, Heartbeats, PulseReport
from sft_fast.train.network import answering
from sft_fast.train.placement import (
    Layout,
    Machine,
    layout_of,
    machines_of,
    shrink,
    usable,
    with_layout,
)
from sft_fast.train.ranks import Call, environment_of, num_cores

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig

# After an error that another rank may have set off, the driver waits this long for that rank's own.
GRACE_SECONDS = 10.0

# How long the driver waits for answers before it looks whether all ranks still get on.
_WATCH_SECONDS = 1.0

# How long what a run reserves may be held by others, such as the ranks before it that are just ending.
_RESERVE_SECONDS = 30.0


class Cluster:
    """One Ray actor a rank. Starts Ray on this machine, or joins the cluster of `ray_address`."""

    def __init__(
        self, config: SFTConfig, began: Layout | None = None, note: Callable[[str], None] = lambda _text: None
    ) -> None:
        """Starts the actors; the model comes with `initialize`.

        Args:
            config: the run.
            began: the layout with which the run began, if it starts again: its machines are waited for, and then it
                goes on with those that are there.
            note: takes what there is to say meanwhile.

        Raises:
            ConfigError: `device_mapping` names a machine or a device that is not there.
            ClusterError: others hold what is needed; or too few machines are left.
            TrainError: a machine was lost meanwhile.
        """
        self._actors: list[Any] = []
        self._group: Any = None
        self._locations: list[Location] = []
        self._ray, self._has_joined = connect(cluster_address(config.ray_address))
        try:
            if began is None:
                machines = self._look(config)
                self.layout = layout_of(config, machines)
                self.config = config
            else:
                self.config, self.layout, machines = self._wait_for_machines(config, began, note)
            self.world_size = len(self.layout.seats)
            self._machines = [machines[seat.machine] for seat in self.layout.seats]  # by rank
            self.num_machines = len({machine.node_id for machine in self._machines})
            self._logs = Path(config.logging_dir, config.exp_name, "ranks")
            self._start(machines)
            self._locations = self._locate()
        except BaseException:
            self.shutdown()
            raise
        self._heartbeats = Heartbeats(
            self._ask_pulse, self._pulse, self.world_size, config.heartbeat_timeout, config.hang_timeout
        )
        address = self._machines[0].address if self.num_machines > 1 else "127.0.0.1"
        self._ranks = [
            replace(info, master_address=address, master_port=self._locations[0].port) for info in self.layout.infos()
        ]

    def _look(self, config: SFTConfig) -> list[Machine]:
        """The machines that the run can use and that answer."""
        nodes, ours = self._ray.nodes(), self._ray.get_runtime_context().get_node_id()
        return answering(usable(config, machines_of(nodes, ours)))

    def _wait_for_machines(
        self, config: SFTConfig, began: Layout, note: Callable[[str], None]
    ) -> tuple[SFTConfig, Layout, list[Machine]]:
        """Waits for all that the run began with, `rejoin_timeout` at most, and then takes what is there."""
        deadline, has_said = time.monotonic() + config.rejoin_timeout, False
        while True:
            machines = self._look(config)
            if began.missing_from(machines) is None:
                return with_layout(config, began), began, machines
            if time.monotonic() >= deadline:
                changed, layout = shrink(config, began, machines)
                note(
                    f"going on with {count(layout.num_machines)} of {count(began.num_machines)} machines: "
                    f"{count(len(layout.seats))} ranks, "
                    f"{count(changed.sft_train.training_args.gradient_accumulation_steps)} micro-batches a step each"
                )
                return changed, layout, machines
            if not has_said:
                note(
                    f"{count(len(machines))} of {count(began.num_machines)} machines are there: waiting for the "
                    f"others, {seconds(config.rejoin_timeout)} at most (rejoin_timeout)"
                )
                has_said = True
            time.sleep(_WATCH_SECONDS)

    def _start(self, machines: Sequence[Machine]) -> None:
        """Reserves the devices, and starts the process of each rank with its environment set before any import."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        reserved = self.layout.bundles(machines)
        self._group = placement_group(
            [resources for _, resources in reserved],
            bundle_label_selector=[{"ray.io/node-id": machine.node_id} for machine, _ in reserved],
        )
        if not self._group.wait(_RESERVE_SECONDS):
            raise _no_room(reserved, self._ray.available_resources())
        bundle_of = {machine.node_id: number for number, (machine, _) in enumerate(reserved)}
        remote = self._ray.remote(concurrency_groups={"heartbeat": 1, "writer": 1})(RankActor)
        for info, seat, machine in zip(self.layout.infos(), self.layout.seats, self._machines, strict=True):
            cores = num_cores() if machine.is_ours else max(1, machine.num_cores)
            variables = environment_of(self.config, info.local_world_size, cores)
            variables["DS_ACCELERATOR"] = info.device
            # Ray is asked for no GPU, and leaves the choice to the actor.
            variables["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
            options = ActorOptions(
                rank=info.rank,
                gpu=seat.gpu,
                address=machine.address if self.num_machines > 1 else None,
                directory=os.getcwd(),
                log_path=str(self._log_of(info.rank)),
            )
            actor = remote.options(
                name=f"{CLUSTER_NAME}-{info.rank}-{os.getpid()}-{time.monotonic_ns()}",
                num_cpus=0,
                num_gpus=0,
                runtime_env={"env_vars": variables},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=bundle_of[machine.node_id]
                ),
            ).remote(options)
            self._actors.append(actor)

    def _locate(self) -> list[Location]:
        """Where the ranks are; asked of all at once, so that they start at the same time."""
        return self._ask("locate", [()] * self.world_size, "it does not start")

    def _ask(self, method: str, arguments: Sequence[tuple[Any, ...]], complaint: str) -> list[Any]:
        """What each rank's actor (not its worker) answers to a question.

        Raises:
            TrainError: a rank has ended, its machine is lost, or it has not answered in the time for long work.
        """
        patience = LONG_WORK_FACTOR * self.config.hang_timeout
        calls = zip(self._actors, arguments, strict=True)
        pending = {getattr(actor, method).remote(*values): rank for rank, (actor, values) in enumerate(calls)}
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + patience
        while pending:
            ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=_WATCH_SECONDS)
            for reference in ready:
                rank = pending.pop(reference)
                answers[rank] = self._get(reference, rank)
            failures = [answer for answer in answers.values() if isinstance(answer, Failure)]
            if not ready:
                failures += self._lost(pending.values())
            if not ready and time.monotonic() > deadline:
                reason = f"{complaint}: no answer for {seconds(patience)}"
                failures += [self._failure(rank, "hung", reason) for rank in pending.values()]
            if failures:
                self.shutdown()
                raise to_error(first_cause(failures))
        return [answers[rank] for rank in range(self.world_size)]

    def check_shared(self, paths: Mapping[str, str], directories: Sequence[str]) -> None:
        """See `Ranks`."""
        if self.num_machines == 1:
            return
        wanted = {f"{what} {path}": os.path.abspath(path) for what, path in paths.items() if "://" not in path}
        probes = []
        try:
            for directory in directories:
                # A file that no other machine can have by chance.
                probe = Path(directory).absolute() / f".shared-{uuid.uuid4().hex}"
                probe.parent.mkdir(parents=True, exist_ok=True)
                probe.touch()
                probes.append(probe)
                wanted[f"what this machine writes to {directory}"] = str(probe)
            answers = self._ask("unseen", [(wanted,)] * self.world_size, "it does not look for its files")
        finally:
            for probe in probes:
                probe.unlink(missing_ok=True)
        lacking = [
            f"rank {rank} on {self._name(rank)} does not see {missing[0]}"
            for rank, missing in enumerate(answers)
            if missing
        ]
        if lacking:
            raise ConfigError(
                "; ".join(lacking[:4]),
                code="not_shared",
                hint="the model, the data sets, output_dir and logging_dir have to be on storage that all machines see "
                "under the same path; object storage does for data_cache_dir",
            )

    def initialize(self, config: SFTConfig, *arguments: Any) -> None:
        """See `Ranks`."""
        if self.num_machines > 1:
            self._check_network()
        self._call("initialize", [(config, rank, *arguments) for rank in self._ranks]).result()

    def _check_network(self) -> None:
        """Raises where a rank cannot reach rank 0: the process group would try for half an hour, and name nobody."""
        place = (self._machines[0].address, self._locations[0].probe_port)
        reasons = self._ask("why_unreachable", [place] * self.world_size, "it does not try the network")
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise ClusterError(
                    f"rank {rank} on {self._name(rank)} cannot reach rank 0 on {self._name(0)}: {reason}",
                    code="unreachable",
                    hint="the machines of a run need open ports between them, 1024 to 65535; `ray start "
                    "--node-ip-address` says which of its networks a machine uses",
                )

    def submit(self, method: str, *arguments: Any) -> Call:
        """See `Ranks`."""
        return self._call(method, [arguments] * self.world_size)

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Call:
        calls = [actor.call.remote(method, *values) for actor, values in zip(self._actors, arguments, strict=True)]
        return _RayCall(self, calls)

    def wait(self, references: list[Any]) -> list[Any]:
        """The answers of all ranks; on the first error, hang or loss, the end of them all and an exception."""
        values: dict[int, Any] = {}
        pending = {reference: rank for rank, reference in enumerate(references)}
        self._heartbeats.start()
        while pending:
            ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=_WATCH_SECONDS)
            failures = self._watch()
            for reference in ready:
                rank = pending.pop(reference)
                values[rank] = self._get(reference, rank)
                if isinstance(values[rank], Failure):
                    failures = [values[rank], *self._later_failures(pending, values[rank])]
            if failures:
                self.finish_writing({failure.rank for failure in failures if failure.kind in ("hung", "lost")})
                self.shutdown()
                raise to_error(first_cause(failures))
        return [values[rank] for rank in range(self.world_size)]

    def _watch(self) -> list[Failure]:
        """Ranks that no longer get on."""
        hang = self._heartbeats.check()
        # A rank that is late with its answer may be busy. If its machine is gone, that shows sooner.
        silent = self._heartbeats.silent(self.config.heartbeat_timeout / 4)
        if hang is not None:
            silent = [*silent, hang.rank]
        failures = self._lost(silent)
        if hang is not None and not failures:
            failures = [self._failure(hang.rank, "hung", hang.message, hang.stack)]
        return failures

    def _lost(self, ranks: Iterable[int]) -> list[Failure]:
        """Those of some ranks whose machines do not answer any more."""
        ranks = list(ranks)
        there = {machine.node_id for machine in answering({self._machines[rank]: None for rank in ranks})}
        return [
            self._failure(rank, "lost", "its machine does not answer any more", last_output(self._log_of(rank)))
            for rank in ranks
            if self._machines[rank].node_id not in there
        ]

    def _failure(self, rank: int, kind: str, message: str, details: str = "") -> Failure:
        return Failure(rank, self._name(rank), kind, message, details, time.time())

    def _name(self, rank: int) -> str:
        """Where a rank runs, for people."""
        machine = self._machines[rank]
        return machine.name if self.num_machines > 1 else machine.host

    def _log_of(self, rank: int) -> Path:
        return (self._logs / f"rank-{rank}.log").absolute()

    def _ask_pulse(self, rank: int) -> Any:
        return self._actors[rank].pulse.options(concurrency_group="heartbeat").remote()

    def _pulse(self, reference: Any) -> PulseReport | None:
        ready, _ = self._ray.wait([reference], timeout=0)
        try:
            return self._ray.get(ready[0]) if ready else None
        except self._ray.exceptions.RayError:
            return None  # the process has ended, which its call says better

    def _later_failures(self, pending: dict[Any, int], first: Failure) -> list[Failure]:
        """What else goes wrong soon after; only waited for where the first error may be the echo of another."""
        failures = [first]
        deadline = time.monotonic() + GRACE_SECONDS
        while pending and all(failure.may_be_echo for failure in failures) and time.monotonic() < deadline:
            ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=_WATCH_SECONDS)
            for reference in ready:
                rank = pending.pop(reference)
                value = self._get(reference, rank)
                if isinstance(value, Failure):
                    failures.append(value)
            # Sooner than Ray, which asks several times before it gives up a machine.
            failures += self._lost(pending.values())
        return failures[1:]

    def _get(self, reference: Any, rank: int) -> Any:
        """The value behind a reference; where its actor has died, that as a `Failure`."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if lost := self._lost([rank]):
                return lost[0]
            lines = [line.strip() for line in str(error).splitlines()]
            reason = next((line for line in lines if "exit detail" in line.lower()), type(error).__name__)
            return self._failure(rank, "died", reason, last_output(self._log_of(rank)))

    def finish_writing(self, hung: Collection[int] = ()) -> None:
        """See `Ranks`. Nobody waits for the ranks that hang, and not long for the others, which may wait for those."""
        if self.config.async_save:
            asked = [
                actor.finish_writing.options(concurrency_group="writer").remote()
                for rank, actor in enumerate(self._actors)
                if rank not in hung
            ]
            timeout = self.config.hang_timeout * (1 if hung else LONG_WORK_FACTOR)
            if asked:
                self._ray.wait(asked, num_returns=len(asked), timeout=timeout)

    def shutdown(self) -> None:
        """See `Ranks`."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._actors:
            for machine, location in zip(self._machines, self._locations, strict=False):
                if machine.is_ours:  # a process that is stopped does not hear Ray
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(location.pid, signal.SIGKILL)
        self._actors = []
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
            self._group = None
        if self._has_joined:
            self._ray.shutdown()
            self._has_joined = False


@dataclass(frozen=True)
class _RayCall:
    cluster: Cluster
    references: list[Any]

    def result(self) -> list[Any]:
        return self.cluster.wait(self.references)


def _no_room(reserved: Sequence[tuple[Machine, dict[str, float]]], free: Mapping[str, float]) -> ClusterError:
    """What was asked for, and what there is."""
    asked = "; ".join(
        f"{amount:.0f} {kind} of {machine.name}, which has {machine.num_gpus if kind == 'GPU' else machine.num_cores}"
        for machine, resources in reserved
        for kind, amount in resources.items()
    )
    left = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("GPU", "CPU"))
    return ClusterError(
        f"asked for {asked}; in the whole cluster {left} are free",
        code="no_room",
        hint="others use the machines: `ray status` shows who; wait for them, or change device_mapping",
    )
