"""The simulation behind docs/scale.md, at sizes that take a moment: its plans are whole, and its totals add up."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import sft_fast
from sft_fast import _core
from tests.data_helpers import make_dataset, random_records

PATH = Path(__file__).parent.parent / "benches" / "scale.py"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    """The simulation."""
    specification = importlib.util.spec_from_file_location("scale", PATH)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["scale"] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["alpaca", "chat", "tulu", "reasoning-16k", "reasoning-32k"])
def test_each_sample_comes_once_and_totals_add_up(scale: ModuleType, name: str) -> None:
    """For every mix, each sample is in one pack and each pack in one step, and tokens, bytes and hours add up."""
    mix, assumed = scale.MIXES[name], scale.Assumptions()
    lengths = mix.lengths(20_000)
    assert (len(lengths), lengths.dtype) == (20_000, np.uint32)
    assert mix.shortest <= lengths.min() <= lengths.max() <= mix.capacity
    plan, offsets, samples, steps = scale.make_plan(lengths, mix.capacity, 64)
    scale.check_plan(lengths, mix.capacity, offsets, samples)
    assert sorted(row for step in range(len(steps)) for row in steps.rows(step)) == list(range(plan.num_packs))
    assert plan.num_tokens == lengths.sum()
    assert plan.fill_ratio > 0.99

    run = scale.run_of(plan, steps, 64, scale.pages_of(lengths), assumed)
    operations = 6 * assumed.parameters * plan.num_tokens
    ideal_hours = operations / (64 * assumed.teraflops * 1e12) / 3600
    assert run.epoch_hours == pytest.approx(ideal_hours * (1 + run.imbalance))
    read = run.node_token_megabytes * 1e6 * run.num_nodes * run.epoch_hours * 3600
    assert read == pytest.approx(plan.num_tokens * scale.BYTES_PER_TOKEN)
    assert run.node_reads * run.num_nodes == pytest.approx(run.node_mask_reads)
    assert run.node_read_megabytes > run.node_token_megabytes
    assert run.imbalance < run.imbalance_in_order


def test_a_broken_plan_is_seen(scale: ModuleType) -> None:
    """Guard: the check of a plan fails where a sample comes twice, is missing, or a pack is too long."""
    lengths = scale.MIXES["alpaca"].lengths(1_000)
    _, offsets, samples, _ = scale.make_plan(lengths, 2_048, 8)
    scale.check_plan(lengths, 2_048, offsets, samples)
    twice = samples.copy()
    twice[0] = twice[1]
    for broken in (twice, samples[:-1]):
        with pytest.raises(AssertionError):
            scale.check_plan(lengths, 2_048, offsets, broken)
    with pytest.raises(AssertionError, match="too long"):
        scale.check_plan(lengths, 2_000, offsets, samples)


def test_the_plan_is_that_of_a_run(tokenizer_dir: Path, tmp_path: Path) -> None:
    """From lengths alone come the very packs and steps that a dataset with samples of these lengths has."""
    dataset = make_dataset(tmp_path, tokenizer_dir, random_records(200))
    packing = dataset.pack(sequence_length=512, seed=42, epoch=3)
    offsets, samples, steps = _core.plan_lengths(dataset.lengths, 512, 42, 3, 4)
    assert [row.tolist() for row in packing] == [row.tolist() for row in np.split(samples, offsets[1:-1])]
    expected = packing._core.steps(4)
    assert [steps.rows(step) for step in range(len(steps))] == [expected.rows(step) for step in range(len(expected))]
    with pytest.raises(sft_fast.ConfigError, match="a pack holds 16"):
        _core.plan_lengths(dataset.lengths, 16, 42, 3, 4)


def test_shards_are_those_of_preprocessing(scale: ModuleType, tokenizer_dir: Path, tmp_path: Path) -> None:
    """The simulation counts the shards that preprocessing writes."""
    records = [{"instruction": "x", "output": "a 0" * (1 + number % 400)} for number in range(3000)]
    manifest = make_dataset(tmp_path, tokenizer_dir, records, sequence_length=4096).manifest
    assert len(manifest["shards"]) == scale.num_shards(manifest["num_tokens"]) > 1
    assert scale.num_shards(1) == 1
    assert scale.num_shards(10**12) == 64 + -(-(10**12 - (1 << 19) * 64 * 65 // 2) // (1 << 25))


def test_limits_are_those_of_the_code(scale: ModuleType) -> None:
    """A size that fits has no limit; one beyond 32 bits of samples, or the maps of a process, has it named."""
    assert not list(scale.limits(10**8, 4 * 10**10, 1e12, 10**10))
    too_many, maps, memory = scale.limits(10**10, 4 * 10**12, 1e12, 2 * 10**12)
    assert "4,294,967,295" in too_many
    assert "65,530" in maps
    assert "2,000 GB" in memory


def test_it_prints_json(scale: ModuleType) -> None:
    """The command prints a line of JSON for each mix and size, with the assumptions that it was given."""
    command = [sys.executable, PATH, "--samples", "2e3,4e3", "--mix", "alpaca,tulu", "--devices", "8", "--json"]
    output = subprocess.run([*command, "--teraflops", "100"], capture_output=True, text=True, check=True).stdout
    results: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    assert [(one["mix"], one["plan"]["num_samples"]) for one in results] == [
        (mix, size) for mix in ("alpaca", "tulu") for size in (2_000, 4_000)
    ]
    assert {one["assumed"]["teraflops"] for one in results} == {100}
    measured = {str(one["plan"]["num_samples"]): one["plan"] for one in results[:2]}
    larger = scale.extrapolated(measured, 8_000)
    assert larger["num_tokens"] == pytest.approx(2 * results[1]["plan"]["num_tokens"], rel=0.1)
