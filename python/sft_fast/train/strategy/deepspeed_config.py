"""The DeepSpeed settings of a run: the user's `strategy_config`, checked, with our own keys laid over it."""

from __future__ import annotations

import copy
import sys
from typing import Any

from sft_fast.errors import ConfigError

_PLACE = "sft_train.strategy_args.strategy_config"

# DeepSpeed's key -> where the same thing is said in our configuration. One place for each decision.
_OURS = {
    "train_batch_size": "training_args.per_device_train_batch_size and gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "training_args.per_device_train_batch_size",
    "gradient_accumulation_steps": "training_args.gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "training_args.learning_rate, weight_decay, adam_*",
    "scheduler": "training_args.lr_scheduler_type, warmup_ratio, warmup_steps",
    "tensorboard": "track_with",
    "wandb": "track_with",
    "csv_monitor": "track_with",
}

# What changes the model, the loss or the data under our hands.
_UNSUPPORTED = {
    "amp": "use model_args.dtype",
    "torch_autocast": "use model_args.dtype",
    "data_efficiency": "the order of the samples is planned here",
    "curriculum_learning": "the order of the samples is planned here",
    "compression_training": "it replaces layers of the model",
    "expert_parallel": "expert parallelism is not supported yet",
    "autotuning": "it starts runs of its own",
    "elasticity": "it changes the global batch",
    "zenflow": "it changes the order of updates",
}


def make_deepspeed_config(config: Any) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        config: the whole `SFTConfig`.

    Raises:
        ConfigError: `strategy_config` sets what is ours to set, or what is not supported; `location` is the key.
    """
    settings: dict[str, Any] = _without_auto(copy.deepcopy(config.sft_train.strategy_args.strategy_config))
    for key, instead in _OURS.items():
        if settings.get(key) is not None:
            raise _refusal(key, f"it is decided elsewhere: set {instead}")
    for key, reason in _UNSUPPORTED.items():
        value = settings.get(key)
        if value not in (None, False, {}, 1) and not (isinstance(value, dict) and value.get("enabled") is False):
            raise _refusal(key, reason)
        settings.pop(key, None)
    _check_parallel(settings, config.tensor_parallel_size)
    _check_precision(settings, config.sft_train.model_args.dtype)

    zero = settings.setdefault("zero_optimization", {})
    stage = zero.get("stage", 1)
    if stage not in (0, 1, 2, 3):
        raise _refusal("zero_optimization.stage", f"expected 0, 1, 2 or 3, found {stage}")
    if stage == 3 and config.sft_train.model_args.compile:
        raise ConfigError(
            "ZeRO-3 gathers each weight when it is needed, which would cut every layer into pieces for a compiler",
            code="strategy_config",
            location="sft_train.model_args.compile",
            hint="set it to false, use stage 1 or 2, or strategy_name: fsdp2_train, which gathers whole layers",
        )
    # Stage 0 reports no gradient norm; stage 1 computes the same update and splits the optimizer's state besides.
    zero["stage"] = max(1, stage)

    arguments, dtype = config.sft_train.training_args, config.sft_train.model_args.dtype
    settings.update(
        train_micro_batch_size_per_gpu=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        gradient_clipping=float(config.max_grad_norm),
        # Our AdamW is torch's, which needs no compiler, unlike DeepSpeed's own.
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        steps_per_print=sys.maxsize,
        # A step whose gradient is not finite changes nothing, at any precision.
        bf16={**settings.get("bf16", {}), "enabled": dtype == "bf16", "check_grad_overflow": True},
        fp16={**settings.get("fp16", {}), "enabled": dtype == "fp16"},
    )
    # Gradients of many micro-batches are added up: in bfloat16 the small ones would be lost.
    settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return settings


def _check_parallel(settings: dict[str, Any], tensor_parallel_size: int) -> None:
    """Leaves of the layout what is DeepSpeed's to do, in one form: `tensor_parallel.autotp_size`, where it is not 1."""
    # Slices of rows are cut here (`ulysses.py`). To DeepSpeed, which is not told, they are ranks with other data.
    settings.pop("sequence_parallel_size", None)
    tensor_parallel = settings.pop("tensor_parallel", None) or {}
    if not isinstance(tensor_parallel, dict):
        raise _refusal("tensor_parallel", "expected a group of keys, of which autotp_size is one")
    for key in tensor_parallel:
        if key != "autotp_size":
            raise _refusal(f"tensor_parallel.{key}", "which weights are split is read from the model")
    if tensor_parallel_size > 1:
        settings["tensor_parallel"] = {"autotp_size": tensor_parallel_size}


def _check_precision(settings: dict[str, Any], dtype: str) -> None:
    for key in ("bf16", "fp16"):
        group = settings.get(key) or {}
        if not isinstance(group, dict):
            raise _refusal(key, "expected a group of keys")
        settings[key] = group
        if group.get("enabled") and dtype != key:
            raise _refusal(f"{key}.enabled", f"sft_train.model_args.dtype says {dtype}; set that one")


def _without_auto(value: Any) -> Any:
    """The settings without the values `auto`, by which other trainers ask for what is filled in here anyway."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _refusal(key: str, reason: str) -> ConfigError:
    return ConfigError(
        f"{key} cannot be set here: {reason}", code="strategy_config", location=f"{_PLACE}.{key}", hint="remove the key"
    )
