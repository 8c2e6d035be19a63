"""What a run will do, in numbers, before anything starts: the step streams of its data sets and the batch arithmetic.

The driver and every worker make the same streams from the same configuration, so only step numbers travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from sft_fast.console import count
from sft_fast.data import Dataset, Report
from sft_fast.stream import StepStream

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig


def train_stream(config: SFTConfig, dataset: Dataset) -> StepStream:
    """The steps of the run."""
    arguments = config.sft_train.training_args
    assert arguments.data_seed is not None, "filled when the configuration was made"
    return StepStream(
        dataset,
        sequence_length=config.sequence_length,
        packed=config.sft_train.use_sequence_packing,
        seed=arguments.data_seed,
        num_rows_per_step=config.num_rows_per_step,
        num_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
    )


def validation_stream(config: SFTConfig, dataset: Dataset) -> StepStream:
    """One pass over the validation data, as steps of one micro-batch a rank. The same each time."""
    return StepStream(
        dataset,
        sequence_length=config.sequence_length,
        packed=config.sft_train.use_sequence_packing,
        seed=0,
        num_rows_per_step=config.sft_train.infer_batch_size * config.data_parallel_size,
    )


def plans_of(config: SFTConfig, reports: Mapping[str, Report]) -> dict[str, dict[str, int | float]]:
    """What the data sets of a run make, by name: packs, where it packs, and of `train` the steps."""
    plans: dict[str, dict[str, int | float]] = {}
    for name, report in reports.items():
        dataset, plan = Dataset(report.path, report.sources), plans.setdefault(name, {})
        if config.sft_train.use_sequence_packing:
            packing = dataset.pack(sequence_length=config.sequence_length)
            plan |= {"num_packs": len(packing), "fill_ratio": packing.fill_ratio}
        if name == "train":
            stream = train_stream(config, dataset)
            plan |= {"num_steps_per_epoch": stream.num_steps_per_epoch, "num_steps": stream.num_steps}
    return plans


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the ranks share a step, whatever the data."""

    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int
    sequence_parallel_size: int
    rows_per_micro_batch: int
    num_micro_batches: int
    sequence_length: int
    is_packed: bool

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, for a table: the ranks, and the global batch."""
        num_rows_per_step = self.rows_per_micro_batch * self.num_micro_batches * self.data_parallel_size
        ranks = count(self.world_size)
        if self.data_parallel_size != self.world_size:
            ranks += (
                f" = {count(self.data_parallel_size)} with other data x {self.tensor_parallel_size} that split weights "
                f"x {self.sequence_parallel_size} that split rows"
            )
        return [
            ("ranks", ranks),
            (
                "global batch",
                f"{count(self.rows_per_micro_batch)} {self.row}s a micro-batch x {count(self.num_micro_batches)} "
                f"micro-batches x {count(self.data_parallel_size)} ranks = {count(num_rows_per_step)} {self.row}s, "
                f"at most {count(num_rows_per_step * self.sequence_length)} tokens",
            ),
        ]

    @property
    def row(self) -> str:
        """What a row of a micro-batch is called."""
        return "pack" if self.is_packed else "sample"


def layout_of(config: SFTConfig) -> Layout:
    """The layout of a run."""
    arguments = config.sft_train.training_args
    return Layout(
        world_size=config.sft_train.world_size,
        data_parallel_size=config.data_parallel_size,
        tensor_parallel_size=config.tensor_parallel_size,
        sequence_parallel_size=config.sequence_parallel_size,
        rows_per_micro_batch=arguments.per_device_train_batch_size,
        num_micro_batches=arguments.gradient_accumulation_steps,
        sequence_length=config.sequence_length,
        is_packed=config.sft_train.use_sequence_packing,
    )


@dataclass(frozen=True, kw_only=True)
class BatchArithmetic(Layout):
    """How samples become steps."""

    num_samples: int
    num_samples_per_epoch: int  # each counted as often as it is used
    num_rows: int  # of the first epoch
    fill_ratio: float
    # By the cost model, how much longer than the mean rank the slowest takes: rows dealt in order, and as planned.
    imbalance_in_order: float
    imbalance: float
    num_steps_per_epoch: int
    num_steps: int

    @classmethod
    def of(cls, config: SFTConfig, stream: StepStream) -> BatchArithmetic:
        """The arithmetic of a run over `stream`."""
        packing = stream.packing(0)
        imbalance_in_order, imbalance = stream.imbalance(config.data_parallel_size)
        return cls(
            **asdict(layout_of(config)),
            num_samples=len(stream.dataset),
            num_samples_per_epoch=sum(source.num_samples_per_epoch for source in stream.dataset.sources),
            num_rows=len(packing),
            fill_ratio=packing.fill_ratio,
            imbalance_in_order=imbalance_in_order,
            imbalance=imbalance,
            num_steps_per_epoch=stream.num_steps_per_epoch,
            num_steps=stream.num_steps,
        )

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, for a table: the layout, and what it makes of the samples."""
        ranks, global_batch = super().rows()
        is_mixed = self.num_samples_per_epoch != self.num_samples
        mixed = f" an epoch of {count(self.num_samples)}, by the weights of their sources," if is_mixed else ""
        rows = [
            ranks,
            (
                "samples",
                f"{count(self.num_samples_per_epoch)}{mixed} in {count(self.num_rows)} {self.row}s, "
                f"{self.fill_ratio:.1%} full",
            ),
            global_batch,
            ("steps", f"{count(self.num_steps)}, {count(self.num_steps_per_epoch)} an epoch"),
        ]
        if self.data_parallel_size > 1:
            rows.append(
                (
                    "balance",
                    f"the slowest rank takes {self.imbalance:.1%} longer than the mean; {self.row}s dealt in order, "
                    f"{self.imbalance_in_order:.1%}",
                )
            )
        return rows
