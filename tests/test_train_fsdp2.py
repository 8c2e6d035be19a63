"""`fsdp2_train` against the plain loop, and against itself: stopped, resumed, exported."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_fast import ConfigError
from sft_fast.config import StrategyArguments
from sft_fast.train.checkpoint import TrainState, commit, staging_directory
from sft_fast.train.cluster import Cluster
from sft_fast.train.export import export_checkpoint
from sft_fast.train.pipeline import SFTPipeline
from sft_fast.train.strategy import check_strategy
from tests.test_train_options import greedy_answers
from tests.test_train_worker import assert_same_curve, curve, save
from tests.train_helpers import Workspace, broken_workspace, dataset_of, plain_loop, run_worker, start_worker


def fsdp2(**settings: Any) -> StrategyArguments:
    """The strategy with these settings."""
    return StrategyArguments(strategy_name="fsdp2_train", strategy_config=settings)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Qwen2, whose head is its embedding."""
    return Workspace.create(tmp_path_factory.mktemp("fsdp2"), kind="qwen2", tie_word_embeddings=True)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", [{}, {"reshard_after_forward": False}])
def test_it_trains_like_a_plain_loop(workspace: Workspace, settings: dict[str, Any], packed: bool) -> None:
    """Loss and gradient norm of every step, with clipping and tied embeddings, packed and not."""
    config = workspace.config(strategy=fsdp2(**settings), packed=packed)
    expected = plain_loop(config)

    assert min(norm for _, norm in expected) > config.max_grad_norm
    assert_same_curve(curve(run_worker(config)), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_models_train_like_a_plain_loop(tmp_path: Path, kind: str) -> None:
    """A head of its own, and another arrangement of layers; with gradient checkpointing, too."""
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    workspace = Workspace.create(tmp_path, kind=kind, **sizes, **dropouts)
    config = workspace.config(strategy=fsdp2(), model={"disable_gradient_checkpointing": False})

    assert_same_curve(curve(run_worker(config, 3)), plain_loop(config, 3))


def test_bfloat16_is_that_of_deepspeed(workspace: Workspace) -> None:
    """With 32-bit masters, the losses of bfloat16 are those of the other strategy to the precision of bfloat16."""
    model = {"dtype": "bf16"}
    ours = curve(run_worker(workspace.config(strategy=fsdp2(), model=model)))
    assert_same_curve(ours, curve(run_worker(workspace.config(model=model))), rel=2e-2)


@pytest.mark.parametrize("model", [{}, {"dtype": "bf16"}, {"lora_target": "q_proj,v_proj", "lora_rank": 4}])
def test_resuming_and_exporting_change_no_bit(workspace: Workspace, tmp_path: Path, model: dict[str, Any]) -> None:
    """Stopped and resumed is straight; run and checkpoint export the same; answers are those of the run."""
    from transformers import AutoModelForCausalLM

    config = workspace.config(strategy=fsdp2(), model=model, output_dir=str(tmp_path / "out"))
    worker = start_worker(config)
    straight = [worker.train_step(step) for step in range(4)]
    worker.close()
    worker = start_worker(config)
    first = [worker.train_step(step) for step in range(2)]
    path = save(worker, config, 2)
    worker.close()
    worker = start_worker(config, path)
    greedy_answers(config, worker._strategy.model.hf_model)
    resumed = [worker.train_step(step) for step in (2, 3)]
    answers = greedy_answers(config, worker._strategy.model.hf_model)
    checkpoint = save(worker, config, 4)
    worker.export(str(tmp_path / "run"))
    worker.close()
    export_checkpoint(str(checkpoint), str(tmp_path / "exported"))

    assert curve(first + resumed) == curve(straight)
    run, exported = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "exported"))
    assert run == exported
    assert greedy_answers(config, AutoModelForCausalLM.from_pretrained(tmp_path / "run")) == answers


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    """It is left out and said, and the later steps are as if it had not been tried."""
    workspace = broken_workspace(tmp_path)
    config = workspace.config(strategy=fsdp2(), on_non_finite="skip", training={"lr_scheduler_type": "constant"})
    reports = run_worker(config)
    bad = [report.step - 1 for report in reports if report.is_skipped]
    worker = start_worker(config)
    without = [worker.train_step(step) for step in range(len(reports)) if step not in bad]
    worker.close()

    assert len(bad) == 2
    assert [report.step - 1 for report in reports if not np.isfinite(report.loss)] == bad
    assert curve([report for report in reports if not report.is_skipped]) == curve(without)


