"""The memory estimate of a run against counts by hand and against what a real forward pass keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sft_fast.config import StrategyArguments
from sft_fast.train.estimate import MemoryEstimate, _kept_by_layers, estimate_memory
from sft_fast.train.model import load_model
from sft_fast.train.pipeline import device_rows
from tests.train_helpers import Workspace, make_model


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Llama."""
    return Workspace.create(tmp_path_factory.mktemp("llama"), num_records=2)


def estimate(workspace: Workspace, stage: int, ranks: int = 4, dtype: str = "bf16", **settings: Any) -> MemoryEstimate:
    """Of a run at a stage."""
    strategy = StrategyArguments(strategy_config={"zero_optimization": {"stage": stage}, **settings})
    return estimate_memory(workspace.config(strategy=strategy, ranks=ranks, model={"dtype": dtype}), stage)


@pytest.mark.parametrize(("stage", "shares"), [(1, (1, 1, 4)), (2, (1, 4, 4)), (3, (4, 4, 4))])
def test_each_stage_splits_what_it_says(workspace: Workspace, stage: int, shares: tuple[int, int, int]) -> None:
    """Weights of 2 bytes, gradients added up in 4, and 12 of the optimizer, each split over the ranks or not."""
    num_parameters = sum(parameter.numel() for parameter in make_model().parameters())
    found = estimate(workspace, stage)

    assert found.num_parameters == found.num_trained == num_parameters
    expected = [num_parameters * width // share for width, share in zip((2, 4, 12), shares, strict=True)]
    assert [found.weights, found.gradients, found.optimizer] == expected


def test_split_weights_and_rows_take_less(workspace: Workspace) -> None:
    """Tensor parallel splits the layers, not what is between them; sequence parallel splits the activations."""
    layers = [parameter for name, parameter in make_model().named_parameters() if "_proj" in name]
    num_split = sum(parameter.numel() for parameter in layers)
    whole = estimate(workspace, 1)

    assert estimate(workspace, 1, tensor_parallel={"autotp_size": 2}).weights == whole.weights - num_split
    # Of each token in a layer, in bf16: queries, keys, values and what attention gives; the gate before and after its
    # function, the other half, and their product. 2 layers, 2 rows of 96 tokens.
    num_in_layers = 2 * 2 * 96 * 2 * (32 + 16 + 16 + 32 + 4 * 64)
    split = estimate(workspace, 1, tensor_parallel={"autotp_size": 2})
    assert whole.activations - split.activations == num_in_layers // 2
    assert estimate(workspace, 1, sequence_parallel_size=4).activations == pytest.approx(
        whole.activations / 4, rel=0.05
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_quantised_weights_take_what_a_loaded_model_does(tmp_path: Path, kind: str, dtype: str) -> None:
    """Of a model that is loaded in 4 or 8 bits under adapters, all weights; the scales of blocks, 3 %, come on top."""
    place = Workspace.create(tmp_path, num_records=2, hidden_size=128, intermediate_size=256, head_dim=32)
    model = {"lora_target": "all-linear", "lora_rank": 4, "dtype": dtype, "quantization": kind}
    config = place.config(model=model)
    loaded = load_model(config.pretrain, config.sft_train.model_args)
    found = estimate_memory(config, 1)

    frozen = sum(weight.untyped_storage().nbytes() for weight in loaded.parameters() if not weight.requires_grad)
    assert found.num_trained == sum(weight.numel() for weight in loaded.parameters() if weight.requires_grad)
    assert found.weights == frozen + found.num_trained * {"bf16": 2, "fp32": 4}[dtype]


def test_layers_keep_what_a_real_pass_keeps(workspace: Workspace, tmp_path: Path) -> None:
    """Counted without memory, the activations are those of a pass on the CPU within some percent."""
    from sft_fast.train import attention

    attention.register()
    with torch.device("meta"):
        counted, products = _kept_by_layers(make_model(attn_implementation=_registered()), 256)
    model = make_model(attn_implementation=attention.NAME)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    positions = torch.arange(256)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(
            input_ids=positions,
            position_ids=positions,
            use_cache=False,
            cu_seqlens=torch.tensor([0, 256], dtype=torch.int32),
            segment_lengths=(256,),
            max_seqlen=256,
        )
    real = sum(storage.nbytes() for storage in kept.values())

    assert output[0].requires_grad
    assert counted == pytest.approx(real, rel=0.1)
    assert 0 < products < counted


def _registered() -> str:
    """The estimate's own attention, by its name."""
    from transformers import AttentionInterface

    from sft_fast.train import estimate as module

    AttentionInterface.register(module._NAME, module._attention)
    return module._NAME


@pytest.mark.parametrize(
    ("dtype", "capability", "is_said"), [("bf16", "AVX2", True), ("bf16", "AVX512", False), ("fp32", "AVX2", False)]
)
def test_a_cpu_that_is_slow_with_bf16_is_said(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, dtype: str, capability: str, is_said: bool
) -> None:
    """Before a run on a CPU without instructions for its type of numbers, the user is told what would be faster."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    rows = dict(device_rows(workspace.config(model={"dtype": dtype})))

    assert ("fp32" in rows.get("slow", "")) == is_said
    assert "memory a device" in rows
