"""What a rank has to say of itself before it joins the others."""

from __future__ import annotations

import os
from datetime import timedelta

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
