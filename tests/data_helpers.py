"""What the tests of the data layer share: records, datasets made of them, and looks at a disk."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sft_fast import Dataset, data, preprocess

# Token ids and label mask of a sample.
PlainSample = tuple[list[int], list[bool]]

WORDS = (
    "What is the capital of France Paris Add two and three five sea wide blue never still poem ü 漢字 🙂 \n \t 'quoted'"
)


def random_text(random: random.Random, num_words: int) -> str:
    """Words, some of them beyond ASCII."""
    return " ".join(random.choice(WORDS.split(" ")) for _ in range(num_words)) + "."


def random_record(random: random.Random, max_words: int = 12) -> dict[str, Any]:
    """A good record, of fields or of messages."""

    def text() -> str:
        return random_text(random, random.randint(1, max_words))

    if random.random() < 0.6:
        record = {"instruction": text(), "input": random.choice(["", text()]), "output": text()}
        return record if random.random() < 0.5 else {"system": text(), **record}
    roles = ["system"] * random.randint(0, 1) + ["user", "assistant"] * random.randint(1, 3)
    return {"messages": [{"role": role, "content": text()} for role in roles]}


def random_records(num_records: int, seed: int = 0, max_words: int = 12) -> list[dict[str, Any]]:
    """Good records."""
    generator = random.Random(seed)
    return [random_record(generator, max_words) for _ in range(num_records)]


def dump_lines(records: Sequence[Any]) -> bytes:
    """Records as JSON Lines; a record that is a text or bytes is taken as it is."""
    lines = (record if isinstance(record, str | bytes) else json.dumps(record) for record in records)
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)


def make_dataset(directory: Path, tokenizer: Path, records: Sequence[Any], **options: Any) -> Dataset:
    """The dataset that `preprocess` makes of records in a file `data.jsonl`, both in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "data.jsonl"
    path.write_bytes(dump_lines(records))
    defaults = {"tokenizer": tokenizer, "sequence_length": 1024, "system_key": "system", "query_key": "input"}
    return Dataset(preprocess(path, directory / "out", **{**defaults, **options}).path)


@contextmanager
def knobs(**private: int) -> Iterator[None]:
    """Within it, `preprocess` works with other sizes of chunks (`chunk_bytes`) and shards (`max_shard_tokens`)."""
    with patch.object(data._core, "preprocess", partial(data._core.preprocess, **private)):
        yield


def plain_samples(dataset: Dataset) -> list[PlainSample]:
    """All samples as lists."""
    return [(sample.input_ids.tolist(), sample.label_mask.tolist()) for sample in dataset]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too, with its bytes; a directory counts as an empty file."""
    paths = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"" for path in paths}
