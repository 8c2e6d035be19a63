"""The tokenizer and the model of a run: loaded from a directory, made ready for training, and checked.

`SFTModel` is what a strategy trains: it takes a micro-batch and gives back the loss, so that no logits leave it.
`check_model` runs it once on a few tokens against the model's own forward, because a model that mixes the samples of
a pack, or that changes its logits after the head, would train on something else without a sign.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sft_fast.errors import ConfigError, TokenizerError, TrainError
from sft_fast.train import attention
from sft_fast.train.batch import IGNORED_LABEL, make_micro_batch
from sft_fast.train.compiled import between_compiled, compile_layers, running_as_written
from sft_fast.train.loss import attach_loss, head_transform
from sft_fast.train.memory import checkpoint_layers, offload_activations
from sft_fast.train.quantization import quantization_config, settle_quantised
from sft_fast.train.ulysses import slice_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Layers that keep a state along the row carry it from one sample of a pack into the next.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class SFTModel(nn.Module):
    """A causal language model whose forward is the training loss of one micro-batch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        label_smoothing: float = 0.0,
        neftune_alpha: float = 0.0,
        offloads_activations: bool = False,
    ) -> None:
        """Wraps `model` (a transformers model, or the same inside PEFT's wrapper) and teaches its head the loss.

        Args:
            model: the model.
            label_smoothing: of the loss in training; validation is without.
            neftune_alpha: how much noise the embeddings get in training; see `neftune_noise`.
            offloads_activations: whether what the layers keep for the backward pass waits in CPU memory.
        """
        super().__init__()
        self.model = model
        self._label_smoothing, self._neftune_alpha = label_smoothing, neftune_alpha
        self._offloads_activations = offloads_activations
        self.sequence_group: Any = None  # ranks that hold a slice of each row; set by a strategy that slices them
        hf = self.hf_model
        scale, softcap = head_transform(hf.config)
        attach_loss(output_layer(hf), scale=scale, softcap=softcap)

    @property
    def hf_model(self) -> Any:
        """The transformers model itself, without PEFT's wrapper."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        segment_lengths: tuple[int, ...],
        max_seqlen: int,
        label_positions: torch.Tensor,
        targets: torch.Tensor,
        first_token: int = 0,
        factor: float = 1.0,
    ) -> torch.Tensor:
        """float32 scalar: `factor` times the summed cross-entropy of the label tokens (see `MicroBatch`)."""
        hf = self.hf_model
        tokens = {"input_ids": input_ids}
        if self.training and self._neftune_alpha:
            embedded = hf.get_input_embeddings()(input_ids)
            noise = neftune_noise(embedded, segment_lengths, self._neftune_alpha, first_token)
            tokens = {"inputs_embeds": embedded + noise}
        # Not the head: its gradients are taken in its forward pass, and wanted at once.
        with offload_activations() if self._offloads_activations else contextlib.nullcontext():
            hidden = hf.base_model(
                **tokens,
                position_ids=position_ids,
                attention_mask=None,
                use_cache=False,
                cu_seqlens=cu_seqlens,
                segment_lengths=segment_lengths,
                max_seqlen=max_seqlen,
                **({} if self.sequence_group is None else {"sequence_group": self.sequence_group}),
            )[0]
        # Only positions with a label go through the head, which costs as much as several layers. An empty selection
        # still makes a graph, so that a rank without labels takes part in the backward pass.
        selected = hidden[0].index_select(0, label_positions)
        smoothing = self._label_smoothing if self.training else 0.0
        loss: torch.Tensor = output_layer(hf)(selected, targets=targets, factor=factor, label_smoothing=smoothing)
        return loss


def neftune_noise(
    embedded: torch.Tensor, segment_lengths: tuple[int, ...], alpha: float, first_token: int = 0
) -> torch.Tensor:
    """Noise for the embeddings of one row of samples: uniform within `alpha / sqrt(length * hidden_size)` of zero.

    The length is that of each token's own sample, as if it were alone (Jain et al., arXiv 2310.05914).

    Args:
        embedded: float `[1, T, hidden_size]`, of a row or of a slice of it.
        segment_lengths: tokens of each sample of the row.
        alpha: strength.
        first_token: where in the row the slice begins.
    """
    lengths = torch.tensor(segment_lengths, dtype=torch.float32)
    reach = (alpha / (lengths * embedded.shape[-1]).sqrt()).repeat_interleave(torch.tensor(segment_lengths))
    reach = reach[first_token : first_token + embedded.shape[1]]
    noise = torch.zeros_like(embedded).uniform_(-1, 1)
    return noise * reach.to(device=embedded.device, dtype=embedded.dtype)[None, :, None]


def output_layer(hf: Any) -> nn.Linear:
    """The output layer, as a plain linear layer.

    Raises:
        ConfigError: there is none, or an adapter sits on it.
    """
    head = hf.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT trains a full copy of it
        head = head.modules_to_save[head.active_adapter]
    if not isinstance(head, nn.Linear) or hasattr(head, "base_layer"):
        raise ConfigError(
            f"the output layer of {type(hf).__name__} is {type(head).__name__}, expected a plain linear layer",
            code="unsupported_model",
            hint="leave lm_head out of lora_target (additional_target trains it in full)",
        )
    return head


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model directory.

    Raises:
        ConfigError: no such directory.
        TokenizerError: the directory has no tokenizer, or a broken one.
    """
    _check_directory(path)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=Path(path).is_dir())
    except Exception as error:
        raise TokenizerError(
            f"cannot load a tokenizer: {_first_line(error)}",
            path=str(path),
            hint="the model directory must hold tokenizer.json (and tokenizer_config.json)",
        ) from error


