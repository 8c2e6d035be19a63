"""Weights of the model in 4 or 8 bits by bitsandbytes, under adapters that train in the run's precision (QLoRA).

The adapters are what is trained, saved and resumed. Where they are merged into the model, that is the model of
`pretrain` in the run's precision: nothing that is exported is quantised.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from sft_fast.errors import ConfigError

_PLACE = "sft_train.model_args.quantization"


def quantization_config(kind: str | None, dtype: torch.dtype) -> Any | None:
    """The settings that transformers loads a model with, or None where nothing is quantised.

    Args:
        kind: `nf4` (the 4-bit type of QLoRA, its scales quantised once more), `int8`, or None.
        dtype: of the computation.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if kind is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization: {kind} needs the package bitsandbytes, which is not installed",
            code="missing_package",
            location=_PLACE,
            hint="pip install 'sft-fast[quantization]'",
        )
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def settle_quantised(model: nn.Module) -> None:
    """Makes the quantised layers of a model that was just loaded those of a run.

    They leave no trace in a state dict, and so in no checkpoint: they come from `pretrain` again. On a CPU they keep
    one layout, where bitsandbytes would change it in the first pass without gradients, and train from that.
    """
    layers: Any = importlib.import_module("bitsandbytes").nn
    for module in model.modules():
        if isinstance(module, (layers.Linear4bit, layers.Linear8bitLt)):
            module.register_state_dict_post_hook(_remove_own)
            if isinstance(module, layers.Linear4bit):
                module.support_avx512bf16_for_cpu = False


def _remove_own(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
