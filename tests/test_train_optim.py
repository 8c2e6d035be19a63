"""The optimizer's groups, the learning rate, and the DeepSpeed settings of a run."""

import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sft_fast import ConfigError
from sft_fast.config import TrainingArguments
from sft_fast.train.optim import learning_rate_schedule, parameter_groups
from sft_fast.train.strategy import check_strategy_name
from sft_fast.train.strategy.deepspeed_config import make_deepspeed_config
from tests.train_helpers import Workspace, make_model

PLACE = "sft_train.strategy_args.strategy_config"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Names only: nothing here reads the files."""
    return Workspace(tmp_path, tmp_path / "model", tmp_path / "records.jsonl")


def test_norms_and_biases_do_not_decay() -> None:
    """Matrices decay, norm weights and biases do not, and every trainable parameter is in one group."""
    model = make_model("qwen2")  # has biases
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}

    decayed, undecayed = ([names[p] for p in group["params"]] for group in parameter_groups(model, 0.1))

    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1, 0.0]
    assert sorted(decayed + undecayed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert all(name.endswith(".bias") or "norm" in name for name in undecayed)
    assert not any(name.endswith(".bias") or "norm" in name for name in decayed)


def test_a_model_that_is_frozen_whole_is_refused() -> None:
    """Training nothing is a mistake of the configuration."""
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="trainable"):
        parameter_groups(model, 0.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant_with_warmup", {}),
        ("inverse_sqrt", {}),
        ("cosine_with_min_lr", {"min_lr": 1e-6}),
        ("warmup_stable_decay", {"num_decay_steps": 5}),
        ("polynomial", {"power": 2.0}),
        ("constant", {}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-6}),
    ],
)
def test_the_learning_rate_is_that_of_transformers(name: str, options: dict[str, Any]) -> None:
    """A step has the rate that a scheduler of transformers shows at that step, whichever step is asked first."""
    from transformers import get_scheduler

    arguments = TrainingArguments(
        learning_rate=3e-4,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=options,
        warmup_steps=4,  # type: ignore[arg-type]
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=4, num_training_steps=20, scheduler_specific_kwargs=dict(options)
    )
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    schedule = learning_rate_schedule(arguments, 20)

    assert [schedule(step) for step in reversed(range(1, 21))] == pytest.approx(expected[::-1])


def test_every_schedule_of_transformers_is_there() -> None:
    """Those that are not look at the loss, so that the rate would no longer be a function of the step."""
    from transformers import SchedulerType

    ours = set(typing.get_args(typing.get_type_hints(TrainingArguments)["lr_scheduler_type"]))
    assert {kind.value for kind in SchedulerType} - ours == {"reduce_lr_on_plateau", "greedy"}


def test_arguments_that_a_schedule_lacks_are_refused() -> None:
    """A schedule argument that transformers does not know is an error before training."""
    arguments = TrainingArguments(lr_scheduler_type="cosine", lr_scheduler_kwargs={"min_lr_typo": 1})
    with pytest.raises(ConfigError) as caught:
        learning_rate_schedule(arguments, 10)
    assert caught.value.location == "sft_train.training_args.lr_scheduler_kwargs"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("megatron_train", "zero_optimization.stage"), ("my_train", "deepspeed_train")],
)
def test_an_unknown_strategy_is_refused_with_what_to_write_instead(name: str, hint: str) -> None:
    """A strategy that is not here is a configuration error whose hint names the settings that do the same."""
    with pytest.raises(ConfigError) as caught:
        check_strategy_name(name)
    assert caught.value.location == "sft_train.strategy_args.strategy_name"
    assert hint in str(caught.value.hint)
    assert "deepspeed_train" in str(caught.value.hint)


def settings_of(workspace: Workspace, strategy: dict[str, Any], **model: Any) -> dict[str, Any]:
    """What DeepSpeed is given for a `strategy_config`."""
    config = workspace.config(model=model)
    config.sft_train.strategy_args.strategy_config = strategy
    return make_deepspeed_config(config)


@pytest.mark.parametrize(
    ("strategy", "key"),
    [
        ({"train_batch_size": 8}, "train_batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu"),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps"),
        ({"gradient_clipping": 0.5}, "gradient_clipping"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"tensor_parallel": {"autotp_size": 1, "preset_model": "llama"}}, "tensor_parallel.preset_model"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
    ],
)
def test_keys_that_are_decided_elsewhere_are_refused(workspace: Workspace, strategy: dict[str, Any], key: str) -> None:
    """A DeepSpeed key that would contradict our configuration is refused by name, never overruled in silence."""
    with pytest.raises(ConfigError) as caught:
        settings_of(workspace, strategy)
    assert caught.value.location == f"{PLACE}.{key}"


def test_auto_is_filled_in(workspace: Workspace) -> None:
    """The value `auto` of other trainers' DeepSpeed files means what is filled in here anyway."""
    settings = settings_of(
        workspace,
        {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": False},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
        },
        dtype="bf16",
    )

    assert settings["bf16"]["enabled"] is True
    assert settings["fp16"]["enabled"] is False
    assert settings["gradient_clipping"] == 1.0
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert "train_batch_size" not in settings


def test_stage_0_becomes_stage_1(workspace: Workspace) -> None:
    """Stage 0 has no gradient norm; stage 1 computes the same."""
    assert settings_of(workspace, {"zero_optimization": {"stage": 0}})["zero_optimization"]["stage"] == 1
    assert settings_of(workspace, {})["zero_optimization"]["stage"] == 1


def test_checking_a_strategy_needs_no_torch() -> None:
    """The checks that `validate` and the driver make load neither torch nor DeepSpeed."""
    program = (
        "import sys, sft_fast.train.pipeline, sft_fast.train.strategy.deepspeed_config\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
