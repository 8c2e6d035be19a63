"""The ranks of a run, as the driver sees them: one call reaches all, and the first error of any ends them all.

`Cluster` makes one Ray actor a rank, on the device that `device_mapping` names. `LocalCluster` has the same methods and
one rank in this process, for machines without Ray and for tests. Calls return at once; the ranks work them off in
order, so the driver can stay a step ahead and no device waits for it.

An error in one rank makes the others fail too, in whatever they were doing together, and often sooner for the driver to
see. The error that is reported is the first cause: see `first_cause`. A rank that hangs is found by its `heartbeat`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sft_fast.errors import ConfigError, SftFastError, TrainError
from sft_fast.ray_session import cluster_address, connect
from sft_fast.train.checkpoint import CLUSTER_NAME
from sft_fast.train.heartbeat import LONG_WORK_FACTOR, PULSE, Heartbeats, PulseReport
from sft_fast.train.strategy.base import RankInfo

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig

# After an error that another rank may have set off, the driver waits this long for that rank's own.
GRACE_SECONDS = 10.0

# How long the driver waits for answers before it looks whether all ranks still get on.
_WATCH_SECONDS = 1.0

# Of the ends of a run, those that come from a process or a machine: what a new start may mend.
_MENDABLE = frozenset({"rank_died", "rank_failed", "rank_hung"})

# What gloo, NCCL and torch say when the other side of a connection is gone.
_ECHO_SIGNS = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "socket timeout")


@dataclass(frozen=True)
class Failure:
    """An error of a rank, as plain values that survive the way to the driver."""

    rank: int
    host: str
    kind: str  # name of the exception's class, `died` or `hung`
    message: str
    traceback: str
    seconds: float  # when, since 1970
    error: SftFastError | None = None  # the exception itself, where it is one of ours

    @property
    def may_be_echo(self) -> bool:
        """Whether it looks like the echo of another rank's end."""
        text = f"{self.kind} {self.message}".lower()
        return self.error is None and self.kind not in ("died", "hung") and any(sign in text for sign in _ECHO_SIGNS)


class Call(Protocol):
    """A call that is under way on all ranks."""

    def result(self) -> list[Any]:
        """The answer of each rank, in the order of the ranks; waits for them.

        Raises:
            SftFastError: a rank failed; all ranks are ended by then.
        """


class Ranks(Protocol):
    """What `Cluster` and `LocalCluster` have in common."""

    world_size: int

    def submit(self, method: str, *arguments: Any) -> Call:
        """Calls a method of every rank's `SFTWorker`, after all that was submitted before. Returns at once."""

    def initialize(self, config: SFTConfig, *arguments: Any) -> None:
        """Calls `SFTWorker.initialize` with each rank's `RankInfo`, and waits."""

    def finish_writing(self) -> None:
        """Waits until no rank that lives writes a checkpoint in the background, whatever else the ranks do."""

    def shutdown(self) -> None:
        """Ends all ranks. May be called again."""


