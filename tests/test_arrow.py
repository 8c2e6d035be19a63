"""Arrow tables: what a dataset becomes, what becomes a dataset, and what is refused."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pyarrow as pa
import pytest

import sft_fast
from sft_fast import Dataset, arrow
from sft_fast.errors import ConfigError, DatasetError, SftFastError
from tests.data_helpers import PlainSample, contents, make_dataset, plain_samples, random_records, write_dataset


@pytest.fixture(params=[300, 70_000])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """Random samples in three shards, of either width, some trained on from the first token."""
    generator = random.Random(2)
    samples: list[PlainSample] = []
    for _ in range(60):
        length = generator.randint(2, 30)
        mask = [generator.random() < 0.5 for _ in range(length - 1)] + [True]
        samples.append(([generator.randrange(request.param) for _ in range(length)], mask))
    return Dataset(write_dataset(tmp_path / "dataset", samples, vocab_size=request.param, shard_sizes=[1, 30]))


@pytest.mark.parametrize("chunk_tokens", [1, 100, 1 << 24])
def test_a_table_holds_every_sample(dataset: Dataset, chunk_tokens: int) -> None:
    """Each row is a sample with its labels and source, whatever the chunks; `datasets` takes the table as it is."""
    with patch.object(arrow, "_CHUNK_TOKENS", chunk_tokens):
        table = dataset.to_arrow()

    rows = datasets.Dataset(table).to_list()
    assert len(rows) == len(dataset)
    for row, sample in zip(rows, dataset, strict=True):
        labels = np.where(sample.label_mask, sample.input_ids.astype(np.int64), -100)
        assert (row["input_ids"], row["labels"]) == (sample.input_ids.tolist(), labels.tolist())
        assert f"{row['source_file']}:{row['source_line']}" == sample.source


def as_large_lists(table: pa.Table) -> pa.Table:
    """The same numbers in other types."""
    lists = pa.large_list(pa.int64())
    return table.set_column(0, "input_ids", table["input_ids"].cast(lists)).set_column(
        1, "labels", table["labels"].cast(lists)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table,
        datasets.Dataset,
        as_large_lists,
        lambda table: pa.concat_tables([table.slice(0, 7), table.slice(7)]),
        lambda table: pa.Table.from_pylist(table.to_pylist(), table.schema),
    ],
    ids=["as it is", "datasets", "large", "sliced", "anew"],
)
def test_there_and_back_is_the_same(dataset: Dataset, tmp_path: Path, change: Callable[[Any], Any]) -> None:
    """A dataset made of its own table has the same samples, masks and sources, and is proved whole."""
    # `datasets` forgets the metadata of a schema, and with it the vocabulary.
    options = {"vocab_size": dataset.vocab_size} if change is datasets.Dataset else {}
    made = Dataset.from_arrow(change(dataset.to_arrow()), tmp_path / "made", **options)

    sft_fast.verify(made.path)
    assert plain_samples(made) == plain_samples(dataset)
    assert [sample.source for sample in made] == [sample.source for sample in dataset]
    for key in ("vocab_size", "pad_token_id", "token_type", "num_tokens", "num_label_tokens", "sample_tokens"):
        assert made.manifest[key] == dataset.manifest[key]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_rows_may_be_chosen(dataset: Dataset, tmp_path: Path) -> None:
    """Rows filtered and shuffled by `datasets` are the dataset that is made."""
    table = datasets.Dataset(dataset.to_arrow()).select([5, 3, 50])

    made = Dataset.from_arrow(table, tmp_path / "made")

    assert plain_samples(made) == [plain_samples(dataset)[number] for number in (5, 3, 50)]
    assert made[2].source == "data.jsonl:51"


def test_any_table_of_ids_and_labels_will_do(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A table of others' making: sources are rows, the vocabulary is what is there, the content decides the rest."""
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "x": 1},
        {"input_ids": [9, 2], "labels": [-100, 2], "x": 2},
    ]
    made = Dataset.from_arrow(pa.Table.from_pylist(rows), tmp_path / "made", tokenizer=tokenizer_dir)

    assert plain_samples(made) == [([5, 6, 7], [False, True, True]), ([9, 2], [False, True])]
    assert [sample.source for sample in made] == ["arrow:1", "arrow:2"]
    assert (made.vocab_size, made.pad_token_id, made.manifest["recipe"]["sequence_length"]) == (10, 0, 3)
    assert made.manifest["tokenizer"] == str(tokenizer_dir)
    again = Dataset.from_arrow(pa.Table.from_pylist(rows), tmp_path / "again", tokenizer=tokenizer_dir)
    assert contents(Path(again.path)) == contents(Path(made.path))
    rows[1]["labels"] = [9, 2]
    other = Dataset.from_arrow(pa.Table.from_pylist(rows), tmp_path / "other", tokenizer=tokenizer_dir)
    assert other.fingerprint != made.fingerprint
    sft_fast.verify(other.path)


