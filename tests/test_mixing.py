"""Sources with weights and caps: what an epoch uses of each, and that it never touches a token."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_fast import Dataset, Packing, Report, Source, ensure_dataset, preprocess
from sft_fast.errors import ConfigError
from sft_fast.mixing import read_entries
from sft_fast.stream import StepStream
from tests.data_helpers import contents, dump_lines, random_records

SIZES = {"web": 40, "math": 11, "code": 5}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a file for each source; that of `code` has a record that is wrong."""
    directory = tmp_path_factory.mktemp("sources")
    for seed, (name, size) in enumerate(SIZES.items()):
        wrong = ["{}"] if name == "code" else []
        (directory / f"{name}.jsonl").write_bytes(dump_lines([*random_records(size, seed=seed), *wrong]))
    return directory


@pytest.fixture(scope="module")
def make(files: Path, tokenizer_dir: Path) -> Callable[..., Report]:
    """Makes or finds the data set of all sources, with what is said about some of them, in a cache."""

    def make(**entries: dict[str, Any]) -> Report:
        listed = [{"path": str(files / f"{name}.jsonl"), **entries.get(name, {})} for name in SIZES]
        return ensure_dataset(listed, files / "cache", tokenizer=tokenizer_dir, sequence_length=512, on_error="skip")

    make()  # the names in the manifest are those of who made it
    return make


Make = Callable[..., Report]


def uses(packing: Packing) -> Counter[int]:
    """How often each sample is in the rows."""
    return Counter(itertools.chain.from_iterable(row.tolist() for row in packing))


def test_sources_are_counted(make: Make, files: Path) -> None:
    """Each source has its records, samples and tokens, which add up to those of the data set, and knows its samples."""
    report = make(math={"name": "sums"})
    dataset = Dataset(report.path, report.sources)

    assert dataset.sources == report.sources
    assert [source.name for source in report.sources] == ["web", "sums", "code"]
    assert [source.num_records for source in report.sources] == [40, 11, 6]
    assert [source.num_samples for source in report.sources] == list(SIZES.values())
    assert [source.num_rejected for source in report.sources] == [0, 0, 1]
    for name in ("num_records", "num_samples", "num_rejected", "num_tokens", "num_label_tokens"):
        assert sum(getattr(source, name) for source in report.sources) == getattr(report, name)
    names = [dataset.source_of(number) for number in range(len(dataset))]
    assert names == ["web"] * 40 + ["sums"] * 11 + ["code"] * 5
    assert [dataset.sources[number].name for number in dataset.source_numbers] == names
    for source in report.sources:
        own = dataset.lengths[np.array([name == source.name for name in names])]
        assert own.sum() == source.num_tokens


