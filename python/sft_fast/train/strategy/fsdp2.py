"""`fsdp2_train`: torch's own `fully_shard` behind the strategy interface.

Each decoder layer is gathered when it is needed; what is around the layers (embeddings, last norm, head) is one more
group. Weights are 32-bit masters, cast for the computation. Checkpoints are torch's distributed ones, which any number
of ranks can load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from sft_fast.train.batch import MicroBatch
from sft_fast.train.memory import decoder_layers
from sft_fast.train.model import DTYPES, SFTModel
from sft_fast.train.optim import make_optimizer
from sft_fast.train.strategy.base import RankInfo, StepResult, TrainStrategy
from sft_fast.train.strategy.fsdp2_config import make_fsdp2_settings
from sft_fast.train.strategy.process_group import announce, backend_of, collective_timeout, make_sequence_group
from sft_fast.train.timing import StepTimer


class Fsdp2Strategy(TrainStrategy):
    """See the module. One object is one rank's part of the model."""

    def __init__(self, config: Any, rank: RankInfo) -> None:
        self._config = config
        self._rank = rank
        self._settings = make_fsdp2_settings(config)
        self._model: Any = None
        self._optimizer: Any = None
        self._writers: Any = None
        self.device = torch.device(rank.device, 0) if rank.device == "cuda" else torch.device(rank.device)

    @property
    @override
    def data_parallel_rank(self) -> int:
        return self._rank.rank // int(self._config.sequence_parallel_size)

    @property
    @override
    def data_parallel_size(self) -> int:
        return int(self._config.data_parallel_size)

    @property
    @override
    def sequence_parallel_rank(self) -> int:
        return self._rank.rank % int(self._config.sequence_parallel_size)

    @property
    @override
    def model(self) -> SFTModel:
        model: SFTModel = self._model
        return model

    @override
    def initialize(self, load_model: Callable[[], SFTModel]) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            announce(self._rank)
            timeout = collective_timeout(self._config.hang_timeout)
            dist.init_process_group(backend_of(self._rank), timeout=timeout)
        mesh = init_device_mesh(self.device.type, (self._rank.world_size,))
        model = load_model()
        model.sequence_group = make_sequence_group(1, self._config.sequence_parallel_size)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        options: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self._settings.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES[self._config.sft_train.model_args.dtype], reduce_dtype=torch.float32
            ),
            "offload_policy": CPUOffloadPolicy() if self._settings.offload else OffloadPolicy(),
        }
        layers = decoder_layers(model.hf_model)
        for layer in layers:
            fully_shard(layer, **options)
        # One group, since a head may be the embedding; not the whole model, since its parts are also called alone.
        in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
        around = [
            module
            for module in model.modules()
            if any(id(parameter) not in in_layers for parameter in module.parameters(recurse=False))
        ]
        fully_shard(around, **options)
        fully_shard(model, **options)
        self._model = model
        self._optimizer = make_optimizer(model, self._config.sft_train.training_args)

    @override
    def train_step(
        self, batches: Iterable[MicroBatch], num_batches: int, num_label_tokens: int, learning_rate: float
    ) -> StepResult:
        model, optimizer = self._model, self._optimizer
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # Gradients are means over the ranks, with their samples or their slices of them: multiplied by the number of
        # ranks, the gradient is the sum again.
        weight = self._rank.world_size
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        timer = StepTimer(self.device)
        for batch in batches:
            with timer("forward"):
                loss = model(**batch.to(self.device).arguments(), factor=weight / num_label_tokens)
            with timer("backward"):
                loss.backward()
            total += loss.detach()
        with timer("optimizer"):
            grad_norm = self._clip()
            # The norm is the same on every rank, and so is the decision.
            if math.isfinite(grad_norm):
                optimizer.step()
            optimizer.zero_grad()
        return StepResult(
            loss=total.item() / weight,
            grad_norm=grad_norm,
            is_skipped=not math.isfinite(grad_norm),
            forward_seconds=timer.seconds("forward"),
            backward_seconds=timer.seconds("backward"),
            optimizer_seconds=timer.seconds("optimizer"),
        )

    def _clip(self) -> float:
        """The norm of the whole gradient; afterwards it is at most `max_grad_norm`, unless that is 0."""
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._config.max_grad_norm or math.inf)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @override
    def val_step(self, batch: MicroBatch) -> float:
        self._model.eval()
        with torch.no_grad():
            loss: torch.Tensor = self._model(**batch.to(self.device).arguments())
        return loss.item()

    @override
    def save(self, directory: str, tag: str) -> None:
        save(self._state(), checkpoint_id=str(Path(directory, tag)))

    @override
    def snapshot(self, directory: str, tag: str) -> Callable[[], None]:
        if self._writers is None:
            # The ranks agree on who writes what while they train: by messages of their own, which a CPU can carry.
            self._writers = dist.new_group(backend="gloo")
        written: Any = async_save(self._state(), checkpoint_id=str(Path(directory, tag)), process_group=self._writers)

        def wait() -> None:
            written.result()

        return wait

    @override
    def load(self, directory: str, tag: str, *, is_universal: bool = False) -> None:
        groups = self._optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        state = self._state()
        load(state, checkpoint_id=str(Path(directory, tag)))
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=not self._has_adapters),
        )
        # The optimizer's settings are for the configuration to say.
        for group, values in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(values)

    def _state(self) -> dict[str, Any]:
        """Weights and optimizer state by name, split; of a model with adapters, what is trained."""
        options = StateDictOptions(ignore_frozen_params=self._has_adapters)
        model, optimizer = get_state_dict(self._model, self._optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    @property
    def _has_adapters(self) -> bool:
        return bool(self._config.sft_train.model_args.has_adapters)

    @override
    def gather_weights(self) -> dict[str, Any] | None:
        gathered = {}
        for name, tensor in self._model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._rank.rank == 0:
                gathered[name.removeprefix("model.")] = whole.detach().cpu()
        return gathered if self._rank.rank == 0 else None

    @override
    def close(self) -> None:
        self._model, self._optimizer, self._writers = None, None, None


def read_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of this strategy by the names of `SFTModel`, whole, read without other ranks."""
    import tempfile

    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        path = Path(temporary, "state.pt")
        dcp_to_torch_save(directory, path)
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=False)["model"]
    return weights
