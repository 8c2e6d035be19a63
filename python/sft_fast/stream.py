"""The steps of a run over a dataset, and the micro-batches of each rank: what a trainer takes."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from sft_fast import _core
from sft_fast.data import Batch, Dataset, Packing, check_number
from sft_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one rank does in one step. `num_rows`, `num_tokens` and `num_label_tokens` are of the whole batch."""

    step: int
    """Global step, from 0."""
    epoch: int
    num_rows: int
    num_tokens: int
    num_label_tokens: int
    """Tokens with a loss: what the sum of losses over all ranks is divided by."""
    micro_batches: list[list[int]]
    """Row numbers of each micro-batch of the rank. Every rank has the same number of micro-batches; one may be empty in
    the last step of an epoch, where the rank joins in with a row of padding."""


class StepStream:
    """The steps of a run, as a pure function of the step number: nothing to save, nothing to lose.

    Which samples form step k depends on the dataset, `sequence_length`, `seed` and `num_rows_per_step` alone, so a run
    may go on with any number of ranks. Every sample is used exactly once an epoch, or as often as the weight of its
    source says; the last step of an epoch has the rows that are left, and its loss is divided by its own label tokens.

    Where an epoch uses only a part of a source and rows are packs, epochs may differ by a few steps: which samples come
    decides how many packs they fill. Then the epochs before a step are planned to find it.

    Args:
        dataset: The samples.
        sequence_length: Tokens of a pack; the longest sample allowed.
        packed: Whether a row is a pack or a single sample.
        seed: Decides, with the epoch, which samples share a pack and the order of everything.
        num_rows_per_step: Rows of a global batch.
        num_epochs: Passes over the data; may be a fraction. Ignored if `max_steps` is positive.
        max_steps: Steps of the run, if positive.

    Raises:
        ConfigError: A sample is longer than `sequence_length`, a number is out of range, or there is no step to train.

    Examples:
        >>> from sft_fast.stream import StepStream
        >>> dataset = sft_fast.Dataset("out")
        >>> stream = StepStream(dataset, sequence_length=256, packed=False, seed=42, num_rows_per_step=2)
        >>> stream.num_steps
        2
        >>> plan = stream.step(0, rank=0, world_size=2, rows_per_micro_batch=1)
        >>> plan.epoch, len(plan.micro_batches), plan.num_label_tokens > 0
        (0, 1, True)
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sequence_length: int,
        packed: bool = True,
        seed: int,
        num_rows_per_step: int,
        num_epochs: float = 1.0,
        max_steps: int = -1,
    ) -> None:
        self.dataset = dataset
        self._sequence_length = sequence_length
        self._packed = packed
        self._seed = seed
        check_number("num_rows_per_step", num_rows_per_step, 1, 2**32 - 1)
        self._num_rows_per_step = num_rows_per_step
        # Two epochs: prefetching crosses from one into the next.
        self._epoch_plan = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self._is_steady = not packed or all(source.is_steady for source in dataset.sources)
        self.num_steps_per_epoch = len(self._epoch_plan(0)[1])
        """Steps of the first epoch."""
        if self.num_steps_per_epoch == 0:
            raise ConfigError(f"expected samples to train on, found none in {dataset.path}")
        self._epoch_ends = [self.num_steps_per_epoch]  # steps of all epochs up to the end of each
        self.num_steps = self._count_steps(num_epochs, max_steps)
        if self.num_steps < 1:
            raise ConfigError(f"expected at least one step to train, found num_epochs={num_epochs}")

    def _plan_epoch(self, epoch: int) -> tuple[Packing, _core.Steps]:
        make = self.dataset.pack if self._packed else self.dataset.rows
        packing = make(sequence_length=self._sequence_length, seed=self._seed, epoch=epoch)
        return packing, packing._core.steps(self._num_rows_per_step)

    def _count_steps(self, num_epochs: float, max_steps: int) -> int:
        """Steps of the run."""
        if max_steps > 0:
            return max_steps
        num_whole = math.floor(num_epochs) if math.isfinite(num_epochs) and not self._is_steady else 0
        before = self.first_step_of(num_whole) if num_whole > 0 else 0
        return before + _core.total_steps(self.num_steps_of(num_whole), num_epochs - num_whole)

    def num_steps_of(self, epoch: int) -> int:
        """Steps of an epoch, from 0."""
        return self.num_steps_per_epoch if self._is_steady else len(self._epoch_plan(epoch)[1])

    def first_step_of(self, epoch: int) -> int:
        """Global step that an epoch begins with."""
        if self._is_steady:
            return epoch * self.num_steps_per_epoch
        while len(self._epoch_ends) < epoch:
            self._epoch_ends.append(self._epoch_ends[-1] + self.num_steps_of(len(self._epoch_ends)))
        return self._epoch_ends[epoch - 1] if epoch else 0

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a global step, and its step in that epoch; all count from 0."""
        if self._is_steady:
            return divmod(step, self.num_steps_per_epoch)
        while self._epoch_ends[-1] <= step:
            self.first_step_of(len(self._epoch_ends) + 1)
        epoch = bisect.bisect_right(self._epoch_ends, step)
        return epoch, step - self.first_step_of(epoch)

    def epoch_of(self, step: int) -> float:
        """How many epochs are done after `step` steps."""
        if self._is_steady:
            return step / self.num_steps_per_epoch
        epoch, index = self.locate(step)
        return epoch + index / self.num_steps_of(epoch)

    def packing(self, epoch: int) -> Packing:
        """The rows of an epoch."""
        return self._epoch_plan(epoch)[0]

    def imbalance(self, world_size: int) -> tuple[float, float]:
        """How much longer than the mean rank the slowest takes by the cost model: (rows dealt in order, as planned)."""
        return self._epoch_plan(0)[1].imbalance(world_size)

    def step(self, step: int, *, rank: int = 0, world_size: int = 1, rows_per_micro_batch: int) -> StepPlan:
        """What `rank` of `world_size` does in global step `step`, from 0.

        Raises:
            IndexError: There is no such step or rank.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        epoch, index = self.locate(step)
        plan = self.step_of(epoch, index, rank=rank, world_size=world_size, rows_per_micro_batch=rows_per_micro_batch)
        return replace(plan, step=step)

    def step_of(
        self, epoch: int, index: int, *, rank: int = 0, world_size: int = 1, rows_per_micro_batch: int
    ) -> StepPlan:
        """As `step`, for step `index` of an epoch; `StepPlan.step` counts in it."""
        if not 0 <= rank < world_size:
            raise IndexError(f"rank {rank} of {world_size}")
        packing, steps = self._epoch_plan(epoch)
        rows = steps.rows(index)
        num_tokens, num_label_tokens = packing._core.count_tokens(rows)
        return StepPlan(
            step=index,
            epoch=epoch,
            num_rows=len(rows),
            num_tokens=num_tokens,
            num_label_tokens=num_label_tokens,
            micro_batches=steps.assign(index, rank, world_size, rows_per_micro_batch),
        )

    def batch(self, step: StepPlan, micro_batch: int) -> Batch:
        """The arrays of a micro-batch, as `Packing.batch` with shifted labels, as wide as its longest row."""
        packing = self.packing(step.epoch)
        rows = step.micro_batches[micro_batch]
        if not rows:
            return _padding_batch(self.dataset.pad_token_id)
        return packing.batch(rows, shift_labels=True, width=packing._core.max_row_tokens(rows))


def _padding_batch(pad_token_id: int) -> Batch:
    """One row of two tokens without a loss: what a rank computes when it has no rows."""
    return {
        "input_ids": np.full((1, 2), pad_token_id, np.int64),
        "labels": np.full((1, 2), -100, np.int64),
        "position_ids": np.arange(2, dtype=np.int64)[None],
        "cu_seqlens": np.array([0, 2], np.int32),
        "max_seqlen": 2,
    }
