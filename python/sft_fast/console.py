"""What the commands print: progress, reports, notes and errors. Tables go to stdout, all the rest to stderr.

A terminal gets a moving bar and colours (unless `NO_COLOR` is set); a file or a pipe gets plain lines. The library that
draws them is half of the start-up, so it is imported where something is printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from sft_fast.redact import without_secrets

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task
    from rich.table import Table
    from rich.text import Text

    from sft_fast import Source
    from sft_fast._core import Progress as PreprocessState
    from sft_fast.cache import CacheContent, CachedDataset, PruneReport
    from sft_fast.data import Report
    from sft_fast.doctor import Check
    from sft_fast.objects import Transfer
    from sft_fast.reference import Comparison

# Seconds between two plain progress lines.
PLAIN_INTERVAL_SECONDS = 5.0


def stdout_console() -> Console:
    """The console for results. Made anew for each use, so that it follows a redirected stdout."""
    from rich.console import Console

    return Console(highlight=False)


def stderr_console() -> Console:
    """The console for everything that is not a result."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_note(text: str) -> None:
    """Tells the user something on stderr that is not an error."""
    from rich.text import Text

    stderr_console().print(Text.assemble(("note: ", "yellow"), text), soft_wrap=True)


def print_error(text: str) -> None:
    """Tells the user on stderr why the command ends."""
    from rich.text import Text

    stderr_console().print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


def count(number: float) -> str:
    """A count with its thousands apart: `1,234,567`."""
    return f"{number:,.0f}"


