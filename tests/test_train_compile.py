"""`compile`: the same steps from compiled layers, compiled once whatever the packs are."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sft_fast import ConfigError
from sft_fast.config import StrategyArguments
from sft_fast.train import compiled
from sft_fast.train.compiled import check_compiler
from sft_fast.train.strategy import check_strategy
from sft_fast.train.worker import SFTWorker
from tests.test_train_worker import assert_same_curve, curve
from tests.train_helpers import Workspace, dataset_of, run_worker, start_worker, train_stream

FSDP2 = StrategyArguments(strategy_name="fsdp2_train")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Llama and records."""
    return Workspace.create(tmp_path_factory.mktemp("compile"), num_records=40)


@pytest.fixture
def num_compiled() -> Iterator[Any]:
    """Says how many pieces of code have been compiled in this test so far."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled._compiled_forward.cache_clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("strategy", "model"),
    [
        (None, {"gradient_checkpointing": "none"}),
        (None, {"gradient_checkpointing": "full", "lora_target": "q_proj,down_proj", "lora_rank": 4}),
        (FSDP2, {"gradient_checkpointing": "full"}),
    ],
)
def test_compiled_layers_train_like_others(
    workspace: Workspace, num_compiled: Any, strategy: StrategyArguments | None, model: dict[str, Any]
) -> None:
    """Losses and norms agree; after the first step nothing is compiled again, over packs of any samples."""
    options: dict[str, Any] = {"stage": 2, "strategy": strategy, "sequence_length": 160}
    plain = workspace.config(**options, model=model)
    config = workspace.config(**options, model={**model, "compile": True}, validation=True)
    stream = train_stream(config, dataset_of(config))
    worker: SFTWorker = start_worker(config)
    reports = [worker.train_step(0)]
    after_first = num_compiled()
    reports += [worker.train_step(step) for step in range(1, stream.num_steps)]
    after_last = num_compiled()
    worker.val_step()
    after_validation = num_compiled()
    worker.val_step()
    reports.append(worker.train_step(stream.num_steps - 1))
    after_all = num_compiled()
    worker.close()

    num_samples = {len(stream.packing(0)[row]) for row in range(len(stream.packing(0)))}
    assert len(num_samples) > 1, "packs differ in their number of samples"
    assert 2 <= after_first <= 8, "the layers are compiled, and one compilation serves both"
    assert after_last == after_first
    assert after_validation > after_first, "without gradients it is other code"
    assert after_all == after_validation
    assert_same_curve(curve(reports[:-1]), curve(run_worker(plain)), rel=1e-4)


def test_where_nothing_compiles_it_is_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C++ compiler, or without Triton for a GPU, the error says what is missing."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def no_compiler() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler") as caught:
        start_worker(workspace.config(model={"compile": True}))
    assert (caught.value.code, caught.value.location) == ("no_compiler", "sft_train.model_args.compile")
    with pytest.raises(ConfigError, match="Triton"):
        check_compiler("cuda")


def test_what_cannot_be_compiled_is_refused(workspace: Workspace) -> None:
    """ZeRO-3 and selective checkpointing are refused by the reason before anything starts."""
    with pytest.raises(ConfigError, match="ZeRO-3 gathers"):
        check_strategy(workspace.config(stage=3, model={"compile": True}))
    with pytest.raises(ConfigError, match="selective"):
        workspace.config(model={"compile": True, "gradient_checkpointing": "selective"})
