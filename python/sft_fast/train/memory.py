"""What stays in memory between the forward and the backward pass, and where: the weights' gradients are the same."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from sft_fast.errors import ConfigError

# Smaller tensors stay on the GPU: moving them costs more than it frees.
_SMALLEST_BYTES = 2**16

# Operators whose results are slow to compute again: products of matrices, and attention.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "aten::_scaled_mm")
_ATTENTION_LIBRARIES = ("torch_attn::", "flash_attn::", "flash_attn_2_cuda::")

# What operators gave, in the order of their calls.
_Results = defaultdict[Any, deque[Any]]


def checkpoint_layers(model: Any, kind: str) -> None:
    """Keeps less of each layer of a transformers model, and computes the rest again in the backward pass.

    Args:
        model: the model.
        kind: `full` keeps the layer's input alone; `selective` also what matrix products and attention gave, so that
            only what is cheap is computed twice; `none` changes nothing.

    Raises:
        ConfigError: the model cannot do it.
    """
    if kind == "none":
        return
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise ConfigError(
            f"{type(model).__name__} has no gradient checkpointing",
            code="unsupported_model",
            location="sft_train.model_args.gradient_checkpointing",
            hint="set it to none",
        )
    # Not the re-entrant form: it loses the gradient where the embeddings are frozen, as they are with adapters.
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = _keeping_what_is_slow
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


class _Keep(TorchDispatchMode):
    """In the forward pass: keeps what slow operators give, in their order."""

    def __init__(self, kept: _Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_slow(func):
            self._kept[func].append(tree_map_only(torch.Tensor, torch.Tensor.detach, result))
        return result


class _Reuse(TorchDispatchMode):
    """When the forward pass runs again: gives that instead of computing it.

    Torch's own pair of modes wants every operator to come again; at ZeRO-3, gathering the weights makes others.
    """

    def __init__(self, kept: _Results) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._kept[func].popleft() if is_slow(func) else func(*args, **(kwargs or {}))


def _keeping_what_is_slow() -> tuple[_Keep, _Reuse]:
    """The contexts of the forward pass of one layer and of its repetition."""
    kept: _Results = defaultdict(deque)
    return _Keep(kept), _Reuse(kept)


def is_slow(operator: Any) -> bool:
    """Whether selective checkpointing keeps what an operator gives."""
    return bool(operator.name().startswith((*_PRODUCTS, *_ATTENTION_LIBRARIES)))


@dataclass(frozen=True, slots=True)
class _OnHost:
    """A tensor that waits in CPU memory."""

    tensor: torch.Tensor
    device: torch.device


def offload_activations() -> AbstractContextManager[Any]:
    """Inside, what autograd keeps on a GPU for the backward pass waits in page-locked CPU memory instead.

    Weights stay where they are, and so do small tensors. Copies run in the GPU's own order of work: none is waited for
    by the program. Without a GPU it changes nothing.
    """
    return torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor | _OnHost:
    if not _is_moved(tensor):
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
    return _OnHost(host.copy_(tensor, non_blocking=True), tensor.device)


def _to_device(saved: torch.Tensor | _OnHost) -> torch.Tensor:
    return saved.tensor.to(saved.device, non_blocking=True) if isinstance(saved, _OnHost) else saved


def _is_moved(tensor: torch.Tensor) -> bool:
    """Whether it is an activation of some size on a GPU. A transposed weight is a weight."""
    is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    return _is_on_gpu(tensor) and not is_weight and tensor.nbytes >= _SMALLEST_BYTES


def _is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def decoder_layers(hf: Any) -> list[nn.Module]:
    """The layers of a transformers model: its list of as many modules as the configuration says."""
    num_layers = hf.config.get_text_config().num_hidden_layers
    lists: Iterator[nn.ModuleList] = (
        module for module in hf.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers
    )
    return list(next(lists))
