"""From arrays to micro-batches."""

import itertools

import numpy as np
import pytest
import torch

from sft_fast.train.batch import IGNORED_LABEL, make_micro_batch
from sft_fast.train.plan import validation_stream
from tests.train_helpers import Workspace, dataset_of, samples_of, train_stream


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A tiny model and records."""
    return Workspace.create(tmp_path_factory.mktemp("batch"))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows_per_micro_batch", [1, 3, 64])
def test_micro_batches_hold_each_sample_once_and_no_padding(
    workspace: Workspace, packed: bool, rows_per_micro_batch: int
) -> None:
    """Cut at its segments, what the device gets is the samples of the step: each once, whole, with its own labels."""
    config = workspace.config(packed=packed, rows=8, micro_batches=1)
    stream = train_stream(config, dataset_of(config))
    for step in range(stream.num_steps):
        plan = stream.step(step, rows_per_micro_batch=rows_per_micro_batch)
        found = []
        for index in range(len(plan.micro_batches)):
            batch = make_micro_batch(stream.batch(plan, index))
            labels = torch.full_like(batch.input_ids[0], IGNORED_LABEL)
            labels[batch.label_positions] = batch.targets
            lengths = list(batch.segment_lengths)
            for ids, positions, targets in zip(
                batch.input_ids[0].split(lengths),
                batch.position_ids[0].split(lengths),
                labels.split(lengths),
                strict=True,
            ):
                assert positions.tolist() == list(range(len(ids)))
                found.append((ids.tolist(), targets.tolist()))
            assert batch.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
            assert batch.max_seqlen == max(lengths)

        expected = [(ids[0].tolist(), [*targets.tolist(), IGNORED_LABEL]) for ids, targets in samples_of(stream, step)]
        assert sorted(found) == sorted(expected)
        assert sum(len(ids) for ids, _ in found) == plan.num_tokens


def test_a_micro_batch_without_labels_is_one_token() -> None:
    """A rank that has nothing to do in the last step still has something to compute, with no loss."""
    arrays = {
        "input_ids": np.array([[7, 7, 7]]),
        "labels": np.full((1, 3), IGNORED_LABEL),
        "position_ids": np.arange(3)[None],
        "cu_seqlens": np.array([0, 3], np.int32),
    }
    batch = make_micro_batch(arrays)

    assert batch.input_ids.tolist() == [[7]]
    assert batch.segment_lengths == (1,)
    assert batch.num_label_tokens == 0


def test_ranks_share_the_rows_of_a_step(workspace: Workspace) -> None:
    """Two ranks together have the rows of one rank alone, and as many micro-batches each."""
    config = workspace.config(rows=4, micro_batches=2)
    stream = train_stream(config, dataset_of(config))
    for step in range(stream.num_steps):
        alone = stream.step(step, rows_per_micro_batch=2).micro_batches
        ranks = [stream.step(step, rank=r, world_size=2, rows_per_micro_batch=2).micro_batches for r in range(2)]

        assert sorted(itertools.chain(*alone)) == sorted(itertools.chain(*itertools.chain(*ranks)))
        assert len(ranks[0]) == len(ranks[1])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_validation_has_every_sample_once(workspace: Workspace, world_size: int, packed: bool) -> None:
    """Whatever the ranks, their validation batches together hold each sample once; each rank has as many batches."""
    config = workspace.config(packed=packed, ranks=world_size, validation=True)
    stream = validation_stream(config, dataset_of(config))
    found, num_batches = [], set()
    for rank in range(world_size):
        batches = [
            make_micro_batch(stream.batch(plan, index))
            for plan in (
                stream.step(
                    step, rank=rank, world_size=world_size, rows_per_micro_batch=config.sft_train.infer_batch_size
                )
                for step in range(stream.num_steps)
            )
            for index in range(len(plan.micro_batches))
        ]
        num_batches.add(len(batches))
        for batch in batches:
            samples = batch.input_ids[0].split(list(batch.segment_lengths))
            found += [ids.tolist() for ids in samples if batch.num_label_tokens]

    assert sorted(found) == sorted(sample.input_ids.tolist() for sample in stream.dataset)
    assert len(num_batches) == 1
    assert stream.num_steps == stream.num_steps_per_epoch
