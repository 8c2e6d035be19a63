"""One self-contained page about a data set: statistics, plots, and a browser of samples and packs.

The statistics are of all samples; the browser has a random part of them, and says so. Whatever comes from records or
paths is escaped where it enters the page, and a content security policy lets the page load nothing and run only the one
script that is in it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft_fast.console import count, shapes, size
from sft_fast.errors import FileError
from sft_fast.inspect import plots
from sft_fast.inspect.summary import MAX_SOURCES, ROWS_PER_RANK, Histogram, Packs, Summary, summarize
from sft_fast.inspect.tokens import Reader, SampleView

if TYPE_CHECKING:
    import sft_fast

# What the browser of the page has: samples and packs by chance, tokens of a sample, samples of a pack, tokens in all.
NUM_RANDOM_SAMPLES, NUM_RANDOM_PACKS = 150, 10
MAX_SAMPLE_TOKENS, MAX_PACK_SAMPLES, MAX_PAGE_TOKENS = 2000, 60, 400_000
_DIRECTORY = Path(__file__).parent


@dataclass(frozen=True)
class Written:
    """What was written."""

    path: str
    num_bytes: int
    num_samples: int
    num_packs: int
    seed: int


def write_page(
    dataset: sft_fast.Dataset, path: str, reader: Reader, *, sequence_length: int | None = None, seed: int = 42
) -> Written:
    """Writes the page, whole or not at all.

    Args:
        dataset: the data set.
        path: where the page goes; a file there is replaced.
        reader: the tokenizer of the data set.
        sequence_length: tokens of a pack; None takes that of the preprocessing.
        seed: decides the packs, and which samples and packs the browser has.

    Raises:
        ConfigError: the package that draws the plots is not installed.
        FileError: the file cannot be written.
    """
    summary = summarize(dataset, sequence_length=sequence_length, seed=seed)
    browser = _Browser(dataset, reader, summary, seed)
    text = _page(dataset, summary, browser)
    try:
        _write_whole(path, text.encode())
    except OSError as error:
        raise FileError(f"cannot write the page: {error.strerror}", path=path) from error
    return Written(path, len(text.encode()), len(browser.samples), len(browser.packs), seed)


def _write_whole(path: str, content: bytes) -> None:
    descriptor, scratch = tempfile.mkstemp(prefix=".sft-fast-page-", dir=os.path.dirname(path) or ".")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


class _Browser:
    """The samples and packs that the page carries, and the lists in which they are shown."""

    def __init__(self, dataset: sft_fast.Dataset, reader: Reader, summary: Summary, seed: int) -> None:
        self.samples: dict[int, dict[str, Any]] = {}
        self.lists: dict[str, list[int]] = {}
        self.packs: list[dict[str, Any]] = []
        self.seed = seed
        self._dataset, self._reader = dataset, reader
        self._num_tokens = 0
        generator = np.random.default_rng(seed)
        self._add_list("longest", summary.longest)
        self._add_list("emptiest", summary.emptiest)
        self._add_list("duplicates", [number for _, numbers in summary.duplicates.largest for number in numbers])
        chosen = generator.choice(len(dataset), min(NUM_RANDOM_SAMPLES, len(dataset)), replace=False)
        self._add_list("random", sorted(chosen.tolist()))
        if summary.packs is not None:
            self._add_packs(summary.packs, generator)

    def _add(self, number: int) -> bool:
        if number in self.samples:
            return True
        if self._num_tokens >= MAX_PAGE_TOKENS:
            return False
        num_tokens = int(self._dataset.lengths[number])
        view = self._reader.view(self._dataset, number, max_tokens=MAX_SAMPLE_TOKENS)
        self.samples[number] = _sample_json(view, num_tokens)
        self._num_tokens += len(view.input_ids)
        return True

    def _add_list(self, name: str, numbers: Sequence[int]) -> None:
        self.lists[name] = [number for number in numbers if self._add(number)]

    def _add_packs(self, packs: Packs, generator: np.random.Generator) -> None:
        packing = self._dataset.pack(sequence_length=packs.sequence_length, seed=packs.seed)
        chosen = generator.choice(len(packing), min(NUM_RANDOM_PACKS, len(packing)), replace=False)
        for number in sorted(chosen.tolist()):
            numbers = packing[number].tolist()
            shown = [sample for sample in numbers[:MAX_PACK_SAMPLES] if self._add(sample)]
            num_tokens = int(self._dataset.lengths[numbers].sum())
            self.packs.append({"number": number, "tokens": num_tokens, "size": len(numbers), "samples": shown})


def _sample_json(view: SampleView, num_tokens: int) -> dict[str, Any]:
    """A sample for the script of the page; positions for what is rare, runs for the mask."""
    bounds = np.flatnonzero(np.diff(np.array([False, *view.label_mask, False], np.int8))).tolist()
    return {
        "source": view.source,
        "tokens": num_tokens,
        "trained": view.num_trained,
        "ids": view.input_ids,
        "text": view.pieces,
        "runs": bounds,
        "control": [at for at, holds in enumerate(view.is_control) if holds],
        "spelled": [at for at, holds in enumerate(view.is_spelled) if holds],
    }


def _page(dataset: sft_fast.Dataset, summary: Summary, browser: _Browser) -> str:
    manifest = dataset.manifest
    script = (_DIRECTORY / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {
        "samples": browser.samples,
        "lists": browser.lists,
        "packs": browser.packs,
        "sequenceLength": summary.packs.sequence_length if summary.packs else 0,
    }
    # `<` would let a record end the element; JSON may write it as an escape.
    data_json = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    name = os.path.basename(os.path.abspath(dataset.path))
    parts = {
        "title": _text(name),
        "script": script,
        "script_hash": digest,
        "style": (_DIRECTORY / "page.css").read_text(encoding="utf-8"),
        "data": data_json,
        "path": _text(dataset.path),
        "files": _text(_named(file["path"] for file in manifest["files"])),
        "figures": _figures(manifest, summary),
        "plots": _plots(manifest, summary),
        "rejected": _rejected(manifest, summary),
        "sources": _sources(summary),
        "duplicates": _duplicates(summary, browser),
        "recipe": _recipe(manifest),
        "browser_note": _browser_note(dataset, summary, browser),
    }
    template = (_DIRECTORY / "page.html").read_text(encoding="utf-8")
    # At one go: what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _figures(manifest: dict[str, Any], summary: Summary) -> str:
    """The numbers at the top."""
    tokens, labels = manifest["num_tokens"], manifest["num_label_tokens"]
    rejected = manifest["num_rejected"]
    figures = [
        ("Samples", _short(manifest["num_samples"]), f"of {_short(manifest['num_records'])} records"),
        ("Rejected", _short(rejected), f"{rejected / max(manifest['num_records'], 1):.1%} of the records"),
        ("Tokens", _short(tokens), f"{tokens / max(manifest['num_samples'], 1):,.0f} a sample"),
        ("Trained on", f"{labels / max(tokens, 1):.1%}", f"{_short(labels)} label tokens"),
        ("Longest", count(manifest["sample_tokens"].get("max", 0)), f"tokens; median {_quantile(manifest, 'p50')}"),
        ("Duplicates", _short(summary.duplicates.num_redundant), "samples beyond the first of equals"),
    ]
    if summary.packs is not None:
        packs = summary.packs
        note = f"full, of {count(packs.sequence_length)} tokens"
        figures.append((f"{_short(packs.num_packs)} packs", f"{packs.fill_ratio:.2%}", note))
    items = (
        f"<div class=figure><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(note)}</small></dd></div>"
        for name, value, note in figures
    )
    return "".join(items)


def _plots(manifest: dict[str, Any], summary: Summary) -> str:
    figures = [
        _figure(
            "Length of samples",
            "Tokens of a sample.",
            plots.histogram(
                summary.lengths,
                (texts := _range_texts(summary.lengths, "tokens", "samples")),
                x_title="tokens",
                y_title="samples",
            ),
            _rows_of(summary.lengths, texts),
        ),
        _figure(
            "Share that is trained on",
            "The part of a sample's tokens that has a loss.",
            plots.histogram(
                summary.label_shares,
                (texts := _percent_texts(summary.label_shares, "samples")),
                x_title="part of the tokens",
                y_title="samples",
                x_format=".0%",
                color="var(--trained-strong)",
            ),
            _rows_of(summary.label_shares, texts),
        ),
        _figure(
            "Turns that are trained on",
            "Answers of a sample: runs of trained tokens.",
            plots.bars(
                [(name, number, text) for name, number, text in _answer_rows(summary.answers)],
                x_title="answers",
                y_title="samples",
                color="var(--trained-strong)",
            ),
            [(text, "") for _, number, text in _answer_rows(summary.answers) if number],
        ),
    ]
    if summary.packs is not None:
        figures += _pack_figures(summary.packs)
    by_reason = _by_reason(manifest)
    if by_reason:
        bars = [(reason, number, f"{reason}: {_several(number, 'record')}") for reason, number in by_reason]
        note = f"{_several(manifest['num_rejected'], 'record')} of {count(manifest['num_records'])}, by reason."
        rows = [(reason, count(number)) for reason, number in by_reason]
        figures.append(_figure("Left out", note, plots.reasons(bars), rows))
    return "".join(figures)


def _pack_figures(packs: Packs) -> list[str]:
    waste = packs.num_padding_tokens / max(packs.num_packs * packs.sequence_length, 1)
    figures = [
        _figure(
            "Fill of packs",
            f"{count(packs.num_packs)} packs of {count(packs.sequence_length)} tokens (epoch 0, seed {packs.seed}); "
            f"{_several(packs.num_padding_tokens, 'position')}, {waste:.3%}, of padding."
            + (f" {_several(packs.num_less_full, 'pack')} less full not shown." if packs.num_less_full else ""),
            plots.histogram(
                packs.fill,
                (texts := _percent_texts(packs.fill, "packs")),
                x_title="part that holds tokens",
                y_title="packs",
                x_format=".0%",
            ),
            _rows_of(packs.fill, texts),
        )
    ]
    if packs.balance:
        rows = [
            (f"{ranks} ranks", f"{before:.2%} in order, {after:.2%} planned") for ranks, before, after in packs.balance
        ]
        note = (
            "How much longer the slowest rank of a step takes than the mean, by the cost model, with "
            f"{ROWS_PER_RANK} packs a rank."
        )
        figures.append(_figure("Balance of ranks", note, plots.balance(packs.balance), rows))
    return figures


def _figure(title: str, note: str, svg: str, rows: list[tuple[str, str]]) -> str:
    """A plot with its title, and its numbers as a table to be opened."""
    table = "".join(f"<tr><td>{_text(name)}<td>{_text(value)}" for name, value in rows)
    return (
        f"<figure class=plot><figcaption><h3>{_text(title)}</h3><p>{_text(note)}</p></figcaption>{svg}"
        f"<details><summary>In numbers</summary>{_table('', table)}</details></figure>"
    )


def _table(head: str, body: str, name: str = "scroll") -> str:
    """A table that scrolls by itself, with the keys too; `head` and `body` are rows."""
    head = f"<thead><tr>{head}</thead>" if head else ""
    return f'<div class="{name}" tabindex="0"><table>{head}<tbody>{body}</tbody></table></div>'


def _range_texts(bins: Histogram, unit: str, what: str) -> list[str]:
    return [f"{start:,.0f} to {end - 1:,.0f} {unit}: {count(number)} {what}" for start, end, number in bins.bins()]


def _percent_texts(bins: Histogram, what: str) -> list[str]:
    return [f"{start:.1%} to {end:.1%}: {count(number)} {what}" for start, end, number in bins.bins()]


def _answer_rows(bins: Histogram) -> list[tuple[str, int, str]]:
    last = len(bins.counts) - 1
    rows = []
    # Some bars at least, so that a single one does not fill the plot.
    for number, num_samples in enumerate(bins.counts + [0] * (9 - len(bins.counts))):
        name = f"{number}+" if number == last == 20 else str(number)
        rows.append((name, num_samples, f"{name} answers: {count(num_samples)} samples"))
    return rows[1:] if rows and not rows[0][1] and len(rows) > 1 else rows


def _rows_of(bins: Histogram, texts: list[str]) -> list[tuple[str, str]]:
    pairs = (text.split(": ", 1) for text, number in zip(texts, bins.counts, strict=True) if number)
    return [(name, value) for name, value in pairs]


def _rejected(manifest: dict[str, Any], summary: Summary) -> str:
    by_reason = _by_reason(manifest)
    if not by_reason:
        return "<p class=empty>Every record became a sample.</p>"
    items = "".join(
        f"<tr><th scope=row><code>{_text(reason)}</code><td class=number>{count(number)}<td>"
        + "".join(
            f"<div><code>{_text(record['path'])}:{record['line']}</code> {_text(record['message'])}</div>"
            for record in summary.rejected.get(reason, [])
        )
        for reason, number in by_reason
    )
    return _table("<th scope=col>Reason<th scope=col class=number>Records<th scope=col>The first of them", items)


def _sources(summary: Summary) -> str:
    shown = summary.sources[:MAX_SOURCES]
    rows = "".join(
        f"<tr><th scope=row><code>{_text(source.path)}</code>"
        + "".join(
            f"<td class=number>{value}"
            for value in (
                count(source.num_records),
                count(source.num_rejected),
                count(source.num_samples),
                count(source.num_tokens),
                f"{source.num_label_tokens / max(source.num_tokens, 1):.1%}",
                f"{source.num_tokens / max(source.num_samples, 1):,.0f}",
                count(source.max_sample_tokens),
            )
        )
        for source in shown
    )
    names = ("Records", "Rejected", "Samples", "Tokens", "Trained", "Mean length", "Longest")
    head = "<th scope=col>File" + "".join(f"<th scope=col class=number>{name}" for name in names)
    more = (
        f"<p>The {len(shown)} largest of {count(len(summary.sources))} files.</p>"
        if len(summary.sources) > len(shown)
        else ""
    )
    return more + _table(head, rows)


def _duplicates(summary: Summary, browser: _Browser) -> str:
    duplicates = summary.duplicates
    if not duplicates.num_groups:
        return "<p class=empty>No two samples have the same tokens.</p>"
    rows = "".join(
        f"<tr><td class=number>{count(number)}<td>"
        + ", ".join(
            f'<a href="#sample-{sample}">{_text(browser.samples[sample]["source"])}</a>'
            for sample in samples
            if sample in browser.samples
        )
        for number, samples in duplicates.largest
    )
    return (
        f"<p>{_several(duplicates.num_redundant, 'sample')} beyond the first of equal tokens, in "
        f"{_several(duplicates.num_groups, 'group')}. The largest:</p>"
        + _table("<th scope=col class=number>Samples<th scope=col>The first of them", rows)
    )


def _recipe(manifest: dict[str, Any]) -> str:
    rows = {
        "tokenizer": manifest["tokenizer"],
        "template": manifest["template"],
        "shapes of records": shapes(manifest["records_by_shape"]),
        **manifest["recipe"],
        "fingerprint": manifest["fingerprint"],
        "shards": f"{len(manifest['shards'])}, {size(sum(shard['num_bytes'] for shard in manifest['shards']))}",
    }
    items = "".join(
        f"<tr><th scope=row>{_text(name)}<td><code>{_text('not set' if value is None else value)}</code>"
        for name, value in rows.items()
    )
    return _table("", items, "scroll whole")


def _browser_note(dataset: sft_fast.Dataset, summary: Summary, browser: _Browser) -> str:
    text = f"This page carries {count(len(browser.samples))} of {count(len(dataset))} samples"
    if summary.packs is not None:
        text += f" and {count(len(browser.packs))} of {count(summary.packs.num_packs)} packs"
    text += (
        f": the longest, the emptiest, duplicates, and others by chance (seed {browser.seed}), of each its first "
        f"{count(MAX_SAMPLE_TOKENS)} tokens. All numbers and plots above are of the whole data set. "
        f"sft-fast inspect shows any sample."
    )
    return _text(text)


def _named(paths: Iterable[str]) -> str:
    names = list(paths)
    return names[0] if len(names) == 1 else f"{count(len(names))} files"


def _quantile(manifest: dict[str, Any], name: str) -> str:
    return count(manifest["sample_tokens"].get(name, 0))


def _by_reason(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    return sorted(manifest["rejected_by_reason"].items(), key=lambda item: (-item[1], item[0]))


def _several(number: int, what: str) -> str:
    return f"{count(number)} {what}" + ("" if number == 1 else "s")


def _short(number: int) -> str:
    """A count, in full up to six digits and then with three: `123,456`, `1.23 M`, `45.6 G`."""
    if number < 1_000_000:
        return count(number)
    value, unit = (number / 1e6, "M") if number < 1e9 else (number / 1e9, "G")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def _text(value: object) -> str:
    """Anything as text that is safe in an element or a quoted attribute."""
    return html.escape(str(value))
