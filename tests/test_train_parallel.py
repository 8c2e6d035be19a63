"""Four ranks, spread in every way: samples, rows and weights. Each is the plain loop, and goes on as another."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_fast import ConfigError
from sft_fast.config import SFTConfig, StrategyArguments
from sft_fast.train.checkpoint import CLUSTER_NAME, TrainState, commit, staging_directory
from sft_fast.train.cluster import Cluster
from sft_fast.train.pipeline import SFTPipeline
from sft_fast.train.strategy import check_strategy
from sft_fast.train.strategy.universal import convert_checkpoint
from tests.train_helpers import Workspace, dataset_of, plain_loop, ray_here, run_worker, start_worker

NUM_STEPS = 3

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
TENSOR_2 = {"tensor_parallel": {"autotp_size": 2}}
SEQUENCE_2 = {"sequence_parallel_size": 2}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Llama with four heads, of which two and two share keys and values."""
    return Workspace.create(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Qwen2, which has biases, and whose head is its embedding."""
    return Workspace.create(tmp_path_factory.mktemp("qwen2"), kind="qwen2", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny Qwen3, whose norms of queries and keys see only some heads on each rank."""
    return Workspace.create(tmp_path_factory.mktemp("qwen3"), kind="qwen3")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Any]:
    """Ray, started once for all clusters of this file."""
    with ray_here(num_cpus=8) as ray:
        yield ray


@pytest.fixture(scope="module")
def four_ranks(ray_session: Any, workspace: Workspace) -> Iterator[Cluster]:
    """Four processes, which the tests initialise anew."""
    cluster = Cluster(workspace.config(ranks=4, rows=1, micro_batches=1))
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def two_ranks(ray_session: Any, workspace: Workspace) -> Iterator[Cluster]:
    """Two others."""
    cluster = Cluster(workspace.config(ranks=2))
    yield cluster
    cluster.shutdown()


def parallel(workspace: Workspace, settings: dict[str, Any], stage: int | None = 1, **changes: Any) -> SFTConfig:
    """Four ranks and a global batch of four rows; `stage` None is fsdp2_train."""
    zero = {"stage": stage, **settings}
    own = {key: zero.pop(key) for key in (*TENSOR_2, *SEQUENCE_2, "ulysses_size") if key in zero}
    strategy = StrategyArguments(strategy_config={**own, "zero_optimization": zero})
    if stage is None:
        strategy = StrategyArguments(strategy_name="fsdp2_train", strategy_config=own)
    ranks = changes.pop("ranks", 4)
    config = workspace.config(ranks=ranks, rows=1, micro_batches=1, strategy=strategy, **changes)
    # The ranks that have the same samples take them in turns.
    config.sft_train.training_args.gradient_accumulation_steps = 4 // config.data_parallel_size
    return config


@functools.cache
def expected(workspace: Workspace, packed: bool) -> list[tuple[float, float]]:
    """Loss and norm of the first steps, by PyTorch and transformers alone."""
    return plain_loop(workspace.config(packed=packed), NUM_STEPS)


def steps(cluster: Cluster, numbers: range) -> list[tuple[float, float]]:
    """Loss and norm of some steps: the shares of the loss add up, and every rank has the same norm."""
    curve = []
    for step in numbers:
        reports = cluster.submit("train_step", step).result()
        assert len({report.grad_norm for report in reports}) == 1
        curve.append((sum(report.loss for report in reports), reports[0].grad_norm))
    return curve


def assert_same_curve(mine: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> None:
    """Within what float32 leaves open."""
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=2e-5)


