"""One rank in this process: the laws of training, against a plain PyTorch loop over the same samples."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sft_fast import ConfigError, TrainError
from sft_fast.config import SFTConfig
from sft_fast.train.checkpoint import CLUSTER_NAME, TrainState, commit, staging_directory
from sft_fast.train.export import export_checkpoint
from sft_fast.train.strategy import check_strategy
from sft_fast.train.worker import SFTWorker, TrainStepReport
from tests.train_helpers import (
    VOCAB_SIZE,
    Workspace,
    broken_workspace,
    dataset_of,
    make_model_dir,
    plain_loop,
    run_worker,
    start_worker,
    train_stream,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Llama and records."""
    return Workspace.create(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Qwen2, whose head is its embedding."""
    return Workspace.create(tmp_path_factory.mktemp("qwen2"), kind="qwen2", tie_word_embeddings=True)


def curve(reports: list[TrainStepReport]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(report.loss, report.grad_norm) for report in reports]


def assert_same_curve(
    actual: list[tuple[float, float]], expected: list[tuple[float, float]], rel: float = 2e-5
) -> None:
    """Each loss and each norm, within a relative tolerance."""
    assert len(actual) == len(expected) > 2
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=rel)


def state_of(config: SFTConfig, step: int) -> TrainState:
    """What the pipeline would save beside the weights."""
    return TrainState(
        fingerprint=dataset_of(config).fingerprint,
        seed=config.seed,
        data_seed=config.seed,
        sequence_length=config.sequence_length,
        is_packed=config.sft_train.use_sequence_packing,
        num_rows_per_step=config.num_rows_per_step,
        model_args=config.to_dict()["sft_train"]["model_args"],
        step=step,
        run_id="test",
        best_val_loss=None,
        world_size=1,
        zero_stage=check_strategy(config),
        strategy_name=config.sft_train.strategy_args.strategy_name,
        pretrain=config.pretrain,
        saved_at=time.time(),
    )


def save(worker: SFTWorker, config: SFTConfig, step: int) -> Path:
    """A checkpoint of a worker."""
    staging = staging_directory(config.output_dir, step)
    worker.do_checkpoint(str(staging))
    return commit(staging, state_of(config, step)).path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_loss_and_gradient_norm_equal_a_plain_loop(workspace: Workspace, stage: int, packed: bool) -> None:
    """Over two epochs with clipping, warm-up and short last steps, for each ZeRO stage, packed and not."""
    config = workspace.config(stage=stage, packed=packed)
    expected = plain_loop(config)

    assert min(norm for _, norm in expected) > config.max_grad_norm, "gradients are clipped"
    assert_same_curve(curve(run_worker(config)), expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_embeddings_train_like_a_plain_loop(tied: Workspace, stage: int) -> None:
    """A head that is the embedding gets both gradients."""
    config = tied.config(stage=stage)
    assert_same_curve(curve(run_worker(config)), plain_loop(config))


@pytest.mark.parametrize(("rows", "micro_batches"), [(1, 4), (4, 1)])
@pytest.mark.parametrize("packed", [True, False])
def test_the_split_into_micro_batches_changes_nothing(
    workspace: Workspace, rows: int, micro_batches: int, packed: bool
) -> None:
    """Loss and gradient norm are those of two micro-batches of two rows, however the four rows are split."""
    expected = curve(run_worker(workspace.config(packed=packed)))
    actual = run_worker(workspace.config(packed=packed, rows=rows, micro_batches=micro_batches))

    assert_same_curve(curve(actual), expected)


def test_gradient_checkpointing_changes_nothing(workspace: Workspace) -> None:
    """Layers that are computed again give the same steps, at ZeRO-3 too."""
    expected = curve(run_worker(workspace.config()))
    for stage in (1, 3):
        config = workspace.config(stage=stage, model={"disable_gradient_checkpointing": False})
        assert_same_curve(curve(run_worker(config)), expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_keeps_float32_masters(workspace: Workspace, tmp_path: Path, stage: int) -> None:
    """Updates too small for a bfloat16 weight add up until they move it; the first step is that of float32."""
    from transformers import AutoModelForCausalLM

    config = workspace.config(
        stage=stage,
        model={"dtype": "bf16"},
        training={"learning_rate": 1e-4, "num_train_epochs": 8, "weight_decay": 0.0},
    )
    worker = start_worker(config)
    reports = [worker.train_step(step) for step in range(train_stream(config, dataset_of(config)).num_steps)]
    worker.export(str(tmp_path / "run"))
    worker.close()
    before = AutoModelForCausalLM.from_pretrained(config.pretrain, dtype=torch.bfloat16).lm_head.weight
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run").lm_head.weight
    # From 0.25 on, neighbouring values are 0.002 apart: one update of 0.0001 is rounded away.
    is_large = before.abs() >= 0.25
    moved = (before != after)[is_large].float().mean()

    assert curve(reports)[0] == pytest.approx(plain_loop(config, 1)[0], rel=2e-2)
    assert is_large.sum() > 1000
    assert moved > 0.3


def test_validation_is_the_mean_over_its_label_tokens(workspace: Workspace) -> None:
    """Before training, the validation loss over the training data is the loss of its samples one by one."""
    config = workspace.config(validation=True, training={"num_train_epochs": 1})
    worker = start_worker(config)
    report = worker.val_step()
    first = worker.train_step(0)
    worker.close()
    stream = train_stream(config, dataset_of(config))
    whole = workspace.config(rows=1000, micro_batches=1)

    loss_sum, num_label_tokens = report.loss_sums["validation"], report.num_label_tokens["validation"]
    assert loss_sum / num_label_tokens == pytest.approx(plain_loop(whole, 1)[0][0], rel=1e-5)
    assert num_label_tokens == sum(
        stream.step(k, rows_per_micro_batch=2).num_label_tokens for k in range(stream.num_steps)
    )
    assert first.loss == pytest.approx(plain_loop(config, 1)[0][0], rel=1e-5), "validation leaves training alone"


@pytest.mark.parametrize(
    ("stage", "dtype", "dropout"),
    [(1, "fp32", 0.0), (1, "bf16", 0.0), (2, "bf16", 0.1), (3, "fp32", 0.1), (3, "bf16", 0.0)],
)
def test_resuming_changes_no_bit(tmp_path: Path, stage: int, dtype: str, dropout: float) -> None:
    """Some steps, stop, resume, as many steps: losses, norms and weights of all at once, with random dropout too."""
    workspace = Workspace.create(tmp_path, attention_dropout=dropout)
    config = workspace.config(stage=stage, model={"dtype": dtype}, output_dir=str(tmp_path / "out"))
    num_steps = train_stream(config, dataset_of(config)).num_steps
    half = num_steps // 2
    worker = start_worker(config)
    straight = [worker.train_step(step) for step in range(num_steps)]
    worker.export(str(tmp_path / "straight"))
    worker.close()

    worker = start_worker(config)
    first = [worker.train_step(step) for step in range(half)]
    path = save(worker, config, half)
    worker.close()
    worker = start_worker(config, path)
    second = [worker.train_step(step) for step in range(half, num_steps)]
    worker.export(str(tmp_path / "resumed"))
    worker.close()

    assert curve(first + second) == curve(straight)
    assert [report.learning_rate for report in first + second] == [report.learning_rate for report in straight]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "resumed")]
    assert weights[0] == weights[1]
    if dropout:
        plain = workspace.config(stage=stage, model={"dtype": dtype, "model_config_kwargs": {"attention_dropout": 0.0}})
        assert curve(run_worker(plain, 1)) != curve(straight)[:1], "dropout is at work"


def test_saving_does_not_disturb_training(workspace: Workspace, tmp_path: Path) -> None:
    """A run that saves after every step has the steps of one that never saves."""
    config = workspace.config(stage=2, output_dir=str(tmp_path))
    worker = start_worker(config)
    saved = []
    for step in range(4):
        saved.append(worker.train_step(step))
        save(worker, config, step + 1)
    worker.close()

    assert curve(saved) == curve(run_worker(config, 4))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_exported_model_is_the_trained_one(tied: Workspace, tmp_path: Path, stage: int, dtype: str) -> None:
    """A model from the run and one from its checkpoint are the same files; transformers loads them, logits agree."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = tied.config(stage=stage, model={"dtype": dtype}, output_dir=str(tmp_path / "out"))
    worker = start_worker(config)
    for step in range(2):
        worker.train_step(step)
    worker.export(str(tmp_path / "run"))
    checkpoint = save(worker, config, 2)
    ids = torch.randint(VOCAB_SIZE, (1, 12))
    worker._strategy.model.eval()
    with torch.no_grad():
        worker._strategy.model.hf_model.set_attn_implementation("eager")
        expected = worker._strategy.model.hf_model(input_ids=ids, use_cache=False).logits
    worker.close()

    export_checkpoint(str(checkpoint), str(tmp_path / "exported"))

    for name in ("run", "exported"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        assert loaded.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, expected)
        assert AutoTokenizer.from_pretrained(tmp_path / name)("one two").input_ids
        assert not [path.name for path in tmp_path.iterdir() if "staging" in path.name]
    run, exported = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "exported"))
    assert run == exported


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_train_alone_and_are_merged(workspace: Workspace, tmp_path: Path, stage: int) -> None:
    """With LoRA only adapters move; resuming is exact; run and checkpoint export the same merged model."""
    from transformers import AutoModelForCausalLM

    config = workspace.config(
        stage=stage, model={"lora_target": "q_proj,v_proj", "lora_rank": 4}, output_dir=str(tmp_path / "out")
    )
    worker = start_worker(config)
    straight = [worker.train_step(step) for step in range(3)]
    worker.export(str(tmp_path / "run"))
    worker.close()
    worker = start_worker(config)
    worker.train_step(0)
    path = save(worker, config, 1)
    worker.close()
    worker = start_worker(config, path)
    resumed = [worker.train_step(step) for step in (1, 2)]
    checkpoint = save(worker, config, 3)
    worker.close()
    export_checkpoint(str(checkpoint), str(tmp_path / "exported"))

    assert curve(resumed) == curve(straight[1:])
    before = AutoModelForCausalLM.from_pretrained(config.pretrain).state_dict()
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("run", "exported")]
    moved = {name for name, weight in models[0].items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "q_proj" in name or "v_proj" in name}
    for name, weight in models[0].items():
        assert torch.equal(weight, models[1][name])
    weights = sum(file.stat().st_size for file in (path / CLUSTER_NAME).iterdir())
    assert weights < 4 * 2 * 4 * (32 * 4 * 6) * 4, "the frozen weights are not saved again"


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_modules_do_not_move(workspace: Workspace, tmp_path: Path, stage: int) -> None:
    """`freeze_module_prefix` leaves those weights as they were; resumption and exports are exact."""
    from transformers import AutoModelForCausalLM

    frozen = ("model.embed_tokens", "model.layers.0")
    config = workspace.config(
        stage=stage, model={"freeze_module_prefix": ",".join(frozen)}, output_dir=str(tmp_path / "out")
    )
    worker = start_worker(config)
    straight = [worker.train_step(step) for step in range(3)]
    worker.export(str(tmp_path / "run"))
    worker.close()
    worker = start_worker(config)
    worker.train_step(0)
    path = save(worker, config, 1)
    worker.close()
    worker = start_worker(config, path)
    resumed = [worker.train_step(step) for step in (1, 2)]
    export_checkpoint(str(save(worker, config, 3)), str(tmp_path / "exported"))
    worker.close()

    assert curve(resumed) == curve(straight[1:])
    before = AutoModelForCausalLM.from_pretrained(config.pretrain).state_dict()
    for directory in ("run", "exported"):
        after = AutoModelForCausalLM.from_pretrained(tmp_path / directory).state_dict()
        assert {name for name in after if torch.equal(after[name], before[name])} == {
            name for name in before if name.startswith(frozen)
        }


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, stage: int, dtype: str) -> None:
    """It ends the run, or is left out and said: then weights and all later steps are as if it had not been tried."""
    workspace = broken_workspace(tmp_path)
    options: dict[str, Any] = {"stage": stage, "model": {"dtype": dtype}}
    worker = start_worker(workspace.config(**options))
    with pytest.raises(TrainError, match="not finite") as caught:
        _ = [worker.train_step(step) for step in range(6)]
    worker.close()
    config = workspace.config(**options, on_non_finite="skip", training={"lr_scheduler_type": "constant"})
    reports = run_worker(config)
    bad = [report.step - 1 for report in reports if report.is_skipped]
    worker = start_worker(config)
    without = [worker.train_step(step) for step in range(len(reports)) if step not in bad]
    worker.close()

    assert caught.value.code == "not_finite"
    assert len(bad) == 2, "one step in each of two epochs"
    assert [report.step - 1 for report in reports if not np.isfinite(report.loss)] == bad
    assert curve([report for report in reports if not report.is_skipped]) == curve(without)


