"""Views of a dataset for PyTorch: what a `DataLoader`, the Trainer of transformers and TRL take. Imports torch.

An item is a dict of int64 tensors [n]: `input_ids`; `labels`, unshifted, as transformers wants them: `labels[t]`
belongs to token t, -100 where there is no loss, which is so for the first token of every sample; `position_ids`, from 0
in each sample. No item has padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, get_worker_info

from sft_fast.data import Batch, Dataset, Packing, check_number
from sft_fast.errors import ConfigError
from sft_fast.mixing import shares
from sft_fast.prefetch import Prefetcher
from sft_fast.stream import StepStream

if TYPE_CHECKING:
    import datasets

Item = dict[str, torch.Tensor]

_KEYS = ("input_ids", "labels", "position_ids")
# Micro-batches that are ready before they are asked for.
_PREFETCH_DEPTH = 4


class SampleView(TorchDataset[Item]):
    """Map-style: item i is sample i, in the order of the records. Shuffling is up to the sampler.

    Args:
        dataset: The samples.

    Examples:
        >>> from sft_fast.views import SampleView
        >>> view = SampleView(sft_fast.Dataset("out"))
        >>> len(view), sorted(view[0]), view[0]["input_ids"].dtype
        (3, ['input_ids', 'labels', 'position_ids'], torch.int64)
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        sample = self.dataset[index]
        ids = sample.input_ids.astype(np.int64)
        labels = np.where(sample.label_mask, ids, -100)
        labels[0] = -100
        return _tensors({"input_ids": ids, "labels": labels, "position_ids": np.arange(len(ids))})


