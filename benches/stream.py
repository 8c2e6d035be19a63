"""What a trainer waits for its data: `benches/stream.py`.

A dataset of a few million tokens is made, and every micro-batch of an epoch is taken from it in the ways there are. The
tokens are counted, so that none is skipped. CPU time of this process, all its threads, so that others do not count.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

import sft_fast
from sft_fast.prefetch import Prefetcher
from sft_fast.stream import StepStream
from sft_fast.train.batch import make_micro_batch
from sft_fast.views import FlatCollator, PackView, StepView

NUM_SAMPLES, SEQUENCE_LENGTH, ROWS = 100_000, 4096, 8


def make_dataset(directory: Path) -> sft_fast.Dataset:
    """Random tokens, 20 to 600 a sample, the second half of each trained on."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(20, 600, NUM_SAMPLES)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = generator.integers(0, 150_000, offsets[-1], dtype=np.int32)
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    labels = np.where(position >= np.repeat(lengths // 2, lengths), ids, -100).astype(np.int32)
    columns = [pa.ListArray.from_arrays(offsets, values) for values in (ids, labels)]
    table = pa.Table.from_arrays(columns, names=["input_ids", "labels"])
    return sft_fast.Dataset.from_arrow(table, directory / "out")


def main() -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        dataset = make_dataset(Path(directory))
        num_tokens = int(dataset.lengths.sum())
        packing = dataset.pack(sequence_length=SEQUENCE_LENGTH)
        rows = [list(range(first, min(first + ROWS, len(packing)))) for first in range(0, len(packing), ROWS)]
        memory = {name: np.empty((ROWS, SEQUENCE_LENGTH), np.int64) for name in ("input_ids", "labels", "position_ids")}
        sizes = {"sequence_length": SEQUENCE_LENGTH, "num_rows_per_step": ROWS, "seed": 42}

        def fill() -> Iterator[int]:
            for numbers in rows:
                bounds, _ = packing.fill(numbers, **{name: array[: len(numbers)] for name, array in memory.items()})
                yield len(bounds)

        def batch() -> Iterator[int]:
            for numbers in rows:
                yield packing.batch(numbers)["input_ids"].size

        def flat_batch() -> Iterator[int]:
            for numbers in rows:
                yield packing.flat_batch(numbers)["input_ids"].size

        def trainer() -> Iterator[int]:
            stream = StepStream(dataset, **sizes)

            def micro_batches() -> Iterator[int]:
                for step in range(stream.num_steps):
                    plan = stream.step(step, rows_per_micro_batch=ROWS)
                    yield make_micro_batch(stream.batch(plan, 0)).input_ids.shape[1]

            yield from Prefetcher(micro_batches(), depth=8)

        def step_view() -> Iterator[int]:
            for item in StepView(dataset, rows_per_micro_batch=ROWS, **sizes):
                yield len(item["input_ids"])

        def pack_view() -> Iterator[int]:
            view, collate = PackView(dataset, sequence_length=SEQUENCE_LENGTH), FlatCollator(flash_attention=True)
            for numbers in rows:
                yield collate([view[number] for number in numbers])["input_ids"].shape[1]

        ways: list[tuple[str, Callable[[], Iterator[int]], bool]] = [
            ("packing.fill, into arrays of ours", fill, False),
            ("packing.batch, new arrays", batch, False),
            ("packing.flat_batch, new arrays", flat_batch, True),
            ("the trainer: steps, micro-batches, prefetched", trainer, True),
            ("StepView, prefetched", step_view, True),
            ("PackView and FlatCollator", pack_view, True),
        ]
        print(f"{num_tokens / 1e6:.1f} M tokens in {len(packing):,} packs, {ROWS} a micro-batch")
        for name, way, is_counted in ways:
            best = float("inf")
            for _ in range(5):
                start = time.process_time()
                counts = list(way())
                best = min(best, time.process_time() - start)
            assert not is_counted or sum(counts) >= num_tokens - len(packing) * SEQUENCE_LENGTH * 0.01
            rate = num_tokens / best
            milliseconds = 1e3 * best / len(rows)
            print(f"{name:<46} {rate / 1e6:6.0f} M tokens/s {4 * rate / 1e9:6.2f} GB/s {milliseconds:6.3f} ms each")
        state = StepView(dataset, **sizes).state_dict()
        print(f"a state: {json.dumps(state)}")


if __name__ == "__main__":
    main()