class LocalCluster:
    """One rank in this process."""

    world_size = 1

    def __init__(self, config: SFTConfig) -> None:
        if config.sft_train.world_size != 1:
            raise ConfigError(
                f"{config.sft_train.world_size} ranks need Ray", location="sft_train.device_mapping", code="no_ray"
            )
        os.environ.update(_environment(config, num_local_ranks=1, num_cores=num_cores()))
        self._config = config
        self._worker: Any = None
        self._error: Exception | None = None

    def initialize(self, config: SFTConfig, *arguments: Any) -> None:
        """See `Ranks`."""
        device = "cpu" if _gpus_per_node(config, _count_local_gpus) == 0 else "cuda"
        if device == "cuda":
            # Before torch looks for devices.
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(config.sft_train.devices[0])
        os.environ["DS_ACCELERATOR"] = device
        from sft_fast.train.worker import SFTWorker

        self._worker = SFTWorker()
        self._worker.initialize(config, RankInfo(device=device, master_port=free_port()), *arguments)

    def submit(self, method: str, *arguments: Any) -> Call:
        """See `Ranks`; here the work is done before it returns. After an error nothing is tried again."""
        if self._error is None:
            try:
                return _Done(getattr(self._worker, method)(*arguments))
            except Exception as error:
                self._error = error
        return _Done(None, self._error)

    def finish_writing(self) -> None:
        """See `Ranks`."""
        if self._worker is not None:
            self._worker.finish_writing()

    def shutdown(self) -> None:
        """See `Ranks`."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@dataclass(frozen=True)
class _Done:
    """The answer of the one rank, or its error."""

    value: Any
    error: Exception | None = None

    def result(self) -> list[Any]:
        if self.error is not None:
            raise self.error
        return [self.value]


class Cluster:
    """One Ray actor a rank. Starts Ray on this machine, or joins the cluster of `ray_address`."""

    def __init__(self, config: SFTConfig) -> None:
        """Starts the actors; the model comes with `initialize`.

        Raises:
            ConfigError: `device_mapping` names a machine or a device that is not there.
        """
        self._local_pids: list[int] = []
        self.world_size = config.sft_train.world_size
        self._actors: list[Any] = []
        self._writes_beside, self._hang_timeout = config.async_save, config.hang_timeout
        self._ray, self._has_joined = connect(cluster_address(config.ray_address))
        ray = self._ray
        try:
            places = _places(config, self._ray.nodes(), ray.get_runtime_context().get_node_id())
            self._actors = [_start_actor(ray, config, place) for place in places]
            # Asked of all at once, so that they start at the same time.
            found = ray.get([actor.locate.remote() for actor in self._actors])
        except BaseException:
            self.shutdown()
            raise
        self._hosts = [host for host, _, _, _ in found]
        self._pids = [pid for _, pid, _, _ in found]
        driver_node = ray.get_runtime_context().get_node_id()
        self._local_pids = [pid for pid, place in zip(self._pids, places, strict=True) if place.node_id == driver_node]
        self._heartbeats = Heartbeats(
            self._ask_pulse, self._pulse, self.world_size, config.heartbeat_timeout, config.hang_timeout
        )
        _, _, address, port = found[0]
        address = "127.0.0.1" if len({place.node_id for place in places}) == 1 else address
        self._ranks = [replace(place.rank, master_address=address, master_port=port) for place in places]

    def initialize(self, config: SFTConfig, *arguments: Any) -> None:
        """See `Ranks`."""
        self._call("initialize", [(config, rank, *arguments) for rank in self._ranks]).result()

    def submit(self, method: str, *arguments: Any) -> Call:
        """See `Ranks`."""
        return self._call(method, [arguments] * self.world_size)

    def _call(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Call:
        calls = [actor.call.remote(method, *values) for actor, values in zip(self._actors, arguments, strict=True)]
        return _RayCall(self, calls)

    def wait(self, references: list[Any]) -> list[Any]:
        """The answers of all ranks; on the first error or hang, the end of them all and an exception."""
        values: dict[int, Any] = {}
        pending = {reference: rank for rank, reference in enumerate(references)}
        self._heartbeats.start()
        while pending:
            ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=_WATCH_SECONDS)
            failures = [failure] if (failure := self._find_hang()) is not None else []
            for reference in ready:
                rank = pending.pop(reference)
                values[rank] = self._get(reference, rank)
                if isinstance(values[rank], Failure):
                    failures = [values[rank], *self._later_failures(pending, values[rank])]
            if failures:
                self.finish_writing({failure.rank for failure in failures if failure.kind == "hung"})
                self.shutdown()
                raise to_error(first_cause(failures))
        return [values[rank] for rank in range(self.world_size)]

    def _find_hang(self) -> Failure | None:
        hang = self._heartbeats.check()
        if hang is None:
            return None
        return Failure(hang.rank, self._hosts[hang.rank], "hung", hang.message, hang.stack, time.time())

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
        while pending and all(failure.may_be_echo for failure in failures):
            ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            value = self._get(ready[0], pending.pop(ready[0]))
            if isinstance(value, Failure):
                failures.append(value)
        return failures[1:]

    def _get(self, reference: Any, rank: int) -> Any:
        """The value behind a reference; where its actor has died, that as a `Failure`."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            reason = next((line for line in lines if "exit detail" in line.lower()), type(error).__name__)
            output = _last_output(self._pids[rank])
            return Failure(rank, self._hosts[rank], "died", reason, output, time.time())

    def finish_writing(self, hung: Collection[int] = ()) -> None:
        """See `Ranks`. Nobody waits for the ranks that hang, and not long for the others, which may wait for those."""
        if self._writes_beside:
            asked = [
                actor.finish_writing.options(concurrency_group="writer").remote()
                for rank, actor in enumerate(self._actors)
                if rank not in hung
            ]
            timeout = self._hang_timeout * (1 if hung else LONG_WORK_FACTOR)
            if asked:
                self._ray.wait(asked, num_returns=len(asked), timeout=timeout)

    def shutdown(self) -> None:
        """See `Ranks`."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._actors:
            for pid in self._local_pids:  # a process that is stopped does not hear Ray
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._actors = []
        if self._has_joined:
            self._ray.shutdown()
            self._has_joined = False


@dataclass(frozen=True)
class _RayCall:
    cluster: Cluster
    references: list[Any]

    def result(self) -> list[Any]:
        return self.cluster.wait(self.references)


class RankActor:
    """What runs in the process of a rank: an `SFTWorker` whose errors become answers. Ray makes an actor of it.

    Nothing here may import torch or DeepSpeed before the first call: they read the environment when they are imported.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._worker: Any = None
        self._failure: Failure | None = None
        self._held_port = _hold_port()

    def locate(self) -> tuple[str, int, str, int]:
        """Host name, process id, network address, and a port of it that stays free for torch to listen on."""
        from ray.util import get_node_ip_address

        return platform.node(), os.getpid(), get_node_ip_address(), int(self._held_port.getsockname()[1])

    def call(self, method: str, *arguments: Any) -> Any:
        """The answer of a worker's method, or the first `Failure` of this rank: after that nothing is tried again."""
        if self._failure is not None:
            return self._failure
        try:
            PULSE.advance(method)
            if self._worker is None:
                from sft_fast.train.worker import SFTWorker

                self._worker = SFTWorker()
            return getattr(self._worker, method)(*arguments)
        except Exception as error:
            self._failure = Failure(
                rank=self._rank,
                host=platform.node(),
                kind=type(error).__name__,
                message=str(error),
                traceback=traceback.format_exc(),
                seconds=time.time(),
                error=error if isinstance(error, SftFastError) else None,
            )
            return self._failure
        finally:
            PULSE.advance("")

    def finish_writing(self) -> None:
        """Returns when this rank writes nothing in the background; asked in a thread of its own."""
        if self._worker is not None:
            self._worker.finish_writing()

    def pulse(self) -> PulseReport:
        """What this rank is doing; asked in a thread of its own."""
        return PULSE.report()


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that set the others off: the earliest of those that are no echo, or the earliest of all."""
    return min(failures, key=lambda failure: (failure.may_be_echo, failure.seconds))


def to_error(failure: Failure) -> SftFastError:
    """A failure as an exception that names rank and host. What the user can put right stays as it is."""
    if failure.error is not None and failure.error.exit_status == 2:
        return failure.error
    where = f"rank {failure.rank} on {failure.host}"
    last_lines = "\n".join(failure.traceback.strip().splitlines()[-8:])
    if failure.kind == "died":
        return TrainError(f"{where} died: {failure.message}", code="rank_died", hint=last_lines or None)
    if failure.kind == "hung":
        return TrainError(f"{where}: {failure.message}", code="rank_hung", hint=last_lines or None)
    if failure.error is not None:
        return TrainError(f"{where}: {failure.error.message}", code=failure.error.code, hint=failure.error.hint)
    return TrainError(f"{where} failed: {failure.kind}: {failure.message}", code="rank_failed", hint=last_lines)


def may_be_mended(error: SftFastError) -> bool:
    """Whether the run may get further when its ranks are started again."""
    return error.code in _MENDABLE


@dataclass(frozen=True)
class _Place:
    """Where a rank runs."""

    rank: RankInfo
    node_id: str
    num_cores: int  # of that machine
    gpu: int | None  # its number on that machine; None for a rank on the CPU


def _places(config: SFTConfig, nodes: list[dict[str, Any]], driver_node: str) -> list[_Place]:
    """The place of each entry of `device_mapping`: device d is GPU `d % n` of machine `d // n`, this machine first.

    Raises:
        ConfigError: there is no such machine or GPU.
    """
    machines = sorted(
        (node for node in nodes if node["Alive"]),
        key=lambda node: (node["NodeID"] != driver_node, node["NodeManagerAddress"]),
    )
    num_gpus = _gpus_per_node(config, lambda: int(machines[0]["Resources"].get("GPU", 0)))
    found: list[tuple[dict[str, Any], int | None]] = []
    for device in config.sft_train.devices:
        number, gpu = divmod(device, num_gpus) if num_gpus else (0, None)
        if number >= len(machines):
            raise _no_such_device(f"device {device} is on machine {number + 1}, but Ray has {len(machines)}")
        present = int(machines[number]["Resources"].get("GPU", 0))
        if gpu is not None and gpu >= present:
            raise _no_such_device(f"device {device} is GPU {gpu} of a machine that has {present}")
        found.append((machines[number], gpu))
    of_machine = [node["NodeID"] for node, _ in found]
    return [
        _Place(
            rank=RankInfo(
                rank=rank,
                world_size=len(found),
                local_rank=of_machine[:rank].count(node["NodeID"]),
                local_world_size=of_machine.count(node["NodeID"]),
                device="cpu" if gpu is None else "cuda",
            ),
            node_id=node["NodeID"],
            num_cores=num_cores() if node["NodeID"] == driver_node else int(node["Resources"].get("CPU", 1)),
            gpu=gpu,
        )
        for rank, (node, gpu) in enumerate(found)
    ]


def _no_such_device(reason: str) -> ConfigError:
    return ConfigError(
        reason,
        code="no_device",
        location="sft_train.device_mapping",
        hint="set device_mapping and num_gpus_per_node to what there is; num_gpus_per_node=0 trains on the CPU",
    )


def _start_actor(ray: Any, config: SFTConfig, place: _Place) -> Any:
    """Starts the process of a rank, with its environment set before anything is imported."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    variables = _environment(config, place.rank.local_world_size, place.num_cores)
    variables["DS_ACCELERATOR"] = place.rank.device
    # Ray is asked for no GPU and so would hide them all; which one a rank sees is said here.
    variables["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    variables["CUDA_VISIBLE_DEVICES"] = "" if place.gpu is None else visible_device(place.gpu)
    options = {
        "name": f"{CLUSTER_NAME}-{place.rank.rank}-{os.getpid()}-{time.monotonic_ns()}",
        "num_cpus": 0,
        "num_gpus": 0,
        "runtime_env": {"env_vars": variables},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node_id, soft=False),
    }
    return (
        ray.remote(concurrency_groups={"heartbeat": 1, "writer": 1})(RankActor)
        .options(**options)
        .remote(place.rank.rank)
    )


