"""How a run shows itself: a moving bar in a terminal, plain lines elsewhere, and the same lines in the log file."""

from __future__ import annotations

import logging
from collections import deque
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from sft_fast.console import count, seconds, stderr_console
from sft_fast.train.metrics import StepMetrics

logger = logging.getLogger("sft_fast.train")

# Steps whose mean time says how long the rest will take.
_NUM_RECENT_STEPS = 50


class _Numbers(ProgressColumn):
    """Loss, rate and remaining time, as texts that the run has set."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["numbers"], style="cyan")


class RunProgress:
    """Shows steps as they end."""

    def __init__(self, num_steps: int, steps_done: int, console: Console | None = None) -> None:
        self._console = console or stderr_console()
        self._num_steps = num_steps
        self._val_loss: float | None = None
        self._recent: deque[float] = deque(maxlen=_NUM_RECENT_STEPS)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = [TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"), _Numbers()]
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=num_steps, completed=steps_done, numbers="")
            self._bar.start()

    def step(self, metrics: StepMetrics, is_logged: bool) -> None:
        """Shows a step that has ended; those that are not logged only move the bar."""
        self._recent.append(metrics.step_seconds)
        self._val_loss = self._val_loss if metrics.val_loss is None else metrics.val_loss
        left = (self._num_steps - metrics.step) * sum(self._recent) / len(self._recent)
        numbers = f"loss {metrics.loss:.4f}"
        if self._val_loss is not None:
            numbers += f"  val_loss {self._val_loss:.4f}"
        numbers += f"  {count(metrics.tokens_per_second)} tokens/s  {seconds(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, numbers=numbers)
        if is_logged or metrics.val_loss is not None:
            line = f"step {metrics.step}/{self._num_steps}  epoch {metrics.epoch:.2f}  loss {metrics.loss:.4f}"
            if metrics.val_loss is not None:
                line += f"  val_loss {metrics.val_loss:.4f}"
            line += (
                f"  lr {metrics.learning_rate:.3e}  grad_norm {metrics.grad_norm:.3f}"
                f"  {count(metrics.tokens_per_second)} tokens/s  {seconds(left)} left"
            )
            logger.info(line)
            if self._bar is None:
                self._console.print(line, soft_wrap=True)

    def note(self, text: str) -> None:
        """A line about something else than a step: a checkpoint, a resumption."""
        logger.info(text)
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def open_log_file(path: Path) -> logging.Handler:
    """Sends what `logger` says to a file, behind what is there; the caller removes the handler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return handler
