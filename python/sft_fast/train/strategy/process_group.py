"""What a rank has to say of itself before it joins the others."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from sft_fast.train.strategy.base import RankInfo


def announce(rank: RankInfo) -> None:
    """Sets the environment variables that torch and DeepSpeed read when the process group is made."""
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.world_size),
        # A GPU rank sees its own GPU only, as number 0.
        LOCAL_RANK="0" if rank.device == "cuda" else str(rank.local_rank),
        LOCAL_SIZE=str(rank.local_world_size),
        LOCAL_WORLD_SIZE=str(rank.local_world_size),
        MASTER_ADDR=rank.master_address,
        MASTER_PORT=str(rank.master_port),
    )


def backend_of(rank: RankInfo) -> str:
    """The library that carries messages between ranks."""
    return "nccl" if rank.device == "cuda" else "gloo"


def collective_timeout(hang_timeout: float) -> timedelta:
    """How long a rank waits for others: longer than the heartbeat, which finds a hung rank and knows which it is."""
    return timedelta(seconds=max(1800.0, 20 * hang_timeout))


def make_sequence_group(tensor_parallel_size: int, sequence_parallel_size: int) -> Any:
    """The ranks that hold the slices of the same rows as this one, in order; None where rows are whole.

    Called by all ranks of the run together. Of neighbouring ranks, first those belong together that share weights
    (tensor parallel), then those that share rows.
    """
    if sequence_parallel_size == 1:
        return None
    import torch.distributed as dist

    num_ranks = tensor_parallel_size * sequence_parallel_size
    groups = [
        list(range(first + part, first + num_ranks, tensor_parallel_size))
        for first in range(0, dist.get_world_size(), num_ranks)
        for part in range(tensor_parallel_size)
    ]
    return dist.new_subgroups_by_enumeration(groups)[0]
