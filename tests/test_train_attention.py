"""Per-sample attention: the samples of a pack never see one another, for every family of models that is supported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sft_fast import ConfigError, TrainError
from sft_fast.train import attention
from sft_fast.train.batch import make_micro_batch
from sft_fast.train.model import SFTModel, check_model, load_config
from tests.train_helpers import VOCAB_SIZE, make_model

# A window shorter than the samples, so that it matters.
WINDOW = 6
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": WINDOW},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
}
LENGTHS = (5, 17, 1, 9)


def make_family(kind: str, implementation: str = "auto") -> Any:
    """A tiny model of a family with per-sample attention."""
    attention.register(implementation)
    model = make_model(kind, **FAMILIES[kind])
    model.set_attn_implementation(attention.NAME)
    return model.eval()


def segments(lengths: tuple[int, ...]) -> dict[str, Any]:
    """What tells a model where the samples of a row are."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {
        "position_ids": positions,
        "cu_seqlens": bounds,
        "segment_lengths": lengths,
        "max_seqlen": max(lengths),
        "attention_mask": None,
        "use_cache": False,
    }


def token_ids(seed: int = 0) -> torch.Tensor:
    """A row of samples of `LENGTHS`, int64 [1, T]."""
    return torch.randint(3, VOCAB_SIZE, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_logits_and_gradients_equal_unpacked_ones(kind: str, implementation: str) -> None:
    """Logits of a pack are those of transformers' own eager attention on each sample alone; so are the gradients."""
    model = make_family(kind, implementation)
    ids = token_ids()
    packed = model(input_ids=ids, **segments(LENGTHS)).logits
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1))
    (packed * weights).sum().backward()
    packed_gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    model.set_attn_implementation("eager")
    alone = torch.cat([model(input_ids=sample, use_cache=False).logits for sample in ids.split(LENGTHS, 1)], 1)
    (alone * weights).sum().backward()

    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed_gradients[name], parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_sample_cannot_see_its_neighbours(kind: str) -> None:
    """Other tokens in one sample of a pack change no logit of the other samples, to the last bit."""
    model = make_family(kind)
    ids, changed = token_ids(), token_ids()
    start = LENGTHS[0]
    changed[0, start : start + LENGTHS[1]] = token_ids(seed=9)[0, : LENGTHS[1]]

    before = model(input_ids=ids, **segments(LENGTHS)).logits[0]
    after = model(input_ids=changed, **segments(LENGTHS)).logits[0]

    others = [i for i in range(sum(LENGTHS)) if not start <= i < start + LENGTHS[1]]
    assert torch.equal(before[others], after[others])
    assert not torch.allclose(before, after), "the change is seen where it was made"


@pytest.mark.parametrize("kind", FAMILIES)
def test_supported_families_pass_the_check_at_the_start(kind: str) -> None:
    """The check that runs before training lets every supported family through."""
    check_model(SFTModel(make_family(kind)), torch.device("cpu"))


def test_a_model_that_mixes_samples_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that runs before training finds a model whose attention ignores the segments."""

    def leaky(*arguments: Any, segment_lengths: Any, cu_seqlens: Any, **options: Any) -> Any:
        total = sum(segment_lengths)
        bounds = torch.tensor([0, total], dtype=torch.int32)
        return attention.per_sample_attention(
            *arguments, **options | {"segment_lengths": (total,), "cu_seqlens": bounds, "max_seqlen": total}
        )

    model = make_family("llama")
    attention.AttentionInterface.register(attention.NAME, leaky)
    with pytest.raises(ConfigError, match="cannot be trained on packed samples"):
        check_model(SFTModel(model), torch.device("cpu"))


def test_attention_sinks_are_refused() -> None:
    """A model whose attention has more inputs than are known here is refused by name, not trained wrong."""
    attention.register()
    model = make_model("gpt_oss", num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW)
    model.set_attn_implementation(attention.NAME)

    with pytest.raises(ConfigError, match="s_aux"):
        check_model(SFTModel(model), torch.device("cpu"))


def test_recurrent_layers_are_refused(tmp_path: Path) -> None:
    """A model that carries a state along the row is refused before its weights are read."""
    from transformers import AutoConfig

    AutoConfig.for_model("qwen3_next", num_hidden_layers=4).save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match="linear_attention"):
        load_config(str(tmp_path))


def test_a_batch_without_segments_is_an_error() -> None:
    """Forgetting where the samples begin is an error, not causal attention over the whole row."""
    with pytest.raises(TrainError, match="cu_seqlens"):
        make_family("llama")(input_ids=token_ids(), use_cache=False)


def test_flash_attention_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a kernel that the machine lacks says so."""
    monkeypatch.setattr(attention, "_flash_attention", lambda: None)
    with pytest.raises(ConfigError, match="FlashAttention") as caught:
        attention.register("fa2")
    assert caught.value.location == "sft_train.model_args.attn_implementation"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_loss_is_that_of_the_logits(kind: str) -> None:
    """The loss of a micro-batch is the cross-entropy of the model's own logits, final softcap included."""
    model = make_family(kind)
    ids = token_ids()[0].numpy()
    labels = ids.copy()
    labels[:-1] = ids[1:]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    labels[bounds[1:] - 1] = -100
    arrays = {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": segments(LENGTHS)["position_ids"].numpy(),
        "cu_seqlens": bounds.numpy(),
    }
    batch = make_micro_batch(arrays)
    logits = model(input_ids=torch.from_numpy(ids)[None], **segments(LENGTHS)).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), ignore_index=-100, reduction="sum")

    fields = {name: getattr(batch, name) for name in batch.__slots__}
    torch.testing.assert_close(SFTModel(model)(**fields), expected)
