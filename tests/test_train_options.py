"""What else can be asked of training: smoothing, noise, adapters to start from, a larger vocabulary, answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sft_fast import ConfigError
from sft_fast.config import ModelArguments, SFTConfig
from sft_fast.train.export import export_checkpoint
from sft_fast.train.generate import greedy
from sft_fast.train.model import SFTModel, neftune_noise
from tests.test_train_worker import curve, save
from tests.train_helpers import (
    VOCAB_SIZE,
    Workspace,
    dataset_of,
    make_model,
    make_model_dir,
    plain_loop,
    run_worker,
    start_worker,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Llama and records."""
    return Workspace.create(tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize("stage", [1, 3])
def test_label_smoothing_trains_like_a_plain_loop(workspace: Workspace, stage: int) -> None:
    """Losses and norms are those of torch's loss with smoothing; validation is without."""
    config = workspace.config(stage=stage, training={"label_smoothing_factor": 0.2}, validation=True)
    plain = workspace.config(stage=stage, validation=True)
    worker, other = start_worker(config), start_worker(plain)
    reports = [worker.train_step(step) for step in range(3)]
    worker.close()
    worker = start_worker(config)
    before = worker.val_step().loss_sums, other.val_step().loss_sums
    worker.close()
    other.close()

    for mine, theirs in zip(curve(reports), plain_loop(config, 3), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)
    assert before[0] == before[1]
    assert plain_loop(plain, 1)[0] != pytest.approx(plain_loop(config, 1)[0], rel=1e-2)


def test_neftune_is_that_of_transformers() -> None:
    """The noise of one sample is what transformers' own hook adds, with the same random numbers."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    embedding = nn.Embedding(50, 16)
    embedding.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    ids = torch.arange(40)[None]
    plain = embedding(ids)
    torch.manual_seed(7)
    expected = neftune_post_forward_hook(embedding, (ids,), plain)
    torch.manual_seed(7)

    torch.testing.assert_close(plain + neftune_noise(plain, (40,), 5.0), expected, rtol=1e-5, atol=1e-6)


def test_the_noise_of_a_packed_sample_is_that_of_the_sample_alone() -> None:
    """Its reach depends on the length of the sample, not of the row: the paper's alpha / sqrt(length x size)."""
    noise = neftune_noise(torch.zeros(1, 1010, 64), (10, 1000), 5.0)[0]
    for part, length in ((noise[:10], 10), (noise[10:], 1000)):
        reach = 5.0 / (length * 64) ** 0.5
        assert 0.95 * reach < part.abs().max() <= reach


def test_noise_is_for_training_only(workspace: Workspace) -> None:
    """With NEFTune the loss of a training step is another, repeatably; the validation loss is the same."""
    config = workspace.config(training={"neftune_noise_alpha": 15.0}, validation=True)
    plain = workspace.config(validation=True)
    losses = []
    for one in (config, config, plain):
        worker = start_worker(one)
        losses.append((worker.val_step().loss_sums, worker.train_step(0).loss))
        worker.close()

    assert losses[0] == losses[1]
    assert losses[0][0] == losses[2][0]
    assert losses[0][1] != pytest.approx(losses[2][1], rel=1e-5)


def test_a_model_without_options_gets_ids() -> None:
    """Guard: without NEFTune nothing stands between the ids and the model."""
    model = SFTModel(make_model()).train()
    seen: list[dict[str, Any]] = []
    model.hf_model.base_model.register_forward_pre_hook(
        lambda _module, _ids, kwargs: seen.append(kwargs), with_kwargs=True
    )
    model.hf_model.set_attn_implementation("eager")
    ids = torch.arange(6)[None]
    model(ids, ids, torch.tensor([0, 6]), (6,), 6, torch.arange(5), ids[0, 1:])

    assert "inputs_embeds" not in seen[0]


def exported_adapters(workspace: Workspace, directory: Path, stage: int) -> Path:
    """Adapters that a short run has trained, as PEFT's files."""
    lora: dict[str, Any] = {"lora_target": "q_proj,v_proj", "lora_rank": 4}
    config = workspace.config(stage=stage, model=lora, output_dir=str(directory / "out"))
    worker = start_worker(config)
    for step in range(3):
        worker.train_step(step)
    worker.export(str(directory / "merged"))
    checkpoint = save(worker, config, 3)
    worker.close()
    export_checkpoint(str(checkpoint), str(directory / "adapters"), adapters_only=True)
    return directory / "adapters"


@pytest.mark.parametrize("stage", [1, 3])
def test_training_goes_on_from_adapters(workspace: Workspace, tmp_path: Path, stage: int) -> None:
    """Exported adapters are PEFT's: PEFT loads them, and a run that starts from them has the model they make."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapters = exported_adapters(workspace, tmp_path, stage)
    base = AutoModelForCausalLM.from_pretrained(workspace.model_dir)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    by_peft = PeftModel.from_pretrained(base, adapters).merge_and_unload()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(by_peft.state_dict()[name], weight)

    model: dict[str, Any] = {"adapter_name_or_path": str(adapters)}
    config = workspace.config(stage=stage, model=model, output_dir=str(tmp_path / "second"))
    worker = start_worker(config)
    first, *_ = [worker.train_step(step) for step in range(2)]
    checkpoint = save(worker, config, 2)
    worker.export(str(tmp_path / "run"))
    worker.close()
    export_checkpoint(str(checkpoint), str(tmp_path / "exported"))
    from_merged = Workspace(tmp_path, tmp_path / "merged", workspace.records).config()

    assert first.loss == pytest.approx(plain_loop(from_merged, 1)[0][0], rel=2e-5)
    run, exported = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "exported"))
    assert run == exported
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    moved = {name for name, weight in merged.state_dict().items() if not torch.equal(after[name], weight)}
    assert moved
    assert all("q_proj" in name or "v_proj" in name for name in moved)


def test_adapters_that_are_not_there_are_named(workspace: Workspace, tmp_path: Path) -> None:
    """A wrong directory is an error of the configuration; a checkpoint without adapters exports none."""
    with pytest.raises(ConfigError, match="cannot load the adapters") as caught:
        start_worker(workspace.config(model={"adapter_name_or_path": str(tmp_path / "nowhere")}))
    assert caught.value.location == "sft_train.model_args.adapter_name_or_path"

    config = workspace.config(output_dir=str(tmp_path / "out"))
    worker = start_worker(config)
    checkpoint = save(worker, config, 1)
    worker.close()
    with pytest.raises(ConfigError, match="no adapters"):
        export_checkpoint(str(checkpoint), str(tmp_path / "adapters"), adapters_only=True)


def small_vocabulary(directory: Path, tied: bool) -> Workspace:
    """A model with fewer embeddings than its tokenizer has ids."""
    workspace = Workspace.create(directory)
    make_model_dir(directory / "model", "qwen2", vocab_size=300, tie_word_embeddings=tied)
    return workspace


def greedy_answers(config: SFTConfig, hf: Any, num_answers: int = 3) -> list[list[int]]:
    """What a model says to the beginning of some samples."""
    dataset = dataset_of(config)
    prompts = [[int(token) for token in dataset[number].input_ids[:8]] for number in range(num_answers)]
    return [greedy(hf, prompt, 8, set()) for prompt in prompts]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_vocabulary_is_trained_and_exported(tmp_path: Path, stage: int, tied: bool) -> None:
    """With `resize_vocab` new ids train, and what is exported generates what the running model does, tied or not."""
    from transformers import AutoModelForCausalLM

    workspace = small_vocabulary(tmp_path, tied)
    config = workspace.config(stage=stage, model={"resize_vocab": True}, output_dir=str(tmp_path / "out"))
    num_ids = dataset_of(config).vocab_size
    assert num_ids > 300
    worker = start_worker(config)
    reports = [worker.train_step(step) for step in range(4)]
    expected = greedy_answers(config, worker._strategy.model.hf_model)
    worker.export(str(tmp_path / "run"))
    checkpoint = save(worker, config, 4)
    worker.close()
    export_checkpoint(str(checkpoint), str(tmp_path / "exported"))

    assert reports[-1].loss < reports[0].loss
    dataset = dataset_of(config)
    for name in ("run", "exported"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.vocab_size == num_ids
        assert model.get_input_embeddings().num_embeddings == num_ids
        is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert is_tied == tied
        for number, answer in enumerate(expected):
            prompt = torch.from_numpy(dataset[number].input_ids[:8].astype("int64"))[None]
            generated = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8, eos_token_id=None
            )
            assert generated[0, 8:].tolist() == answer


@pytest.mark.parametrize("stage", [1, 3])
def test_answers_in_between_change_nothing(workspace: Workspace, stage: int) -> None:
    """Steps after an answer are those of a run that never answered; at ZeRO-3 too."""
    config = workspace.config(stage=stage)
    worker = start_worker(config)
    reports = [worker.train_step(0)]
    answers = greedy_answers(config, worker._strategy.model.hf_model)
    reports.append(worker.train_step(1))
    worker.close()

    assert curve(reports) == curve(run_worker(config, 2))
    assert len({tuple(answer) for answer in answers}) > 1


def test_an_answer_ends_where_it_is_told(workspace: Workspace) -> None:
    """At an end token, which is part of it; at the most new tokens; at the last position that the model knows."""
    model = make_model(max_position_embeddings=12)
    whole = greedy(model, [5, 6, 7], 6, set())

    assert len(whole) == 6
    assert greedy(model, [5, 6, 7], 6, {whole[2]}) == whole[: whole.index(whole[2]) + 1]
    assert len(greedy(model, [5, 6, 7], 100, set())) == 9
    assert all(0 <= token < VOCAB_SIZE for token in whole)


def test_adapters_are_known_by_either_key() -> None:
    """A target and a directory both mean adapters; none means all weights."""
    assert ModelArguments(lora_target="all-linear").has_adapters
    assert ModelArguments(adapter_name_or_path="x").has_adapters
    assert not ModelArguments().has_adapters
