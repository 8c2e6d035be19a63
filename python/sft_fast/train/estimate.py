"""How much memory a run will need on each device, from the model's configuration alone, before anything starts.

Parameters are counted on a model without memory (torch's meta device), and what a layer keeps for the backward pass by
running it there once. It is an estimate: buffers of communication, fragments and what the libraries themselves take
come on top.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM
from typing_extensions import override

from sft_fast.config import SFTConfig
from sft_fast.console import count, size
from sft_fast.train.loss import chunk_rows_of
from sft_fast.train.memory import decoder_layers, is_slow
from sft_fast.train.model import DTYPES, load_config
from sft_fast.train.strategy.layout import split_layers

_NAME = "sft_fast_estimate"

# DeepSpeed's own `reduce_bucket_size`.
_BUCKET_ELEMENTS = 500_000_000


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on each device at the worst moment of a step."""

    num_parameters: int
    num_trained: int
    weights: int
    gradients: int
    optimizer: int  # 32-bit masters and the two means of Adam
    activations: int
    loss: int  # one chunk of logits, and the gradient of the output layer
    buffers: int  # what DeepSpeed exchanges gradients through; on a CPU only what is written of it is taken
    is_optimizer_on_host: bool  # then its bytes are in the memory of the machine, not in `total`

    @property
    def total(self) -> int:
        """All of it that is on the device."""
        on_device = 0 if self.is_optimizer_on_host else self.optimizer
        return self.weights + self.gradients + on_device + self.activations + self.loss + self.buffers

    def rows(self) -> list[tuple[str, str]]:
        """Names and values, for a table."""
        trained = "" if self.num_trained == self.num_parameters else f", {count(self.num_trained)} of them trained"
        place = " in the memory of the machine" if self.is_optimizer_on_host else ""
        return [
            ("parameters", f"{count(self.num_parameters)}{trained}"),
            (
                "memory a device",
                f"about {size(self.total)}: weights {size(self.weights)}, gradients {size(self.gradients)}, optimizer "
                f"{size(self.optimizer)}{place}, activations {size(self.activations)}, loss {size(self.loss)}"
                + (f", buffers {size(self.buffers)}" if self.buffers else ""),
            ),
        ]


