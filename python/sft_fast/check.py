"""The dry run of `sft-fast validate`: everything that can be wrong before a long run, found in seconds.

It reads the beginning of each file through the real preprocessing, so that what it shows is what would be trained on.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import sft_fast
from sft_fast.config import SFTConfig
from sft_fast.console import count, policy_rows, size, two_columns
from sft_fast.errors import SftFastError
from sft_fast.inputs import Input, local_copies, resolve
from sft_fast.inspect.terminal import show_samples
from sft_fast.mixing import Entry, read_entries
from sft_fast.objects import Transfer
from sft_fast.train.pipeline import SFTPipeline, device_rows
from sft_fast.train.plan import BatchArithmetic, layout_of, train_stream

# Of a longer file only this much is read, cut at the end of a record.
MAX_HEAD_BYTES = 4_000_000
# Files that are looked into; all of them must exist.
MAX_FILES = 8
# First bytes of gzip and Zstandard files, which are read whole.
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")


def check_run(config: SFTConfig, console: Console, num_samples: int) -> None:
    """Checks a configuration against the machine and prints what the run would be.

    Args:
        config: already checked in itself by `load_config`.
        console: where the tables and samples go.
        num_samples: samples to show.

    Raises:
        SftFastError: the first thing that is wrong.
    """
    SFTPipeline(config)  # refuses a strategy or a model directory that cannot be trained
    data = {
        name: [(entry, resolve(entry.paths).files) for entry in read_entries(files)]
        for name, files in config.data_files().items()
    }
    files = {name: [one for _, inputs in sources for one in inputs] for name, sources in data.items()}
    console.print(two_columns("run", _run_rows(config, files)))
    for name, sources in data.items():
        _check_data(config, name, sources, console, num_samples if name == "train" else 0)
    console.print(two_columns("devices", device_rows(config)))
    console.print("the configuration is valid")


def _run_rows(config: SFTConfig, files: dict[str, list[Input]]) -> list[tuple[str, str]]:
    def described(inputs: list[Input]) -> str:
        name = inputs[0].name if len(inputs) == 1 else f"{len(inputs)} files"
        if not all(os.path.isfile(one.path) for one in inputs):
            return name
        return f"{name}, {size(sum(os.path.getsize(one.path) for one in inputs))}"

    return [
        ("name", config.exp_name),
        ("model", config.pretrain),
        ("template", config.template),
        *((f"{name} data", described(inputs)) for name, inputs in files.items()),
        ("checkpoints", os.path.join(config.output_dir, "sft_train")),
        ("logs", config.logging_dir),
    ]


def _batch_rows(config: SFTConfig, dataset: sft_fast.Dataset | None) -> list[tuple[str, str]]:
    """The arithmetic of a step, so that a slip shows before it costs a day; of the run, where all data is known."""
    if dataset:
        return BatchArithmetic.of(config, train_stream(config, dataset)).rows()
    return layout_of(config).rows()


def _template_rows(config: SFTConfig, verdict: dict[str, Any]) -> list[tuple[str, str]]:
    """The verdict on the chat template: what it does to answers, and what follows for the training."""
    opened = verdict["opens_thinking"]
    thinking = "shown" if verdict["shows_thinking"] else "left out, or not known as a field"
    earlier = f"left out: dropped_thinking={config.dropped_thinking}"
    return [
        ("name", config.template),
        ("prefix-preserving", _yes(verdict["prefix_preserving"], "each answer stands where the model would write it")),
        ("end of turn trained", _yes(verdict["end_of_turn_trained"], "an answer ends with a token that ends the turn")),
        ("generation markers", _yes(verdict["has_generation_markers"], "the template says what is trained on")),
        ("date-dependent", _yes(verdict["date_dependent"], f"template_date={config.template_date or 'today'}")),
        ("thinking", thinking),
        ("earlier thinking", earlier if verdict["drops_earlier_thinking"] else "as that of the last answer"),
        ("prompt opens", opened or "no thought"),
    ]


def _yes(holds: bool, meaning: str) -> str:
    return f"yes: {meaning}" if holds else "no"


def _check_data(
    config: SFTConfig, name: str, sources: list[tuple[Entry, list[Input]]], console: Console, num_samples: int
) -> None:
    """Preprocesses the beginning of the files into a temporary directory and shows the first samples."""
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="sft-fast-validate-"))
        heads: dict[str, str] = {}
        read: list[dict[str, Any]] = []
        for entry, inputs in sources:
            own = []
            first = inputs[: MAX_FILES - len(heads)]
            for one in stack.enter_context(local_copies(first, Transfer())):
                head = Path(scratch, f"head-{len(heads)}")
                own.append(_head(one.path, head) if one.batches is None else _first_rows(one, head))
                heads[own[-1]] = one.name
            if own:
                weights = {"weight": entry.weight, "max_samples": entry.max_samples}
                read.append({"path": own, "name": entry.name, **weights})
        try:
            report = sft_fast.preprocess(read, Path(scratch, "dataset"), **config.preprocess_options())
        except SftFastError as error:
            error.path = heads.get(error.path or "", error.path)
            raise
        dataset = sft_fast.Dataset(report.path, report.sources)
        num_files = sum(len(inputs) for _, inputs in sources)
        is_whole = num_files == len(heads) and all(head == path for head, path in heads.items())
        console.print(
            two_columns(
                f"{name} data, {'all of it' if is_whole else 'its beginning'}",
                [
                    ("records", count(report.num_records)),
                    ("rejected", count(report.num_rejected)),
                    *((f"  {reason}", count(number)) for reason, number in sorted(report.rejected_by_reason.items())),
                    *policy_rows(report),
                    ("longest sample", f"{count(report.max_sample_tokens)} tokens"),
                ],
            )
        )
        if name == "train":
            console.print(two_columns("template", _template_rows(config, dataset.manifest["template_verdict"])))
            console.print(two_columns("batch", _batch_rows(config, dataset if is_whole else None)))
        if num_samples and report.num_samples:
            show_samples(dataset, console, numbers=list(range(min(num_samples, len(dataset)))), renamed=heads)


def _first_rows(table: Input, scratch: Path) -> str:
    """A file with the first rows of a table, as JSON Lines."""
    num_bytes = 0
    with scratch.open("wb") as file:
        for line in table.lines():
            num_bytes += file.write(line)
            if num_bytes > MAX_HEAD_BYTES:
                break
    return str(scratch)


def _head(path: str, scratch: Path) -> str:
    """A file with the first whole records of `path`: the file itself where it is short."""
    if os.path.getsize(path) <= MAX_HEAD_BYTES:
        return path
    with open(path, "rb") as file:
        beginning = file.read(MAX_HEAD_BYTES)
    if beginning.startswith(COMPRESSED):
        return path
    if beginning.lstrip().startswith(b"["):
        beginning = _first_elements(beginning.decode("utf-8", errors="ignore")).encode()
    else:
        beginning = beginning[: beginning.rfind(b"\n") + 1]
    if not beginning:
        return path  # its first record is longer than that, or broken: let the preprocessing say
    scratch.write_bytes(beginning)
    return str(scratch)


def _first_elements(text: str) -> str:
    """The whole elements at the beginning of a JSON array as lines, each with the number that it has in the array."""
    decoder = json.JSONDecoder()
    lines: list[str] = []
    position = text.index("[") + 1
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        try:
            element, end = decoder.raw_decode(text, position)
        except ValueError:
            return "\n".join(lines)
        lines += [""] * (text.count("\n", 0, position) - len(lines))
        lines.append(json.dumps(element))
        position = end
