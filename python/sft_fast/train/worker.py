"""One rank of a run: reads its own share of each step, trains, validates, saves.

A plain class. `cluster.py` makes a Ray actor of it; a test, or a machine without Ray, calls it as it is. All ranks are
called with the same method in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sft_fast.data import Dataset
from sft_fast.errors import ConfigError, TrainError
from sft_fast.prefetch import Prefetcher
from sft_fast.stream import StepPlan, StepStream
from sft_fast.train.background import BackgroundWriter, WriteReport
from sft_fast.train.batch import MicroBatch, make_micro_batch
from sft_fast.train.checkpoint import CLUSTER_NAME, MODEL_DIRECTORY, mark_written, naming_a_full_disk, sync_files
from sft_fast.train.export import save_model_files, write_model
from sft_fast.train.flops import ModelFlops, peak_tflops
from sft_fast.train.generate import Generation, generate_answers
from sft_fast.train.heartbeat import PULSE
from sft_fast.train.model import SFTModel, check_model, load_model
from sft_fast.train.optim import learning_rate_schedule
from sft_fast.train.plan import train_stream, validation_stream
from sft_fast.train.strategy import RankInfo, TrainStrategy, create_strategy
from sft_fast.train.timing import ProfileWindow, peak_memory_bytes
from sft_fast.train.ulysses import slice_of

if TYPE_CHECKING:
    from sft_fast import Source
    from sft_fast.config import SFTConfig

# Micro-batches that wait, ready, for the device. A few hundred kilobytes each.
_PREFETCH_DEPTH = 8

# Micro-batches of this rank, each with the plan of its step.
_Batches = Prefetcher[tuple[StepPlan, MicroBatch]]


@dataclass(frozen=True, kw_only=True)
class TrainStepReport:
    """What a rank tells the driver of a training step. `loss`, `flops`, times and memory differ between ranks."""

    step: int  # steps done with this one
    epoch: float  # epochs done with this step
    loss: float  # this rank's share: the sum over all ranks is the loss
    learning_rate: float
    grad_norm: float  # before clipping
    is_skipped: bool  # the gradient was not finite, and no weight was changed
    num_tokens: int  # of the global batch
    num_label_tokens: int  # of the global batch
    num_rows: int  # of the global batch
    flops: float  # this rank's share of the operations that the samples need
    step_seconds: float
    data_wait_seconds: float  # part of it in which the next micro-batch was not ready
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    peak_memory_bytes: int
    peak_tflops: float | None  # of the device, where it is known


@dataclass(frozen=True, kw_only=True)
class ValStepReport:
    """What a rank tells the driver of a validation."""

    loss_sums: dict[str, float]  # over the label tokens of this rank, by source
    num_label_tokens: dict[str, int]  # of this rank, by source
    generations: list[Generation]  # of rank 0
    seconds: float


class SFTWorker:
    """See the module. `initialize` comes first."""

    _strategy: TrainStrategy
    _stream: StepStream

    def __init__(self) -> None:
        self._prefetcher: _Batches | None = None
        self._next_step = -1
        self._val_streams: dict[str, StepStream] = {}
        self._writer = BackgroundWriter()

    def initialize(
        self,
        config: SFTConfig,
        rank: RankInfo,
        train_path: str,
        val_paths: dict[str, str] | None = None,
        checkpoint: str | None = None,
        is_universal: bool = False,
        train_sources: Sequence[Source] | None = None,
    ) -> None:
        """Opens the data sets, loads the model, and goes back to a checkpoint where there is one.

        Args:
            config: the run.
            rank: which of the ranks this is.
            train_path: directory of the training data set.
            val_paths: directories of the validation data sets by the names of their sources, if there are any.
            checkpoint: directory of a complete checkpoint.
            is_universal: whether it was converted for another number of ranks.
            train_sources: how much of each source of the training data an epoch uses; by default each sample, once.

        Raises:
            ConfigError: the model, the strategy or their settings cannot be used.
            DatasetError: a data set cannot be read.
        """
        self.close()
        self._config, self._rank = config, rank
        self._stream = train_stream(config, Dataset(train_path, train_sources))
        self._val_streams = {name: validation_stream(config, Dataset(path)) for name, path in (val_paths or {}).items()}
        arguments = config.sft_train.training_args
        self._learning_rate = learning_rate_schedule(arguments, self._stream.num_steps)
        self._strategy = create_strategy(config, rank)
        self._strategy.initialize(self._load_model)
        check_model(self._strategy.model, self._strategy.device)
        self._peak_tflops = self._find_peak()
        trace = Path(config.logging_dir, config.exp_name, "profile", f"rank-{rank.rank}.json")
        self._profile = ProfileWindow(config.profile_first_step, config.profile_num_steps, trace)
        if checkpoint is not None:
            self._strategy.load(checkpoint, CLUSTER_NAME, is_universal=is_universal)

    def _load_model(self) -> SFTModel:
        config = self._config
        arguments = config.sft_train.training_args
        loaded = load_model(
            config.pretrain,
            config.sft_train.model_args,
            seed=config.seed,
            vocab_size=self._stream.dataset.vocab_size,
        )
        model = SFTModel(
            loaded,
            label_smoothing=arguments.label_smoothing_factor,
            neftune_alpha=arguments.neftune_noise_alpha,
            offloads_activations=config.sft_train.model_args.offload_activations,
        )
        self._flops = ModelFlops.of(model.hf_model)  # before any weight of it is cut
        vocab_size = int(model.hf_model.get_input_embeddings().num_embeddings)
        if self._stream.dataset.vocab_size > vocab_size:
            raise ConfigError(
                f"the tokenizer has {self._stream.dataset.vocab_size} ids, but the model has embeddings for "
                f"{vocab_size}",
                path=config.pretrain,
                code="vocabulary",
                hint="the tokenizer belongs to another model; or tokens were added to it: then set "
                "sft_train.model_args.resize_vocab=true",
            )
        return model

    def _find_peak(self) -> float | None:
        """10^12 operations a second that the device can do: as configured, else by its name."""
        device = self._strategy.device
        if self._config.device_peak_tflops is not None or device.type == "cpu":
            return self._config.device_peak_tflops
        return peak_tflops(torch.cuda.get_device_name(device), self._config.sft_train.model_args.dtype)

    def train_step(self, step: int) -> TrainStepReport:
        """Trains global step `step`, counted from 0, and makes ready for the next.

        Raises:
            TrainError: the loss or the gradient is not finite, on every rank alike; unless `on_non_finite: skip`.
        """
        start = time.perf_counter()
        self._profile.before(step + 1)
        # Random numbers (dropout) depend on the seed, the step and the rank alone: nothing to save, nothing to restore.
        # Ranks that compute the same tokens with parts of the weights draw the same.
        size = self._config.tensor_parallel_size
        torch.manual_seed(_seed_of(self._config.seed, step, self._rank.rank // size))
        batches = _StepBatches(self._batches_from(step), step + 1, self._flops)
        plan = batches.plan
        learning_rate = self._learning_rate(step + 1)
        result = self._strategy.train_step(batches, len(plan.micro_batches), plan.num_label_tokens, learning_rate)
        # With float16 such steps are the rule: DeepSpeed goes on with a lower loss scale, and gives up at the lowest.
        is_tolerated = self._config.on_non_finite == "skip" or self._config.sft_train.model_args.dtype == "fp16"
        if result.is_skipped and not is_tolerated:
            raise not_finite(f"step {step + 1}: the loss or the gradient is not finite")
        self._next_step = step + 1
        self._profile.after(step + 1)
        return TrainStepReport(
            step=step + 1,
            epoch=self._stream.epoch_of(step + 1),
            loss=result.loss,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            is_skipped=result.is_skipped,
            num_tokens=plan.num_tokens,
            num_label_tokens=plan.num_label_tokens,
            num_rows=plan.num_rows,
            flops=batches.flops / self._config.tensor_parallel_size,
            step_seconds=time.perf_counter() - start,
            data_wait_seconds=batches.wait_seconds,
            forward_seconds=result.forward_seconds,
            backward_seconds=result.backward_seconds,
            optimizer_seconds=result.optimizer_seconds,
            peak_memory_bytes=peak_memory_bytes(self._strategy.device),
            peak_tflops=self._peak_tflops,
        )

    def val_step(self) -> ValStepReport:
        """Runs all validation data once, source by source, and answers the prompts that are asked for."""
        start = time.perf_counter()
        loss_sums: dict[str, float] = {}
        num_label_tokens: dict[str, int] = {}
        for name, stream in self._val_streams.items():
            loss_sums[name], num_label_tokens[name] = self._validate(stream)
        return ValStepReport(
            loss_sums=loss_sums,
            num_label_tokens=num_label_tokens,
            generations=self._generate(),
            seconds=time.perf_counter() - start,
        )

    def _validate(self, stream: StepStream) -> tuple[float, int]:
        """Sum of the losses of this rank's share, and its label tokens."""
        rows = self._config.sft_train.infer_batch_size
        batches = Prefetcher(self._read(stream, 0, rows), _PREFETCH_DEPTH)
        loss_sum, num_label_tokens = 0.0, 0
        try:
            for index, (_, batch) in enumerate(batches):
                PULSE.advance(f"micro-batch {index + 1} of a validation", is_counted=True)
                loss_sum += self._strategy.val_step(batch)
                num_label_tokens += batch.num_label_tokens
        finally:
            batches.close()
        return loss_sum, num_label_tokens

    def _generate(self) -> list[Generation]:
        validation = self._config.validation
        if validation is None or not validation.num_generations:
            return []
        PULSE.advance("sample answers")
        answers = generate_answers(
            self._strategy.model.hf_model,
            {name: stream.dataset for name, stream in self._val_streams.items()},
            str(Path(self._config.pretrain, "tokenizer.json")),
            validation.num_generations,
            validation.max_new_tokens,
        )
        return answers if self._rank.rank == 0 else []

    def do_checkpoint(self, directory: str, in_background: bool = False) -> float:
        """Writes this rank's part of a checkpoint into a staging directory (see `checkpoint.py`).

        Args:
            directory: the staging directory.
            in_background: to return as soon as the state is copied; `finish_checkpoint` says when it is written.

        Returns:
            The seconds for which it held the rank.

        Raises:
            TrainError: the disk is full.
        """
        start = time.perf_counter()
        with naming_a_full_disk(directory):
            if in_background:
                write = self._strategy.snapshot(directory, CLUSTER_NAME)
                self._writer.start(lambda: self._write(write, directory))
            else:
                self._strategy.save(directory, CLUSTER_NAME)
                self._write_model_files(directory)
                mark_written(Path(directory), self._rank.rank)
        return time.perf_counter() - start

    def finish_checkpoint(self, wait: bool) -> WriteReport | None:
        """What became of the checkpoint that is being written in the background; None while it is not done.

        Args:
            wait: to hold the rank until it is.

        Raises:
            TrainError: the disk is full. Any other error of writing is raised as it is.
        """
        return self._writer.finish(wait)

    def finish_writing(self) -> None:
        """Returns when nothing is being written in the background, whatever became of it. For a thread of its own."""
        self._writer.join()

    def _write(self, write: Callable[[], None], directory: str) -> None:
        """The work of the background: all of this rank's files, to the disk."""
        with naming_a_full_disk(directory):
            write()
            self._write_model_files(directory)
            sync_files(Path(directory))
            mark_written(Path(directory), self._rank.rank)

    def _write_model_files(self, directory: str) -> None:
        if self._rank.rank == 0:
            config = self._strategy.model.hf_model.config
            save_model_files(config, self._config.pretrain, Path(directory, MODEL_DIRECTORY))

    def export(self, output_dir: str) -> None:
        """Writes the model as it is now, as an ordinary model directory, adapters merged; see `export.py`."""
        weights = self._strategy.gather_weights()
        if weights is not None:
            pretrain, arguments = self._config.pretrain, self._config.sft_train.model_args
            config = self._strategy.model.hf_model.config
            write_model(weights, arguments, config, pretrain, pretrain, output_dir, self._config.seed)

    def close(self) -> None:
        """Stops the prefetching and leaves the other ranks."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._writer.close()
        if hasattr(self, "_strategy"):
            self._strategy.close()
            del self._strategy

    def _batches_from(self, step: int) -> _Batches:
        """The micro-batches from `step` on: those that are being prepared already, unless another step is asked for."""
        if self._prefetcher is None or self._next_step != step:
            if self._prefetcher is not None:
                self._prefetcher.close()
            rows = self._config.sft_train.training_args.per_device_train_batch_size
            self._prefetcher = Prefetcher(self._read(self._stream, step, rows), _PREFETCH_DEPTH)
        return self._prefetcher

    def _read(self, stream: StepStream, step: int, rows_per_micro_batch: int) -> Iterator[tuple[StepPlan, MicroBatch]]:
        """This rank's micro-batches from `step` to the end of `stream`, each with the plan of its step."""
        rank, size = self._strategy.data_parallel_rank, self._strategy.data_parallel_size
        part, num_parts = self._strategy.sequence_parallel_rank, self._config.sequence_parallel_size
        pin = self._strategy.device.type == "cuda"
        for number in range(step, stream.num_steps):
            plan = stream.step(number, rank=rank, world_size=size, rows_per_micro_batch=rows_per_micro_batch)
            for index in range(len(plan.micro_batches)):
                batch = slice_of(make_micro_batch(stream.batch(plan, index)), part, num_parts)
                yield plan, batch.pin() if pin else batch