def load_config(path: str, overrides: dict[str, Any] | None = None) -> Any:
    """The transformers configuration of a model directory, with `overrides` laid over it.

    Raises:
        ConfigError: no such directory, no readable config.json, or a model kind whose samples cannot be kept apart.
    """
    _check_directory(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=Path(path).is_dir(), **(overrides or {}))
    except Exception as error:
        raise ConfigError(
            f"cannot read the model's configuration: {_first_line(error)}", path=str(path), code="model"
        ) from error
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if unknown:
        raise ConfigError(
            f"layers of type {', '.join(unknown)} cannot keep the samples of a pack apart",
            path=str(path),
            code="unsupported_model",
            hint="choose a model whose layers are full or sliding attention",
        )
    return config


def load_model(path: str, model_args: Any, *, seed: int = 0, vocab_size: int = 0) -> nn.Module:
    """The model of a directory, ready to be wrapped by `SFTModel`: dtype, attention, adapters, checkpointing.

    Args:
        path: the model directory.
        model_args: the `model_args` part of the configuration.
        seed: decides the initial values of adapters and of new embeddings.
        vocab_size: ids that the model must have embeddings for; with `resize_vocab` it is given what it lacks.

    Raises:
        ConfigError: no such directory, no weights, an attention kernel that this machine lacks, or adapter targets
            that the model lacks.
    """
    config = load_config(path, model_args.model_config_kwargs)
    attention.register(model_args.attn_implementation, adapt=between_compiled if model_args.compile else None)
    transformers_logging.disable_progress_bar()
    quantized = quantization_config(model_args.quantization, DTYPES[model_args.dtype])
    torch.manual_seed(seed)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[model_args.dtype],
            attn_implementation=attention.NAME,
            local_files_only=Path(path).is_dir(),
            **({} if quantized is None else {"quantization_config": quantized}),
        )
    except Exception as error:
        raise ConfigError(f"cannot load the model: {_first_line(error)}", path=str(path), code="model") from error
    if quantized is not None:
        settle_quantised(model)
    if model_args.resize_vocab and vocab_size > int(model.get_input_embeddings().num_embeddings):
        # New rows are drawn around the mean of the others.
        model.resize_token_embeddings(vocab_size)
    if model_args.has_adapters:
        model = _add_lora(model, model_args)
    _freeze(model, model_args.freeze_module_prefix or [])
    checkpoint_layers(model, model_args.kept_activations)
    if model_args.compile:
        compile_layers(model.get_base_model() if model_args.has_adapters else model)
    loaded: nn.Module = model
    return loaded


