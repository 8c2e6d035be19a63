"""Packs, batches and the stream of steps: against slow, obvious loops, for random datasets."""

import itertools
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_fast import Dataset, Packing
from sft_fast.errors import ConfigError, InputError, SftFastError
from sft_fast.stream import StepStream
from tests.data_helpers import PlainSample, plain_samples, write_dataset

CAPACITY = 32
NUM_SAMPLES = 203


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Random samples of 2 to 32 tokens in three shards, whose masks begin and end anywhere."""
    generator = random.Random(11)
    samples: list[PlainSample] = []
    for _ in range(NUM_SAMPLES):
        length = generator.choice([2, 3, 5, 8, 13, 21, 32, generator.randint(2, CAPACITY)])
        mask = [generator.random() < 0.6 for _ in range(length - 1)] + [True]
        samples.append(([generator.randrange(300) for _ in range(length)], mask))
    path = tmp_path_factory.mktemp("packing") / "dataset"
    return Dataset(write_dataset(path, samples, shard_sizes=[1, 100], pad_token_id=299))


@pytest.fixture(scope="module")
def samples(dataset: Dataset) -> list[PlainSample]:
    """The samples as lists."""
    return plain_samples(dataset)


def oracle(
    samples: list[PlainSample], rows: list[list[int]], width: int, pad_token_id: int, shift_labels: bool
) -> dict[str, Any]:
    """The arrays of a batch, token by token."""
    batch: dict[str, Any] = {"input_ids": [], "labels": [], "position_ids": [], "cu_seqlens": [0]}
    for row in rows:
        segments = [samples[number] for number in row]
        num_padding = width - sum(len(ids) for ids, _ in segments)
        if num_padding:
            segments.append(([pad_token_id] * num_padding, [False] * num_padding))
        for ids, mask in segments:
            for position, token in enumerate(ids):
                batch["input_ids"].append(token)
                batch["position_ids"].append(position)
                target = position + 1 if shift_labels else position
                is_trained = 0 < target < len(ids) and mask[target]
                batch["labels"].append(ids[target] if is_trained else -100)
            batch["cu_seqlens"].append(batch["cu_seqlens"][-1] + len(ids))
    for name in ("input_ids", "labels", "position_ids"):
        batch[name] = np.array(batch[name], np.int64).reshape(len(rows), width)
    batch["cu_seqlens"] = np.array(batch["cu_seqlens"], np.int32)
    batch["max_seqlen"] = int(np.diff(batch["cu_seqlens"]).max(initial=0))
    return batch


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Both have the same arrays, of the same types."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype, name
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            assert found[name] == value, name


def plan(packing: Packing) -> list[list[int]]:
    """The sample numbers of every row."""
    return [row.tolist() for row in packing]


@given(data=st.data())
def test_a_batch_is_what_a_slow_loop_writes(dataset: Dataset, samples: list[PlainSample], data: st.DataObject) -> None:
    """Any rows in any order, packed or not, shifted or not, of any width; a new batch and own memory."""
    is_packed, shift_labels = data.draw(st.booleans()), data.draw(st.booleans())
    sequence_length = data.draw(st.sampled_from([CAPACITY, 33, 100]))
    make = dataset.pack if is_packed else dataset.rows
    packing = make(sequence_length=sequence_length, seed=data.draw(st.integers(0, 2**64 - 1)))
    numbers = data.draw(st.lists(st.integers(-len(packing), len(packing) - 1), min_size=1, max_size=4))
    rows = [packing[number].tolist() for number in numbers]
    longest = max(sum(len(samples[number][0]) for number in row) for row in rows)
    width = data.draw(st.one_of(st.none(), st.integers(longest, longest + 9)))

    batch = packing.batch(numbers, shift_labels=shift_labels, width=width)

    width = width if width is not None else sequence_length if is_packed else longest
    expected = oracle(samples, rows, width, dataset.pad_token_id, shift_labels)
    assert_equal(batch, expected)

    names = ("input_ids", "labels", "position_ids")
    memory = {name: np.full((len(rows), width), 7, np.int64) for name in names}
    cu_seqlens, max_seqlen = packing.fill(numbers, shift_labels=shift_labels, **memory)
    assert_equal({**memory, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}, expected)


@given(sequence_length=st.integers(CAPACITY, 200), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**64 - 1))
def test_rows_hold_every_sample_once(dataset: Dataset, sequence_length: int, seed: int, epoch: int) -> None:
    """Every sample is in exactly one row, no pack is over capacity, an unpacked row has one sample; ratios are true."""
    packs = dataset.pack(sequence_length=sequence_length, seed=seed, epoch=epoch)
    rows = dataset.rows(sequence_length=sequence_length, seed=seed, epoch=epoch)

    for packing in (packs, rows):
        assert sorted(itertools.chain(*plan(packing))) == list(range(NUM_SAMPLES))
        assert packing.fill_ratio == pytest.approx(dataset.lengths.sum() / (len(packing) * sequence_length))
    assert all(dataset.lengths[row].sum() <= sequence_length for row in packs)
    assert {len(row) for row in rows} == {1}
    # No better than the bound of full packs, and near it: samples are many and small.
    fewest = -(-int(dataset.lengths.sum()) // sequence_length)
    assert fewest <= len(packs) <= fewest * 1.1 + 1


def test_seed_and_epoch_decide_the_rows(dataset: Dataset) -> None:
    """The same arguments give the same rows in any order of calls; another seed or epoch gives others."""
    for make in (dataset.pack, dataset.rows):
        first = plan(make(sequence_length=CAPACITY, seed=1, epoch=2))
        others = [
            plan(make(sequence_length=CAPACITY, seed=seed, epoch=epoch)) for seed, epoch in [(1, 3), (2, 2), (2, 1)]
        ]
        assert first == plan(make(sequence_length=CAPACITY, seed=1, epoch=2))
        assert first not in others
        assert len({str(other) for other in others}) == 3


@pytest.mark.parametrize(
    "numbers",
    [
        {"sequence_length": CAPACITY - 1},
        {"sequence_length": 0},
        {"sequence_length": -1},
        {"sequence_length": 2**32},
        {"sequence_length": CAPACITY, "seed": -1},
        {"sequence_length": CAPACITY, "seed": 2**64},
        {"sequence_length": CAPACITY, "epoch": -1},
    ],
)
def test_numbers_out_of_range_are_config_errors(dataset: Dataset, numbers: dict[str, int]) -> None:
    """A sequence length below the longest sample, and numbers that can't be, are ConfigErrors, packed or not."""
    for make in (dataset.pack, dataset.rows):
        with pytest.raises(ConfigError):
            make(**numbers)