def test_names_are_kept_with_the_dataset(files: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Opened without further words, a data set knows the sources that it was made of, each of weight 1."""
    listed = [
        {"path": [str(files / "web.jsonl"), str(files / "math.jsonl")], "name": "a", "weight": 3},
        files / "c*.jsonl",
    ]
    preprocess(listed, tmp_path / "out", tokenizer=tokenizer_dir, sequence_length=512, on_error="skip")

    sources = Dataset(tmp_path / "out").sources

    assert [(source.name, source.num_files, source.weight) for source in sources] == [("a", 2, 1.0), ("c", 1, 1.0)]
    assert sources[0].num_samples == 51


def test_a_weight_encodes_nothing(make: Make) -> None:
    """Weights, caps and names find the same data set, byte by byte the same; it is opened with those of the moment."""
    plain = make()
    before = contents(Path(plain.path))

    mixed = make(web={"weight": 0.25, "name": "x"}, math={"weight": 3, "max_samples": 7})

    assert (mixed.path, mixed.reused, contents(Path(mixed.path))) == (plain.path, True, before)
    assert mixed.fingerprint == plain.fingerprint
    dataset = Dataset(mixed.path, mixed.sources)
    assert dataset.source_of(0) == "x"
    assert [source.num_samples_per_epoch for source in dataset.sources] == [10, 21, 5]


def test_all_of_all_sources_is_the_plan_without_sources(make: Make) -> None:
    """Weight 1 and caps that nothing exceeds change no plan."""
    report = make(web={"weight": 1, "max_samples": 40})
    for epoch in range(2):
        rows = [
            [row.tolist() for row in Dataset(report.path, sources).pack(sequence_length=512, epoch=epoch)]
            for sources in (None, report.sources, [Source(name="all", num_files=3)])
        ]
        assert rows[0] == rows[1] == rows[2]


@settings(max_examples=40, deadline=None)
@given(
    weights=st.fixed_dictionaries({name: st.sampled_from([0, 0.5, 1, 2]) | st.floats(1e-6, 4) for name in SIZES}),
    caps=st.fixed_dictionaries({}, optional={name: st.integers(1, 50) for name in SIZES}),
    seed=st.integers(0, 2**64 - 1),
    packed=st.booleans(),
)  # fmt: skip
def test_weights_are_kept(make: Make, weights: dict[str, float], caps: dict[str, int], seed: int, packed: bool) -> None:
    """An epoch uses each sample that a cap keeps the floor or the ceiling of weight times; all of them, rounded."""
    dataset = Dataset(make().path).mix(weights, caps)
    plan = dataset.pack if packed else dataset.rows
    kept: dict[str, set[int]] = {}
    for epoch in range(3):
        counts = uses(plan(sequence_length=512, seed=seed, epoch=epoch))
        for source in dataset.sources:
            own = [number for number in range(len(dataset)) if dataset.source_of(number) == source.name]
            weight = round(weights[source.name] * 1e6) / 1e6
            num_kept = min(len(own), caps.get(source.name, len(own)))
            num_uses = sum(counts[number] for number in own)
            assert num_uses == source.num_samples_per_epoch
            assert abs(num_uses - weight * num_kept) <= 0.5 + 1e-6
            often = sorted((counts[number] for number in own), reverse=True)
            assert set(often[:num_kept]) <= {int(weight), int(-(-weight // 1))}
            assert not any(often[num_kept:])
            if weight >= 1:
                used = {number for number in own if counts[number]}
                assert kept.setdefault(source.name, used) == used, "a cap keeps the same samples in every epoch"


def test_halves_make_a_whole(make: Make) -> None:
    """With a weight of 0.5, two epochs in a row use every sample of an even number once."""
    dataset = Dataset(make().path).mix({"web": 0.5, "math": 0, "code": 0})
    for first in range(3):
        both = [uses(dataset.pack(sequence_length=512, epoch=epoch)) for epoch in (first, first + 1)]
        assert both[0] + both[1] == Counter(range(40))


def test_no_source_changes_what_is_taken_of_another(make: Make) -> None:
    """The part of a source depends on the seed and its own samples alone, and another seed takes another."""

    def part(weight_of_another: float, seed: int) -> set[int]:
        dataset = Dataset(make().path).mix({"web": 0.3, "math": weight_of_another})
        return {number for number in uses(dataset.rows(sequence_length=512, seed=seed)) if number < 40}

    assert part(1, seed=1) == part(2.5, seed=1) != part(1, seed=2)


@pytest.mark.parametrize("packed", [False, True])
def test_steps_of_a_mix_are_the_same_for_any_ranks(make: Make, packed: bool) -> None:
    """Step k has the same samples whatever the ranks, read in any order; epochs end where their rows do."""
    dataset = Dataset(make().path).mix({"web": 0.4, "math": 1.7})

    def stream() -> StepStream:
        return StepStream(dataset, sequence_length=512, packed=packed, seed=5, num_rows_per_step=3, num_epochs=4.5)

    def samples(stream: StepStream, step: int, world_size: int) -> Counter[int]:
        plans = [
            stream.step(step, rank=rank, world_size=world_size, rows_per_micro_batch=1) for rank in range(world_size)
        ]
        packing = stream.packing(plans[0].epoch)
        rows = [row for plan in plans for micro_batch in plan.micro_batches for row in micro_batch]
        return Counter(itertools.chain.from_iterable(packing[row].tolist() for row in rows))

    one, many = stream(), stream()
    steps = [samples(one, step, 1) for step in range(one.num_steps)]
    assert steps == [samples(many, step, 4) for step in reversed(range(many.num_steps))][::-1]
    ends = list(itertools.accumulate(one.num_steps_of(epoch) for epoch in range(5)))
    assert [one.first_step_of(epoch) for epoch in range(1, 6)] == ends
    assert one.num_steps == ends[3] + -(-one.num_steps_of(4) // 2)
    for epoch, (start, end) in enumerate(itertools.pairwise([0, *ends[:4]])):
        assert sum(steps[start:end], Counter()) == uses(one.packing(epoch))
        assert one.epoch_of(end) == epoch + 1
        assert [one.locate(step) for step in (start, end - 1)] == [(epoch, 0), (epoch, end - start - 1)]


def test_a_view_goes_on_in_a_mix(make: Make) -> None:
    """The stateful view has the items of each epoch's own length, goes on where it stood, and refuses another mix."""
    from sft_fast.views import StepView

    dataset = Dataset(make().path).mix({"web": 0.3, "math": 1.5})

    def view(dataset: Dataset) -> StepView:
        return StepView(dataset, sequence_length=512, num_rows_per_step=2)

    whole = view(dataset)
    for epoch in range(4):
        whole.set_epoch(epoch)
        items = [item["input_ids"].tolist() for item in whole]
        assert len(items) == len(whole)
        resumed, first = view(dataset), view(dataset)
        first.set_epoch(epoch)
        iterator = iter(first)
        taken = [next(iterator)["input_ids"].tolist()]
        resumed.load_state_dict(first.state_dict())
        assert taken + [item["input_ids"].tolist() for item in resumed] == items
        with pytest.raises(ConfigError, match="mix"):
            view(dataset.mix({"web": 0.4})).load_state_dict(first.state_dict())


def test_too_many_samples_are_refused(make: Make) -> None:
    """An epoch that could not be numbered is an error, not a process without memory."""
    sources = [Source(name="all", num_files=3, weight=1e9)]
    with pytest.raises(ConfigError, match="can be numbered"):
        Dataset(make().path, sources).pack(sequence_length=512)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "at least one input file"),
        ([3], r"file_name\[0\]"),
        ([{"name": "a"}], r"file_name\[0\]\.path"),
        ([{"path": "a", "wieght": 2}], "wieght"),
        ([{"path": "a", "weight": -1}], r"file_name\[0\]\.weight"),
        ([{"path": "a", "weight": float("nan")}], "weight"),
        ([{"path": "a", "weight": True}], "weight"),
        ([{"path": "a", "max_samples": 0}], "max_samples"),
        ([{"path": "a", "name": "b"}, {"path": "c", "name": "b"}], "two sources"),
        ({"path": "a", "name": "a/b"}, r"file_name\.name"),
    ],
)
def test_entries_that_cannot_be_are_named(files: Any, message: str) -> None:
    """What an entry may not say is refused with the place in the list."""
    with pytest.raises(ConfigError, match=message):
        read_entries(files)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.jsonl", "b.json.gz"], ["a", "b"]),
        (["x/data.jsonl", "y/data.jsonl"], ["data", "data-2"]),
        (["data/*.jsonl", "train-[0-9]*.jsonl.zst"], ["data", "train"]),
        ([{"path": "a.jsonl", "name": "b"}, "b.jsonl"], ["b", "b-2"]),
        (["b.jsonl", {"path": "a.jsonl", "name": "b"}], ["b-2", "b"]),
        (["*"], ["data"]),
    ],
)
def test_sources_without_a_name_are_called_as_their_files(paths: Any, names: list[str]) -> None:
    """Each source has a name of its own, and one that was given is never taken away."""
    assert [entry.name for entry in read_entries(paths)] == names


def test_sources_of_other_files_are_refused(make: Make) -> None:
    """Sources must cover the files of the data set, and be called by names that it has."""
    with pytest.raises(ConfigError, match="sources of 3 files, found sources of 1"):
        Dataset(make().path, [Source(name="all")])
    with pytest.raises(ConfigError, match='found "wbe"'):
        Dataset(make().path).mix({"wbe": 2.0})