def size(num_bytes: float) -> str:
    """A number of bytes in the largest unit (of 1000) that leaves a whole part: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def seconds(duration: float) -> str:
    """A duration: `0.82 s`, `42 s`, `3 min 5 s`, `2 h 10 min`."""
    if duration < 10:
        return f"{duration:.2f} s"
    minutes, rest = divmod(round(duration), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _progress_bar(console: Console) -> Progress:
    """A bar with bytes done, records and megabytes a second since the start, and the time that is left."""
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{size(task.completed)} of {size(task.total or 0)}", style="progress.download")

    class Rates(ProgressColumn):
        def render(self, task: Task) -> Text:
            elapsed = task.elapsed or 0.0
            if elapsed <= 0:
                return Text("")
            num_records = task.fields["num_records"]
            records = f"{count(num_records / elapsed)} records/s  " if num_records else ""
            return Text(f"{records}{task.completed / elapsed / 1e6:.1f} MB/s", style="cyan")

    # Where the line is too narrow, the bar is the one that gives way.
    amount, rates, left = (column(table_column=Column(no_wrap=True)) for column in (Amount, Rates, TimeRemainingColumn))
    columns = [TextColumn("{task.description}"), BarColumn(), amount, rates, left]
    return Progress(*columns, console=console, transient=True)


class PreprocessProgress:
    """Shows how far preprocessing is: a context manager, and the callback that `sft_fast.preprocess` takes.

    The work has two phases, each over all bytes: a look for the data set in the cache, and the making of it.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Progress | None = None
        self._was_hashing = self._is_shape_said = False
        self._phase_start = self._last_line = time.monotonic()

    def __enter__(self) -> PreprocessProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: PreprocessState) -> None:
        """Takes the state of the work: bytes done of all bytes in this phase, and records so far."""
        if self._bar is None and _is_terminal(sys.stderr):
            # At the first call: the work has begun, and what is done before needs no bar.
            self._bar = _progress_bar(stderr_console())
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, num_records=0)
        if progress.records_by_shape and not self._is_shape_said:
            self._is_shape_said = True
            # Said from the first records on, so that a wrong guess costs no more than a look.
            line = f"{self._title}: records of the shape {shapes(progress.records_by_shape)}"
            if self._bar is None:
                print(line, file=sys.stderr)
            else:
                self._bar.console.print(line, soft_wrap=True)
        if progress.is_hashing != self._was_hashing:
            self._was_hashing = progress.is_hashing
            self._phase_start = self._last_line = time.monotonic()
            if self._bar is not None:
                self._bar.reset(self._task, total=progress.num_total_bytes)
        title = f"{self._title} (looking for it in the cache)" if progress.is_hashing else self._title
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=title,
                completed=progress.num_bytes,
                total=progress.num_total_bytes,
                num_records=progress.num_records,
            )
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_INTERVAL_SECONDS:
            return
        self._last_line = now
        elapsed = now - self._phase_start
        left = (progress.num_total_bytes - progress.num_bytes) / max(progress.num_bytes, 1) * elapsed
        records = "" if progress.is_hashing else f"{count(progress.num_records / elapsed)} records/s, "
        print(
            f"{title}: {size(progress.num_bytes)} of {size(progress.num_total_bytes)}, {records}"
            f"{progress.num_bytes / elapsed / 1e6:.1f} MB/s, {seconds(left)} left",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """Takes how much of `total` is done, and shows it on stderr: in a terminal as a bar, elsewhere not at all."""
    if not _is_terminal(sys.stderr):
        yield lambda _: None
        return
    from rich.progress import Progress

    with Progress(console=stderr_console(), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can move there; `FORCE_COLOR` says so of a stream that only passes on to one."""
    return (stream.isatty() and os.environ.get("TERM") != "dumb") or bool(os.environ.get("FORCE_COLOR"))


def shapes(records_by_shape: Mapping[str, int]) -> str:
    """What shapes the records have: `messages`, or `messages 1,200, fields 3`."""
    is_one = len(records_by_shape) == 1
    return (
        ", ".join(name if is_one else f"{name} {count(number)}" for name, number in records_by_shape.items()) or "none"
    )


def skipped(files: Sequence[str]) -> str:
    """What was left aside of directories: how many, and the first."""
    return f"{count(len(files))}: {', '.join(files[:5])}" + (", …" if len(files) > 5 else "")


def print_reports(reports: Mapping[str, Report], plans: Mapping[str, Mapping[str, Any]], as_json: bool) -> None:
    """Tables, or JSON: the report itself, or one for each name where the configuration named them."""
    if as_json:
        values: dict[str, Any] = {
            name: {**dataclasses.asdict(report), **plans[name]} for name, report in reports.items()
        }
        print(json.dumps(values.get("", values), default=str))
        return
    for name, report in reports.items():
        print_report(stdout_console(), report, name or "preprocessed", plan_rows(**plans[name]))
        if report.num_rejected:
            print_note(f"what was left out, and why: rejected.jsonl in {without_secrets(report.path)}")
        if report.why_not_fast and not report.reused:
            print_note(f"the slower tokenizers library encoded: {report.why_not_fast}")


def report_table(report: Report, title: str, more: Sequence[tuple[str, str]] = ()) -> Table:
    """The outcome of preprocessing as a table: everything that went in, `more` that follows of it, and where it is."""
    rejected = [(f"  {reason}", count(number)) for reason, number in sorted(report.rejected_by_reason.items())]
    share = report.num_label_tokens / max(report.num_tokens, 1)
    rate = report.num_bytes / max(report.seconds, 1e-9) / 1e6
    return two_columns(
        title,
        [
            ("records", count(report.num_records)),
            ("shapes", shapes(report.records_by_shape)),
            *([("skipped files", skipped(report.skipped_files))] if report.skipped_files else []),
            ("samples", count(report.num_samples)),
            *(
                [("  of an older data set", count(report.num_reused_samples))]
                if report.num_reused_samples and not report.reused
                else []
            ),
            ("rejected", count(report.num_rejected)),
            *rejected,
            *policy_rows(report),
            ("tokens", count(report.num_tokens)),
            ("label tokens", f"{count(report.num_label_tokens)} ({share:.1%})"),
            ("longest sample", f"{count(report.max_sample_tokens)} tokens"),
            *([("as of transformers", compared(report.comparison))] if report.comparison else []),
            *more,
            *([("object storage", transferred(report.transfer))] if not report.transfer.is_nothing else []),
            ("time", "found in the cache" if report.reused else f"{seconds(report.seconds)}, {rate:.1f} MB/s"),
            ("data set", without_secrets(report.path)),
        ],
    )


def compared(comparison: Comparison) -> str:
    """What came of `verify`."""
    left_out = [f"{reason} {count(number)}" for reason, number in sorted(comparison.not_compared.items())]
    text = f"ids of {count(comparison.num_ids)}, masks of {count(comparison.num_masks)} samples"
    return f"{text}; not compared: {', '.join(left_out)}" if left_out else text


def transferred(transfer: Transfer) -> str:
    """What was moved from and to object storage, and at which price."""
    parts = [
        ("fetched", size(transfer.num_fetched_bytes), transfer.num_fetched_bytes),
        ("from the cache", size(transfer.num_cached_bytes), transfer.num_cached_bytes),
        ("sent", size(transfer.num_sent_bytes), transfer.num_sent_bytes),
        ("requests made again", count(transfer.num_retries), transfer.num_retries),
    ]
    return ", ".join(f"{what} {text}" for what, text, number in parts if number)


def plan_rows(
    num_packs: int | None = None,
    fill_ratio: float = 0.0,
    num_steps_per_epoch: int | None = None,
    num_steps: int | None = None,
) -> list[tuple[str, str]]:
    """What the samples make: packs and steps, as far as they are known."""
    rows = []
    if num_packs is not None:
        rows.append(("packs", f"{count(num_packs)}, {fill_ratio:.2%} full"))
    if num_steps_per_epoch is not None and num_steps is not None:
        rows.append(("steps", f"{count(num_steps)}, {count(num_steps_per_epoch)} an epoch"))
    return rows


def print_report(console: Console, report: Report, title: str, more: Sequence[tuple[str, str]] = ()) -> None:
    """The outcome of preprocessing, and of each source, unless there is one and it is used as it is."""
    console.print(report_table(report, title, more))
    if len(report.sources) > 1 or not report.sources[0].is_whole:
        console.print(source_table(report.sources))


def source_table(sources: Sequence[Source]) -> Table:
    """What came of each source, and how much of it an epoch uses."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="sources", title_justify="left", title_style="bold", box=None, padding=(0, 2))
    table.add_column("source", style="dim", overflow="fold")
    for name in ("records", "rejected", "samples", "tokens", "label tokens", "weight", "at most", "an epoch"):
        table.add_column(name, justify="right")
    for source in sources:
        counts = (
            source.num_records,
            source.num_rejected,
            source.num_samples,
            source.num_tokens,
            source.num_label_tokens,
        )
        table.add_row(
            Text(source.name),
            *map(count, counts),
            f"{source.weight:g}",
            "all" if source.max_samples is None else count(source.max_samples),
            count(source.num_samples_per_epoch),
        )
    return table


def policy_rows(report: Report) -> list[tuple[str, str]]:
    """What the policies did to the samples, where they did something."""
    rows = [
        ("split", report.num_split_samples, "samples beyond the first of their record"),
        ("truncated", report.num_truncated, "samples"),
        ("cut answers", report.num_cut_answers, "samples end within an answer"),
        ("skipped answers", report.num_skipped_answers, "whose thinking the template leaves out"),
        ("control text", report.num_control_text, "with text that spells a control token, encoded as ordinary text"),
    ]
    return [(name, f"{count(number)} {what}") for name, number, what in rows if number]


def two_columns(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of names and values without lines."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def print_cache(content: CacheContent) -> None:
    """The data sets of a cache, two lines each, and what killed runs left."""
    from rich.text import Text

    console = stdout_console()
    for dataset in content.datasets:
        notes = ["in use"] if dataset.is_in_use else []
        notes += [] if dataset.is_ours else ["never pruned: not made for the cache, or with other files in it"]
        console.print(Text(_dataset_line(dataset, notes)), soft_wrap=True)
        if dataset.problem is not None:
            console.print(Text(f"    {dataset.state}: {dataset.problem}", style="red"), soft_wrap=True)
        else:
            files = ", ".join(dataset.files[:3]) + (f" and {len(dataset.files) - 3} more" if dataset.files[3:] else "")
            about = f"{dataset.tokenizer}, {dataset.template} template, length {count(dataset.sequence_length or 0)}"
            console.print(Text(f"    {about}: {files}", style="dim"), soft_wrap=True)
    for leftover in content.leftovers:
        state = "a process is at work" if leftover.is_alive else "left by a killed run"
        console.print(Text(f"{os.path.basename(leftover.path)}  {size(leftover.num_bytes)}  {state}"), soft_wrap=True)
    number = count(len(content.datasets))
    console.print(Text(f"{content.path}: {number} data sets, {size(content.num_bytes)}"), soft_wrap=True)


def print_pruned(report: PruneReport) -> None:
    """What was removed from a cache, or would be."""
    from rich.text import Text

    console = stdout_console()
    for dataset in report.datasets:
        console.print(Text(_dataset_line(dataset, [])), soft_wrap=True)
    for leftover in report.leftovers:
        line = f"{os.path.basename(leftover.path)}  {size(leftover.num_bytes)}  left by a killed run"
        console.print(Text(line), soft_wrap=True)
    verb = "would be freed" if report.is_dry_run else "freed"
    freed, kept = size(report.num_freed_bytes), size(report.num_kept_bytes)
    console.print(Text(f"{report.path}: {freed} {verb}, {kept} kept"), soft_wrap=True)
    for dataset in report.kept_in_use:
        print_note(f"{dataset.path} stays: a process makes or uses it")


def print_checks(checks: Sequence[Check]) -> None:
    """What was found out about the machine, section by section; below each problem what to do about it."""
    from rich.text import Text

    console = stdout_console()
    marks = {
        "ok": ("ok", "green"),
        "note": ("note", "yellow"),
        "missing": ("--", "dim"),
        "problem": ("FAIL", "bold red"),
    }
    section, last_hint = "", None
    for check in checks:
        if check.section != section:
            section = check.section
            console.print(Text(section, style="bold"))
        mark = marks[check.state]
        line = Text.assemble("  ", (f"{mark[0]:4}", mark[1]), "  ", (f"{check.name:<20} ", "dim"), check.value)
        console.print(line, soft_wrap=True)
        if check.hint is not None and check.hint != last_hint:
            console.print(Text(f"        {check.hint}", style="yellow"), soft_wrap=True)
        last_hint = check.hint
    num_problems = sum(check.state == "problem" for check in checks)
    verdict = f"{num_problems} of these do not work" if num_problems else "what is needed is there"
    console.print(Text(verdict, style="bold red" if num_problems else "bold"))


def _dataset_line(dataset: CachedDataset, notes: list[str]) -> str:
    made, used = (time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) for at in (dataset.made, dataset.used))
    parts = [os.path.basename(dataset.path), size(dataset.num_bytes)]
    if dataset.num_samples is not None and dataset.num_tokens is not None:
        parts += [f"{count(dataset.num_samples)} samples", f"{count(dataset.num_tokens)} tokens"]
    return "  ".join([*parts, f"used {used}", f"made {made}", dataset.state, *notes])