def test_what_preprocess_makes_goes_there_and_back(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A real dataset of several files becomes a table and again a dataset, with its files and lines."""
    dataset = make_dataset(tmp_path, tokenizer_dir, random_records(30))

    made = Dataset.from_arrow(dataset.to_arrow(), tmp_path / "made", sequence_length=1024, pad_token_id=7)

    assert plain_samples(made) == plain_samples(dataset)
    assert [sample.source for sample in made] == [sample.source for sample in dataset]
    assert (made.pad_token_id, made.vocab_size) == (7, dataset.vocab_size)


GOOD = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"input_ids": [1, 2]}], {}, "columns input_ids and labels"),
        ([GOOD, {"input_ids": [5, 6], "labels": [-100, 7]}], {}, "found 7 in row 1"),
        ([GOOD, {"input_ids": [5, 6, 7], "labels": [6, 7, -100]}], {}, "found 6 in row 1"),
        ([GOOD, {"input_ids": [5, 6], "labels": [6]}], {}, "others in row 1"),
        ([GOOD, {"input_ids": [], "labels": []}], {}, "found none in sample 1"),
        ([GOOD, {"input_ids": [5, 6], "labels": [5, -100]}], {}, "token to learn .* in sample 1"),
        ([{"input_ids": [-5, 6], "labels": [-100, 6]}], {}, "expected token ids from 0"),
        ([GOOD, {"input_ids": [8, 9], "labels": None}], {}, "null"),
        ([GOOD, {"input_ids": [8, None], "labels": [8, None]}], {}, "null"),
        ([GOOD], {"vocab_size": 7}, "below 7, found 7 in sample 0"),
        ([GOOD], {"sequence_length": 2}, "at most 2 tokens, found 3"),
        ([GOOD], {"vocab_size": 8, "pad_token_id": 8}, "pad_token_id"),
        ([{**GOOD, "source_file": None, "source_line": 1}], {}, "null"),
        ([{"input_ids": ["a"], "labels": ["a"]}], {}, "lists of integers"),
        ([{"input_ids": 1, "labels": 1}], {}, "lists of integers"),
        ([], {}, "columns input_ids and labels"),
    ],
)
def test_what_is_no_sample_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    """A row that can't be a sample, and a table of something else, is one error that says where; nothing is left."""
    with pytest.raises(SftFastError, match=message) as caught:
        Dataset.from_arrow(pa.Table.from_pylist(rows), tmp_path / "here" / "made", **options)

    assert isinstance(caught.value, ConfigError | DatasetError)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_and_no_room_are_errors(tmp_path: Path) -> None:
    """A table without rows makes no dataset, and a directory that holds something is not touched."""
    table = pa.Table.from_pylist([GOOD])
    with pytest.raises(SftFastError, match="found none"):
        Dataset.from_arrow(table.slice(0, 0), tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = contents(tmp_path)

    with pytest.raises(DatasetError, match="empty directory"):
        Dataset.from_arrow(table, tmp_path / "mine")

    assert contents(tmp_path) == before


def test_without_pyarrow_the_error_says_what_to_do(dataset: Dataset) -> None:
    """Where pyarrow is not installed, the error names the package and how to get it."""
    with patch.dict("sys.modules", {"pyarrow": None}), pytest.raises(ConfigError, match="pyarrow") as caught:
        dataset.to_arrow()

    assert "pip install" in (caught.value.hint or "")
