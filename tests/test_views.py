"""Views for torch: what they hold, where they go on, and that others' trainers learn from them what a loop does."""

import json
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from sft_fast import Dataset
from sft_fast.errors import ConfigError
from sft_fast.views import FlatCollator, Item, PackView, PaddingCollator, SampleView, StepView, as_datasets
from tests.data_helpers import PlainSample, make_dataset, plain_samples, random_records, write_dataset
from tests.train_helpers import VOCAB_SIZE, make_model, make_model_dir

CAPACITY = 48
NUM_SAMPLES = 41


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Random samples, each other than all others, some with a mask that begins at the first token."""
    generator = random.Random(4)
    samples: list[PlainSample] = []
    for number in range(NUM_SAMPLES):
        length = generator.choice([2, 3, 7, 20, 40, CAPACITY])
        ids = [3 + number, *(generator.randrange(3, VOCAB_SIZE) for _ in range(length - 1))]
        mask = [generator.random() < 0.5 for _ in range(length - 1)] + [True]
        samples.append((ids, mask))
    path = tmp_path_factory.mktemp("views") / "dataset"
    return Dataset(write_dataset(path, samples, vocab_size=VOCAB_SIZE, shard_sizes=[10]))


def plain_items(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    """Ids and unshifted labels of every sample, by a slow loop."""
    items = []
    for ids, mask in plain_samples(dataset):
        labels = [token if is_label else -100 for token, is_label in zip(ids, mask, strict=True)]
        items.append((ids, [-100, *labels[1:]]))
    return items


def cut(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each sample of a batch, cut where positions begin anew, without padding."""
    samples: list[tuple[list[int], list[int]]] = []
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    columns = (batch[key].flatten().tolist() for key in ("input_ids", "labels", "position_ids"))
    for token, label, position, is_real in zip(*columns, mask.flatten().tolist(), strict=True):
        if not is_real:
            continue
        if position == 0:
            samples.append(([], []))
        assert position == len(samples[-1][0])
        samples[-1][0].append(token)
        samples[-1][1].append(label)
    return samples


def flat(batches: Iterable[list[Any]]) -> list[Any]:
    """All in one list, in order."""
    return [item for batch in batches for item in batch]


def test_a_sample_view_is_the_samples(dataset: Dataset) -> None:
    """Item i is sample i, with the labels of a slow loop and positions from 0."""
    view = SampleView(dataset)

    items = [view[index] for index in range(len(view))]

    assert flat(cut(item) for item in items) == plain_items(dataset)
    assert {tensor.dtype for item in items for tensor in item.values()} == {torch.int64}
    with pytest.raises(IndexError):
        view[NUM_SAMPLES]


