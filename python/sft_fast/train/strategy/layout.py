"""Whether a model can be split over the ranks as a run asks for, and which of its weights are. Needs no torch.

Tensor parallel splits the weights that the model's own plan in transformers names: by columns, those that make heads
and the inner width; by rows, those that come after them. Embeddings, norms and the output layer stay whole on every
rank. Sequence parallel splits rows, and in attention the heads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sft_fast.errors import ConfigError

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig

_PLACE = "sft_train.strategy_args.strategy_config"
_TENSOR = f"{_PLACE}.tensor_parallel.autotp_size"

# Styles of a plan -> how a weight is cut in the words of DeepSpeed's AutoTP. A weight that stays whole but sees a part
# of the heads has a part of its gradient on each rank: they are added up.
_STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    "replicated_with_grad_allreduce": {"partition_type": "skip", "grad_allreduce": True},
}
# What a plan says of the parts that stay whole here, in whatever style.
_WHOLE = ("lm_head", "embed_tokens")


def split_layers(model_config: Any) -> dict[str, str]:
    """Regular expressions for the names of weights, and the style in which each is split.

    Args:
        model_config: a configuration of transformers.

    Raises:
        ConfigError: transformers has no plan for such a model, or one with styles that AutoTP does not have.
    """
    text_config = model_config.get_text_config()
    plan = getattr(text_config, "base_model_tp_plan", None) or {}
    plan = {layer: style for layer, style in plan.items() if layer.split(".")[-1] not in _WHOLE}
    if not plan:
        raise _refusal(f"transformers has no plan for splitting the weights of {text_config.model_type}")
    for layer, style in plan.items():
        if style not in _STYLES:
            raise _refusal(f"{layer} of {text_config.model_type} would be split as {style}, which is not supported")
    patterns = {layer: re.escape(layer).replace(r"\*", "[0-9]+") for layer in plan}
    return {rf".*{patterns[layer]}\.weight$": style for layer, style in plan.items()}


def autotp_partition(model_config: Any) -> dict[str, Any]:
    """The `partition_config` of DeepSpeed's AutoTP for a model; raises as `split_layers`."""
    specs = [{"patterns": [layer], **_STYLES[style]} for layer, style in split_layers(model_config).items()]
    return {"use_default_specs": False, "layer_specs": specs}


def check_layout(config: SFTConfig, model_config: Any) -> None:
    """Raises `ConfigError`, with the reason and what to do, where a run asks for what a model can't do.

    Args:
        config: the run.
        model_config: the model's configuration, of transformers.
    """
    num_tensor, num_sequence = config.tensor_parallel_size, config.sequence_parallel_size
    arguments, text_config = config.sft_train.model_args, model_config.get_text_config()
    num_heads = text_config.num_attention_heads
    if num_tensor > 1:
        split_layers(model_config)
        if arguments.has_adapters or arguments.freeze_module_prefix:
            what = "adapters" if arguments.has_adapters else "frozen weights"
            raise _refusal(f"AutoTP does not know {what}")
        sizes = {
            "num_attention_heads": num_heads,
            "num_key_value_heads": getattr(text_config, "num_key_value_heads", None) or num_heads,
            "intermediate_size": text_config.intermediate_size,
        }
        for name, size in sizes.items():
            if size % num_tensor:
                raise ConfigError(
                    f"{num_tensor} ranks can't share the weights of a model with {name} {size}",
                    code="parallel_size",
                    location=_TENSOR,
                    hint=f"a divisor of {size}; zero_optimization.stage: 3 splits weights over any number of ranks",
                )
    if num_sequence > 1 and num_heads % (num_tensor * num_sequence):
        of_each = f" / {num_tensor}" if num_tensor > 1 else ""
        raise ConfigError(
            f"{num_sequence} ranks can't share the attention of a model with {num_heads}{of_each} heads",
            code="parallel_size",
            location=f"{_PLACE}.{config.sequence_parallel_key}",
            hint=f"a divisor of {num_heads // num_tensor}",
        )


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"this run can't be tensor parallel: {reason}",
        code="unsupported_model",
        location=_TENSOR,
        hint="zero_optimization.stage: 3 splits the weights of every model",
    )
