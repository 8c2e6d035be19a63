"""Ranks as the driver sees them, wherever they run; and the one that needs no Ray.

Calls return at once; the ranks work them off in order, so the driver can stay a step ahead and no device waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sft_fast.errors import ConfigError
from sft_fast.train.network import free_port
from sft_fast.train.placement import visible_device
from sft_fast.train.strategy.base import RankInfo

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig


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
    num_machines: int
    config: SFTConfig  # of the run, for these ranks

    def submit(self, method: str, *arguments: Any) -> Call:
        """Calls a method of every rank's `SFTWorker`, after all that was submitted before. Returns at once."""

    def check_shared(self, paths: Mapping[str, str], directories: Sequence[str]) -> None:
        """Makes sure that all machines see the files of the run.

        Args:
            paths: what has to be there, by what it is.
            directories: what has to be the same on all of them.

        Raises:
            ConfigError: a machine does not see one of them.
        """

    def initialize(self, config: SFTConfig, *arguments: Any) -> None:
        """Calls `SFTWorker.initialize` with each rank's `RankInfo`, and waits."""

    def finish_writing(self) -> None:
        """Waits until no rank that lives writes a checkpoint in the background, whatever else the ranks do."""

    def shutdown(self) -> None:
        """Ends all ranks. May be called again."""


class LocalCluster:
    """One rank in this process."""

    world_size = 1
    num_machines = 1

    def __init__(self, config: SFTConfig) -> None:
        if config.sft_train.world_size != 1:
            raise ConfigError(
                f"{config.sft_train.world_size} ranks need Ray", location="sft_train.device_mapping", code="no_ray"
            )
        os.environ.update(environment_of(config, num_local_ranks=1, num_cores=num_cores()))
        self.config = config
        self._worker: Any = None
        self._error: Exception | None = None

    def initialize(self, config: SFTConfig, *arguments: Any) -> None:
        """See `Ranks`."""
        device = "cuda" if _num_local_gpus(config) else "cpu"
        if device == "cuda":
            # Before torch looks for devices.
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(config.sft_train.devices[0])
        os.environ["DS_ACCELERATOR"] = device
        from sft_fast.train.worker import SFTWorker

        self._worker = SFTWorker()
        self._worker.initialize(config, RankInfo(device=device, master_port=free_port()), *arguments)

    def check_shared(self, paths: Mapping[str, str], directories: Sequence[str]) -> None:
        """See `Ranks`; there is one machine."""

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


def environment_of(config: SFTConfig, num_local_ranks: int, num_cores: int) -> dict[str, str]:
    """Environment variables of a rank: its share of the cores, then what the configuration sets."""
    threads = str(max(1, num_cores // num_local_ranks))
    # By default idle threads spin, and take the cores from those that all wait for: with one other busy process on the
    # machine, a step takes ten times as long.
    ours = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    return ours | config.system_envs | config.sft_train.system_envs


def _num_local_gpus(config: SFTConfig) -> int:
    """GPUs of this machine that the run may use."""
    if config.num_gpus_per_node is not None:
        return config.num_gpus_per_node
    import torch

    return torch.cuda.device_count()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