@pytest.fixture
def two_ranks(workspace: Workspace) -> Iterator[Cluster]:
    """Two processes."""
    cluster = Cluster(workspace.config(ranks=2, micro_batches=1, strategy=fsdp2()))
    yield cluster
    cluster.shutdown()


@pytest.mark.ray
def test_two_ranks_are_one_and_go_on_as_one(workspace: Workspace, two_ranks: Cluster, tmp_path: Path) -> None:
    """Two ranks have the losses and norms of one; one rank goes on from their checkpoint as it is."""
    config = workspace.config(ranks=2, micro_batches=1, strategy=fsdp2(), output_dir=str(tmp_path))
    alone = workspace.config(strategy=fsdp2(), output_dir=str(tmp_path))
    path = dataset_of(config).path
    two_ranks.initialize(config, path)
    reports = [two_ranks.submit("train_step", step).result() for step in range(2)]
    staging = staging_directory(config.output_dir, 2)
    two_ranks.submit("do_checkpoint", str(staging)).result()
    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(TrainState)}
    saved = commit(staging, TrainState(**(values | {"step": 2})))
    worker = start_worker(alone, saved.path)
    later = [worker.train_step(step) for step in (2, 3)]
    worker.close()

    found = [(sum(report.loss for report in both), both[0].grad_norm) for both in reports]
    assert_same_curve(found + curve(later), curve(run_worker(alone, 4)))


def test_a_whole_run_goes_through_it(workspace: Workspace, tmp_path: Path) -> None:
    """The pipeline trains, validates, saves and exports with it, and refuses the checkpoint of another strategy."""
    places = {"output_dir": str(tmp_path / "out"), "logging_dir": str(tmp_path / "logs")}
    options: dict[str, Any] = {"validation": True, "training": {"max_steps": 2}, **places}
    SFTPipeline(workspace.config(strategy=fsdp2(), export_dir=str(tmp_path / "m"), **options), use_ray=False).run()

    assert (tmp_path / "m" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="strategy_name"):
        SFTPipeline(workspace.config(resume_from_checkpoint=True, **options), use_ray=False).run()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"param_dtype": "bfloat16"}, "param_dtype"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization"),
        ({"fsdp_size": 4}, "fsdp_size"),
        ({"offload_policy": "cpu"}, "offload_policy"),
    ],
)
def test_settings_that_it_lacks_are_refused(workspace: Workspace, settings: dict[str, Any], key: str) -> None:
    """A key that is unknown or contradicts the configuration is refused by its full name, before anything starts."""
    with pytest.raises(ConfigError) as caught:
        check_strategy(workspace.config(strategy=fsdp2(**settings)))
    assert caught.value.location == f"sft_train.strategy_args.strategy_config.{key}"


def test_settings_of_roll_that_agree_are_accepted(workspace: Workspace) -> None:
    """What says the same as the rest of the configuration is no contradiction; fp16 has no loss scaling here."""
    settings = {"param_dtype": "float32", "reduce_dtype": "float32", "fsdp_size": 1, "reshard_after_forward": True}
    assert check_strategy(workspace.config(strategy=fsdp2(**settings))) == 0
    with pytest.raises(ConfigError, match="loss scaling"):
        check_strategy(workspace.config(strategy=fsdp2(), model={"dtype": "fp16"}))
