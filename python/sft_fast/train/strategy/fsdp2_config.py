"""The settings of `fsdp2_train`, checked: which keys there are, and which are said elsewhere. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft_fast.errors import ConfigError

_PLACE = "sft_train.strategy_args.strategy_config"

# Keys of ROLL's fsdp2_train that say what is said elsewhere or never differs -> the values that agree with it.
_AGREED: dict[str, tuple[Any, ...]] = {
    "reduce_dtype": (None, "fp32", "float32"),
    "cast_forward_inputs": (None, True),
    "expert_parallel_size": (None, 1),
}
_NAMES = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "fp32", "float32": "fp32"}


@dataclass(frozen=True)
class Fsdp2Settings:
    """How weights are split."""

    reshard_after_forward: bool  # True: each layer's weights are given up after use (as ZeRO-3), False: as ZeRO-2
    offload: bool  # weights, gradients and optimizer state in CPU memory


def make_fsdp2_settings(config: Any) -> Fsdp2Settings:
    """The settings of a run.

    Raises:
        ConfigError: a key is unknown or asks for what is not supported; `location` is the key.
    """
    settings = dict(config.sft_train.strategy_args.strategy_config)
    dtype = config.sft_train.model_args.dtype
    if dtype == "fp16":
        raise ConfigError(
            "fsdp2_train has no loss scaling, which fp16 needs",
            code="strategy_config",
            location="sft_train.model_args.dtype",
            hint="use bf16, or strategy_name: deepspeed_train",
        )
    reshard = settings.pop("reshard_after_forward", True)
    offload = settings.pop("offload_policy", False)
    for key, value in (("reshard_after_forward", reshard), ("offload_policy", offload)):
        if not isinstance(value, bool):
            raise _refusal(key, f"expected true or false, found {value!r}")
    param_dtype = settings.pop("param_dtype", None)
    if param_dtype is not None and _NAMES.get(str(param_dtype)) != dtype:
        raise _refusal("param_dtype", f"sft_train.model_args.dtype says {dtype}; set that one")
    fsdp_size = settings.pop("fsdp_size", None)
    if fsdp_size not in (None, config.sft_train.world_size):
        raise _refusal("fsdp_size", f"the model is split over all {config.sft_train.world_size} ranks")
    settings.pop("ulysses_size", None)  # `SFTConfig.sequence_parallel_size`
    for key, value in settings.items():
        if key not in _AGREED:
            raise _refusal(key, "it is no key of fsdp2_train: reshard_after_forward, offload_policy, ulysses_size")
        if value not in _AGREED[key]:
            raise _refusal(key, f"{value!r} is not supported")
    return Fsdp2Settings(reshard_after_forward=reshard, offload=offload)


def _refusal(key: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{key} cannot be set here: {reason}", code="strategy_config", location=f"{_PLACE}.{key}", hint="remove the key"
    )
