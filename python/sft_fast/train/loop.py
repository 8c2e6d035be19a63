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

from sft_fast.console import count, seconds
from sft_fast.errors import SftFastError, TrainError
from sft_fast.train.checkpoint import (
    TrainState,
    commit,
    missing_parts,
    naming_a_full_disk,
    remove_old,
    staging_directory,
)
from sft_fast.train.metrics import StepFile, StepMetrics
from sft_fast.train.progress import RunProgress
from sft_fast.train.ranks import Call, Ranks
from sft_fast.train.tracking import Tracker

if TYPE_CHECKING:
    from sft_fast.config import SFTConfig
    from sft_fast.train.background import WriteReport
    from sft_fast.train.generate import Generation
    from sft_fast.train.worker import TrainStepReport, ValStepReport

# Steps that are left out one after the other (`on_non_finite: skip`) before the run is given up.
MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class Outputs:
    """Where a run shows what it does."""

    metrics: StepFile
    generations: StepFile | None  # where there are any
    tracker: Tracker
    progress: RunProgress


@dataclass(frozen=True)
class _Save:
    """A checkpoint that the ranks have been told to write."""

    held: Call  # answers when the ranks can go on
    staging: Path  # where it is being written
    in_background: bool  # whether it may still be under way then


@dataclass(frozen=True)
class _StepCalls:
    """The work of one step that the ranks have been given."""

    step: int  # steps done with it
    train: Call
    validate: Call | None
    written: Call | None  # what becomes of the checkpoint that is written in the background, of an earlier step
    save: _Save | None