def test_wrong_rows_and_memory_are_refused(dataset: Dataset) -> None:
    """Row numbers beyond the packs are IndexErrors; memory of a wrong shape, type or layout is refused untouched."""
    packing = dataset.pack(sequence_length=CAPACITY)

    def new(num_rows: int = 2, width: int = CAPACITY, dtype: Any = np.int64) -> Any:
        return np.full((num_rows, width), 7, dtype)

    for number in (len(packing), -len(packing) - 1, 2**70):
        with pytest.raises(IndexError):
            packing[number]
        with pytest.raises(IndexError):
            packing.batch([0, number])
        with pytest.raises(IndexError):
            packing.fill([0, number], input_ids=new(), labels=new(), position_ids=new())
    for width in (1, 2**31, 2**60):
        with pytest.raises(ValueError, match="expected"):
            packing.batch([0], width=width)
    wrong_arrays = [
        new(num_rows=1), new(num_rows=3), new(width=CAPACITY + 1), new(dtype=np.int32), new(width=2 * CAPACITY)[:, ::2],
        new().reshape(-1), np.asfortranarray(new()),
    ]  # fmt: skip
    read_only = new()
    read_only.flags.writeable = False
    for wrong in [*wrong_arrays, read_only]:
        for name in ("input_ids", "labels", "position_ids"):
            arrays = {"input_ids": new(), "labels": new(), "position_ids": new(), name: wrong}
            with pytest.raises((ValueError, TypeError)):
                packing.fill([0, 1], **arrays)
            assert all((array == 7).all() for array in arrays.values())
    shared = new()
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        packing.fill([0, 1], input_ids=shared, labels=shared, position_ids=new())


def test_no_rows_are_an_empty_batch(dataset: Dataset) -> None:
    """A batch of no rows has arrays of no rows and one bound."""
    batch = dataset.rows(sequence_length=CAPACITY).batch([])

    assert batch["input_ids"].shape == (0, 0)
    assert batch["cu_seqlens"].tolist() == [0]