@pytest.mark.ray
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_four_ranks_are_a_plain_loop(workspace: Workspace, four_ranks: Cluster, stage: int, packed: bool) -> None:
    """At every stage, packed with the optimizer on the CPU, and not: the losses and norms of plain PyTorch."""
    config = parallel(workspace, OFFLOAD if packed else {}, stage, packed=packed)
    four_ranks.initialize(config, dataset_of(config).path)

    assert_same_curve(steps(four_ranks, range(NUM_STEPS)), expected(workspace, packed))


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "stage", "packed"),
    [
        (SEQUENCE_2, 1, True),
        (SEQUENCE_2, 2, False),
        (SEQUENCE_2, 3, True),
        ({"sequence_parallel_size": 4}, 2, True),  # more ranks than heads of keys
        ({"ulysses_size": 2}, None, False),
    ],
)
def test_ranks_that_split_rows_are_a_plain_loop(
    workspace: Workspace, four_ranks: Cluster, settings: dict[str, Any], stage: int | None, packed: bool
) -> None:
    """Two ranks to a row and two rows at a time, or four to a row: losses, norms and validation are equal."""
    config = parallel(workspace, settings, stage, packed=packed, validation=True)
    path = dataset_of(config).path
    four_ranks.initialize(config, path, {"validation": path})
    before = four_ranks.submit("val_step").result()
    alone = start_worker(workspace.config(packed=packed, validation=True))
    whole = alone.val_step()
    alone.close()

    assert_same_curve(steps(four_ranks, range(NUM_STEPS)), expected(workspace, packed))
    assert sum(one.num_label_tokens["validation"] for one in before) == whole.num_label_tokens["validation"]
    loss = sum(one.loss_sums["validation"] for one in before)
    assert loss == pytest.approx(whole.loss_sums["validation"], rel=1e-5)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("kind", "settings", "stage", "packed"),
    [
        ("workspace", TENSOR_2, 1, False),
        ("tied", TENSOR_2, 2, True),
        ("normed", TENSOR_2, 3, True),
        ("tied", {**TENSOR_2, **SEQUENCE_2}, 3, False),
    ],
)
def test_ranks_that_split_weights_are_a_plain_loop(
    four_ranks: Cluster,
    request: pytest.FixtureRequest,
    kind: str,
    settings: dict[str, Any],
    stage: int,
    packed: bool,
) -> None:
    """Two ranks to a weight, and two models with other samples or two slices of rows: losses and norms are equal."""
    place: Workspace = request.getfixturevalue(kind)
    config = parallel(place, settings, stage, packed=packed)
    four_ranks.initialize(config, dataset_of(config).path)

    assert_same_curve(steps(four_ranks, range(NUM_STEPS)), expected(place, packed))


@pytest.mark.ray
def test_a_step_counts_its_arithmetic_once(workspace: Workspace, four_ranks: Cluster) -> None:
    """However rows and weights are split, the shares of the ranks add up to what one rank would do."""
    config = parallel(workspace, {**TENSOR_2, **SEQUENCE_2}, packed=True)
    four_ranks.initialize(config, dataset_of(config).path)
    reports = four_ranks.submit("train_step", 0).result()
    (alone,) = run_worker(workspace.config(packed=True), 1)

    # A row is filled up to a multiple of the ranks that share it: at most one token of a few hundred.
    assert sum(report.flops for report in reports) == pytest.approx(alone.flops, rel=0.02)
    assert {report.num_label_tokens for report in reports} == {alone.num_label_tokens}


def on_all(cluster: Cluster, function: Any) -> list[Any]:
    """The answers of a function that each rank calls with its actor."""
    answers: list[Any] = cluster._ray.get([actor.__ray_call__.remote(function) for actor in cluster._actors])
    return answers


@pytest.fixture
def counting_ranks(four_ranks: Cluster) -> Cluster:
    """Four ranks that compile without C++, offload on a CPU too, and count both in `num_compiled` and `num_moved`."""

    def prepare(actor: Any) -> None:
        import functools

        import torch
        from torch._dynamo.utils import counters

        from sft_fast.train import compiled, memory

        if not hasattr(actor, "num_moved"):
            torch.compile = functools.partial(torch.compile, backend="eager")
            memory._is_on_gpu, memory._SMALLEST_BYTES = lambda _: True, 0
            to_host = memory._to_host

            def count(tensor: Any) -> Any:
                saved = to_host(tensor)
                actor.num_moved += isinstance(saved, memory._OnHost)
                return saved

            memory._to_host = count
        torch._dynamo.reset()
        counters.clear()
        compiled._compiled_forward.cache_clear()
        actor.num_moved, actor.num_compiled = 0, lambda: counters["stats"]["unique_graphs"]

    on_all(four_ranks, prepare)
    return four_ranks