def _environment(config: SFTConfig, num_local_ranks: int, num_cores: int) -> dict[str, str]:
    """Environment variables of a rank: its share of the cores, then what the configuration sets."""
    threads = str(max(1, num_cores // num_local_ranks))
    # By default idle threads spin, and take the cores from those that all wait for: with one other busy process on the
    # machine, a step takes ten times as long.
    ours = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    return ours | config.system_envs | config.sft_train.system_envs


def _gpus_per_node(config: SFTConfig, count: Callable[[], int]) -> int:
    """GPUs of each machine that the run may use: as configured, else what `count` finds."""
    return count() if config.num_gpus_per_node is None else config.num_gpus_per_node


def _count_local_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def visible_device(gpu: int) -> str:
    """GPU number `gpu` as CUDA_VISIBLE_DEVICES says it, where that variable already leaves only some."""
    allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return allowed[gpu].strip() if gpu < len(allowed) else str(gpu)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def free_port() -> int:
    """A port of this machine that nobody listens on, for use at once."""
    with _hold_port() as held:
        return int(held.getsockname()[1])


def _hold_port() -> socket.socket:
    """A port that is given to nobody else while the socket is open, but that this machine may still listen on.

    Between the choice of a port and its use lies the import of torch: time enough for another process to be given it.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("", 0))
    return held


def _last_output(pid: int) -> str:
    """The end of what a process of Ray wrote to stderr, if it ran on this machine."""
    for path in Path("/tmp/ray/session_latest/logs").glob(f"worker-*-{pid}.err"):
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
    return ""