def _add_lora(model: nn.Module, model_args: Any) -> nn.Module:
    """Adapters: those of the directory `adapter_name_or_path`, or new ones on the layers that `lora_target` names.

    They have the dtype of the model: the optimizer keeps the float32 masters.
    """
    try:
        from peft import LoraConfig, PeftModel, TaskType, get_peft_model
    except ImportError as error:
        raise ConfigError(
            "LoRA needs the package peft, which is not installed",
            location="sft_train.model_args.lora_target",
            hint="pip install peft",
        ) from error
    path = model_args.adapter_name_or_path
    if path is not None:
        try:
            loaded: nn.Module = PeftModel.from_pretrained(
                model, path, is_trainable=True, autocast_adapter_dtype=False, local_files_only=True
            )
        except Exception as error:
            raise ConfigError(
                f"cannot load the adapters: {_first_line(error)}",
                path=path,
                code="model",
                location="sft_train.model_args.adapter_name_or_path",
                hint="it is a directory with adapter_config.json and adapter_model.safetensors, made for this model",
            ) from error
        return loaded
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=model_args.lora_target,
        r=model_args.lora_rank,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        modules_to_save=model_args.additional_target,
    )
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise ConfigError(_first_line(error), location="sft_train.model_args.lora_target") from error


def _freeze(model: nn.Module, prefixes: list[str]) -> None:
    """Leaves the parameters out of training whose name begins with one of `prefixes`."""
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(prefixes)):
            parameter.requires_grad_(False)


def check_model(model: SFTModel, device: torch.device) -> None:
    """Compares two packed samples with the model's own forward on each alone; a few tokens, two short passes.

    Raises:
        ConfigError: the values differ: this model cannot be trained right, so it is not trained at all.
    """
    hf = model.hf_model
    vocab_size = int(hf.get_input_embeddings().num_embeddings)
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 7)
    ids = torch.randint(vocab_size, (1, sum(lengths)), generator=generator)
    labels = torch.cat([ids[0, 1:], ids.new_full((1,), IGNORED_LABEL)])
    labels[[sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]] = IGNORED_LABEL
    batch = make_micro_batch(
        {
            "input_ids": ids.numpy(),
            "labels": labels.numpy(),
            "position_ids": torch.cat([torch.arange(n) for n in lengths]).numpy(),
            "cu_seqlens": [0, lengths[0], sum(lengths)],
        }
    )
    group = model.sequence_group
    if group is not None:
        batch = slice_of(batch, dist.get_rank(group), dist.get_world_size(group))

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), running_as_written(hf):
            packed = model(**batch.to(device).arguments())
            if group is not None:
                dist.all_reduce(packed, group=group)
            with plain_attention(hf):
                alone = torch.zeros((), device=device)
                for sample in torch.split(ids.to(device), list(lengths), dim=1):
                    logits = hf(input_ids=sample, use_cache=False).logits[0, :-1].float()
                    alone += nn.functional.cross_entropy(logits, sample[0, 1:], reduction="sum")
    except (TypeError, TrainError) as error:
        raise _unsupported(hf, f"its attention cannot be replaced ({_first_line(error)})") from error
    finally:
        model.train(was_training)
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    difference = abs(packed.item() - alone.item()) / max(1.0, abs(alone.item()))
    if not difference <= tolerance:
        raise _unsupported(
            hf, f"the loss of packed samples is {packed.item():.4f}, but {alone.item():.4f} when each is alone"
        )


def _unsupported(hf: Any, reason: str) -> ConfigError:
    return ConfigError(
        f"{type(hf).__name__} cannot be trained on packed samples: {reason}",
        code="unsupported_model",
        hint="Llama, Qwen, Mistral, Gemma, Phi and GPT-2 families work",
    )


@contextlib.contextmanager
def plain_attention(hf: Any) -> Iterator[None]:
    """The model with transformers' plain attention, which every model has, for the time of a `with` block."""
    hf.set_attn_implementation("eager")
    try:
        with running_as_written(hf):
            yield
    finally:
        hf.set_attn_implementation(attention.NAME)


def _check_directory(path: str) -> None:
    """A path that looks like one must be a directory with a config.json; other names are left to the model hub."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        file = directory / "config.json"
        if not file.is_file():
            raise ConfigError("there is no config.json in the model directory", path=str(path), code="model")
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise ConfigError(f"config.json is not JSON: {error}", path=str(file), code="model") from error
    elif str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1:
        raise ConfigError("there is no such model directory", path=str(path), location="pretrain", code="model")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