def test_a_pack_view_is_the_packs(dataset: Dataset) -> None:
    """Item i is pack i, no longer than allowed, every sample once an epoch; another epoch has as many other packs."""
    view = PackView(dataset, sequence_length=100, seed=5)
    expected = plain_items(dataset)
    orders = []
    for epoch in (0, 1, 0):
        view.set_epoch(epoch)
        packs = [cut(view[index]) for index in range(len(view))]
        assert all(sum(len(ids) for ids, _ in pack) <= 100 for pack in packs)
        assert packs == [[expected[number] for number in view.sample_numbers(index)] for index in range(len(view))]
        assert sorted(flat(packs)) == sorted(expected)
        orders.append(packs)

    assert orders[0] == orders[2] != orders[1]
    assert len(orders[0]) == len(orders[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_map_views_go_to_workers(dataset: Dataset) -> None:
    """Worker processes read the same items, forked or spawned."""
    samples, packs = SampleView(dataset), PackView(dataset, sequence_length=64, seed=1, epoch=3)
    for view, num_workers, start_method in ((samples, 2, "fork"), (packs, 2, "fork"), (packs, 1, "spawn")):
        loader: DataLoader[Any] = DataLoader(
            view, batch_size=3, collate_fn=FlatCollator(), num_workers=num_workers, multiprocessing_context=start_method
        )

        assert flat(cut(batch) for batch in loader) == flat(cut(view[index]) for index in range(len(view)))


def step_view(dataset: Dataset, **changes: Any) -> StepView:
    """A view of packs, 4 a step."""
    return StepView(dataset, **{"sequence_length": CAPACITY, "num_rows_per_step": 4, "seed": 2, **changes})


def plain(items: Iterable[Item]) -> list[dict[str, list[int]]]:
    """Items as lists."""
    return [{key: tensor.tolist() for key, tensor in item.items()} for item in items]


@given(
    packed=st.booleans(),
    num_rows_per_step=st.integers(1, 30),
    rows_per_micro_batch=st.integers(1, 5),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 3),
)
def test_ranks_share_each_step(
    dataset: Dataset,
    packed: bool,
    num_rows_per_step: int,
    rows_per_micro_batch: int,
    world_size: int,
    seed: int,
    epoch: int,
) -> None:
    """For any ranks and micro-batches, every rank has as many items as it says, and all have every sample once."""
    sizes = {"packed": packed, "num_rows_per_step": num_rows_per_step, "seed": seed}
    ranks = []
    for rank in range(world_size):
        view = step_view(dataset, rank=rank, world_size=world_size, rows_per_micro_batch=rows_per_micro_batch, **sizes)
        view.set_epoch(epoch)
        ranks.append([cut(item) for item in view])
        assert len(ranks[-1]) == len(view)

    padding = ([0, 0], [-100, -100])
    found = [sample for items in ranks for sample in flat(items) if sample != padding]
    assert sorted(found) == sorted(plain_items(dataset))
    assert len({len(items) for items in ranks}) == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_view_goes_on_at_every_item(dataset: Dataset, world_size: int) -> None:
    """Stopped behind any item of either epoch, its state through JSON, another view has exactly what follows."""
    arguments: dict[str, Any] = {"world_size": world_size, "rank": world_size - 1}
    whole = []
    states = []
    view = step_view(dataset, **arguments)
    for epoch in (0, 1):
        view.set_epoch(epoch)
        states.append(json.dumps(view.state_dict()))
        for item in view:
            whole.append(item)
            states.append(json.dumps(view.state_dict()))
    expected = plain(whole)
    assert len(states) == len(whole) + 2

    for number, state in enumerate(states):
        num_before = number if number <= len(view) else number - 1
        resumed = step_view(dataset, **arguments)
        resumed.load_state_dict(json.loads(state))
        found = plain(resumed)
        first_epoch = number <= len(view)
        assert found == expected[num_before : len(view) if first_epoch else None]
        if first_epoch:
            resumed.set_epoch(1)
            assert plain(resumed) == expected[len(view) :]


def test_a_step_view_goes_on_with_other_ranks(dataset: Dataset) -> None:
    """At the beginning of any step it goes on with another number of ranks: the samples of each step are the same."""
    view = step_view(dataset)
    states = {0: view.state_dict()}
    steps: list[Any] = [[]]
    for item in view:
        state = view.state_dict()
        steps[-1] += cut(item)
        if state["micro_batch"] == 0:
            states[state["step"]] = state
            steps.append([])
    assert len(states) == view.num_steps + 1

    for step, state in states.items():
        found: list[Any] = [[] for _ in range(step, view.num_steps)]
        for rank in range(2):
            other = step_view(dataset, rank=rank, world_size=2, rows_per_micro_batch=3)
            other.load_state_dict(state)
            for item in other:
                place = other.state_dict()
                done = place["step"] if place["micro_batch"] else place["step"] - 1
                found[done - step] += [sample for sample in cut(item) if sample[0] != [0, 0]]
        assert [sorted(samples) for samples in found] == [sorted(samples) for samples in steps[step:-1]]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_keep_the_order(dataset: Dataset, num_workers: int) -> None:
    """With any number of workers, that persist or not, from any place, a DataLoader has the items in their order."""
    view = step_view(dataset)
    expected = {}
    for epoch in (0, 1):
        view.set_epoch(epoch)
        expected[epoch] = plain(view)
    for persistent_workers in (False, True):
        loader: DataLoader[Any] = DataLoader(
            view, batch_size=None, num_workers=num_workers, persistent_workers=persistent_workers
        )
        for epoch in (0, 1):
            view.set_epoch(epoch)
            assert plain(loader) == expected[epoch]
        for num_items in (1, 5, len(view) - 1, len(view)):
            view.load_state_dict(view.state_dict(num_items))
            assert plain(loader) == expected[1][num_items:]
        view.set_epoch(0)
        assert plain(loader) == expected[0]
        with pytest.raises(ConfigError, match="num_items"):
            view.state_dict()
        assert view.state_dict(3)["micro_batch"] == 3
        del loader


def test_a_state_of_something_else_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    """A state is taken only for the same dataset and plan, and within a step only for the same split."""
    view = step_view(dataset)
    iterator = iter(view)
    next(iterator)
    state = view.state_dict()
    iterator.close()
    assert (state["step"], state["micro_batch"]) == (0, 1)
    other = Dataset(write_dataset(tmp_path / "other", plain_samples(dataset), fingerprint="1" * 64))

    for wrong in (
        step_view(other), step_view(dataset, seed=3), step_view(dataset, packed=False),
        step_view(dataset, num_rows_per_step=5), step_view(dataset, sequence_length=CAPACITY + 1),
        step_view(dataset, world_size=2), step_view(dataset, rows_per_micro_batch=2),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="expected a state"):
            wrong.load_state_dict(state)
    for change in ({"step": 10**6}, {"step": -1}, {"micro_batch": 4}, {"epoch": -1}):
        with pytest.raises(ConfigError):
            view.load_state_dict({**state, **change})
    for numbers in ({"rank": 1}, {"world_size": 0}, {"rows_per_micro_batch": 0}, {"sequence_length": CAPACITY - 1}):
        with pytest.raises(ConfigError):
            step_view(dataset, **numbers)


def test_views_are_pickled(dataset: Dataset) -> None:
    """A pickled view is the same view, at the same place."""
    view = step_view(dataset)
    view.load_state_dict(view.state_dict(5))

    assert plain(pickle.loads(pickle.dumps(view))) == plain(view)
    packs = PackView(dataset, sequence_length=70, epoch=2)
    received = pickle.loads(pickle.dumps(packs))
    assert plain(received[index] for index in range(len(packs))) == plain(packs[index] for index in range(len(packs)))


def test_collators(dataset: Dataset) -> None:
    """Flat batches have the bounds of their samples, padded ones a mask; nothing is lost in either."""
    view = SampleView(dataset)
    items = [view[index] for index in (3, 0, 7)]
    lengths = [len(item["input_ids"]) for item in items]

    batch = FlatCollator(flash_attention=True)(items)
    assert cut({key: batch[key] for key in ("input_ids", "labels", "position_ids")}) == flat(map(cut, items))
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert batch["input_ids"].shape == (1, sum(lengths))

    padded = PaddingCollator(pad_token_id=1)(items)
    assert cut(padded) == flat(map(cut, items))
    assert padded["attention_mask"].sum(1).tolist() == lengths
    hidden = padded["attention_mask"] == 0
    assert set(padded["input_ids"][hidden].tolist()) == {1}
    assert set(padded["labels"][hidden].tolist()) == {-100}


Batches = list[list[tuple[list[int], list[int]]]]


class Recorder:
    """A collator that remembers the samples of every batch."""

    def __init__(self, collate: Callable[..., dict[str, Any]]) -> None:
        self._collate = collate
        self.batches: Batches = []

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """The batch of items."""
        batch = self._collate(items)
        self.batches.append(cut(batch))
        return batch


def losses_of_a_loop(batches: Batches, accumulation: int, learning_rate: float) -> tuple[list[float], nn.Module]:
    """Plain gradient descent, one sample at a time, on the mean over the label tokens of `accumulation` batches."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for start in range(0, len(batches), accumulation):
        samples = flat(batches[start : start + accumulation])
        num_labels = sum(label != -100 for _, labels in samples for label in labels)
        total = 0.0
        for ids, labels in samples:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum") / num_labels
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


def arguments_of(batch_size: int, output_dir: Path, accumulation: int) -> dict[str, Any]:
    """One epoch of gradient descent without tricks, every loss logged."""
    return {
        "output_dir": str(output_dir), "num_train_epochs": 1, "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip


def assert_trained_as_a_loop(trainer: Any, dataset: Dataset, recorder: Recorder, accumulation: int) -> None:
    """The trainer saw every sample once, and its losses and weights are those of the loop."""
    assert sorted(flat(recorder.batches)) == sorted(plain_items(dataset))
    losses, model = losses_of_a_loop(recorder.batches, accumulation, 0.05)
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    np.testing.assert_allclose(found, losses, atol=2e-4)
    for expected, weight, before in zip(
        model.parameters(), trainer.model.parameters(), make_model().parameters(), strict=True
    ):
        torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(weight, before, atol=1e-4)


VIEWS: dict[str, Callable[[Dataset], tuple[Any, int, Any]]] = {
    "samples, flat": lambda dataset: (SampleView(dataset), 4, FlatCollator()),
    "samples, padded": lambda dataset: (SampleView(dataset), 4, PaddingCollator(dataset.pad_token_id)),
    "packs, joined": lambda dataset: (PackView(dataset, sequence_length=64), 2, FlatCollator()),
    "packs, one by one": lambda dataset: (PackView(dataset, sequence_length=64), 1, None),
    "steps": lambda dataset: (step_view(dataset, num_rows_per_step=2, rows_per_micro_batch=2), 1, FlatCollator()),
}


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", VIEWS)
def test_the_trainer_of_transformers(dataset: Dataset, tmp_path: Path, name: str, accumulation: int) -> None:
    """One epoch of its Trainer over any view: every sample once, and the losses and weights of a plain loop."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    view, batch_size, collate = VIEWS[name](dataset)
    recorder = Recorder(collate or default_data_collator)
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(**arguments_of(batch_size, tmp_path, accumulation), dataloader_pin_memory=False),
        train_dataset=view,
        data_collator=recorder,
    )
    trainer.train()

    assert_trained_as_a_loop(trainer, dataset, recorder, accumulation)


