"""The optimizer and its learning rate: AdamW with two groups of parameters, and a rate that is a function of the step.

The learning rate of a step depends on the step's number alone. So there is no schedule to save, and a resumed run has
the right rate whatever it was before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from sft_fast.errors import ConfigError


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and norms and biases, which do not.

    A parameter is of the second kind when it is a vector: every norm weight and every bias is, no matrix is. (A
    parameter that ZeRO-3 has already split tells its true shape as `ds_shape`.)

    Raises:
        ConfigError: nothing is trainable.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            num_dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            (decayed if num_dimensions >= 2 else undecayed).append(parameter)
    if not decayed and not undecayed:
        raise ConfigError(
            "no parameter is trainable",
            location="sft_train.model_args.freeze_module_prefix",
            hint="the prefixes freeze the whole model",
        )
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, arguments: Any) -> torch.optim.AdamW:
    """AdamW of torch over `parameter_groups`, with the values of `training_args`."""
    return torch.optim.AdamW(
        parameter_groups(model, arguments.weight_decay),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=True,
    )


def learning_rate_schedule(arguments: Any, num_steps: int) -> Callable[[int], float]:
    """The learning rate of step 1, 2, ... `num_steps`, by transformers' schedule of that name.

    Raises:
        ConfigError: transformers does not take `lr_scheduler_kwargs`.
    """
    # transformers hands out schedulers that hold an optimizer; of them only the factor by step is wanted.
    placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            placeholder,
            num_warmup_steps=arguments.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs),
        )
        factor = scheduler.lr_lambdas[0]
        float(factor(0))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"the schedule {arguments.lr_scheduler_type} does not take these arguments: {error}",
            location="sft_train.training_args.lr_scheduler_kwargs",
        ) from error
    # Step k runs at the rate that the scheduler shows after k - 1 updates.
    return lambda step: arguments.learning_rate * float(factor(step - 1))
