"""Runs over sources with weights: what they train on, how they go on, and what they show before."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_fast import ConfigError, Dataset, ensure_dataset
from sft_fast.config import DataArguments, SFTConfig, ValidationConfig
from sft_fast.train.pipeline import SFTPipeline
from sft_fast.train.plan import BatchArithmetic, train_stream
from tests.train_helpers import Workspace, write_records


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny model and records of two sources."""
    workspace = Workspace.create(tmp_path_factory.mktemp("mixing"))
    write_records(workspace.root / "more.jsonl", 10, seed=3)
    return workspace


def mixed(workspace: Workspace, directory: Path, weight: float, **changes: Any) -> SFTConfig:
    """A run over all records, and over those of a second source by its weight."""
    config = workspace.config(output_dir=str(directory / "out"), logging_dir=str(directory / "logs"), **changes)
    more = {"path": str(workspace.root / "more.jsonl"), "weight": weight}
    config.sft_train.data_args.file_name = [str(workspace.records), more]
    return config


def losses(config: SFTConfig) -> list[dict[str, Any]]:
    """What a run writes of its steps, without times."""
    SFTPipeline(config, use_ray=False).run()
    lines = (Path(config.logging_dir) / "sft" / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in ("step", "epoch", "loss", "num_tokens")} for line in lines]


def test_a_run_trains_on_the_mix(workspace: Workspace, tmp_path: Path) -> None:
    """Each epoch has the tokens of its part of each source, a run goes on in it, and not with another weight."""
    config = mixed(workspace, tmp_path / "whole", 0.5, training={"num_train_epochs": 4})
    whole = losses(config)
    report = ensure_dataset(config.data_files()["train"], config.data_cache_dir, **config.preprocess_options())
    stream = train_stream(config, Dataset(report.path, report.sources))
    [one, more] = report.sources

    assert len(whole) == stream.num_steps
    assert whole[-1]["epoch"] == 4
    assert sum(line["num_tokens"] for line in whole) == 4 * one.num_tokens + 2 * more.num_tokens

    half = mixed(workspace, tmp_path / "parts", 0.5, training={"num_train_epochs": 4, "max_steps": 5})
    half.sft_train.training_args.lr_scheduler_type = config.sft_train.training_args.lr_scheduler_type = "constant"
    assert [line["num_tokens"] for line in losses(half)] == [line["num_tokens"] for line in whole[:5]]
    half.sft_train.training_args.max_steps = -1
    half.resume_from_checkpoint = True
    assert [line["num_tokens"] for line in losses(half)] == [line["num_tokens"] for line in whole]
    other = mixed(workspace, tmp_path / "parts", 0.75, resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="max_samples of each source"):
        SFTPipeline(other, use_ray=False).run()


def test_the_arithmetic_counts_the_mix(workspace: Workspace, tmp_path: Path) -> None:
    """What is printed before a run says how many samples an epoch has, and of how many."""
    config = mixed(workspace, tmp_path, 2.5)
    report = ensure_dataset(config.data_files()["train"], config.data_cache_dir, **config.preprocess_options())
    arithmetic = BatchArithmetic.of(config, train_stream(config, Dataset(report.path, report.sources)))

    assert (arithmetic.num_samples, arithmetic.num_samples_per_epoch) == (34, 24 + 25)
    assert dict(arithmetic.rows())["samples"].startswith("49 an epoch of 34, by the weights of their sources, in ")


def test_reports_and_the_dry_run_show_the_mix(
    workspace: Workspace, tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """`preprocess` has a row for each source, in JSON too, and `validate` counts the samples of an epoch."""
    config = {
        "pretrain": str(workspace.model_dir),
        "sequence_length": 96,
        "num_gpus_per_node": 0,
        "sft_train": {
            "data_args": {
                "file_name": [str(workspace.records), {"path": str(workspace.root / "more.jsonl"), "weight": 2.5}]
            }
        },
    }
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(config))
    printed = run_cli("preprocess", "--config-name", "mix", COLUMNS="140").stdout
    as_json = json.loads(run_cli("preprocess", "--config-name", "mix", "--json").stdout)
    dry = run_cli("validate", "--config-name", "mix").stdout

    assert re.search(r"^\s*more\s+10\s+0\s+10\s+[\d,]+\s+[\d,]+\s+2\.5\s+all\s+25\s*$", printed, re.MULTILINE), printed
    assert [source["name"] for source in as_json["train"]["sources"]] == ["r", "more"]
    assert "49 an epoch of 34" in " ".join(dry.split())


@pytest.mark.parametrize(
    ("changes", "location"),
    [
        ({"train": [{"path": "a.jsonl", "weight": -1}]}, "sft_train.data_args.file_name[0].weight"),
        ({"validation": [{"path": "a.jsonl", "weight": 2}]}, "validation.data_args.file_name"),
    ],
)
def test_wrong_entries_are_found_with_the_configuration(
    workspace: Workspace, changes: dict[str, Any], location: str
) -> None:
    """An entry that can't be, or a weight for validation, is an error of the configuration, with its place."""
    config = workspace.config()
    if "train" in changes:
        config.sft_train.data_args.file_name = changes["train"]
    else:
        config.validation = ValidationConfig(data_args=DataArguments(file_name=changes["validation"]))
    with pytest.raises(ConfigError) as caught:
        config.__post_init__()
    assert caught.value.location == location