def test_a_tokenizer_of_another_model_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    """Token ids that the model has no embeddings for are an error at the start."""
    make_model_dir(tmp_path / "model", vocab_size=300)
    config = Workspace(tmp_path, tmp_path / "model", workspace.records).config()
    with pytest.raises(ConfigError, match="embeddings for 300"):
        start_worker(config)


def test_weights_that_are_missing_are_named(workspace: Workspace, tmp_path: Path) -> None:
    """A model directory without weights is an error of the configuration, with its path."""
    make_model_dir(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    config = Workspace(tmp_path, tmp_path / "model", workspace.records).config()
    with pytest.raises(ConfigError) as caught:
        start_worker(config)
    assert caught.value.path == str(tmp_path / "model")


def test_settings_of_the_model_reach_it_and_its_export(workspace: Workspace, tmp_path: Path) -> None:
    """`model_config_kwargs` change the model that is trained, and the configuration that is exported."""
    changed: dict[str, Any] = {"model": {"model_config_kwargs": {"rms_norm_eps": 0.5}}}
    config = workspace.config(**changed, output_dir=str(tmp_path))
    worker = start_worker(config)
    first = worker.train_step(0)
    worker.export(str(tmp_path / "run"))
    worker.close()

    assert first.loss != run_worker(workspace.config(), 1)[0].loss
    assert json.loads((tmp_path / "run" / "config.json").read_text())["rms_norm_eps"] == 0.5