def test_a_dataset_is_a_sequence(dataset: Dataset, samples: list[PlainSample]) -> None:
    """Samples are counted from either end; there are as many as the length says; arrays are copies of their own."""
    assert len(dataset) == NUM_SAMPLES
    assert dataset[-1].source == f"data.jsonl:{NUM_SAMPLES}"
    for index in (NUM_SAMPLES, -NUM_SAMPLES - 1, 2**70):
        with pytest.raises(IndexError):
            dataset[index]
    sample = dataset[3]
    assert (sample.input_ids.dtype, sample.label_mask.dtype) == (np.uint32, np.bool_)
    sample.input_ids[:] = 0
    assert dataset[3].input_ids.tolist() == samples[3][0]
    assert (dataset.lengths.dtype, dataset.vocab_size, dataset.pad_token_id) == (np.uint32, 300, 299)


def test_a_dataset_goes_to_another_process(dataset: Dataset, samples: list[PlainSample]) -> None:
    """A pickled dataset opens the same files again, and plans the same rows."""
    received = pickle.loads(pickle.dumps(dataset))

    assert plain_samples(received) == samples
    assert received.manifest == dataset.manifest
    assert plan(received.pack(sequence_length=50)) == plan(dataset.pack(sequence_length=50))


def test_errors_of_the_extension_go_to_another_process(dataset: Dataset) -> None:
    """An error raised from Rust is pickled with all that it says, as Ray does."""
    with pytest.raises(SftFastError) as caught:
        dataset.pack(sequence_length=2)

    received = pickle.loads(pickle.dumps(caught.value))

    assert type(received) is ConfigError
    assert not isinstance(received, InputError)
    assert (str(received), vars(received)) == (str(caught.value), vars(caught.value))


def stream_of(dataset: Dataset, **changes: Any) -> StepStream:
    """A stream of 7 rows a step."""
    return StepStream(dataset, **{"sequence_length": CAPACITY, "seed": 3, "num_rows_per_step": 7, **changes})


def rows_of(stream: StepStream, step: int, world_size: int, rows_per_micro_batch: int) -> list[list[list[int]]]:
    """The rows of every micro-batch of every rank."""
    return [
        stream.step(step, rank=rank, world_size=world_size, rows_per_micro_batch=rows_per_micro_batch).micro_batches
        for rank in range(world_size)
    ]


