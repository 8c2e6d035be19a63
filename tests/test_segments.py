"""Input that changed in part costs only the part that changed, and the result is what all of it would have given."""

import random
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from tests.data_helpers import contents, dump_lines, knobs, random_records

RECORDS = random_records(3000, seed=3, max_words=5)
# A record of each kind that is more than a sample: wrong, without an answer to learn, and too long.
ODD: list[Any] = ["{", {"instruction": "a", "output": ""}, {"instruction": "a " * 200, "output": "b"}]


class Workshop:
    """Preprocesses one file again and again, in a cache and from scratch."""

    def __init__(self, directory: Path, tokenizer: Path) -> None:
        self.file, self.directory, self.num_runs = directory / "data.jsonl", directory, 0
        self.options: dict[str, Any] = {
            "tokenizer": tokenizer, "sequence_length": 128, "system_key": "system", "query_key": "input",
            "on_error": "skip",
        }  # fmt: skip

    def in_cache(self, records: list[Any], **changes: Any) -> sft_fast.Report:
        """The report of the dataset of these records in the cache."""
        self.file.write_bytes(dump_lines(records))
        return sft_fast.ensure_dataset(self.file, self.directory / "cache", **{**self.options, **changes})

    def from_scratch(self, **changes: Any) -> dict[str, bytes]:
        """The files of the dataset of the same records where there is no other."""
        self.num_runs += 1
        directory = self.directory / f"scratch-{self.num_runs}"
        sft_fast.preprocess(self.file, directory, **{**self.options, **changes})
        return contents(directory)


@pytest.fixture
def workshop(tmp_path: Path, tokenizer_dir: Path) -> Workshop:
    """A workshop with a dataset of the records in its cache."""
    workshop = Workshop(tmp_path, tokenizer_dir)
    assert workshop.in_cache(RECORDS).num_reused_samples == 0
    return workshop


CHANGES: dict[str, list[Any]] = {
    "grown": RECORDS + random_records(50, seed=4),
    "shrunk": RECORDS[:-500],
    "put in": RECORDS[:1000] + random_records(1, seed=5) + RECORDS[1000:],
    "put in front": random_records(1, seed=5) + RECORDS,
    "taken out": RECORDS[:2000] + RECORDS[2001:],
    "changed": [*RECORDS[:1500], {"instruction": "new", "output": "new"}, *RECORDS[1501:]],
    "halves exchanged": RECORDS[1500:] + RECORDS[:1500],
    "odd ones put in": RECORDS[:700] + ODD + RECORDS[700:],
    "blank lines put in": ["", *RECORDS[:1800], "", *RECORDS[1800:]],
}


@pytest.mark.parametrize("records", CHANGES.values(), ids=CHANGES)
def test_only_what_changed_is_encoded(workshop: Workshop, records: list[Any]) -> None:
    """Samples of what did not change are taken from an older dataset, and every file is as if none had been taken."""
    report = workshop.in_cache(records)

    assert not report.reused
    assert 2000 < report.num_reused_samples < report.num_samples
    sft_fast.verify(report.path)
    assert contents(Path(report.path)) == workshop.from_scratch()


def test_many_changes_and_cuts(workshop: Workshop) -> None:
    """The files do not depend on what was taken over, after many changes, and with other threads, chunks and shards."""
    generator = random.Random(6)
    records: list[Any] = list(RECORDS)
    for number in range(6):
        for _ in range(generator.randint(1, 5)):
            at = generator.randrange(len(records))
            records[at : at + generator.randint(0, 2)] = generator.choice([ODD, [], random_records(2, seed=number)])
        with knobs(chunk_bytes=generator.choice([64, 5000, 1 << 20]), max_shard_tokens=20_000):
            report = workshop.in_cache(records, num_threads=generator.randint(1, 4))
        assert report.num_reused_samples > 1000
        with knobs(max_shard_tokens=20_000):
            assert contents(Path(report.path)) == workshop.from_scratch()


def test_a_replaced_dataset_is_a_source(workshop: Workshop) -> None:
    """With `overwrite`, samples are taken from the dataset that is replaced."""
    directory = workshop.directory / "out"
    workshop.from_scratch()
    sft_fast.preprocess(workshop.file, directory, **workshop.options)
    workshop.file.write_bytes(dump_lines(CHANGES["put in"]))

    report = sft_fast.preprocess(workshop.file, directory, **workshop.options, overwrite=True)

    assert report.num_reused_samples > 2000
    assert contents(directory) == workshop.from_scratch()


@pytest.mark.parametrize("change", [{"sequence_length": 64}, {"too_long": "truncate"}, {"prompt_key": "input"}])
def test_nothing_is_taken_by_another_recipe(workshop: Workshop, change: dict[str, Any]) -> None:
    """Where a setting decides what samples hold, those of another setting are not taken."""
    assert workshop.in_cache(CHANGES["grown"], **change).num_reused_samples == 0


def test_truncated_samples_are_counted_again(workshop: Workshop) -> None:
    """A segment with a sample that was cut is encoded again, so that counts stay right."""
    before = workshop.in_cache(CHANGES["odd ones put in"], too_long="truncate")
    report = workshop.in_cache(CHANGES["odd ones put in"] + random_records(3), too_long="truncate")

    assert report.num_truncated == before.num_truncated > 0
    assert 2000 < report.num_reused_samples < report.num_samples
    assert contents(Path(report.path)) == workshop.from_scratch(too_long="truncate")


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "segments.jsonl"])
def test_nothing_is_taken_from_damage(workshop: Workshop, name: str) -> None:
    """A shard or list of segments whose checksum is wrong is no source; the work is done as if it were not there."""
    path = Path(workshop.in_cache(RECORDS).path, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)

    report = workshop.in_cache(CHANGES["grown"])

    assert report.num_reused_samples == 0
    assert contents(Path(report.path)) == workshop.from_scratch()