def estimate_memory(config: SFTConfig, zero_stage: int) -> MemoryEstimate:
    """The estimate of a run whose model directory and settings are sound.

    Args:
        config: the run.
        zero_stage: 1 to 3; 0 for `fsdp2_train`.
    """
    arguments, worker = config.sft_train.model_args, config.sft_train
    model_config = load_config(config.pretrain, arguments.model_config_kwargs)
    AttentionInterface.register(_NAME, _attention)
    dtype = DTYPES[arguments.dtype]
    with torch.device("meta"):
        hf: Any = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=_NAME)
    split = split_layers(model_config) if config.tensor_parallel_size > 1 else {}
    is_cut = [re.compile(layer) for layer, style in split.items() if style in ("colwise", "rowwise")]
    num_parameters = sum(parameter.numel() for parameter in hf.parameters())
    num_of_rank = sum(
        parameter.numel() // (config.tensor_parallel_size if any(layer.match(name) for layer in is_cut) else 1)
        for name, parameter in hf.named_parameters()
    )
    if arguments.freeze_module_prefix:
        for name, parameter in hf.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(arguments.freeze_module_prefix)))
    num_trained = sum(parameter.numel() for parameter in hf.parameters() if parameter.requires_grad)
    if arguments.has_adapters:
        num_trained = _num_adapter_weights(hf, arguments)
    num_trained_of_rank = num_trained * num_of_rank // num_parameters

    settings = worker.strategy_args.strategy_config
    num_shards = worker.world_size // config.tensor_parallel_size
    is_fsdp2 = worker.strategy_args.strategy_name == "fsdp2_train"
    width = torch.empty((), dtype=dtype).element_size()
    splits_weights = is_fsdp2 or zero_stage == 3
    splits_gradients = is_fsdp2 or zero_stage >= 2
    # FSDP2 keeps the masters as its weights, and casts a layer at a time.
    weights = num_of_rank * (4 if is_fsdp2 else width) // (num_shards if splits_weights else 1)
    if arguments.quantization is not None:
        num_quantised = sum(p.numel() for layer in decoder_layers(hf) for p in layer.parameters() if p.dim() > 1)
        weights -= int(num_quantised * (width - {"nf4": 0.5, "int8": 1}[arguments.quantization]))
    if arguments.has_adapters:
        weights += num_trained * width
    gradients = num_trained_of_rank * 4 // (num_shards if splits_gradients else 1)
    optimizer = num_trained_of_rank * (8 if is_fsdp2 else 12) // num_shards

    num_tokens = worker.training_args.per_device_train_batch_size * config.sequence_length
    num_tokens = -(-num_tokens // config.sequence_parallel_size)
    part = hf
    if config.tensor_parallel_size > 1:
        with torch.device("meta"):
            narrow = _of_one_rank(model_config, config.tensor_parallel_size)
            part = AutoModelForCausalLM.from_config(narrow, dtype=dtype, attn_implementation=_NAME)
    whole_layers, products = _kept_by_layers(part, num_tokens)
    num_layers = len(decoder_layers(hf))
    inputs = num_layers * num_tokens * model_config.get_text_config().hidden_size * width
    # What is computed again is there for one layer at a time.
    kept = {
        "none": whole_layers,
        "full": inputs + whole_layers // num_layers,
        "selective": inputs + products + whole_layers // num_layers,
    }[arguments.kept_activations]
    if arguments.offload_activations and config.num_gpus_per_node != 0:
        kept = whole_layers // num_layers
    head = hf.get_output_embeddings().weight
    on_gpu = config.num_gpus_per_node != 0
    num_logits = min(num_tokens, chunk_rows_of(head.shape[0], on_gpu)) * head.shape[0]
    loss = num_logits * 8 + (head.numel() * 4 if head.requires_grad and not arguments.has_adapters else 0)
    zero = settings.get("zero_optimization") or {}
    offload = zero.get("offload_optimizer") or {}
    num_buffers = 2 if zero.get("overlap_comm", zero_stage == 3) else 1
    bucket = zero.get("reduce_bucket_size", "auto")
    num_elements = int(_BUCKET_ELEMENTS if bucket == "auto" else bucket)
    return MemoryEstimate(
        num_parameters=num_parameters,
        num_trained=num_trained,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept,
        loss=loss,
        buffers=0 if is_fsdp2 or not on_gpu else num_buffers * num_elements * width,
        is_optimizer_on_host=offload.get("device") == "cpu" or bool(settings.get("offload_policy")),
    )


def _of_one_rank(model_config: Any, num_tensor: int) -> Any:
    """The configuration of a model whose layers are the parts of one rank: fewer heads, and a narrower inside.

    What is between the layers stays as wide as it is, on every rank.
    """
    narrow = copy.deepcopy(model_config)
    text = narrow.get_text_config()
    num_heads = text.num_attention_heads
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    text.num_key_value_heads = (getattr(text, "num_key_value_heads", None) or num_heads) // num_tensor
    text.num_attention_heads = num_heads // num_tensor
    text.intermediate_size //= num_tensor
    return narrow


def _num_adapter_weights(hf: Any, arguments: Any) -> int:
    """Weights of new LoRA adapters; those that are read from a directory count as none."""
    targets = arguments.lora_target or []
    linear = {
        name: module
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear) and module is not hf.get_output_embeddings()
    }
    if targets == "all-linear":
        chosen = list(linear)
    elif isinstance(targets, str):
        chosen = [name for name in linear if re.fullmatch(targets, name) or name.endswith(f".{targets}")]
    else:
        chosen = [name for name in linear if name.split(".")[-1] in targets]
    return sum(arguments.lora_rank * (linear[name].in_features + linear[name].out_features) for name in chosen)


class _Attention(torch.autograd.Function):
    """Keeps what the kernels keep for the backward pass: its inputs and its output, never the scores; it has none."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def _attention(
    _module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    output: torch.Tensor = _Attention.apply(query, key, value)
    return output.transpose(1, 2), None


class _Products(TorchDispatchMode):
    """Adds up the results of the operators that selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_slow(func) and isinstance(result, torch.Tensor):
            self.num_bytes += result.nbytes
        return result


def _kept_by_layers(hf: Any, num_tokens: int) -> tuple[int, int]:
    """Bytes that all layers keep for the backward pass of a row, and those of them that come from products."""
    weights = {parameter.untyped_storage()._cdata for parameter in hf.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # which also keeps its address from being used again
        return tensor

    ids = torch.zeros((1, num_tokens), dtype=torch.int64, device="meta")
    hf.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _Products() as products:
        hf.base_model(input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values()), products.num_bytes
