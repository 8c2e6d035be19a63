"""A trained model as an ordinary model directory: safetensors, configuration, tokenizer.

The weights come from a running model (`write_model`) or from a checkpoint (`export_checkpoint`). Adapters are merged
into the model they were trained on, so that what comes out needs nothing of ours. A directory is complete or absent.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from sft_fast.config import ModelArguments
from sft_fast.errors import ConfigError, FileError, TrainError
from sft_fast.train.checkpoint import CLUSTER_NAME, MODEL_DIRECTORY, Checkpoint, read_checkpoint
from sft_fast.train.model import DTYPES, load_config, load_model
from sft_fast.train.strategy.universal import read_universal_weights

# What belongs to a model besides its weights and its config.json; copied as it is.
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "LICENSE*",
)


def save_model_files(config: PretrainedConfig, pretrain: str, directory: Path) -> None:
    """Writes what a model directory has besides weights: the configuration, and copies of tokenizer files."""
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in _COMPANIONS:
        for path in Path(pretrain).glob(pattern):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
    config.save_pretrained(directory)


def write_model(
    weights: Mapping[str, torch.Tensor],
    arguments: ModelArguments,
    config: PretrainedConfig,
    pretrain: str,
    model_files: str,
    output_dir: str,
    seed: int,
) -> None:
    """Writes a model directory. What `output_dir` held before is replaced when the new one is complete.

    Args:
        weights: by the names of the transformers model, or of PEFT's wrapper of it where `arguments` ask for adapters.
        arguments: precision, and which adapters there are.
        config: the model's configuration.
        pretrain: directory of the model that adapters are merged into.
        model_files: directory whose tokenizer files are copied.
        output_dir: where the model goes.
        seed: of the run: with adapters, embeddings that `resize_vocab` added are drawn again.

    Raises:
        FileError: `output_dir` is a file, or holds something that is no model.
    """
    target = Path(output_dir)
    if target.exists() and not target.is_dir():
        raise FileError("expected a directory, found a file", path=output_dir)
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
        raise FileError(
            "the directory holds something that is no model", path=output_dir, hint="name a new or empty directory"
        )
    dtype = DTYPES[arguments.dtype]
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    if arguments.has_adapters:
        model = _with_adapters(weights, arguments, pretrain, config, seed).merge_and_unload()
        weights = dict(model.state_dict())
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    for name in model.all_tied_weights_keys:
        weights.pop(name, None)  # it is the same weight under a second name
    model.config.dtype = dtype

    staging = target.with_name(f"{target.name}.staging-{uuid.uuid4().hex[:8]}")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers draws a progress bar of its own
            model.save_pretrained(staging, state_dict=dict(weights))
        save_model_files(model.config, model_files, staging)
        if target.is_dir():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def export_checkpoint(checkpoint: str, output_dir: str, *, adapters_only: bool = False) -> None:
    """Writes the model of a checkpoint as an ordinary model directory.

    Args:
        checkpoint: a directory `checkpoint-<step>` (or the cluster's directory in it).
        output_dir: where the model goes.
        adapters_only: writes PEFT's files of the adapters instead of a model that they are merged into.

    Raises:
        ConfigError: it is no complete checkpoint, or has no adapters where only those are asked for.
        FileError: `output_dir` holds something that is no model.
    """
    found = read_checkpoint(checkpoint)
    arguments = ModelArguments(**found.state.model_args)
    files = str(found.path / MODEL_DIRECTORY)
    weights = {name.removeprefix("model."): tensor for name, tensor in _read_weights(found).items()}
    if adapters_only:
        _write_adapters(weights, arguments, load_config(files), found, output_dir)
    else:
        write_model(weights, arguments, load_config(files), found.state.pretrain, files, output_dir, found.state.seed)


def _write_adapters(
    weights: Mapping[str, torch.Tensor],
    arguments: ModelArguments,
    config: PretrainedConfig,
    checkpoint: Checkpoint,
    output_dir: str,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, as PEFT and `adapter_name_or_path` read them."""
    if not arguments.has_adapters:
        raise ConfigError("this checkpoint has no adapters", path=str(checkpoint.path), code="checkpoint")
    target = Path(output_dir)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileError("expected a new or empty directory", path=output_dir)
    model = _with_adapters(weights, arguments, checkpoint.state.pretrain, config, checkpoint.state.seed)
    staging = target.with_name(f"{target.name}.staging-{uuid.uuid4().hex[:8]}")
    try:
        model.save_pretrained(staging)
        if target.is_dir():
            target.rmdir()
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read_weights(checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """The weights in a checkpoint by the names of `SFTModel`; of a model with adapters, what was trained."""
    if checkpoint.state.strategy_name == "fsdp2_train":
        from sft_fast.train.strategy.fsdp2 import read_weights

        return read_weights(checkpoint.path / CLUSTER_NAME)
    if checkpoint.state.tensor_parallel_size > 1:
        return read_universal_weights(checkpoint.path / CLUSTER_NAME)
    if checkpoint.state.zero_stage < 3:
        # One file has them all, in the precision of the run.
        path = checkpoint.path / CLUSTER_NAME / "mp_rank_00_model_states.pt"
        weights: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)[
            "module"
        ]
        return weights
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it shows every file
        gathered: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.path),
            tag=CLUSTER_NAME,
            exclude_frozen_parameters=ModelArguments(**checkpoint.state.model_args).has_adapters,
        )
    return gathered


def _with_adapters(
    weights: Mapping[str, torch.Tensor],
    arguments: ModelArguments,
    pretrain: str,
    config: PretrainedConfig,
    seed: int,
) -> Any:
    """The model of `pretrain` with the adapters among `weights`, in PEFT's wrapper."""
    model: Any = load_model(pretrain, replace(arguments, quantization=None), vocab_size=config.vocab_size, seed=seed)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained <= set(weights):
        raise TrainError(f"the checkpoint lacks adapters, such as {min(trained - set(weights))}", code="checkpoint")
    # What was quantised is left out: the adapters are merged into the model as it was.
    own = model.state_dict()
    whole = {
        name: tensor
        for name, tensor in weights.items()
        if name in own and tensor.is_floating_point() and tensor.shape == own[name].shape
    }
    model.load_state_dict(whole, strict=False)
    return model
