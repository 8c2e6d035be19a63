"""`deepspeed_train`: DeepSpeed's ZeRO stages 1 to 3 behind the strategy interface.

The loss, the learning rate and the optimizer are ours; DeepSpeed splits states over ranks, casts, clips and reduces.
The settings that it is given are made in `deepspeed_config.py`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import logger as deepspeed_logger
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from typing_extensions import override

from sft_fast.errors import TrainError
from sft_fast.train.background import copy_to_host
from sft_fast.train.batch import MicroBatch
from sft_fast.train.model import SFTModel
from sft_fast.train.optim import make_optimizer
from sft_fast.train.strategy.base import RankInfo, StepResult, TrainStrategy
from sft_fast.train.strategy.deepspeed_config import make_deepspeed_config
from sft_fast.train.strategy.layout import autotp_partition
from sft_fast.train.strategy.process_group import announce, backend_of, collective_timeout, make_sequence_group
from sft_fast.train.timing import StepTimer

# On a CPU, DeepSpeed would compile a shared-memory operator at every start (a minute, and a compiler); gloo does the
# same work without it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed_logger.setLevel(logging.WARNING)


class DeepSpeedStrategy(TrainStrategy):
    """See the module. One object is one rank's part of the model."""

    def __init__(self, config: Any, rank: RankInfo) -> None:
        self._config = config
        self._rank = rank
        self._settings = make_deepspeed_config(config)
        self._num_tensor, self._num_sequence = int(config.tensor_parallel_size), int(config.sequence_parallel_size)
        self._engine: Any = None
        self._optimizer: Any = None
        self.device = torch.device(rank.device, 0) if rank.device == "cuda" else torch.device(rank.device)

    @property
    @override
    def data_parallel_rank(self) -> int:
        return self._rank.rank // self._num_tensor // self._num_sequence

    @property
    @override
    def data_parallel_size(self) -> int:
        return int(self._config.data_parallel_size)

    @property
    @override
    def sequence_parallel_rank(self) -> int:
        return self._rank.rank // self._num_tensor % self._num_sequence

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3."""
        return int(self._settings["zero_optimization"]["stage"])

    @override
    def initialize(self, load_model: Callable[[], SFTModel]) -> None:
        self._join()
        with self._partitioned_loading():
            model = load_model()
        model.sequence_group = make_sequence_group(self._num_tensor, self._num_sequence)
        if self._num_tensor > 1:
            self._settings["tensor_parallel"] |= {
                "partition_config": autotp_partition(model.hf_model.config),
                "vocab_parallel_lm_head": False,
            }
        arguments = self._config.sft_train.training_args
        self._optimizer = make_optimizer(model, arguments)
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints the memory, again and again
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=self._optimizer, config=self._settings, dist_init_required=False
            )

    @contextlib.contextmanager
    def _partitioned_loading(self) -> Iterator[None]:
        """At stage 3, transformers splits each weight over the ranks as it is read, so that no rank holds the model.

        Not with tensor parallel: there the model is cut first, and its parts split over fewer ranks than all.
        """
        if self.zero_stage < 3 or self._num_tensor > 1:
            yield
            return
        told = HfDeepSpeedConfig(self._settings)  # transformers keeps a weak reference and looks at it while it loads
        try:
            yield
        finally:
            del told
            unset_hf_deepspeed_config()

    def _join(self) -> None:
        """Makes the process group, once a process."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if deepspeed.comm.is_initialized():
            return
        announce(self._rank)
        deepspeed.init_distributed(
            dist_backend=backend_of(self._rank),
            auto_mpi_discovery=False,
            verbose=False,
            timeout=collective_timeout(self._config.hang_timeout),
        )

    @override
    def train_step(
        self, batches: Iterable[MicroBatch], num_batches: int, num_label_tokens: int, learning_rate: float
    ) -> StepResult:
        engine = self._engine
        engine.train()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # DeepSpeed divides by the configured number of micro-batches, whatever the number of this step, and takes the
        # mean over the ranks that have different tokens: other samples, or other slices of them. Multiplied by both,
        # the gradient is the sum again.
        weight = self._rank.world_size // self._num_tensor * engine.gradient_accumulation_steps()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        timer = StepTimer(self.device)
        for index, batch in enumerate(batches):
            # Said for each micro-batch, since the last step of an epoch may have fewer of them than the others.
            engine.set_gradient_accumulation_boundary(index == num_batches - 1)
            with timer("forward"):
                loss = engine(**batch.to(self.device).arguments(), factor=weight / num_label_tokens)
            with timer("backward"):
                engine.backward(loss)
            total += loss.detach()
        with timer("optimizer"):
            engine.step()
        # A gradient that is not finite makes the norm so, which all ranks share; then DeepSpeed changes nothing.
        grad_norm = float(engine.get_global_grad_norm())
        # Ranks that share weights have the same tokens. Asking for the value waits for the device.
        loss_share = total.item() / weight / self._num_tensor
        return StepResult(
            loss=loss_share,
            grad_norm=grad_norm,
            is_skipped=not math.isfinite(grad_norm),
            forward_seconds=timer.seconds("forward"),
            backward_seconds=timer.seconds("backward"),
            optimizer_seconds=timer.seconds("optimizer"),
        )

    @override
    def val_step(self, batch: MicroBatch) -> float:
        self._engine.eval()
        with torch.no_grad():
            loss: torch.Tensor = self._engine(**batch.to(self.device).arguments())
        return loss.item()

    @override
    def save(self, directory: str, tag: str) -> None:
        # `latest` would point at this checkpoint before it is whole; which one is newest is decided elsewhere.
        self._engine.save_checkpoint(
            directory, tag=tag, save_latest=False, exclude_frozen_parameters=self._has_adapters
        )

    @override
    def snapshot(self, directory: str, tag: str) -> Callable[[], None]:
        copies = _CopyingEngine(self._engine._config)
        usual, self._engine.checkpoint_engine = self._engine.checkpoint_engine, copies
        try:
            self.save(directory, tag)
        finally:
            self._engine.checkpoint_engine = usual
        return copies.write

    @override
    def load(self, directory: str, tag: str, *, is_universal: bool = False) -> None:
        groups = self._optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        # DeepSpeed takes this from its settings; which kind of checkpoint it is shows only now.
        self._engine._config.load_universal_checkpoint = is_universal
        path, _ = self._engine.load_checkpoint(directory, tag=tag, load_module_strict=not self._has_adapters)
        self._engine._config.load_universal_checkpoint = False
        # The optimizer's settings are for the configuration to say. From a converted checkpoint, stage 3 gives those of
        # one group to all groups, and makes all share one step counter, which then counts each step once a group.
        for group, values in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(values)
        for state in self._optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        if path is None:
            raise TrainError(f"DeepSpeed could not load the checkpoint {tag}", path=directory, code="checkpoint")

    @property
    def _has_adapters(self) -> bool:
        """Whether only adapters are trained, so that a checkpoint need not hold the weights of `pretrain`."""
        return bool(self._config.sft_train.model_args.has_adapters)

    @property
    @override
    def model(self) -> SFTModel:
        module: SFTModel = self._engine.module
        return module

    @override
    def gather_weights(self) -> dict[str, Any] | None:
        if self.zero_stage == 3 or self._num_tensor > 1:
            weights = self._engine._consolidated_16bit_state_dict()
        else:
            weights = self._engine.module.state_dict()
        if self._rank.rank != 0:
            return None
        return {name.removeprefix("model."): tensor.detach().cpu() for name, tensor in weights.items()}

    @override
    def close(self) -> None:
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
            deepspeed.utils.groups.mpu = None  # the next engine would take it for its own


class _CopyingEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """Keeps copies of what DeepSpeed would have written, file by file, until it is told to write them.

    DeepSpeed's own writer beside training wants its library for asynchronous files, which has to be compiled.
    """

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._files: list[tuple[Any, str]] = []

    @override
    def save(self, state_dict: Any, path: str) -> None:
        self._files.append((copy_to_host(state_dict), path))

    def write(self) -> None:
        """Writes the files; the memory of each is given back as soon as it is written."""
        while self._files:
            state, path = self._files.pop(0)
            super().save(state, path)
