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
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from sft_fast.errors import ConfigError, TrainError
from sft_fast.train.ulysses import all_heads, all_tokens

NAME = "sft_fast_per_sample"

# What a layer may pass that changes the scores in ways not written here. None of them may be dropped in silence.
_REFUSED_ARGUMENTS = ("s_aux", "position_bias", "head_mask")


def register(implementation: str | None = None, *, adapt: Callable[[Any], Any] | None = None) -> None:
    """Makes `attn_implementation=NAME` valid for models of transformers. May be called again.

    Args:
        implementation: None or `auto` for the fastest kernel; `sdpa`, `eager` or `fa2` (`flash_attention_2`) for it.
        adapt: makes another function of it, for layers that do not call it as it is.

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
    function: Any = functools.partial(per_sample_attention, implementation=implementation or "auto")
    AttentionInterface.register(NAME, function if adapt is None else adapt(function))


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
    sequence_group: Any = None,
    implementation: str = "auto",
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each segment of one row of tokens; called by the layers of a model.

    Args:
        module: the layer that asks; only its class name is read, for errors.
        query: float `[1, num_heads, T, head_dim]`.
        key: float `[1, num_key_heads, T, head_dim]`, with as many heads or fewer (grouped queries).
        value: as `key`.
        attention_mask: None: the segments say it all.
        dropout: probability that a weight is left out.
        scaling: factor of the scores; None is `head_dim ** -0.5`.
        sliding_window: a token sees at most this many tokens, itself included; None for all before it.
        softcap: scores become `softcap * tanh(scores / softcap)`; None for none.
        cu_seqlens: int32 `[num_segments + 1]` on the device of `query`, from 0 to T.
        max_seqlen: tokens of the longest segment.
        segment_lengths: the differences of `cu_seqlens` as plain integers, so that no device is waited for.
        sequence_group: ranks that hold a slice of the row each, in order; None where this rank has all of it. `T` is
            then the tokens of this rank, and the segments are those of the whole row.
        implementation: see `register`.
        **arguments: what else the model passes along.

    Returns:
        float `[1, T, num_heads, head_dim]`, and None for the weights, which are not kept.

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
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = _Rule(dropout, scaling, sliding_window, softcap or None)
    if sequence_group is None:
        return _attend_row(query, key, value, cu_seqlens, max_seqlen, segment_lengths, rule, implementation), None
    num_heads = query.shape[1]
    query, key, value = (all_tokens(tensor, sequence_group, num_heads) for tensor in (query, key, value))
    output = _attend_row(query, key, value, cu_seqlens, max_seqlen, segment_lengths, rule, implementation)
    return all_heads(output.transpose(1, 2), sequence_group).transpose(1, 2), None


def _attend_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    segment_lengths: Sequence[int],
    rule: _Rule,
    implementation: str,
) -> torch.Tensor:
    """One row of whole segments through the kernel for it; see `per_sample_attention`."""
    kernel = _varlen_kernel(query, rule, implementation)
    if kernel is not None:
        # The kernels want tokens before heads; a view, since that is the order that the projections made.
        tokens = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
        return kernel(*tokens, cu_seqlens, max_seqlen, rule).unsqueeze(0)

    attend = _attend_in_steps if rule.softcap or implementation == "eager" else _attend
    # `split`, not slices: its backward is one concatenation, where each slice would write a whole gradient of zeros.
    lengths = list(segment_lengths)
    segments = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v, rule).transpose(1, 2) for q, k, v in segments], dim=1)


@dataclass(frozen=True)
class _Rule:
    """How scores become weights; the meanings are those of `per_sample_attention`."""

    dropout: float
    scaling: float
    sliding_window: int | None
    softcap: float | None

    @property
    def window(self) -> tuple[int, int]:
        """As the kernels say it: tokens seen to the left and to the right besides the token itself; -1 for all."""
        return (-1, 0) if self.sliding_window is None else (self.sliding_window - 1, 0)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """One segment through torch's kernel; float `[1, num_heads, n, head_dim]` in and out."""
    num_tokens = query.shape[2]
    needs_mask = rule.sliding_window is not None and num_tokens > rule.sliding_window
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_visible(num_tokens, rule.sliding_window, query.device) if needs_mask else None,
        dropout_p=rule.dropout,
        is_causal=not needs_mask,
        scale=rule.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_in_steps(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: _Rule) -> torch.Tensor:
    """The same in plain steps, for what torch's kernel does not know. Memory is quadratic in the segment."""
    num_tokens, num_groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(num_groups, dim=1), value.repeat_interleave(num_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    hidden = ~_visible(num_tokens, rule.sliding_window, query.device)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(functional.dropout(weights, p=rule.dropout), value)


def _visible(num_tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which token sees which, bool `[num_tokens, num_tokens]`: i sees j when `i - window < j <= i`."""
    position = torch.arange(num_tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (num_tokens if window is None else window))


# A kernel over all segments at once: (query, key, value, cu_seqlens, max_seqlen, rule), tensors of
# [T, heads, head_dim] in and out.
_Kernel = Callable[..., torch.Tensor]


def _varlen_kernel(query: torch.Tensor, rule: _Rule, implementation: str) -> _Kernel | None:
    """The kernel that takes all segments in one call here, or None where each segment goes alone."""
    if implementation in ("sdpa", "eager") or query.device.type != "cuda":
        return None
    if query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] > 256:
        return None
    if (flash := _flash_attention()) is not None:
        return flash
    return _torch_varlen() if rule.dropout == 0.0 and rule.softcap is None else None


def kernel_name(query: torch.Tensor) -> str:
    """Which kernel a layer without window, dropout and softcap gets for such a query, for reports."""
    kernel = _varlen_kernel(query, _Rule(0.0, 1.0, None, None), "auto")
    if kernel is None:
        return "torch's kernel, sample by sample"
    return "FlashAttention" if kernel is _flash_attention() else "torch's varlen kernel"


@functools.cache
def _flash_attention() -> _Kernel | None:
    """FlashAttention-2 where it is installed: the one kernel with dropout and softcap."""
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
        rule: _Rule,
    ) -> torch.Tensor:
        output: torch.Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            dropout_p=rule.dropout,
            softmax_scale=rule.scaling,
            causal=True,
            window_size=rule.window,
            softcap=rule.softcap or 0.0,
        )
        return output

    return kernel


@functools.cache
def _torch_varlen() -> _Kernel | None:
    """The kernel that comes with torch, in the form that says causality by its window."""
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
        rule: _Rule,
    ) -> torch.Tensor:
        output = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            scale=rule.scaling,
            window_size=rule.window,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(output, torch.Tensor)
        return output

    return kernel