@given(
    num_rows_per_step=st.integers(1, 40),
    world_size=st.integers(1, 9),
    rows_per_micro_batch=st.integers(1, 7),
    packed=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_step_is_shared_out_whole(
    dataset: Dataset, num_rows_per_step: int, world_size: int, rows_per_micro_batch: int, packed: bool, seed: int
) -> None:
    """Each row once an epoch; as many micro-batches on every rank, none too large, of the rows that one rank has."""
    stream = stream_of(dataset, num_rows_per_step=num_rows_per_step, packed=packed, seed=seed)
    num_rows = len(stream.packing(0))
    assert stream.num_steps == stream.num_steps_per_epoch == -(-num_rows // num_rows_per_step)

    found = []
    for step in {0, stream.num_steps // 2, stream.num_steps - 1}:
        ranks = rows_of(stream, step, world_size, rows_per_micro_batch)
        rows = sorted(row for rank in ranks for micro_batch in rank for row in micro_batch)
        assert len({len(rank) for rank in ranks}) == 1
        assert all(len(micro_batch) <= rows_per_micro_batch for rank in ranks for micro_batch in rank)
        is_last = step == stream.num_steps - 1
        assert len(rows) == (num_rows - step * num_rows_per_step if is_last else num_rows_per_step)
        assert rows == sorted(rows_of(stream, step, 1, num_rows_per_step)[0][0])
        found += rows
    assert len(found) == len(set(found))


def test_the_same_step_is_the_same_in_any_order(dataset: Dataset) -> None:
    """A step is a pure function of its number: asked backwards, twice, or of a new stream, it is the same."""
    stream, other = stream_of(dataset, num_epochs=3), stream_of(dataset, num_epochs=3)

    forwards = [stream.step(step, rows_per_micro_batch=2) for step in range(stream.num_steps)]

    assert forwards == [other.step(step, rows_per_micro_batch=2) for step in reversed(range(stream.num_steps))][::-1]
    assert [plan.epoch for plan in forwards] == [step // stream.num_steps_per_epoch for step in range(stream.num_steps)]


@pytest.mark.parametrize("packed", [False, True])
def test_the_batches_of_a_step_hold_its_samples(dataset: Dataset, samples: list[PlainSample], packed: bool) -> None:
    """Batches are as wide as their longest row, with shifted labels; the counts of a step are those of its arrays."""
    stream = stream_of(dataset, packed=packed)
    for step in (0, stream.num_steps - 1):
        plans = [stream.step(step, rank=rank, world_size=2, rows_per_micro_batch=2) for rank in range(2)]
        batches = []
        for current in plans:
            for index, numbers in enumerate(current.micro_batches):
                batch = stream.batch(current, index)
                batches.append(batch)
                rows = [stream.packing(0)[number].tolist() for number in numbers]
                if rows:
                    width = max(sum(len(samples[number][0]) for number in row) for row in rows)
                    assert_equal(batch, oracle(samples, rows, width, dataset.pad_token_id, shift_labels=True))
        used = [number for current in plans for rows in current.micro_batches for row in rows
                for number in stream.packing(0)[row].tolist()]  # fmt: skip
        assert {plan.num_tokens for plan in plans} == {sum(len(samples[number][0]) for number in used)}
        num_labels = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        assert {plan.num_label_tokens for plan in plans} == {num_labels}


def test_a_rank_without_rows_gets_padding(dataset: Dataset) -> None:
    """In a last step with fewer rows than ranks, an empty micro-batch is one row of padding without a label."""
    stream = stream_of(dataset, packed=False, num_rows_per_step=NUM_SAMPLES - 1)
    last = [stream.step(1, rank=rank, world_size=3, rows_per_micro_batch=4) for rank in range(3)]

    assert sorted(plan.micro_batches for plan in last)[:2] == [[[]], [[]]]
    empty = next(plan for plan in last if plan.micro_batches == [[]])
    batch = stream.batch(empty, 0)
    assert batch["input_ids"].tolist() == [[dataset.pad_token_id] * 2]
    assert (batch["labels"] == -100).all()
    assert (batch["position_ids"].tolist(), batch["cu_seqlens"].tolist(), batch["max_seqlen"]) == ([[0, 1]], [0, 2], 2)


@pytest.mark.parametrize(
    ("length", "num_steps"),
    [
        ({}, 29),
        ({"num_epochs": 2}, 58),
        ({"num_epochs": 0.5}, 15),
        ({"num_epochs": 0.001}, 1),
        ({"num_epochs": 1.1}, 32),
        ({"num_epochs": 3, "max_steps": -1}, 87),
        ({"num_epochs": 3, "max_steps": 0}, 87),
        ({"num_epochs": 0, "max_steps": 100}, 100),
    ],
)
def test_a_run_is_as_long_as_asked(dataset: Dataset, length: dict[str, Any], num_steps: int) -> None:
    """Epochs, whole or not, round up to steps; max_steps overrides them; the epoch of a step counts up to the end."""
    stream = stream_of(dataset, packed=False, **length)

    assert (stream.num_steps_per_epoch, stream.num_steps) == (29, num_steps)
    assert stream.epoch_of(num_steps) == num_steps / 29
    for step in (0, num_steps - 1):
        assert stream.step(step, rows_per_micro_batch=7).epoch == step // 29
    for step in (-1, num_steps):
        with pytest.raises(IndexError):
            stream.step(step, rows_per_micro_batch=7)
    with pytest.raises(IndexError):
        stream.step(0, rank=2, world_size=2, rows_per_micro_batch=7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_epochs": 0}, {"num_epochs": -1.0}, {"num_epochs": float("nan")}, {"num_rows_per_step": 0},
        {"num_rows_per_step": -1}, {"sequence_length": CAPACITY - 1}, {"seed": -1},
    ],
)  # fmt: skip
def test_a_stream_of_nothing_is_a_config_error(dataset: Dataset, wrong: dict[str, Any]) -> None:
    """A stream without steps, or with numbers that can't be, is refused when it is made."""
    with pytest.raises(ConfigError):
        stream_of(dataset, **wrong)


def test_an_empty_dataset_has_no_stream(tmp_path: Path) -> None:
    """A dataset without samples opens, packs to nothing, and is refused as a stream, max_steps or not."""
    empty = Dataset(write_dataset(tmp_path / "empty", [], shards=[]))

    assert (len(empty), len(empty.pack(sequence_length=8)), empty.lengths.tolist()) == (0, 0, [])
    for max_steps in (-1, 5):
        with pytest.raises(ConfigError, match="found none"):
            stream_of(empty, max_steps=max_steps)


def test_planning_balances_ranks(dataset: Dataset) -> None:
    """Rows are dealt to ranks so that the slowest waits less than it would in order."""
    before, after = stream_of(dataset, packed=False, num_rows_per_step=16).imbalance(4)

    assert 0 <= after < before