class _StepBatches:
    """The micro-batches of one step, taken from a prefetcher; counts the time spent waiting and the arithmetic."""

    def __init__(self, prefetcher: _Batches, step: int, model_flops: ModelFlops) -> None:
        self._prefetcher = prefetcher
        self._step = step
        self._model_flops = model_flops
        self.wait_seconds = 0.0
        self.flops = 0.0
        self.plan, self._first = self._take(1)

    def _take(self, number: int) -> tuple[StepPlan, MicroBatch]:
        PULSE.advance(f"micro-batch {number} of step {self._step}", is_counted=True)
        start = time.perf_counter()
        plan, batch = next(self._prefetcher)
        self.wait_seconds += time.perf_counter() - start
        # Of a slice of a row: its share of the whole row, and its own labels.
        share = batch.input_ids.shape[1] / sum(batch.segment_lengths)
        self.flops += share * self._model_flops.of_batch(batch.segment_lengths, 0)
        self.flops += self._model_flops.of_batch((), batch.num_label_tokens)
        return plan, batch

    def __iter__(self) -> Iterator[MicroBatch]:
        yield self._first
        for number in range(2, len(self.plan.micro_batches) + 1):
            yield self._take(number)[1]
        PULSE.advance(f"the update of step {self._step}", is_counted=True)


def not_finite(reason: str) -> TrainError:
    """The error of a step without a finite loss and gradient."""
    return TrainError(
        reason,
        code="not_finite",
        hint="lower the learning rate, warm up longer, or look at the samples of this step; resume from the last "
        "checkpoint. on_non_finite=skip leaves such steps out and counts them",
    )


def _seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
