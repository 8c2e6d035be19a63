"""The steps of a run, from the driver's side: what is handed out when, and what becomes of the reports.

The ranks are handed the work of a step before the reports of the one before are read, so that no device waits for the
driver. `TrainLoop.run` reads from top to bottom.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sft_fast.console import seconds
from sft_fast.errors import TrainError
from sft_fast.train.checkpoint import TrainState, commit, naming_a_full_disk, remove_old, staging_directory
from sft_fast.train.cluster import Call, Ranks
from sft_fast.train.metrics import MetricsFile, StepMetrics
from sft_fast.train.progress import RunProgress
from sft_fast.train.tracking import Tracker

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig
    from sft_fast.train.worker import TrainStepReport, ValStepReport

# Steps that are left out one after the other (`on_non_finite: skip`) before the run is given up.
MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class Outputs:
    """Where a run shows what it does."""

    metrics: MetricsFile
    tracker: Tracker
    progress: RunProgress


@dataclass(frozen=True)
class _StepCalls:
    """The work of one step that the ranks have been given."""

    step: int  # steps done with it
    train: Call
    validate: Call | None
    checkpoint: Call | None
    staging: Path | None  # where the checkpoint is being written


class TrainLoop:
    """Takes a run from `state` to its end.

    Args:
        config: the run.
        cluster: the ranks, initialised.
        num_steps: of the whole run.
        has_validation: whether there is validation data.
        state: where the run stands; afterwards, how far it came.
        outputs: where it shows what it does.
        stop_signal: gives the name of the signal that asks the run to end, or None.
    """

    def __init__(
        self,
        config: SFTConfig,
        cluster: Ranks,
        num_steps: int,
        has_validation: bool,
        state: TrainState,
        outputs: Outputs,
        stop_signal: Callable[[], str | None],
    ) -> None:
        self.state = state
        self._config, self._cluster, self._outputs = config, cluster, outputs
        self._num_steps, self._has_validation = num_steps, has_validation
        self._stop_signal = stop_signal
        self._num_skipped_in_a_row = 0

    def run(self) -> None:
        """Trains to the last step, or until a signal asks to end.

        Raises:
            TrainError: a signal ended the run (`stopped`), after a checkpoint; or a rank failed.
        """
        under_way: _StepCalls | None = None
        for step in range(self.state.step + 1, self._num_steps + 1):
            if self._stop_signal() is not None:
                break
            calls = self._submit(step)
            if under_way is not None:
                self._finish(under_way)
            under_way = calls
        signal_name = self._stop_signal()
        if under_way is not None:
            if under_way.checkpoint is None:
                under_way = self._with_checkpoint(under_way)
            self._finish(under_way)
        if signal_name is not None and self.state.step < self._num_steps:
            raise TrainError(
                f"stopped by {signal_name} after step {self.state.step} of {self._num_steps}"
                + ("; its checkpoint is complete" if under_way is not None else ""),
                code="stopped",
                hint="resume_from_checkpoint=true goes on from there",
            )

    def _submit(self, step: int) -> _StepCalls:
        """Gives the ranks the work of a step, from 1, and what is due after it."""
        config, is_last = self._config, step == self._num_steps
        train = self._cluster.submit("train_step", step - 1)
        validate = None
        if self._has_validation and _is_due(step, config.eval_steps, is_last):
            validate = self._cluster.submit("val_step")
        calls = _StepCalls(step, train, validate, None, None)
        return self._with_checkpoint(calls) if _is_due(step, config.save_steps, is_last) else calls

    def _with_checkpoint(self, calls: _StepCalls) -> _StepCalls:
        """The same work, and a checkpoint after it."""
        staging = staging_directory(self._config.output_dir, calls.step)
        return replace(calls, checkpoint=self._cluster.submit("do_checkpoint", str(staging)), staging=staging)

    def _finish(self, calls: _StepCalls) -> None:
        """Waits for the work of a step, records it, and makes its checkpoint one."""
        config, outputs = self._config, self._outputs
        trained = calls.train.result()
        val_loss = None if calls.validate is None else _val_loss(calls.validate.result())
        self._count_skipped(trained[0])
        best = min((loss for loss in (self.state.best_val_loss, val_loss) if loss is not None), default=None)
        self.state = replace(self.state, step=calls.step, val_loss=val_loss, best_val_loss=best)

        step = self._metrics(trained, val_loss)
        is_logged = step.step % config.logging_steps == 0 or val_loss is not None or calls.checkpoint is not None
        if is_logged:
            outputs.metrics.write(step)
            outputs.tracker.log({name: v for name, v in step.values().items() if name != "step"}, step.step)
        outputs.progress.step(step, is_logged)
        if calls.checkpoint is not None and calls.staging is not None:
            took = max(calls.checkpoint.result())
            with naming_a_full_disk(calls.staging):
                saved = commit(calls.staging, replace(self.state, saved_at=time.time()))
            outputs.progress.note(f"checkpoint {saved.path}, written in {seconds(took)}")
            remove_old(config.output_dir, self.state.run_id, config.max_ckpt_to_keep)

    def _count_skipped(self, report: TrainStepReport) -> None:
        """Says that a step has changed nothing, and gives up where that goes on."""
        if not report.is_skipped:
            self._num_skipped_in_a_row = 0
            return
        self._num_skipped_in_a_row += 1
        self.state = replace(self.state, num_skipped_steps=self.state.num_skipped_steps + 1)
        self._outputs.progress.note(
            f"step {report.step} changed nothing: its loss or gradient is not finite ({self.state.num_skipped_steps} "
            "such steps so far)"
        )
        # With float16 the first steps are left out until the loss scale fits.
        if self._num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW and self._config.sft_train.model_args.dtype != "fp16":
            raise TrainError(
                f"the loss or the gradient of {self._num_skipped_in_a_row} steps in a row is not finite",
                code="not_finite",
                hint="lower the learning rate or warm up longer; resume from a checkpoint before them",
            )

    def _metrics(self, reports: list[TrainStepReport], val_loss: float | None) -> StepMetrics:
        """What the reports of all ranks say together."""
        first = reports[0]
        slowest = max(report.step_seconds for report in reports)
        # Ranks that share one model have the same part of the loss: it counts once.
        loss = sum(report.loss for report in reports) / self._config.model_parallel_size
        return StepMetrics(
            step=first.step,
            epoch=first.epoch,
            loss=loss,
            val_loss=val_loss,
            learning_rate=first.learning_rate,
            grad_norm=first.grad_norm,
            num_skipped_steps=self.state.num_skipped_steps,
            num_tokens=first.num_tokens,
            num_label_tokens=first.num_label_tokens,
            tokens_per_second=first.num_tokens / slowest,
            step_seconds=slowest,
            data_wait_seconds=max(report.data_wait_seconds for report in reports),
        )


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return is_last or (every > 0 and step % every == 0)


def _val_loss(reports: list[ValStepReport]) -> float:
    """Mean over the label tokens of the whole validation data."""
    return sum(report.loss_sum for report in reports) / max(1, sum(report.num_label_tokens for report in reports))
