"""`duplicates: drop`: which records count as same, which of them stays, and that nothing else decides it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

import sft_fast
from tests.data_helpers import contents, dump_lines, knobs, make_dataset, plain_samples, random_records

OPTIONS: dict[str, Any] = {"sequence_length": 512, "system_key": "system", "query_key": "input"}


def repeated(num_records: int, num_distinct: int, seed: int) -> list[dict[str, Any]]:
    """Records that come several times, some of them written in another way."""
    generator = random.Random(seed)
    distinct = random_records(num_distinct, seed=seed)
    records = [generator.choice(distinct) for _ in range(num_records)]
    return [dict(reversed(record.items())) if generator.random() < 0.3 else record for record in records]


def rejected_of(directory: str | Path) -> list[dict[str, Any]]:
    """The lines of `rejected.jsonl`."""
    return [json.loads(line) for line in Path(directory, "rejected.jsonl").read_text().splitlines()]


def test_the_first_of_the_same_samples_stays(tokenizer_dir: Path, tmp_path: Path) -> None:
    """What is left is each sample once, where it first came; each other one is listed with the place of its first."""
    records = repeated(300, 60, seed=1)
    all_of_them = make_dataset(tmp_path / "keep", tokenizer_dir, records, **OPTIONS)
    dropped = make_dataset(tmp_path / "drop", tokenizer_dir, records, duplicates="drop", **OPTIONS)

    firsts: dict[str, int] = {}
    expected, listed = [], []
    for number, sample in enumerate(plain_samples(all_of_them), start=1):
        first = firsts.setdefault(json.dumps(sample), number)
        if first == number:
            expected.append(sample)
        else:
            listed.append((number, f"{tmp_path / 'drop' / 'data.jsonl'}:{first}"))
    assert plain_samples(dropped) == expected
    found = rejected_of(dropped.path)
    assert [(line["line"], line["message"].rpartition(" ")[2]) for line in found] == listed
    assert {line["reason"] for line in found} == {"duplicate"}
    assert dropped.manifest["rejected_by_reason"] == {"duplicate": len(listed)}
    assert sum(source.num_rejected for source in dropped.sources) == len(listed) > 200
    sft_fast.verify(dropped.path)


def test_same_means_the_same_ids_and_mask(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The same tokens with another mask are no duplicate; the same conversation in another shape is one."""
    messages = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    masked = [messages[0], {**messages[1], "weight": 0}, *messages[2:]]
    shares = [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in messages]
    records = [{"messages": messages}, {"messages": masked}, {"conversations": shares}]

    dataset = make_dataset(tmp_path, tokenizer_dir, records, duplicates="drop", **OPTIONS)

    assert len(dataset) == 2
    assert dataset[0].input_ids.tolist() == dataset[1].input_ids.tolist()
    assert [(line["line"], line["reason"]) for line in rejected_of(dataset.path)] == [(3, "duplicate")]


@pytest.mark.parametrize("shape", ["lines", "array"])
def test_threads_and_chunks_decide_nothing(tokenizer_dir: Path, tmp_path: Path, shape: str) -> None:
    """The bytes of a data set without duplicates, wrong records between them, are the same however it was made."""
    records = [*repeated(150, 40, seed=2), {"instruction": 1, "output": "x"}, *repeated(150, 40, seed=2)]
    for name, part in (("a", records[:200]), ("b", records[200:])):
        content = dump_lines(part) if shape == "lines" else json.dumps(part).encode()
        (tmp_path / f"{name}.json").write_bytes(content)
    found = set()
    for number, (threads, chunk_bytes) in enumerate([(1, 1 << 20), (3, 64), (2, 700)]):
        with knobs(chunk_bytes=chunk_bytes, max_shard_tokens=2000):
            report = sft_fast.preprocess(
                [tmp_path / "a.json", tmp_path / "b.json"], tmp_path / f"out-{number}", tokenizer=tokenizer_dir,
                duplicates="drop", on_error="skip", num_threads=threads, **OPTIONS,
            )  # fmt: skip
        assert report.rejected_by_reason == {"duplicate": 260, "wrong_type": 1}
        assert report.num_samples == 40
        found.add(tuple(contents(Path(report.path)).items()))
    assert len(found) == 1


@pytest.mark.parametrize("seed", range(4))
def test_what_is_reused_is_the_same_as_made_anew(tokenizer_dir: Path, tmp_path: Path, seed: int) -> None:
    """After any change samples come from the older data set, and the bytes are those of a fresh run."""
    generator = random.Random(seed)
    records: list[Any] = random_records(3000, seed=seed)
    records += generator.sample(records, 20)
    path = tmp_path / "data.jsonl"

    def make(name: str, **options: Any) -> sft_fast.Report:
        return sft_fast.preprocess(
            path, tmp_path / name, tokenizer=tokenizer_dir, duplicates="drop", **{**OPTIONS, **options}
        )

    path.write_bytes(dump_lines(records))
    make("out")
    num_reused = 0
    for step in range(3):
        start = generator.randrange(len(records) - 400)
        records[start:start] = generator.sample(records, 5)  # the first of what comes later
        del records[start + 300 : start + 310]
        path.write_bytes(dump_lines(records))
        num_reused += make("out", overwrite=True).num_reused_samples
        fresh = make(f"fresh-{step}")
        assert contents(tmp_path / "out") == contents(Path(fresh.path))
    assert num_reused > 2000


def test_it_is_other_work(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The policy is part of the recipe, and a policy that is not known is named."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(dump_lines(random_records(5)))
    make = {
        policy: sft_fast.ensure_dataset(path, tmp_path / "cache", tokenizer=tokenizer_dir, duplicates=policy, **OPTIONS)
        for policy in ("keep", "drop")
    }
    assert make["keep"].fingerprint != make["drop"].fingerprint
    with pytest.raises(sft_fast.ConfigError, match="'keep' or 'drop'"):
        sft_fast.preprocess(path, tmp_path / "o", tokenizer=tokenizer_dir, duplicates="dorp", **OPTIONS)


def test_records_that_are_split_are_compared_whole(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A record of several samples is a duplicate if all of them are the same; what it counted is taken back."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "t.jinja").write_text(template)
    turns = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "why"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"},
    ]  # fmt: skip
    records = [{"messages": turns}, {"messages": turns}, {"messages": [*turns[:3], {**turns[3], "content": "e"}]}]
    options = {"template": str(tmp_path / "t.jinja"), "dropped_thinking": "split", **OPTIONS}

    one = make_dataset(tmp_path / "one", tokenizer_dir, [records[0], records[2]], **options)
    dropped = make_dataset(tmp_path / "drop", tokenizer_dir, records, duplicates="drop", **options)

    assert one.manifest["num_split_samples"] > 0
    assert plain_samples(dropped) == plain_samples(one)
    for count in ("num_split_samples", "num_skipped_answers", "num_samples", "num_tokens", "num_label_tokens"):
        assert dropped.manifest[count] == one.manifest[count]
    assert dropped.manifest["rejected_by_reason"] == {"duplicate": 1}
