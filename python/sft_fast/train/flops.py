"""How much arithmetic a micro-batch needs, and how much a device can do: together, the model FLOPs utilization.

What counts is what the mathematics needs, never what was computed again (gradient checkpointing) or for nothing
(padding). A product with a weight takes 2 operations a weight and token in the forward pass, 2 in the backward pass for
the input, and 2 for the weight itself where it is trained. The head counts at label tokens only, where alone it runs.
Attention takes 4 operations a pair of tokens that see each other, head and size of a head in the forward pass, and
twice that in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sft_fast.train.model import output_layer

# Dense matrix products with bfloat16 inputs, in 10^12 operations a second, by a part of the device's name; the first
# that fits counts. From the data sheets of the makers: nvidia.com for each product, amd.com for the Instinct series.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("H200", 989.4),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 383.0),
)


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """The peak of a device of this name; None where it is not known, and in float32, for which the table is not."""
    if dtype == "fp32":
        return None
    return next((peak for name, peak in PEAK_TFLOPS if name in device_name), None)


@dataclass(frozen=True)
class ModelFlops:
    """What a model needs."""

    per_token: float  # all layers, forward and backward
    per_label_token: float  # the head
    per_pair: float  # one pair of tokens in one attention layer
    windows: tuple[int | None, ...]  # of each layer: the most tokens that a token sees, None for all before it

    @classmethod
    def of(cls, hf: Any) -> ModelFlops:
        """Counted over the parameters of a transformers model (with adapters or not, split over ranks or not)."""
        config, head = hf.config.get_text_config(), output_layer(hf)
        looked_up = [module for module in hf.modules() if isinstance(module, nn.Embedding)]
        outside = {id(parameter) for module in (head, *looked_up) for parameter in module.parameters()}
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        if not hasattr(config, "layer_types") and window:
            kinds = ["sliding_attention"] * config.num_hidden_layers
        return cls(
            per_token=sum(
                _flops(parameter) * (_active_experts(config) if ".experts." in name else 1.0)
                for name, parameter in hf.named_parameters()
                if id(parameter) not in outside
            ),
            per_label_token=sum(_flops(parameter) for parameter in head.parameters()),
            per_pair=3 * 4 * config.num_attention_heads * head_dim,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        )

    def of_batch(self, segment_lengths: Sequence[int], num_label_tokens: int) -> float:
        """Operations of a forward and a backward pass over samples of these lengths."""
        num_pairs = sum(_num_pairs(length, window) for window in self.windows for length in segment_lengths)
        return (
            self.per_token * sum(segment_lengths) + self.per_label_token * num_label_tokens + self.per_pair * num_pairs
        )


def _flops(parameter: Any) -> float:
    """Of one token, through a weight; norms and biases are no products."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if len(shape) < 2:
        return 0.0
    return float(shape.numel() * (6 if parameter.requires_grad else 4))


def _active_experts(config: Any) -> float:
    """The share of a layer's experts that a token goes through."""
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    return float((getattr(config, "num_experts_per_tok", None) or num_experts) / num_experts)


def _num_pairs(length: int, window: int | None) -> int:
    """Pairs of tokens (with themselves) that see each other under causal attention."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
