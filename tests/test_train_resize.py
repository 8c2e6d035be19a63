"""`resize_vocab` on two ranks: new embeddings are the same everywhere, train as on one, and are exported."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_fast.config import StrategyArguments
from sft_fast.train.checkpoint import commit, staging_directory
from sft_fast.train.cluster import Cluster
from sft_fast.train.export import export_checkpoint
from tests.test_train_options import small_vocabulary
from tests.test_train_worker import assert_same_curve, curve, save, state_of
from tests.train_helpers import Workspace, dataset_of, run_worker, start_worker

FSDP2 = StrategyArguments(strategy_name="fsdp2_train")
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A model with fewer embeddings than its tokenizer has ids."""
    return small_vocabulary(tmp_path_factory.mktemp("resize"), request.param)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two processes, which every test initialises anew."""
    nowhere = tmp_path_factory.mktemp("ranks")
    cluster = Cluster(Workspace(nowhere, nowhere, nowhere).config(ranks=2, micro_batches=1))
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def one_rank(workspace: Workspace) -> list[tuple[float, float]]:
    """The losses and norms of three steps on one rank."""
    return curve(run_worker(workspace.config(model={"resize_vocab": True}), 3))


@pytest.mark.ray
@pytest.mark.parametrize("stage", [1, 2, 3, 0])
def test_two_ranks_train_a_larger_vocabulary_as_one(
    workspace: Workspace, two_ranks: Cluster, one_rank: list[tuple[float, float]], tmp_path: Path, stage: int
) -> None:
    """Steps are those of one rank; run and checkpoint export a model that generates what the ranks answer.

    Stage 0 is FSDP2.
    """
    from transformers import AutoModelForCausalLM

    prompt = PROMPT

    def answer(actor: Any) -> list[int]:  # sent to the ranks by value, with what it names
        from sft_fast.train.generate import greedy

        worker = actor._worker
        worker._strategy.model.eval()
        return greedy(worker._strategy.model.hf_model, prompt, 8, set())

    strategy = None if stage else FSDP2
    config = workspace.config(
        ranks=2, micro_batches=1, stage=stage, strategy=strategy, model={"resize_vocab": True}, output_dir=str(tmp_path)
    )
    two_ranks.initialize(config, dataset_of(config).path)
    reports = [two_ranks.submit("train_step", step).result() for step in range(3)]
    answers = two_ranks._ray.get([actor.__ray_call__.remote(answer) for actor in two_ranks._actors])
    staging = staging_directory(config.output_dir, 3)
    two_ranks.submit("do_checkpoint", str(staging)).result()
    two_ranks.submit("export", str(tmp_path / "run")).result()
    saved = commit(staging, state_of(config, 3))
    export_checkpoint(str(saved.path), str(tmp_path / "exported"))

    assert_same_curve([(sum(report.loss for report in both), both[0].grad_norm) for both in reports], one_rank)
    assert answers[0] == answers[1]
    num_ids = dataset_of(config).vocab_size
    for name in ("run", "exported"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == num_ids > 300
        ids = torch.tensor([PROMPT])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=None
        )
        assert generated[0, len(PROMPT) :].tolist() == answers[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_new_embeddings_under_adapters_are_those_of_the_run(workspace: Workspace, tmp_path: Path, stage: int) -> None:
    """Embeddings that do not train are in no checkpoint: an export draws the very same ones again."""
    from safetensors.torch import load_file

    model: dict[str, Any] = {"resize_vocab": True, "lora_target": "q_proj,v_proj", "lora_rank": 4}
    config = workspace.config(stage=stage, model=model, output_dir=str(tmp_path))
    worker = start_worker(config)
    worker.train_step(0)
    worker.export(str(tmp_path / "run"))
    path = save(worker, config, 1)
    worker.close()
    export_checkpoint(str(path), str(tmp_path / "exported"))
    run, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "exported"))

    assert run.keys() == exported.keys()
    for name, tensor in run.items():
        assert torch.equal(tensor, exported[name]), name
