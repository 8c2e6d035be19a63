"""`quantization`: adapters over weights in 4 or 8 bits, from the first step to the exported model."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_fast import ConfigError
from sft_fast.config import StrategyArguments
from sft_fast.train.export import export_checkpoint
from sft_fast.train.strategy import check_strategy
from tests.test_train_worker import curve, save
from tests.train_helpers import Workspace, run_worker, start_worker

LORA: dict[str, Any] = {"lora_target": "all-linear", "lora_rank": 4}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A Llama that is wide enough for blocks of 64 weights, and records."""
    return Workspace.create(
        tmp_path_factory.mktemp("quantization"),
        hidden_size=64,
        intermediate_size=128,
        initializer_range=0.1,
        head_dim=16,
    )


@pytest.mark.parametrize(("kind", "stage", "dtype"), [("nf4", 1, "fp32"), ("nf4", 2, "bf16"), ("int8", 1, "bf16")])
def test_adapters_over_quantised_weights(
    workspace: Workspace, tmp_path: Path, kind: str, stage: int, dtype: str
) -> None:
    """They learn, near what adapters over the whole weights do; a checkpoint has them alone, resumes and exports."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"stage": stage, "output_dir": str(tmp_path / "out")}
    config = workspace.config(**options, model={**LORA, "dtype": dtype, "quantization": kind})
    worker = start_worker(config)
    layer = worker._strategy.model.hf_model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == (torch.uint8 if kind == "nf4" else torch.int8)
    first = [worker.train_step(step) for step in range(3)]
    path = save(worker, config, 3)
    straight = [worker.train_step(step) for step in (3, 4, 5)]
    worker.close()
    worker = start_worker(config, path)
    resumed = [worker.train_step(step) for step in (3, 4, 5)]
    last = save(worker, config, 6)
    worker.export(str(tmp_path / "run"))
    worker.close()
    export_checkpoint(str(last), str(tmp_path / "exported"))
    export_checkpoint(str(last), str(tmp_path / "adapters"), adapters_only=True)
    whole = run_worker(workspace.config(**options, model={**LORA, "dtype": dtype}), 6)

    assert curve(resumed) == curve(straight)
    assert straight[-1].loss < first[0].loss
    for mine, theirs in zip([*first, *straight], whole, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=0.05)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "exported")]
    assert models[0] == models[1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert not hasattr(model.config, "quantization_config")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    again = workspace.config(
        **options, model={"dtype": dtype, "quantization": kind, "adapter_name_or_path": str(tmp_path / "adapters")}
    )
    assert run_worker(again, 1)[0].loss < first[0].loss, "a run goes on from the adapters"


def test_quantised_weights_are_in_no_checkpoint(workspace: Workspace, tmp_path: Path) -> None:
    """What is saved has the adapters' names alone."""
    config = workspace.config(output_dir=str(tmp_path), model={**LORA, "quantization": "nf4"})
    worker = start_worker(config)
    path = save(worker, config, 0)
    worker.close()
    state = torch.load(path / "sft_train" / "mp_rank_00_model_states.pt", weights_only=False)["module"]

    assert state
    assert [name for name in state if "lora_" not in name] == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"quantization": "nf4"}}, "no gradient"),
        ({"stage": 3, "model": {**LORA, "quantization": "nf4"}}, "ZeRO-3 splits"),
        (
            {
                "ranks": 2,
                "strategy": StrategyArguments(strategy_config={"tensor_parallel": {"autotp_size": 2}}),
                "model": {**LORA, "quantization": "nf4"},
            },
            "cuts every weight",
        ),
        (
            {
                "strategy": StrategyArguments(strategy_name="fsdp2_train"),
                "model": {**LORA, "quantization": "int8"},
            },
            "fsdp2_train splits",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused(workspace: Workspace, changes: dict[str, Any], reason: str) -> None:
    """Before anything starts, with the reason and what to write instead; `none` is nothing at all."""
    with pytest.raises(ConfigError, match=reason) as caught:
        check_strategy(workspace.config(**changes))
    assert (caught.value.code, caught.value.location) == ("quantization", "sft_train.model_args.quantization")
    assert check_strategy(workspace.config(model={"quantization": "none"})) == 1


def test_the_missing_package_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes the error says how to install it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    with pytest.raises(ConfigError, match="bitsandbytes") as caught:
        start_worker(workspace.config(model={**LORA, "quantization": "nf4"}))
    assert caught.value.code == "missing_package"
