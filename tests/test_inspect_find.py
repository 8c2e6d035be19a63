"""Finding in a data set: the record of a line, a text over the borders of tokens, and where two data sets part."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import sft_fast
from sft_fast.errors import ConfigError, DatasetError
from sft_fast.inspect import find
from sft_fast.inspect.diff import compare, show_comparison
from sft_fast.inspect.find import find_source, search
from sft_fast.inspect.tokens import Reader
from tests.conftest import CHAT_TEMPLATE, make_tokenizer_dir
from tests.data_helpers import dump_lines, make_dataset, random_records, write_dataset

BAD = {"instruction": "no answer"}


@pytest.fixture(scope="module")
def reader(tokenizer_dir: Path) -> Reader:
    """The tiny byte-level tokenizer."""
    return Reader(str(tokenizer_dir))


def test_survey_is_what_the_samples_say(tmp_path: Path) -> None:
    """The survey of a data set has what reading each sample gives, and equal hashes for equal ids and masks only."""
    generator = np.random.default_rng(5)
    samples = []
    for _ in range(300):
        length = int(generator.integers(1, 12))
        samples.append((generator.integers(0, 2, length).tolist(), (generator.random(length) < 0.5).tolist()))
    narrow, wide = (
        sft_fast.Dataset(write_dataset(tmp_path / str(size), samples, vocab_size=size, shard_sizes=[7, 100]))
        for size in (300, 70_000)
    )

    survey: dict[str, Any] = narrow._core.survey()

    for number, (ids, mask) in enumerate(samples):
        assert survey["num_label_tokens"][number] == sum(mask[1:])
        runs = sum(now and not before for before, now in zip([False, *mask], mask, strict=False))
        assert survey["num_label_runs"][number] == runs
        assert (survey["files"][number], survey["lines"][number]) == (0, number + 1)
        for other, (other_ids, other_mask) in enumerate(samples[:50]):
            assert (survey["ids_hashes"][number] == survey["ids_hashes"][other]) == (ids == other_ids)
            # The mask is known by its runs: behind the last one, its length says nothing.
            same_mask = np.flatnonzero(mask).tolist() == np.flatnonzero(other_mask).tolist()
            assert (survey["mask_hashes"][number] == survey["mask_hashes"][other]) == same_mask
    for name, values in wide._core.survey().items():
        assert (values == survey[name]).all(), name


def test_source_finds_the_samples_of_a_line(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A file and line lead to the sample that was made of them, under the whole path or the end of it."""
    records = random_records(20)
    dataset = make_dataset(tmp_path, tokenizer_dir, [*records[:10], BAD, *records[10:]], on_error="skip")

    for name in (str(tmp_path / "data.jsonl"), "data.jsonl", f"{tmp_path.name}/data.jsonl"):
        assert find_source(dataset, f"{name}:3") == find.Found([2], [])
        assert find_source(dataset, f"{name}:12") == find.Found([10], [])