@pytest.mark.ray
@pytest.mark.parametrize(
    ("settings", "stage", "model", "is_compiled"),
    [
        ({**TENSOR_2, **SEQUENCE_2}, 1, {"compile": True, "gradient_checkpointing": "full"}, True),
        ({**TENSOR_2, **SEQUENCE_2}, 2, {"offload_activations": True}, False),
        (SEQUENCE_2, 3, {"offload_activations": True, "gradient_checkpointing": "full"}, False),
    ],
)
def test_split_layers_are_compiled_and_offloaded_like_others(
    workspace: Workspace,
    counting_ranks: Cluster,
    settings: dict[str, Any],
    stage: int | None,
    model: dict[str, Any],
    is_compiled: bool,
) -> None:
    """Losses and norms are those of a plain loop; after two steps nothing is compiled again."""
    config = parallel(workspace, settings, stage, model=model)
    counting_ranks.initialize(config, dataset_of(config).path)
    first = steps(counting_ranks, range(2))
    after_two = on_all(counting_ranks, lambda actor: (actor.num_compiled(), actor.num_moved))
    later = steps(counting_ranks, range(2, NUM_STEPS))

    assert_same_curve(first + later, expected(workspace, True))
    assert on_all(counting_ranks, lambda actor: actor.num_compiled()) == [num_graphs for num_graphs, _ in after_two]
    for num_graphs, num_moved in after_two:
        assert (num_graphs >= 2, num_moved >= 2) == (is_compiled, not is_compiled)


@pytest.mark.ray
def test_adapters_over_quantised_weights_train_in_slices_of_rows(four_ranks: Cluster, tmp_path: Path) -> None:
    """Two ranks to a row, the weights of the layers in 4 bits: losses and norms are those of one rank."""
    wide = Workspace.create(tmp_path, hidden_size=64, intermediate_size=128, initializer_range=0.1, head_dim=16)
    model = {"lora_target": "all-linear", "lora_rank": 4, "quantization": "nf4"}
    config = parallel(wide, SEQUENCE_2, 2, model=model)
    four_ranks.initialize(config, dataset_of(config).path)
    alone = run_worker(wide.config(model=model), NUM_STEPS)

    assert_same_curve(steps(four_ranks, range(NUM_STEPS)), [(report.loss, report.grad_norm) for report in alone])


def saved_beside(cluster: Cluster, config: SFTConfig, step: int) -> tuple[Path, list[tuple[float, float]]]:
    """A checkpoint of all ranks, written while they do the steps that are left, and those."""
    staging = staging_directory(config.output_dir, step)
    cluster.submit("do_checkpoint", str(staging), True).result()
    later = steps(cluster, range(step, NUM_STEPS))
    cluster.submit("finish_checkpoint", True).result()
    values: dict[str, Any] = {field.name: None for field in dataclasses.fields(TrainState)}
    return commit(staging, TrainState(**(values | {"step": step}))).path, later


@pytest.mark.ray
@pytest.mark.parametrize(("settings", "stage"), [({}, 2), (TENSOR_2, 3)])
def test_four_ranks_go_on_to_the_last_bit_and_as_others(
    workspace: Workspace,
    four_ranks: Cluster,
    two_ranks: Cluster,
    tmp_path: Path,
    settings: dict[str, Any],
    stage: int,
) -> None:
    """Saved beside training: on four ranks the very losses and norms; on two, split or not, those of a plain loop."""
    config = parallel(workspace, settings, stage, output_dir=str(tmp_path))
    path = dataset_of(config).path
    four_ranks.initialize(config, path)
    first = steps(four_ranks, range(2))
    checkpoint, later = saved_beside(four_ranks, config, 2)
    four_ranks.initialize(config, path, None, str(checkpoint))

    assert steps(four_ranks, range(2, NUM_STEPS)) == later
    assert_same_curve(first + later, expected(workspace, True))
    converted = tmp_path / "converted"
    convert_checkpoint(checkpoint / CLUSTER_NAME, converted / CLUSTER_NAME)
    other = parallel(workspace, {} if settings else TENSOR_2, stage, ranks=2)
    two_ranks.initialize(other, path, None, str(converted), True)
    assert_same_curve(steps(two_ranks, range(2, NUM_STEPS)), expected(workspace, True)[2:])


