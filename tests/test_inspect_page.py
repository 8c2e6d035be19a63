"""The page about a data set: its numbers against those of a plain count, and what must never be in it."""

import base64
import collections
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sft_fast
from sft_fast.errors import ConfigError, FileError
from sft_fast.inspect import page
from sft_fast.inspect.page import write_page
from sft_fast.inspect.summary import NUM_EXTREMES, summarize
from sft_fast.inspect.tokens import Reader
from tests.data_helpers import make_dataset, random_records, write_dataset
from tests.page_helpers import BAD, HOSTILE, make_page


class Elements(HTMLParser):
    """Every start tag of a page with its attributes, and the texts of `script` and `style`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = collections.defaultdict(list)
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps the tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keeps what is not read as HTML."""
        if self.tags and self.cdata_elem is not None:
            self.raw[self.cdata_elem].append(data)


@pytest.fixture(scope="module")
def dataset_and_page(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[sft_fast.Dataset, str]:
    """A data set with hostile records, and the text of its page."""
    dataset, path = make_page(tmp_path_factory.mktemp("page"), tokenizer_dir)
    return dataset, path.read_text(encoding="utf-8")


def test_numbers_are_those_of_a_plain_count(dataset_and_page: tuple[sft_fast.Dataset, str]) -> None:
    """The summary of a data set has what reading sample by sample and pack by pack gives."""
    dataset, _ = dataset_and_page
    samples = list(dataset)
    lengths = [len(sample.input_ids) for sample in samples]
    labels = [int(sample.label_mask[1:].sum()) for sample in samples]

    summary = summarize(dataset, sequence_length=1024)

    for start, end, number in summary.lengths.bins():
        assert number == sum(start <= length < end for length in lengths)
    assert (
        sum(summary.lengths.counts) == sum(summary.label_shares.counts) == sum(summary.answers.counts) == len(samples)
    )
    for number, num_samples in enumerate(summary.answers.counts):
        runs = [int((np.diff(np.pad(sample.label_mask.astype(int), 1)) == 1).sum()) for sample in samples]
        assert num_samples == runs.count(number)
    assert summary.longest == sorted(range(len(samples)), key=lambda at: (-lengths[at], at))[:NUM_EXTREMES]
    assert summary.emptiest == sorted(range(len(samples)), key=lambda at: (labels[at], at))[:NUM_EXTREMES]
    groups = collections.Counter(sample.input_ids.tobytes() for sample in samples)
    repeated = [number for number in groups.values() if number > 1]
    assert (summary.duplicates.num_groups, summary.duplicates.num_redundant) == (
        len(repeated),
        sum(repeated) - len(repeated),
    )
    for number, first in summary.duplicates.largest:
        assert groups[samples[first[0]].input_ids.tobytes()] == number
        assert len({samples[at].input_ids.tobytes() for at in first}) == 1
    [source] = summary.sources
    assert (source.num_tokens, source.num_label_tokens, source.num_rejected) == (sum(lengths), sum(labels), 1)
    packing = dataset.pack(sequence_length=1024)
    fills = [sum(lengths[at] for at in row) / 1024 for row in packing]
    assert summary.packs is not None
    assert summary.packs.num_padding_tokens == len(packing) * 1024 - sum(lengths)
    assert sum(summary.packs.fill.counts) + summary.packs.num_less_full == len(fills)
    assert summary.packs.num_less_full == sum(fill < summary.packs.fill.edges[0] for fill in fills)
    assert [record["reason"] for record in summary.rejected["missing_key"]] == ["missing_key"]


def test_nothing_is_loaded(dataset_and_page: tuple[sft_fast.Dataset, str]) -> None:
    """No element of the page refers to anything outside of it, and its policy forbids to load or send anything."""
    _, text = dataset_and_page
    elements = Elements(text)
    policy = next(
        attrs["content"] for tag, attrs in elements.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    names = {tag for tag, _ in elements.tags}

    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not names & {"link", "img", "iframe", "object", "embed", "audio", "video", "source", "base", "form", "use"}
    for tag, attrs in elements.tags:
        for name, value in attrs.items():
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "style"):
                assert (tag, name) == ("a", "href"), (tag, name, value)
                assert (value or "").startswith("#")
            assert not name.startswith("on"), (tag, name)
    style = "".join(elements.raw["style"])
    assert "url(" not in style
    assert "@import" not in style
    addresses = set(re.findall(r"https?://[^\s\"'<]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_only_the_own_script_may_run(dataset_and_page: tuple[sft_fast.Dataset, str]) -> None:
    """The page has one script, which its policy knows by hash, and one element of data, which is JSON."""
    _, text = dataset_and_page
    data, script = Elements(text).raw["script"]

    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert script == Path(page.__file__).with_name("page.js").read_text(encoding="utf-8")
    assert len(json.loads(data)["samples"]) > 0


def test_what_records_say_is_text(dataset_and_page: tuple[sft_fast.Dataset, str]) -> None:
    """Records, paths and messages of errors enter the page escaped, whole, and only once through the template."""
    dataset, text = dataset_and_page
    data = json.loads(Elements(text).raw["script"][0])

    for part in (*HOSTILE[:3], "<b>window"):
        assert part not in text
    texts = ["".join(sample["text"]) for sample in data["samples"].values()]
    for part in HOSTILE:
        assert any(part in sample for sample in texts)
    assert "&lt;b&gt;window" in text or "window" not in json.dumps(list(summarize(dataset).rejected.values()))
    assert text.count('"use strict"') == 1


def test_the_page_carries_a_seeded_part(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many samples the page has a random part, the same for a seed, and says how many; it has a bound in tokens."""
    monkeypatch.setattr(page, "NUM_RANDOM_SAMPLES", 20)
    dataset, path = make_page(tmp_path, tokenizer_dir, random_records(300), seed=1)
    texts = [path.read_text(encoding="utf-8")]
    for seed in (1, 2):
        write_page(dataset, str(path), Reader(str(tokenizer_dir)), seed=seed)
        texts.append(path.read_text(encoding="utf-8"))
    carried = [set(json.loads(Elements(text).raw["script"][0])["lists"]["random"]) for text in texts]

    assert texts[0] == texts[1]
    assert carried[0] != carried[2]
    assert len(carried[0]) == 20
    number = len(json.loads(Elements(texts[0]).raw["script"][0])["samples"])
    assert f"This page carries {number} of 300 samples" in texts[0]
    monkeypatch.setattr(page, "MAX_PAGE_TOKENS", 100)
    written = write_page(dataset, str(path), Reader(str(tokenizer_dir)))
    assert written.num_samples < 20


@pytest.mark.parametrize("samples", [[], [([1, 2], [False, True])]])
def test_small_datasets_have_a_page(tokenizer_dir: Path, tmp_path: Path, samples: list[Any]) -> None:
    """A data set of one sample, and one of none, have a page too."""
    dataset = sft_fast.Dataset(write_dataset(tmp_path / "out", samples))

    written = write_page(dataset, str(tmp_path / "page.html"), Reader(str(tokenizer_dir)), sequence_length=2)

    assert written.num_samples == len(samples)
    assert (tmp_path / "page.html").stat().st_size == written.num_bytes


def test_packs_that_cannot_be_are_left_out(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Where a sample is longer than the pack that is asked for, the page has no packs, and all the rest."""
    dataset, path = make_page(tmp_path, tokenizer_dir, sequence_length=8)

    assert summarize(dataset, sequence_length=8).packs is None
    assert "Fill of packs" not in path.read_text(encoding="utf-8")


def test_failure_leaves_the_old_page(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written is an error with its path, and leaves the page that was there, and nothing beside it."""
    dataset = make_dataset(tmp_path, tokenizer_dir, [*random_records(3), BAD], on_error="skip")
    reader = Reader(str(tokenizer_dir))
    with pytest.raises(FileError, match="cannot write the page"):
        write_page(dataset, str(tmp_path / "nowhere" / "page.html"), reader)
    (tmp_path / "page.html").write_text("old", encoding="utf-8")
    before = sorted(tmp_path.iterdir())

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(FileError, match="No space left"):
        write_page(dataset, str(tmp_path / "page.html"), reader)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "old"


def test_missing_package_is_named(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that draws, the error says which extra brings it."""
    dataset = make_dataset(tmp_path, tokenizer_dir, random_records(3))
    monkeypatch.setitem(sys.modules, "vl_convert", None)

    with pytest.raises(ConfigError, match=r"sft-fast\[report\]"):
        write_page(dataset, str(tmp_path / "page.html"), Reader(str(tokenizer_dir)))