@pytest.mark.parametrize("name", ["samples, padded", "samples, flat", "packs", "samples, by our collator"])
def test_the_trainer_of_trl(dataset: Dataset, tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    """One epoch of TRL's SFTTrainer, by its collator or ours: every sample once, and the losses of a plain loop."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    is_packed, is_ours = name == "packs", name == "samples, by our collator"
    view = PackView(dataset, sequence_length=64) if is_packed else SampleView(dataset)
    trainer = SFTTrainer(
        model=make_model(),
        args=SFTConfig(
            **arguments_of(2 if is_packed else 4, tmp_path, 2),
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            padding_free=name in ("samples, flat", "packs"),
            max_length=None,
            dataloader_pin_memory=False,
        ),
        train_dataset=as_datasets(view),
        data_collator=FlatCollator() if is_ours else None,
        processing_class=AutoTokenizer.from_pretrained(tokenizer_dir),
    )
    collate = trainer.data_collator

    def with_positions(items: list[Any]) -> dict[str, Any]:
        batch = collate(items)
        shape = batch["input_ids"].shape
        return {"position_ids": torch.arange(shape[1]).expand(shape), **batch}

    recorder = Recorder(with_positions)
    trainer.data_collator = recorder
    trainer.train()

    assert_trained_as_a_loop(trainer, dataset, recorder, 2)


def test_trl_trains_on_an_arrow_table(dataset: Dataset, tokenizer_dir: Path, tmp_path: Path) -> None:
    """The table of a dataset is what TRL takes without further ado, and trains on as a plain loop does."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=make_model(),
        args=SFTConfig(**arguments_of(4, tmp_path, 1), max_length=None, dataloader_pin_memory=False),
        train_dataset=datasets.Dataset(dataset.to_arrow()).select_columns(["input_ids", "labels"]),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_dir),
    )
    collate = trainer.data_collator

    def with_positions(items: list[Any]) -> dict[str, Any]:
        batch = collate(items)
        return {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape), **batch}

    recorder = Recorder(with_positions)
    trainer.data_collator = recorder
    trainer.train()

    # The first label is in the table as it is in the mask; no model has a loss on it.
    recorder.batches = [[(ids, [-100, *labels[1:]]) for ids, labels in batch] for batch in recorder.batches]
    assert_trained_as_a_loop(trainer, dataset, recorder, 1)


def test_the_data_layer_needs_no_torch() -> None:
    """All but the views is there without torch, and without pyarrow."""
    modules = "sft_fast, sft_fast.cache, sft_fast.stream, sft_fast.prefetch, sft_fast.arrow"
    code = f"import sys; sys.modules['torch'] = sys.modules['pyarrow'] = None; import {modules}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/views.md runs from top to bottom, with a model directory and a dataset of its tokenizer."""
    from transformers import AutoTokenizer

    model_dir = make_model_dir(tmp_path / "model")
    make_dataset(tmp_path, model_dir, random_records(20))
    page = (Path(__file__).parent.parent / "docs" / "views.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"model_dir": str(model_dir), "tokenizer": AutoTokenizer.from_pretrained(model_dir)}
    monkeypatch.chdir(tmp_path)

    for block in blocks:
        exec(compile(block, "docs/views.md", "exec"), names)

    assert len(blocks) == 6
    assert names["place"]["epoch"] == 1
    assert 0 < len(names["chosen"]) <= 20
    assert names["pinned"]["input_ids"].any()
