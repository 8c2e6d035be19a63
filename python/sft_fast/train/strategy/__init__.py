"""Training backends by the name that `strategy_args.strategy_name` gives."""

from __future__ import annotations

from typing import Any

from sft_fast.errors import ConfigError
from sft_fast.train.strategy.base import RankInfo, StepResult, TrainStrategy
from sft_fast.train.strategy.deepspeed_config import make_deepspeed_config
from sft_fast.train.strategy.fsdp2_config import make_fsdp2_settings

__all__ = ["RankInfo", "StepResult", "TrainStrategy", "check_strategy", "check_strategy_name", "create_strategy"]

_STRATEGIES = ("deepspeed_train", "fsdp2_train")

# For users of other backends: what says the same in DeepSpeed's words.
_EQUIVALENTS = {
    "megatron_train": (
        "write strategy_name: deepspeed_train and\n"
        "  strategy_config.zero_optimization.stage: 1   for use_distributed_optimizer\n"
        "  strategy_config.tensor_parallel.autotp_size: N   for tensor_model_parallel_size\n"
        "  strategy_config.sequence_parallel_size: N   for context_parallel_size\n"
        "  strategy_config.zero_optimization.stage: 3   to split the weights, as pipeline parallel does\n"
        "  strategy_config.zero_optimization.offload_optimizer: {device: cpu}   for optimizer_cpu_offload\n"
        "  model_args.gradient_checkpointing: full or selective   for recompute_granularity\n"
        "and leave out the other *_parallel_size, and sequence_parallel"
    ),
}


def create_strategy(config: Any, rank: RankInfo) -> TrainStrategy:
    """The strategy that the configuration names, not yet initialised.

    Raises:
        ConfigError: the name is unknown, or is one that is not supported; the hint says what to write instead.
    """
    name = config.sft_train.strategy_args.strategy_name
    check_strategy_name(name)
    # Imported here: DeepSpeed reads the environment when it is imported.
    if name == "fsdp2_train":
        from sft_fast.train.strategy.fsdp2 import Fsdp2Strategy

        return Fsdp2Strategy(config, rank)
    from sft_fast.train.strategy.deepspeed import DeepSpeedStrategy

    return DeepSpeedStrategy(config, rank)


def check_strategy(config: Any) -> int:
    """Checks name and settings of the strategy, without torch.

    Returns:
        The stage of ZeRO; 0 where there is none.

    Raises:
        ConfigError: the name or a setting is not supported.
    """
    name = config.sft_train.strategy_args.strategy_name
    check_strategy_name(name)
    if name == "fsdp2_train":
        make_fsdp2_settings(config)
        zero_stage = 0
    else:
        zero_stage = int(make_deepspeed_config(config)["zero_optimization"]["stage"])
    _check_quantization(config, zero_stage)
    return zero_stage


def _check_quantization(config: Any, zero_stage: int) -> None:
    """Raises `ConfigError` where the rest of the configuration cannot go with `quantization`, by the reason."""
    arguments = config.sft_train.model_args
    if arguments.quantization is None:
        return
    if not arguments.has_adapters:
        reason, hint = "a weight in 4 or 8 bits has no gradient", "set lora_target: all-linear, which trains adapters"
    elif zero_stage == 3:
        reason = "ZeRO-3 splits every weight over the ranks, and a quantised one cannot be split"
        hint = "use stage 1 or 2: a quantised model takes a quarter of the memory, and adapters need little state"
    elif config.sft_train.strategy_args.strategy_config.get("tensor_parallel"):
        reason = "tensor parallelism cuts every weight, and a quantised one cannot be cut"
        hint = "leave out tensor_parallel; a quantised model takes a quarter of the memory"
    elif config.sft_train.strategy_args.strategy_name == "fsdp2_train":
        reason = "fsdp2_train splits every weight over the ranks, and a quantised one cannot be split"
        hint = "use strategy_name: deepspeed_train with stage 1 or 2"
    else:
        return
    raise ConfigError(
        f"quantization is not possible here: {reason}",
        code="quantization",
        location="sft_train.model_args.quantization",
        hint=hint,
    )


def check_strategy_name(name: str) -> None:
    """Raises `ConfigError` unless `name` is a strategy that there is."""
    if name not in _STRATEGIES:
        raise ConfigError(
            f"the strategy {name} is not supported, expected {' or '.join(_STRATEGIES)}",
            code="unknown_strategy",
            location="sft_train.strategy_args.strategy_name",
            hint=_EQUIVALENTS.get(name, "write strategy_name: deepspeed_train"),
        )