def test_source_says_why_a_record_was_left_out(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The line of a record that was rejected leads to its reason, as `rejected.jsonl` has it."""
    dataset = make_dataset(tmp_path, tokenizer_dir, [*random_records(3), BAD], on_error="skip")

    found = find_source(dataset, "data.jsonl:4")

    assert found.samples == []
    assert found.rejected == [json.loads(Path(dataset.path, "rejected.jsonl").read_text(encoding="utf-8"))]
    assert found.rejected[0]["reason"] == "missing_key"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{", encoding="utf-8")])
def test_damaged_list_of_rejected_records_is_an_error(tokenizer_dir: Path, tmp_path: Path, damage: Any) -> None:
    """Where `rejected.jsonl` is gone or no JSON, what became of a line cannot be told, and the error names the file."""
    dataset = make_dataset(tmp_path, tokenizer_dir, random_records(3))
    damage(Path(dataset.path, "rejected.jsonl"))

    with pytest.raises(DatasetError, match="rejected records"):
        find_source(dataset, "data.jsonl:1")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("data.jsonl", "expected FILE:LINE"),
        ("data.jsonl:x", "expected FILE:LINE"),
        ("other.jsonl:1", "is no file of the data set"),
        ("ata.jsonl:1", "is no file of the data set"),
        ("data.jsonl:9", "the last sample before it is from line 3"),
        ("data.jsonl:0", "no sample is before it"),
    ],
)
def test_source_that_is_not_there_is_an_error(tokenizer_dir: Path, tmp_path: Path, place: str, message: str) -> None:
    """A place that is none, an unknown file, a line without a record: an error that says what there is."""
    dataset = make_dataset(tmp_path, tokenizer_dir, random_records(3))

    with pytest.raises(ConfigError) as caught:
        find_source(dataset, place)
    assert message in str(caught.value)


def test_a_file_name_of_two_files_is_an_error(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The end of a path that two files have is not guessed at: the error names both."""
    paths = [tmp_path / name / "data.jsonl" for name in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(random_records(1)[0]) + "\n", encoding="utf-8")
    options: dict[str, Any] = {"tokenizer": tokenizer_dir, "sequence_length": 512, "query_key": "input"}
    dataset = sft_fast.Dataset(sft_fast.preprocess(paths, tmp_path / "out", **options).path)

    with pytest.raises(ConfigError, match="several files") as caught:
        find_source(dataset, "data.jsonl:1")
    assert str(paths[1]) in str(caught.value)
    assert find_source(dataset, f"{paths[1]}:1").samples == [1]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_search_finds_what_is_in_the_text(
    reader: Reader, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Search finds as many places as the decoded texts of the samples have, however it cuts them into pieces."""
    texts = data.draw(st.lists(st.text("ab<漢\n", min_size=1, max_size=12), min_size=1, max_size=6))
    needle = data.draw(st.text("ab<漢\n", min_size=1, max_size=3))
    samples = []
    for text in texts:
        ids = reader.tokenizer.encode(text, add_special_tokens=False).ids
        samples.append((ids, data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))))
    path = write_dataset(tmp_path_factory.mktemp("search") / "out", samples, vocab_size=403)

    with patch.object(find, "CHUNK_TOKENS", data.draw(st.integers(1, 40))):
        result = search(sft_fast.Dataset(path), reader, needle, max_hits=1000)

    assert result.num_hits == sum(text.count(needle) for text in texts) == len(result.hits)
    assert result.num_samples_with_hits == sum(needle in text for text in texts)
    assert (result.num_samples_searched, result.num_tokens_searched) == (
        len(texts),
        sum(len(ids) for ids, _ in samples),
    )
    for hit in result.hits:
        ids, mask = samples[hit.sample]
        assert needle in reader.tokenizer.decode(ids[hit.token : hit.token + hit.num_tokens], skip_special_tokens=False)
        trained = mask[hit.token : hit.token + hit.num_tokens]
        assert hit.trained == ("yes" if all(trained) else "partly" if any(trained) else "no")
        assert hit.before + needle + hit.after in texts[hit.sample]


def test_search_in_other_tokenizers(reader: Reader, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Where tokens do not stand for bytes of their own, search decodes sample by sample and finds the same."""
    dataset = make_dataset(tmp_path, tokenizer_dir, random_records(20))
    expected = search(dataset, reader, "Paris")
    with patch.object(Reader, "token_bytes", None):
        found = search(dataset, reader, "Paris")

    assert found == expected
    assert expected.num_hits > 0
    with pytest.raises(ConfigError):
        search(dataset, reader, "")


def test_equal_datasets_have_no_difference(tokenizer_dir: Path, reader: Reader, tmp_path: Path) -> None:
    """A data set is identical to one of the same records in a file of another name."""
    records = random_records(30)
    here = make_dataset(tmp_path / "here", tokenizer_dir, records)
    there = make_dataset(tmp_path / "there", tokenizer_dir, records)

    result = compare(here, there, (reader, reader))

    assert (result.num_matched, result.num_identical, result.num_only_here, result.num_only_there) == (30, 30, 0, 0)
    assert result.differences == []


def test_masks_part_where_they_part(tokenizer_dir: Path, reader: Reader, tmp_path: Path) -> None:
    """Two policies of what is trained on give the same ids; the difference is shown at the token where masks part."""
    turns = [{"role": role, "content": "a b c"} for role in ("user", "assistant") * 2]
    records = [{"messages": turns}, *random_records(5), BAD]
    here = make_dataset(tmp_path, tokenizer_dir, records, on_error="skip")
    options: dict[str, Any] = {"tokenizer": tokenizer_dir, "sequence_length": 1024, "on_error": "skip"}
    more = {"system_key": "system", "query_key": "input", "train_on": "last_answer"}
    other = sft_fast.preprocess(tmp_path / "data.jsonl", tmp_path / "other", **options, **more)
    there = sft_fast.Dataset(other.path)
    first_answer = np.flatnonzero(here[0].label_mask)[0]

    result = compare(here, there, (reader, reader))

    assert result.kinds["mask"] == result.num_examined == result.num_matched - result.num_identical
    assert result.kinds["text"] == result.kinds["tokens"] == 0
    assert (result.differences[0].kind, result.differences[0].tokens) == ("mask", (first_answer, first_answer))
    assert any(result.differences[0].excerpts[0].label_mask)
    assert json.loads(json.dumps(result.to_json()))["kinds"]["mask"] == result.kinds["mask"]


def test_templates_part_where_their_text_parts(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Two templates are compared by text, over two tokenizers: the first token that differs is named in each."""
    other_dir = make_tokenizer_dir(tmp_path / "model", CHAT_TEMPLATE.replace("'<|im_end|>'", "'!<|im_end|>'"))
    records = random_records(8)
    here = make_dataset(tmp_path / "here", tokenizer_dir, records)
    there = make_dataset(tmp_path / "there", other_dir, records)
    readers = (Reader(str(tokenizer_dir)), Reader(str(other_dir)))

    result = compare(here, there, readers, max_differences=100)

    assert result.kinds == {"text": 8, "mask": 0, "tokens": 0, "same": 0}
    for difference in result.differences:
        pieces = [
            reader.view(dataset, number).pieces
            for dataset, reader, number in zip((here, there), readers, difference.samples, strict=True)
        ]
        texts = ["".join(part) for part in pieces]
        common = next(at for at, (one, other) in enumerate(zip(*texts, strict=False)) if one != other)
        for part, token in zip(pieces, difference.tokens, strict=True):
            start = len("".join(part[:token]))
            assert start <= common < start + len(part[token])


def test_tokenizers_part_in_tokens_alone(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Two tokenizers that cut the same text differently are compared by text: text and mask are the same."""
    other_dir = make_tokenizer_dir(tmp_path / "model")
    content = json.loads((other_dir / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:20]
    (other_dir / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    records = [{"instruction": "What is the capital?", "output": "The sea is wide, never still."}] * 3
    here = make_dataset(tmp_path / "here", tokenizer_dir, records)
    there = make_dataset(tmp_path / "there", other_dir, records)

    result = compare(here, there, (Reader(str(tokenizer_dir)), Reader(str(other_dir))))

    assert not result.same_tokenizer
    assert (result.num_examined, result.num_identical) == (3, 0)
    assert result.kinds == {"text": 0, "mask": 0, "tokens": 3, "same": 0}


def test_samples_without_a_partner_are_counted(tokenizer_dir: Path, reader: Reader, tmp_path: Path) -> None:
    """Records that one data set lacks are counted, and the others still find each other."""
    records = random_records(10)
    path = tmp_path / "data.jsonl"
    options: dict[str, Any] = {"tokenizer": tokenizer_dir, "sequence_length": 1024, "on_error": "skip"}
    datasets = []
    for name, content in (("here", [BAD, *records[1:]]), ("there", [*records[:9], BAD])):
        path.write_bytes(dump_lines(content))
        datasets.append(sft_fast.Dataset(sft_fast.preprocess(path, tmp_path / name, **options).path))

    result = compare(*datasets, (reader, reader))

    assert (result.num_only_here, result.num_only_there, result.num_matched, result.num_identical) == (1, 1, 8, 8)


def test_nothing_in_common_is_said(
    tokenizer_dir: Path, reader: Reader, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Data sets of other files have no pairs, and it is said why."""
    here = make_dataset(tmp_path / "here", tokenizer_dir, random_records(3, seed=1))
    there = make_dataset(tmp_path / "there", tokenizer_dir, random_records(4, seed=2))

    result = compare(here, there, (reader, reader))
    show_comparison(result, (here.path, there.path), Console(), with_ids=False)

    assert (result.num_matched, result.num_only_here, result.num_only_there) == (0, 3, 4)
    assert "no file of one has the path or the content" in " ".join(capsys.readouterr().out.split())


def test_only_a_part_is_examined(tokenizer_dir: Path, reader: Reader, tmp_path: Path) -> None:
    """Of many pairs that differ, so many texts are compared as is said, the same each time; the counts say so."""
    records = random_records(40)
    here = make_dataset(tmp_path, tokenizer_dir, records)
    (tmp_path / "model").mkdir()
    other_dir = make_tokenizer_dir(tmp_path / "model", CHAT_TEMPLATE.replace("'\\n'", "'\\n\\n'"))
    options: dict[str, Any] = {"tokenizer": other_dir, "sequence_length": 1024, "system_key": "system"}
    other = sft_fast.preprocess(tmp_path / "data.jsonl", tmp_path / "other", query_key="input", **options)
    there = sft_fast.Dataset(other.path)

    results = [compare(here, there, (reader, reader), max_examined=10) for _ in range(2)]

    assert (results[0].num_examined, sum(results[0].kinds.values())) == (10, 10)
    assert results[0] == results[1]