@dataclass(frozen=True)
class _Background:
    """A checkpoint that is being written while the ranks train on."""

    staging: Path
    state: TrainState  # of its step
    held_seconds: float


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
        self._saved_step = state.step
        self._writing: Path | None = None  # what the ranks were told last to write in the background, until it is done
        self._background: _Background | None = None
        self._num_waits = 0

    def run(self) -> None:
        """Trains to the last step, or until the validation loss no longer falls, or until a signal asks to end.

        Raises:
            TrainError: a signal ended the run (`stopped`), after a checkpoint; or a rank failed.
        """
        try:
            self._run()
        except Exception:
            self._keep_what_is_written()
            raise

    def _run(self) -> None:
        under_way: _StepCalls | None = None
        for step in range(self.state.step + 1, self._num_steps + 1):
            if self._stop_signal() is not None or self._is_no_longer_better():
                break
            calls = self._submit(step)
            if under_way is not None:
                self._finish(under_way)
            under_way = calls
            if calls.validate is not None and self._config.early_stopping_patience:
                self._finish(calls)  # only now is it known whether there is another step
                under_way = None
        signal_name = self._stop_signal()
        if under_way is not None:
            self._finish(under_way)
        self._finish_background()
        if self._saved_step < self.state.step:
            save = self._submit_save(self.state.step, in_background=False)
            self._commit(save.staging, self.state, f"written in {seconds(max(save.held.result()))}")
        if self.state.step == self._num_steps:
            return
        if signal_name is None:
            self._outputs.progress.note(
                f"stopped early after step {self.state.step} of {self._num_steps}: {self.state.num_evals_without_gain} "
                "validations without a lower loss"
            )
        else:
            raise TrainError(
                f"stopped by {signal_name} after step {self.state.step} of {self._num_steps}"
                + ("; its checkpoint is complete" if self._saved_step else ""),
                code="stopped",
                hint="resume_from_checkpoint=true goes on from there",
            )

    def _is_no_longer_better(self) -> bool:
        patience = self._config.early_stopping_patience
        return 0 < patience <= self.state.num_evals_without_gain

    def _submit(self, step: int) -> _StepCalls:
        """Gives the ranks the work of a step, from 1, and what is due after it."""
        config, is_last = self._config, step == self._num_steps
        train = self._cluster.submit("train_step", step - 1)
        validate = None
        if self._has_validation and _is_due(step, config.eval_steps, is_last):
            validate = self._cluster.submit("val_step")
        is_saved = _is_due(step, config.save_steps, is_last)
        # Only one checkpoint is under way at a time: the next one waits for it.
        written = self._cluster.submit("finish_checkpoint", is_saved) if self._writing is not None else None
        # The last one has nothing to be written beside.
        save = self._submit_save(step, in_background=config.async_save and not is_last) if is_saved else None
        return _StepCalls(step, train, validate, written, save)

    def _submit_save(self, step: int, *, in_background: bool) -> _Save:
        staging = staging_directory(self._config.output_dir, step)
        self._writing = staging if in_background else None
        return _Save(self._cluster.submit("do_checkpoint", str(staging), in_background), staging, in_background)

    def _commit(self, staging: Path, state: TrainState, how: str) -> None:
        """Makes what the ranks have written a checkpoint of `state`."""
        missing = missing_parts(staging, self._cluster.world_size)
        if missing:
            raise TrainError(
                f"what these ranks wrote of the checkpoint of step {state.step} is not seen on this machine: "
                + ", ".join(map(str, missing)),
                code="incomplete",
                path=str(staging),
                hint="output_dir has to be on storage that all machines share, under the same path",
            )
        with naming_a_full_disk(staging):
            saved = commit(staging, replace(state, saved_at=time.time()))
        self._saved_step = state.step
        self._outputs.progress.note(f"checkpoint {saved.path}, {how}")
        remove_old(self._config.output_dir, state.run_id, self._config.max_ckpt_to_keep)

    def _finish_background(self, written: Call | None = None) -> None:
        """Commits what has been written in the background, if all ranks say so; without a call of theirs, waits."""
        background = self._background
        if background is None:
            return
        if written is None:
            written = self._cluster.submit("finish_checkpoint", True)
        reports: list[WriteReport | None] = written.result()
        done = [report for report in reports if report is not None]
        if len(done) < len(reports):
            return
        waited = max(report.waited_seconds for report in done)
        how = (
            f"written in {seconds(max(report.seconds for report in done))} beside training, "
            f"which it held for {seconds(background.held_seconds + waited)}"
        )
        if waited:
            self._num_waits += 1
            how += f"; the next one had to wait for it (waits so far: {count(self._num_waits)})"
        self._background = None
        if self._writing == background.staging:
            self._writing = None
        self._commit(background.staging, background.state, how)

    def _keep_what_is_written(self) -> None:
        """After an error: finishes the checkpoint that was being written, if every rank has lived to write its part."""
        background, note = self._background, self._outputs.progress.note
        if background is None:
            return
        try:
            self._cluster.finish_writing()
            if not missing_parts(background.staging, self._cluster.world_size):
                self._commit(background.staging, background.state, "written in full before the run failed")
            else:
                note(f"the checkpoint of step {background.state.step} was not written in full: it is left out")
        except (OSError, SftFastError) as error:  # what ended the run is to be reported, not this
            note(f"the checkpoint of step {background.state.step} is left out: {error}")

    def _finish(self, calls: _StepCalls) -> None:
        """Waits for the work of a step, records it, and makes its checkpoint one."""
        config, outputs = self._config, self._outputs
        trained = calls.train.result()
        if calls.written is not None:
            self._finish_background(calls.written)
        validated = [] if calls.validate is None else calls.validate.result()
        self._count_skipped(trained[0])
        step = self._metrics(trained, validated)
        self.state = _with_validation(
            replace(self.state, step=calls.step), step.val_loss, config.early_stopping_threshold
        )

        is_logged = calls.step % config.logging_steps == 0 or bool(validated) or calls.save is not None
        if is_logged:
            outputs.metrics.write(step.values())
            outputs.tracker.log({name: v for name, v in step.values().items() if name != "step"}, calls.step)
        if validated:
            self._show_generations(validated[0].generations)
        outputs.progress.step(step, is_logged)
        if calls.save is not None:
            held = max(calls.save.held.result())
            if calls.save.in_background:
                self._background = _Background(calls.save.staging, self.state, held)
            else:
                self._commit(calls.save.staging, self.state, f"written in {seconds(held)}")

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

    def _show_generations(self, generations: list[Generation]) -> None:
        step, outputs = self.state.step, self._outputs
        for generation in generations:
            if outputs.generations is not None:
                outputs.generations.write({"step": step, **generation.values()})
        if generations:
            texts = [f"{one.prompt}\n=> {one.generated}" for one in generations]
            outputs.tracker.log_text("generations", "\n\n----\n\n".join(texts), step)

    def _metrics(self, reports: list[TrainStepReport], validated: list[ValStepReport]) -> StepMetrics:
        """What the reports of all ranks say together."""
        val_losses = _val_losses(validated)
        first = reports[0]
        slowest = max(report.step_seconds for report in reports)
        forward = [report.forward_seconds for report in reports]
        return StepMetrics(
            step=first.step,
            epoch=first.epoch,
            loss=sum(report.loss for report in reports),
            val_loss=val_losses.pop("val_loss", None),
            val_loss_by_source=val_losses,
            learning_rate=first.learning_rate,
            grad_norm=first.grad_norm,
            num_skipped_steps=self.state.num_skipped_steps,
            num_tokens=first.num_tokens,
            num_label_tokens=first.num_label_tokens,
            pack_fill=first.num_tokens / (first.num_rows * self._config.sequence_length),
            tokens_per_second=first.num_tokens / slowest,
            tokens_per_second_per_device=first.num_tokens / slowest / len(reports),
            mfu=self._mfu(reports, slowest),
            imbalance=max(forward) / max(1e-9, sum(forward) / len(forward)) - 1,
            step_seconds=slowest,
            data_wait_seconds=max(report.data_wait_seconds for report in reports),
            forward_seconds=max(forward),
            backward_seconds=max(report.backward_seconds for report in reports),
            optimizer_seconds=max(report.optimizer_seconds for report in reports),
            peak_memory_bytes=max(report.peak_memory_bytes for report in reports),
        )

    def _mfu(self, reports: list[TrainStepReport], step_seconds: float) -> float | None:
        peaks = [report.peak_tflops for report in reports if report.peak_tflops is not None]
        if len(peaks) < len(reports):
            return None
        return sum(report.flops for report in reports) / step_seconds / (sum(peaks) * 1e12)


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return is_last or (every > 0 and step % every == 0)


def _val_losses(reports: list[ValStepReport]) -> dict[str, float]:
    """Means over the label tokens: `val_loss` of all, and `val_loss/<source>` of each of several sources."""
    if not reports:
        return {}
    sources = reports[0].loss_sums
    sums = {source: sum(report.loss_sums[source] for report in reports) for source in sources}
    counts = {source: sum(report.num_label_tokens[source] for report in reports) for source in sources}
    losses = {"val_loss": sum(sums.values()) / max(1, sum(counts.values()))}
    if len(sources) > 1:
        losses |= {
            source.replace("validation", "val_loss", 1): sums[source] / max(1, counts[source]) for source in sources
        }
    return losses


def _with_validation(state: TrainState, val_loss: float | None, threshold: float) -> TrainState:
    """The state after a step, with its validation loss if there was a validation."""
    if val_loss is None:
        return replace(state, val_loss=None)
    best = state.best_val_loss
    has_gained = best is None or val_loss < best - threshold
    return replace(
        state,
        val_loss=val_loss,
        best_val_loss=val_loss if best is None else min(best, val_loss),
        num_evals_without_gain=0 if has_gained else state.num_evals_without_gain + 1,
    )
