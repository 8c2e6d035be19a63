"""What a training backend does for a worker, and nothing more: the worker knows no backend by name."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the driver reads this module too, and has no need of torch
    import torch

    from sft_fast.train.batch import MicroBatch
    from sft_fast.train.model import SFTModel


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the ranks of this machine
    local_world_size: int = 1
    device: str = "cpu"  # "cpu" or "cuda": which kind; a GPU rank sees one GPU only
    master_address: str = "127.0.0.1"
    master_port: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one rank knows after a training step."""

    loss: float  # this rank's share: the shares of all ranks add up to the loss
    grad_norm: float  # of the whole gradient, before clipping; the same on every rank
    forward_seconds: float
    backward_seconds: float  # what the ranks exchange meanwhile is part of it
    optimizer_seconds: float  # with the norm of the gradient and clipping
    is_skipped: bool  # the gradient was not finite, so no weight was changed; the same on every rank


class TrainStrategy(abc.ABC):
    """Spreads one model over the ranks and updates it. Every method is called by all ranks together."""

    device: torch.device

    @property
    @abc.abstractmethod
    def data_parallel_rank(self) -> int:
        """This rank's place among `data_parallel_size` ranks (or groups of ranks) that read different data."""

    @property
    @abc.abstractmethod
    def data_parallel_size(self) -> int:
        """Number of ranks, or groups of them, that read different data."""

    @property
    @abc.abstractmethod
    def sequence_parallel_rank(self) -> int:
        """Which slice of each row this rank computes; 0 where rows are whole."""

    @property
    @abc.abstractmethod
    def model(self) -> SFTModel:
        """This rank's part of the model."""

    @abc.abstractmethod
    def initialize(self, load_model: Callable[[], SFTModel]) -> None:
        """Joins the other ranks, loads the model and makes its optimizer."""

    @abc.abstractmethod
    def train_step(
        self, batches: Iterable[MicroBatch], num_batches: int, num_label_tokens: int, learning_rate: float
    ) -> StepResult:
        """One optimizer step; none, on every rank, where the loss or the gradient of any is not finite.

        Args:
            batches: this rank's micro-batches of the step.
            num_batches: how many they are: at least one, and the same on every rank.
            num_label_tokens: label tokens of the whole global batch, the divisor of the loss.
            learning_rate: of this step.
        """

    @abc.abstractmethod
    def val_step(self, batch: MicroBatch) -> float:
        """Summed cross-entropy of the label tokens of one micro-batch, without training."""

    @abc.abstractmethod
    def save(self, directory: str, tag: str) -> None:
        """Writes weights and optimizer state to `<directory>/<tag>/`; returns when every rank has written."""

    @abc.abstractmethod
    def snapshot(self, directory: str, tag: str) -> Callable[[], None]:
        """Copies what `save` would write into memory, and gives what writes it.

        The function is called once, in another thread, while training goes on; it waits for no training of other ranks,
        and returns when this rank has written its part.
        """

    @abc.abstractmethod
    def load(self, directory: str, tag: str, *, is_universal: bool = False) -> None:
        """Reads what `save` wrote with the same number of ranks, or what `convert_checkpoint` made of it for any."""

    @abc.abstractmethod
    def gather_weights(self) -> dict[str, Any] | None:
        """The transformers model's weights by name, on the CPU: on rank 0; None elsewhere."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leaves the other ranks."""