class PackView(TorchDataset[Item]):
    """Map-style: item i is pack i of an epoch, several samples end to end, already shuffled.

    A model must keep attention within the samples: transformers does so for a batch of one item, or of several that
    `FlatCollator` joins, by `position_ids`.

    Args:
        dataset: The samples.
        sequence_length: Tokens that a pack may hold.
        seed: Decides, with the epoch, which samples share a pack.
        epoch: From 0; see `set_epoch`.

    Raises:
        ConfigError: A sample is longer than `sequence_length`, or a number is out of range.

    Examples:
        >>> from sft_fast.views import PackView
        >>> view = PackView(sft_fast.Dataset("out"), sequence_length=256)
        >>> len(view), sorted(view.sample_numbers(0)), int(view[0]["position_ids"][0])
        (1, [0, 1, 2], 0)
    """

    def __init__(self, dataset: Dataset, *, sequence_length: int, seed: int = 42, epoch: int = 0) -> None:
        self.dataset = dataset
        self._sequence_length = sequence_length
        self._seed = seed
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Packs anew. Every epoch has the same number of packs. Trainers call this where they shuffle."""
        self._epoch = epoch
        self._packing = self.dataset.pack(sequence_length=self._sequence_length, seed=self._seed, epoch=epoch)

    def __len__(self) -> int:
        return len(self._packing)

    def __getitem__(self, index: int) -> Item:
        return _flat(self._packing, [index])

    def sample_numbers(self, index: int) -> list[int]:
        """The samples in pack `index`."""
        numbers: list[int] = self._packing[index].tolist()
        return numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_pack_view, (self.dataset, self._sequence_length, self._seed, self._epoch)


def _make_pack_view(dataset: Dataset, sequence_length: int, seed: int, epoch: int) -> PackView:
    return PackView(dataset, sequence_length=sequence_length, seed=seed, epoch=epoch)


class StepView(IterableDataset[Item]):
    """Iterable and stateful: the micro-batches of one rank in one epoch, in the order of `StepStream`.

    An item is a micro-batch: its rows end to end. So a `DataLoader` takes it with `batch_size=None`, or with
    `batch_size=1` and `FlatCollator`, and its order is the same for any number of workers; with none, which suffices, a
    thread prepares items ahead. For any number of ranks, global step k has the same samples; a rank without rows in the
    last step gets two tokens of padding without a label.

    `state_dict` is a place: a few integers and the fingerprint of the dataset, as JSON can hold them. At the beginning
    of a step it can be loaded with another `world_size`, `rank` or `rows_per_micro_batch`.

    Args:
        dataset: The samples.
        sequence_length: Tokens of a pack; the longest sample allowed.
        num_rows_per_step: Rows of a global batch, over all ranks.
        rows_per_micro_batch: Rows of an item.
        packed: Whether a row is a pack or a single sample.
        seed: Decides, with the epoch, which samples share a pack and the order of everything.
        rank: This rank, from 0.
        world_size: Number of ranks.

    Raises:
        ConfigError: A sample is longer than `sequence_length`, or a number is out of range.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from sft_fast.views import FlatCollator, StepView
        >>> view = StepView(sft_fast.Dataset("out"), sequence_length=64, num_rows_per_step=2)
        >>> loader = DataLoader(view, batch_size=1, collate_fn=FlatCollator())
        >>> num_tokens = [batch["input_ids"].shape[1] for batch in loader]
        >>> sum(num_tokens) == int(view.dataset.lengths.sum())
        True
        >>> view.state_dict()["step"] == view.num_steps
        True
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sequence_length: int,
        num_rows_per_step: int,
        rows_per_micro_batch: int = 1,
        packed: bool = True,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_number("world_size", world_size, 1, 2**31 - 1)
        check_number("rank", rank, 0, world_size - 1)
        check_number("rows_per_micro_batch", rows_per_micro_batch, 1, 2**32 - 1)
        self.dataset = dataset
        self._plan: dict[str, Any] = {
            "sequence_length": sequence_length, "packed": packed, "seed": seed, "num_rows_per_step": num_rows_per_step,
        }  # fmt: skip
        self._split = {"rank": rank, "world_size": world_size, "rows_per_micro_batch": rows_per_micro_batch}
        self._make_stream()
        # Epoch, step of the epoch and micro-batch of the step where an iteration begins, and whether a worker process
        # has begun one. In shared memory: workers that persist see what is set here, and we see what they do.
        self._shared = torch.zeros(4, dtype=torch.int64).share_memory_()
        self._place = (0, 0, 0)  # of the next item of the iteration of this process

    def _make_stream(self) -> None:
        self._stream = StepStream(self.dataset, **self._plan, max_steps=2**62)

    @property
    def num_steps(self) -> int:
        """Global steps of the epoch."""
        return self._stream.num_steps_of(int(self._shared[0]))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_stream"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_stream()

    def __len__(self) -> int:
        """Items of an epoch."""
        return self._num_items(int(self._shared[0]))

    def _num_items(self, epoch: int) -> int:
        last = self._stream.num_steps_of(epoch) - 1
        return last * self._num_micro_batches(epoch, 0) + self._num_micro_batches(epoch, last)

    def _num_micro_batches(self, epoch: int, step: int) -> int:
        """Items of a step of an epoch."""
        num_rows_per_step: int = self._plan["num_rows_per_step"]
        num_rows = min(num_rows_per_step, len(self._stream.packing(epoch)) - step * num_rows_per_step)
        num_rows_of_rank = -(-num_rows // self._split["world_size"])
        return -(-num_rows_of_rank // self._split["rows_per_micro_batch"])

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch, unless the view is within it already."""
        check_number("epoch", epoch, 0, 2**31 - 1)
        if epoch != int(self._shared[0]):
            self._go_to(epoch, 0, 0)

    def _go_to(self, epoch: int, step: int, micro_batch: int) -> None:
        self._shared[:] = torch.tensor([epoch, step, micro_batch, 0])
        self._place = (epoch, step, micro_batch)

    def __iter__(self) -> Iterator[Item]:
        """From the place that was loaded, else from the beginning of the epoch."""
        epoch, step, micro_batch = self._shared[:3].tolist()
        worker = get_worker_info()
        if worker is None:
            self._shared[1:] = 0
            self._place = (epoch, step, micro_batch)
            return self._iterate(epoch, step, micro_batch, 0, 1)
        self._shared[3] = 1
        return self._iterate(epoch, step, micro_batch, worker.id, worker.num_workers)

    def _iterate(self, epoch: int, step: int, micro_batch: int, first: int, stride: int) -> Iterator[Item]:
        items = Prefetcher(self._read(epoch, step, micro_batch, first, stride), _PREFETCH_DEPTH)
        try:
            for place, item in items:
                self._place = place
                yield item
        finally:
            items.close()

    def _read(
        self, epoch: int, first_step: int, first_micro_batch: int, first: int, stride: int
    ) -> Iterator[tuple[tuple[int, int, int], Item]]:
        """Each `stride`-th item from the `first` on, and the place behind it."""
        number = -first_micro_batch
        for step in range(first_step, self._stream.num_steps_of(epoch)):
            plan = self._stream.step_of(epoch, step, **self._split)
            size = len(plan.micro_batches)
            for micro_batch, rows in enumerate(plan.micro_batches):
                if number >= 0 and number % stride == first:
                    place = (epoch, step, micro_batch + 1) if micro_batch + 1 < size else (epoch, step + 1, 0)
                    item = _flat(self._stream.packing(epoch), rows) if rows else _padding(self.dataset.pad_token_id)
                    yield place, item
                number += 1

    def state_dict(self, num_items: int | None = None) -> dict[str, Any]:
        """The place behind the last item that was handed out, as values for JSON.

        Args:
            num_items: Items of this epoch that were taken; needed where `DataLoader` workers read the view, since this
                process can't know how many of their items were used.

        Raises:
            ConfigError: It is needed and missing, or there are not so many items.
        """
        _refuse_in_worker()
        epoch, step, micro_batch = self._place
        if num_items is not None:
            check_number("num_items", num_items, 0, self._num_items(epoch))
            step, micro_batch = divmod(num_items, self._num_micro_batches(epoch, 0))
            if num_items == self._num_items(epoch):
                step, micro_batch = self._stream.num_steps_of(epoch), 0
        elif self._shared[3]:
            raise ConfigError(
                "expected num_items, since worker processes read the view",
                hint="state_dict(num_items) takes the items of this epoch that were used; or use no workers: a thread "
                "prepares items ahead",
            )
        return {**self._identity(), **self._split, "epoch": epoch, "step": step, "micro_batch": micro_batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place: the next iteration begins there.

        Raises:
            ConfigError: The state is of another dataset or other arguments, or within a step of another split.
        """
        _refuse_in_worker()
        expected = self._identity()
        found = {name: state.get(name) for name in expected}
        if found != expected:
            raise ConfigError(f"expected a state of {expected}, found {found}")
        epoch, step, micro_batch = (int(state[name]) for name in ("epoch", "step", "micro_batch"))
        check_number("epoch", epoch, 0, 2**31 - 1)
        check_number("step", step, 0, self._stream.num_steps_of(epoch))
        names = ("world_size", "rows_per_micro_batch")
        if micro_batch and any(state[name] != self._split[name] for name in names):
            sizes = {name: state[name] for name in names}
            raise ConfigError(
                f"expected a state at the beginning of a step, or of {self._split}, found micro-batch {micro_batch} of "
                f"a step of {sizes}"
            )
        check_number("micro_batch", micro_batch, 0, max(0, self._num_micro_batches(epoch, step) - 1))
        self._go_to(epoch, step, micro_batch)

    def _identity(self) -> dict[str, Any]:
        mix = shares(self.dataset.sources)
        return {
            **self._plan,
            "fingerprint": self.dataset.fingerprint,
            **({"mix": [list(share) for share in mix]} if mix else {}),
        }


def _refuse_in_worker() -> None:
    if get_worker_info() is not None:
        raise ConfigError(
            "expected to be asked for a state in the process that has the DataLoader, found a worker of it"
        )


class FlatCollator:
    """Joins items end to end into one row [1, T], without padding; attention stays within samples by `position_ids`.

    Args:
        flash_attention: Whether to add `cu_seq_lens_q`, `cu_seq_lens_k`, int32 [k + 1], the bounds of the k samples,
            and `max_length_q`, `max_length_k`, the tokens of the longest: what transformers passes to FlashAttention.

    Examples:
        >>> from sft_fast.views import FlatCollator, SampleView
        >>> view = SampleView(sft_fast.Dataset("out"))
        >>> batch = FlatCollator(flash_attention=True)([view[0], view[1]])
        >>> batch["input_ids"].shape == (1, len(view[0]["input_ids"]) + len(view[1]["input_ids"]))
        True
        >>> batch["cu_seq_lens_q"].dtype, len(batch["cu_seq_lens_q"])
        (torch.int32, 3)
    """

    def __init__(self, *, flash_attention: bool = False) -> None:
        self._flash_attention = flash_attention

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of items."""
        batch: dict[str, Any] = {key: torch.cat([torch.as_tensor(item[key]) for item in items])[None] for key in _KEYS}
        if self._flash_attention:
            starts = torch.nonzero(batch["position_ids"][0] == 0).flatten()
            bounds = torch.cat([starts, torch.tensor([batch["position_ids"].shape[1]])]).to(torch.int32)
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            longest = int(torch.diff(bounds).max())
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch


class PaddingCollator:
    """Items of `SampleView` as rows [B, T], padded on the right to the longest, with `attention_mask`.

    Args:
        pad_token_id: `dataset.pad_token_id`.

    Examples:
        >>> from sft_fast.views import PaddingCollator, SampleView
        >>> dataset = sft_fast.Dataset("out")
        >>> view = SampleView(dataset)
        >>> batch = PaddingCollator(dataset.pad_token_id)([view[0], view[1], view[2]])
        >>> batch["input_ids"].shape == batch["attention_mask"].shape == (3, dataset.lengths.max())
        True
    """

    def __init__(self, pad_token_id: int) -> None:
        self._padding = {"input_ids": pad_token_id, "labels": -100, "position_ids": 0, "attention_mask": 0}

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of items."""
        columns = {key: [torch.as_tensor(item[key]) for item in items] for key in _KEYS}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        return {
            key: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._padding[key])
            for key, rows in columns.items()
        }


def as_datasets(view: SampleView | PackView) -> datasets.Dataset:
    """A view as a dataset of the library `datasets`, which TRL insists on. Rows are read when they are asked for.

    The columns are those of an item, as numpy arrays, and `seq_lengths`, the tokens of each sample of the row, by which
    TRL makes position ids. TRL takes it with `dataset_kwargs={"skip_prepare_dataset": True}`.

    Raises:
        ConfigError: `datasets` is not installed.

    Examples:
        >>> from sft_fast.views import PackView, as_datasets
        >>> rows = as_datasets(PackView(sft_fast.Dataset("out"), sequence_length=256))
        >>> len(rows), sorted(rows[0])
        (1, ['input_ids', 'labels', 'position_ids', 'seq_lengths'])
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(
            "as_datasets needs the package datasets", code="missing_package", hint="pip install datasets"
        ) from error
    return datasets.Dataset.from_dict({"row": range(len(view))}).with_transform(_Rows(view))


class _Rows:
    """The transform of `as_datasets`: row numbers to columns."""

    def __init__(self, view: SampleView | PackView) -> None:
        self._view = view

    def __call__(self, columns: dict[str, list[int]]) -> dict[str, list[Any]]:
        items = [self._view[row] for row in columns["row"]]
        result: dict[str, list[Any]] = {key: [item[key].numpy() for item in items] for key in _KEYS}
        bounds = [np.append(np.flatnonzero(ids == 0), len(ids)) for ids in result["position_ids"]]
        return {**result, "seq_lengths": [np.diff(each).tolist() for each in bounds]}


def _flat(packing: Packing, rows: list[int]) -> Item:
    batch: Batch = packing.flat_batch(rows)
    return _tensors({key: batch[key][0] for key in _KEYS})


def _padding(pad_token_id: int) -> Item:
    return {
        "input_ids": torch.full((2,), pad_token_id),
        "labels": torch.full((2,), -100),
        "position_ids": torch.arange(2),
    }


def _tensors(arrays: dict[str, Any]) -> Item:
    return {key: torch.from_numpy(array) for key, array in arrays.items()}