@pytest.mark.ray
def test_a_whole_run_with_split_weights_goes_on_alone(tied: Workspace, ray_session: Any, tmp_path: Path) -> None:
    """The pipeline trains with split weights, exports, and goes on with whole ones to the metrics of one rank alone."""
    from sft_fast.train.export import export_checkpoint

    metrics = []
    for name, layouts in (("alone", [(1, {})]), ("changing", [(2, TENSOR_2), (1, {})])):
        for ranks, settings in layouts:
            places = {"output_dir": str(tmp_path / name), "logging_dir": str(tmp_path / name)}
            training = {"max_steps": 2 if ranks == 2 else 4, "lr_scheduler_type": "constant"}
            options: dict[str, Any] = {"resume_from_checkpoint": True, "validation": True, "training": training}
            export = str(tmp_path / f"model-{ranks}")
            config = parallel(tied, settings, 2, ranks=ranks, export_dir=export, **places, **options)
            SFTPipeline(config, use_ray=ranks > 1).run()
        lines = (tmp_path / name / "sft" / "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line) for line in lines])
    export_checkpoint(str(tmp_path / "changing" / "sft_train" / "checkpoint-2"), str(tmp_path / "exported"))

    for one, changing in zip(*metrics, strict=True):
        for key in ("step", "loss", "grad_norm", "num_tokens", "num_label_tokens"):
            assert changing[key] == pytest.approx(one[key], rel=5e-5)
    assert metrics[1][-1]["val_loss"] == pytest.approx(metrics[0][-1]["val_loss"], rel=5e-5)
    run, exported = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("model-2", "exported"))
    assert run == exported


@pytest.mark.parametrize(
    ("kind", "settings", "changes", "message"),
    [
        ("gpt2", TENSOR_2, {}, "no plan for splitting the weights of gpt2"),
        ("phi3", TENSOR_2, {}, "split as colwise_gather_output, which is not supported"),
        ("llama", {"tensor_parallel": {"autotp_size": 4}}, {}, "num_key_value_heads 2"),
        ("llama", {"sequence_parallel_size": 8}, {"ranks": 8}, "the attention of a model with 4 heads"),
        ("llama", {**TENSOR_2, "sequence_parallel_size": 4}, {"ranks": 8}, "4 / 2 heads"),
        ("llama", TENSOR_2, {"model": {"lora_target": "q_proj"}}, "does not know adapters"),
        ("llama", TENSOR_2, {"model": {"freeze_module_prefix": ["model"]}}, "does not know frozen weights"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """Before anything starts, with the reason and what to do."""
    place = Workspace.create(tmp_path, num_records=2, kind=kind)
    with pytest.raises(ConfigError, match=message) as caught:
        SFTPipeline(parallel(place, settings, **changes))
    assert caught.value.hint
    assert str(caught.value.location).startswith("sft_train.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": {"autotp_size": 3}}, "4 ranks cannot be split into groups of 3"),
        ({**TENSOR_2, "sequence_parallel_size": 4}, "into groups of 8"),
        ({"tensor_parallel": {"autotp_size": "two"}}, "expected a number of ranks"),
        ({"sequence_parallel_size": -1}, "expected a number of ranks"),
        ({"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}}, "preset_model cannot be set"),
    ],
)
def test_ranks_that_cannot_be_split_so_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Numbers that do not fit, and settings that are read from the model, are refused by their key."""
    with pytest.raises(ConfigError, match=message):
        check_strategy(parallel(Workspace(tmp_path, tmp_path, tmp_path / "r.jsonl"), settings))
