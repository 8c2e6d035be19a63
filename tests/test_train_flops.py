"""The arithmetic of a model, against torch's own counter."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sft_fast.train import attention
from sft_fast.train.flops import ModelFlops, _num_pairs, peak_tflops
from sft_fast.train.model import SFTModel
from tests.train_helpers import make_model


def counted(model: SFTModel, num_tokens: int, num_labels: int) -> int:
    """What torch counts in a forward and a backward pass over one sample, with plain attention."""
    attention.register("eager")
    model.hf_model.set_attn_implementation(attention.NAME)
    ids = torch.arange(num_tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(
            ids,
            ids,
            torch.tensor([0, num_tokens], dtype=torch.int32),
            (num_tokens,),
            num_tokens,
            torch.arange(num_labels),
            ids[0, :num_labels],
        ).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4})],
)
def test_the_arithmetic_is_what_torch_counts(kind: str, changes: dict[str, Any]) -> None:
    """Weights, head at label tokens, attention: together they are torch's count; of pairs, plain attention does all."""
    model = SFTModel(make_model(kind, **changes))
    flops = ModelFlops.of(model.hf_model)
    num_tokens, num_labels = 64, 40

    pairs = flops.per_pair * len(flops.windows) * num_tokens**2
    expected = flops.per_token * num_tokens + flops.per_label_token * num_labels + pairs
    # It does not see the gradient of the head's weight, which is added up in place.
    unseen = flops.per_label_token / 3 * num_labels
    assert counted(model, num_tokens, num_labels) + unseen == pytest.approx(expected, rel=2e-3)
    causal = flops.of_batch((num_tokens,), num_labels)
    assert causal == pytest.approx(expected - pairs * (1 - 65 / 128))


def test_frozen_weights_need_no_gradient() -> None:
    """A weight that is not trained takes 4 operations a token instead of 6, as torch counts too."""
    model = SFTModel(make_model())
    for name, parameter in model.hf_model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "embed" in name)
    flops = ModelFlops.of(model.hf_model)
    expected = flops.per_token * 64 + flops.per_label_token * 40 + flops.per_pair * 2 * 64**2

    assert counted(model, 64, 40) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 9])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    """As many as a causal mask with that window has places."""
    for length in (1, 2, 5, 8):
        mask = torch.ones(length, length).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        assert _num_pairs(length, window) == int(mask.sum())


def test_peaks_are_known_by_name() -> None:
    """The name that torch gives a device finds its row; another name and float32 find none."""
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp16") == 312.0
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_tflops("Something else", "bf16") is None
