"""From the arrays of one micro-batch to the tensors that a step eats.

The rows of a micro-batch are laid end to end, and every segment that has no label is left out: attention never
crosses segments, so such a segment (padding above all) can change neither the loss nor any gradient. What remains is
one row of whole samples, and nothing is ever computed for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One row of samples, end to end. `T` tokens, `k` segments, `n` label tokens."""

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], from 0 in each segment
    cu_seqlens: torch.Tensor  # int32 [k + 1], from 0 to T
    segment_lengths: tuple[int, ...]  # k
    max_seqlen: int
    label_positions: torch.Tensor  # int64 [n]: places in the row whose next token is trained on
    targets: torch.Tensor  # int64 [n]: those next tokens
    # Of a slice (see `ulysses.py`), its first position in the row. Segments are those of the whole row.
    first_token: int = 0

    @property
    def num_label_tokens(self) -> int:
        """The `n` of the fields."""
        return int(self.targets.shape[0])

    def arguments(self) -> dict[str, Any]:
        """The fields, as keyword arguments of `SFTModel.forward`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`; from pinned memory the copies overlap with what the device is doing."""
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> MicroBatch:
        """The same batch in page-locked memory, from which a GPU copies without a pause."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        return MicroBatch(**(values | {name: function(v) for name, v in values.items() if torch.is_tensor(v)}))


def make_micro_batch(arrays: Mapping[str, Any]) -> MicroBatch:
    """One micro-batch from the arrays that a step stream fills.

    Args:
        arrays: `input_ids`, `labels` (already shifted: the target of each position, -100 for none) and `position_ids`,
            int64 `[rows, width]`; `cu_seqlens` int32 over the `rows * width` positions.
    """
    input_ids = np.asarray(arrays["input_ids"], dtype=np.int64).reshape(-1)
    labels = np.asarray(arrays["labels"], dtype=np.int64).reshape(-1)
    position_ids = np.asarray(arrays["position_ids"], dtype=np.int64).reshape(-1)
    boundaries = np.asarray(arrays["cu_seqlens"], dtype=np.int64)

    lengths = np.diff(boundaries)
    labelled = np.concatenate([[0], np.cumsum(labels != IGNORED_LABEL)])
    keep = labelled[boundaries[1:]] > labelled[boundaries[:-1]]
    if not keep.any():
        # No label at all (the empty micro-batch of a last step): one token, so that this rank still takes part in
        # whatever its model does together with the other ranks.
        input_ids, labels, position_ids = input_ids[:1], np.full(1, IGNORED_LABEL), np.zeros(1, dtype=np.int64)
        lengths = np.ones(1, dtype=np.int64)
    elif not keep.all():
        kept_tokens = np.repeat(keep, lengths)
        input_ids, labels, position_ids = input_ids[kept_tokens], labels[kept_tokens], position_ids[kept_tokens]
        lengths = lengths[keep]

    label_positions = np.flatnonzero(labels != IGNORED_LABEL)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).unsqueeze(0),
        position_ids=torch.from_numpy(position_ids).unsqueeze(0),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
        segment_lengths=tuple(int(length) for length in lengths),
        max_seqlen=int(lengths.max()),
        label_positions=torch.from_numpy(label_positions),
        targets=torch.from_numpy(labels[label_positions]),
    )
