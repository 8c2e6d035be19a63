"""Sequence parallelism: attention over a row whose tokens are spread over a group of ranks.

Each rank holds a slice of the positions of every row. Only attention needs the others: before it, an exchange gives
each rank all tokens of some heads, and after it, another gives it back all heads of its own tokens. So attention
itself, and what it knows of samples, stays as it is (DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from sft_fast.train.batch import MicroBatch


def slice_of(batch: MicroBatch, part: int, num_parts: int) -> MicroBatch:
    """The part of a micro-batch that one of `num_parts` ranks computes: a slice of the positions of its row.

    The row is filled up to a multiple of `num_parts` with a segment of its own, which has no labels. The segments stay
    those of the whole row, since attention is over all of it.
    """
    if num_parts == 1:
        return batch
    num_tokens = batch.input_ids.shape[1]
    num_missing = -num_tokens % num_parts
    input_ids, position_ids, cu_seqlens = batch.input_ids, batch.position_ids, batch.cu_seqlens
    segment_lengths = batch.segment_lengths
    if num_missing:
        input_ids = torch.nn.functional.pad(input_ids, (0, num_missing))
        position_ids = torch.cat([position_ids, torch.arange(num_missing)[None]], dim=1)
        cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + num_missing])
        segment_lengths = (*segment_lengths, num_missing)
    size = input_ids.shape[1] // num_parts
    first = part * size
    is_mine = (batch.label_positions >= first) & (batch.label_positions < first + size)
    return replace(
        batch,
        input_ids=input_ids[:, first : first + size],
        position_ids=position_ids[:, first : first + size],
        cu_seqlens=cu_seqlens,
        segment_lengths=segment_lengths,
        max_seqlen=max(segment_lengths),
        label_positions=batch.label_positions[is_mine] - first,
        targets=batch.targets[is_mine],
        first_token=first,
    )


def all_tokens(tensor: torch.Tensor, group: Any, num_heads: int) -> torch.Tensor:
    """This rank's heads for all tokens of the row.

    Args:
        tensor: float `[1, heads, S, head_dim]`, all heads of this rank's tokens. Where there are too few heads of keys
            and values for all ranks, each is repeated as often as need be.
        group: the ranks that share the row.
        num_heads: heads of the queries, a multiple of the number of ranks.

    Returns:
        float `[1, heads / ranks, S * ranks, head_dim]`; with repeated heads, more of them.
    """
    num_ranks = dist.get_world_size(group)
    num_copies = num_ranks // math.gcd(tensor.shape[1], num_ranks)
    if num_copies > 1:
        if num_heads % (tensor.shape[1] * num_copies):
            raise ValueError(f"{num_heads} heads cannot be spread over {num_ranks} ranks")
        tensor = tensor.repeat_interleave(num_copies, dim=1)
    exchanged: torch.Tensor = _Exchange.apply(tensor, group, True)
    return exchanged


def all_heads(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The way back: float `[1, heads / ranks, T, head_dim]` to `[1, heads, T / ranks, head_dim]`."""
    exchanged: torch.Tensor = _Exchange.apply(tensor, group, False)
    return exchanged


class _Exchange(torch.autograd.Function):
    """One exchange; the gradient takes the other way."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any, to_tokens: bool) -> torch.Tensor:
        ctx.group, ctx.to_tokens = group, to_tokens
        return _exchange(tensor, group, to_tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _exchange(grad_outputs[0], ctx.group, not ctx.to_tokens), None, None


def _exchange(tensor: torch.Tensor, group: Any, to_tokens: bool) -> torch.Tensor:
    """Gives heads for tokens, or tokens for heads: `[1, heads, tokens, head_dim]` in and out."""
    num_ranks = dist.get_world_size(group)
    _, num_heads, num_tokens, head_dim = tensor.shape
    if to_tokens:
        sent = tensor.reshape(num_ranks, num_heads // num_ranks, num_tokens, head_dim).contiguous()
    else:
        sent = tensor.reshape(num_heads, num_ranks, num_tokens // num_ranks, head_dim).transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    if to_tokens:
        received = received.transpose(0, 1)
        return received.reshape(1, num_heads // num_ranks, num_tokens * num_ranks, head_dim)
    return received.reshape(1, num_heads * num_ranks, num_tokens // num_ranks, head_dim)
