"""What is kept for the backward pass changes memory and time, and no gradient."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from sft_fast.config import ModelArguments, StrategyArguments
from sft_fast.train import memory
from sft_fast.train.attention import register
from sft_fast.train.memory import checkpoint_layers
from sft_fast.train.model import SFTModel
from tests.test_train_worker import curve
from tests.train_helpers import Workspace, make_model, run_worker

FSDP2 = StrategyArguments(strategy_name="fsdp2_train")
KINDS = ("none", "selective", "full")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Llama and records."""
    return Workspace.create(tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize("stage", [1, 3, 0])
def test_checkpointing_changes_no_bit(workspace: Workspace, stage: int) -> None:
    """In float32, losses and gradient norms are the same whatever is computed again; stage 0 is FSDP2."""
    strategy = None if stage else FSDP2
    none, selective, full = (
        curve(run_worker(workspace.config(stage=stage, strategy=strategy, model={"gradient_checkpointing": kind}), 3))
        for kind in KINDS
    )

    assert none == selective == full


class _Counter(TorchDispatchMode):
    """Counts the calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def one_step(kind: str = "none", offloads: bool = False) -> tuple[SFTModel, dict[str, int], dict[str, int]]:
    """A model with gradients, and how often operators ran in its forward and its backward pass."""
    register()
    hf = make_model()
    hf.set_attn_implementation("sft_fast_per_sample")
    checkpoint_layers(hf, kind)
    model = SFTModel(hf, offloads_activations=offloads).train()
    ids = torch.arange(12)[None]
    positions = torch.arange(12) % 6
    with _Counter() as forward:
        loss = model(ids, positions[None], torch.tensor([0, 6, 12]), (6, 6), 6, torch.arange(5), ids[0, 1:6])
    with _Counter() as backward:
        loss.backward()
    return model, forward.counts, backward.counts


def num_products(counts: dict[str, int], kind: str) -> int:
    """Matrix products or calls of attention, of the forward kind."""
    return sum(n for name, n in counts.items() if name.startswith(f"aten::{kind}") and "backward" not in name)


def test_selective_checkpointing_computes_only_what_is_cheap() -> None:
    """The backward pass repeats neither matrix products nor attention, but the rest; `full` repeats all."""
    none, selective, full = (one_step(kind)[2] for kind in KINDS)
    attention = "_scaled_dot_product"

    assert num_products(none, attention) == num_products(selective, attention) == 0
    assert num_products(full, attention) == 4, "two layers, two samples"
    assert num_products(none, "mm") == num_products(selective, "mm") < num_products(full, "mm")
    assert none.get("aten::silu", 0) == 0
    assert selective["aten::silu"] == full["aten::silu"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_activations_change_no_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all tensors taken for those of a GPU, activations wait elsewhere and weights do not; gradients are equal."""
    expected = one_step(kind)[0]
    moved: list[torch.Tensor] = []
    usual = memory._to_host

    def remember(tensor: torch.Tensor) -> Any:
        saved = usual(tensor)
        if isinstance(saved, memory._OnHost):
            assert saved.tensor.data_ptr() != tensor.data_ptr()
            moved.append(tensor)
        return saved

    monkeypatch.setattr(memory, "_is_on_gpu", lambda _: True)
    monkeypatch.setattr(memory, "_SMALLEST_BYTES", 0)
    monkeypatch.setattr(memory, "_to_host", remember)
    model = one_step(kind, offloads=True)[0]
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    assert len(moved) >= 2
    assert not [tensor for tensor in moved if tensor.data_ptr() in weights]
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def test_nothing_is_offloaded_without_a_gpu(workspace: Workspace) -> None:
    """On a CPU the key changes nothing: what is kept is kept where it is."""
    weight = nn.Parameter(torch.ones(300, 300))
    activation = torch.ones(300, 300)
    runs = [curve(run_worker(workspace.config(model={"offload_activations": value}), 2)) for value in (False, True)]

    assert memory._to_host(activation) is activation
    assert memory._to_host(weight.t())._base is weight  # type: ignore[union-attr]
    assert runs[0] == runs[1]


def test_the_older_key_still_counts() -> None:
    """`disable_gradient_checkpointing` says it where `gradient_checkpointing` does not."""
    assert ModelArguments().kept_activations == "full"
    assert ModelArguments(disable_gradient_checkpointing=True).kept_activations == "none"
    assert ModelArguments(disable_gradient_checkpointing=True, gradient_checkpointing="selective").kept_activations == (
        "selective"
    )
