"""Attention that never crosses the samples of a pack, as one function that every model of transformers can call.

`register()` makes it known to transformers under `NAME`. A model loaded with `attn_implementation=NAME` calls it in
each layer; where the samples begin and end arrives as keyword arguments of the model's forward (`cu_seqlens`,
`max_seqlen`, `segment_lengths`), so no dense mask is ever built. The batch is one row: all samples, end to end.

Which kernel runs is decided by the device and by what the layer asks for: FlashAttention or torch's own varlen kernel
on a GPU, `scaled_dot_product_attention` for each sample elsewhere. All of them give the same values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from sft_fast.errors import ConfigError, TrainError

NAME = "sft_fast_per_sample"

# What a layer may pass that changes the scores in ways not written here. None of them may be dropped in silence.
_REFUSED_ARGUMENTS = ("s_aux", "position_bias", "head_mask")


def register(implementation: str | None = None) -> None:
    """Makes `attn_implementation=NAME` valid for models of transformers. May be called again.

    Args:
        implementation: `None` or `auto` for the fastest kernel; `sdpa`, `eager` or `fa2` (`flash_attention_2`) for that.

    Raises:
        ConfigError: FlashAttention is asked for and not there.
    """
    if implementation in ("fa2", "flash_attention_2"):
        implementation = "fa2"
        if _flash_attention() is None or not torch.cuda.is_available():
            raise ConfigError(
                "FlashAttention is not installed, or there is no GPU",
                location="sft_train.model_args.attn_implementation",
                hint="pip install flash-attn, or leave it to `auto`",
            )
    AttentionInterface.register(NAME, functools.partial(per_sample_attention, implementation=implementation or "auto"))


def per_sample_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    segment_lengths: Sequence[int] | None = None,
    implementation: str = "auto",
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment of one row of tokens.

    Args:
        module: the layer that asks; only its class name is read, for errors.
        query: float `[1, num_heads, T, head_dim]`; `key` and `value` may have fewer heads (grouped queries).
        sliding_window: a token sees at most this many tokens, itself included; None for all before it.
        softcap: scores become `softcap * tanh(scores / softcap)`; None for none.
        cu_seqlens: int32 `[num_segments + 1]` on the device of `query`, from 0 to T.
        max_seqlen: tokens of the longest segment.
        segment_lengths: the differences of `cu_seqlens` as plain integers, so that no device is waited for.
        implementation: see `register`.

    Returns:
        float `[1, T, num_heads, head_dim]` and None (there are no attention weights to show).

    Raises:
        TrainError: the batch came without segments or with a mask.
        ConfigError: the layer asks for something that is not supported.
    """
    if cu_seqlens is None or segment_lengths is None or max_seqlen is None or query.shape[0] != 1:
        raise TrainError("per-sample attention needs one row of tokens with cu_seqlens, max_seqlen and segment_lengths")
    if attention_mask is not None:
        raise TrainError("per-sample attention takes no attention mask: the segments say it all")
    for name in _REFUSED_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ConfigError(
                f"{type(module).__name__} uses `{name}`, which per-sample attention does not support",
                code="unsupported_model",
                hint="choose another model; Llama, Qwen, Mistral, Gemma, Phi and GPT-2 families work",
            )

    kernel = _varlen_kernel(query, dropout, softcap, implementation)
    if kernel is not None:
        output = kernel(query, key, value, cu_seqlens, max_seqlen, dropout, scaling, sliding_window, softcap)
        return output.unsqueeze(0), None

    attend = _attend_in_steps if softcap or implementation == "eager" else _attend
    # `split`, not slices: its backward is one concatenation, where each slice would write a whole gradient of zeros.
    lengths = list(segment_lengths)
    segments = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [attend(q, k, v, dropout, scaling, sliding_window, softcap).transpose(1, 2) for q, k, v in segments]
    return torch.cat(outputs, dim=1), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One segment through torch's kernel; float `[1, num_heads, n, head_dim]` in and out."""
    num_tokens = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if sliding_window is None or num_tokens <= sliding_window:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
        )
    mask = _band(num_tokens, sliding_window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )


def _attend_in_steps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One segment in plain steps, for what torch's kernel does not know. Memory is quadratic in the segment."""
    num_tokens, num_groups = query.shape[2], query.shape[1] // key.shape[1]
    key = key.repeat_interleave(num_groups, dim=1)
    value = value.repeat_interleave(num_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    mask = _band(num_tokens, sliding_window or num_tokens, query.device)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(F.dropout(weights, p=dropout), value)


def _band(num_tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """bool `[num_tokens, num_tokens]`: token i sees token j when `i - window < j <= i`."""
    position = torch.arange(num_tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


# A kernel over all segments at once: (query, key, value, cu_seqlens, max_seqlen, dropout, scaling, sliding_window,
# softcap) -> float [T, num_heads, head_dim].
_Kernel = Callable[..., torch.Tensor]


def _varlen_kernel(
    query: torch.Tensor, dropout: float, softcap: float | None, implementation: str
) -> _Kernel | None:
    """The kernel that takes all segments in one call here, or None where each segment goes alone."""
    if implementation in ("sdpa", "eager") or query.device.type != "cuda":
        return None
    if query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] > 256:
        return None
    if (flash := _flash_attention()) is not None:
        return flash
    return _torch_varlen() if dropout == 0.0 and not softcap else None


def _window(sliding_window: int | None) -> tuple[int, int]:
    """The kernels' way to say it: tokens seen to the left and to the right, besides the token itself; -1: all."""
    return (-1, 0) if sliding_window is None else (sliding_window - 1, 0)


@functools.cache
def _flash_attention() -> _Kernel | None:
    """FlashAttention-2 when it is installed: the one kernel with dropout and softcap."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        dropout: float,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        output: torch.Tensor = flash_attn_varlen_func(
            *_token_major(query, key, value),
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            dropout_p=dropout,
            softmax_scale=scaling,
            causal=True,
            window_size=_window(sliding_window),
            softcap=softcap or 0.0,
        )
        return output

    return kernel


@functools.cache
def _torch_varlen() -> _Kernel | None:
    """torch's own kernel (nothing to install), in the form that says causality by its window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        return None

    def kernel(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        dropout: float,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        output = varlen_attn(
            *_token_major(query, key, value),
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            scale=scaling,
            window_size=_window(sliding_window),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(output, torch.Tensor)
        return output

    return kernel


def _token_major(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """`[1, heads, T, head_dim]` to `[T, heads, head_dim]`; a view, since transformers made it from that order."""
    return [tensor.squeeze(0).transpose(0, 1) for tensor in tensors]
