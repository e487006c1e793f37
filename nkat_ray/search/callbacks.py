"""What Tune sees, written into the run's journal first and then told to whoever listens."""

import errno
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
from ray.tune import Callback
from ray.tune.experiment import Trial

from nkat_ray.metrics import (
    ATTENTION_ENTROPY,
    EPOCH,
    LAMBDA_THEORY,
    LOCAL_TPE,
    NKAT_PREFIX,
    NOTICES,
    STOP_DETAIL,
    STOP_REASON,
    TRAIN_LOSS,
    VAL_ACCURACY,
)
from nkat_ray.search.journal import Journal, TrialRecord
from nkat_ray.search.schedulers import VERDICTS

ROW_KEYS = (
    EPOCH, TRAIN_LOSS, VAL_ACCURACY, LOCAL_TPE, "lr", "images_per_s", "epoch_s", "started_s", LAMBDA_THEORY,
    "node", "gpus", "cpus", "parameters", "nkat_parameters",
)  # fmt: skip


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Plain functions that are told what happens; the display, TensorBoard and tests are such."""

    on_trial_start: Callable[[int, Mapping[str, Any]], None] = _nothing  # trial, proposed values
    on_result: Callable[[int, Mapping[str, Any]], None] = _nothing  # trial, the curve's row
    on_trial_end: Callable[[TrialRecord], None] = _nothing
    on_survivor: Callable[[int], None] = _nothing  # the first time that a trial reaches the gate
    on_notice: Callable[[str], None] = _nothing  # one line that a worker wants the user to know


class JournalCallback(Callback):
    """Adapts Tune's callbacks to the journal, the searcher's `tell` and the listeners.

    Args:
        journal: written before anybody is told.
        folder: Tune's own folder of this attempt, a path or a URI: checkpoints are found below it.
        gate: Local TPE to reach.
        max_epochs: the last epoch.
        tell: takes a trial that has ended.
        expired: whether Stage 1's time is used up.
        listeners: told last.
        verdict: how the scheduler words an end of its own.
        advance: called again and again while Tune goes on.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        folder: str,
        gate: float,
        max_epochs: int,
        tell: Callable[[TrialRecord], None],
        expired: Callable[[], bool],
        listeners: Listeners,
        verdict: str = VERDICTS["asha"],
        advance: Callable[[], None] | None = None,
    ) -> None:
        self._journal, self._folder, self._gate, self._max_epochs = journal, folder, gate, max_epochs
        self._tell, self._expired, self._listeners = tell, expired, listeners
        self._verdict, self._advance = verdict, advance

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; nothing here is restored from one."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune has looked round once more, about ten times a second."""
        if self._advance is not None:
            self._advance()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has its slot, for the first time or again."""
        self._journal.write("started", trial=trial.config["trial"], trial_id=trial.trial_id)
        self._listeners.on_trial_start(trial.config["trial"], self._record(trial).params)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch, with the decision on it already taken. Both are written before anybody is told of either."""
        record = self._record(trial)
        was_survivor = record.passed(self._gate)
        row = self._write_epoch(record, trial, result) if LOCAL_TPE in result else None
        ended = bool(result.get("done")) and self._write_end(record, result.get(STOP_REASON), result.get(STOP_DETAIL))
        if row is not None:
            self._listeners.on_result(record.trial, row)
            for text in result.get(NOTICES) or ():
                self._listeners.on_notice(f"trial {record.trial}: {text}")
        if record.passed(self._gate) and not was_survivor:
            self._listeners.on_survivor(record.trial)
        if ended:
            self._tell_end(record)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial's end; those that returned by themselves had no result that said so."""
        record = self._record(trial)
        last = trial.last_result or {}
        if self._write_end(record, last.get(STOP_REASON), last.get(STOP_DETAIL)):
            self._tell_end(record)
        self._tidy(record)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial that raised, or lost its process, and is tried again from its checkpoint."""
        self._listeners.on_notice(f"trial {trial.config['trial']} is tried again after a fault: {_error_of(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial that raised more often than it may be retried.

        Raises:
            OSError: storage is full. That is no trial's fault, and the next ones would fail alike: the run ends, and
                `--resume` goes on with this trial.
        """
        record, error = self._record(trial), _error_of(trial)
        if os.strerror(errno.ENOSPC) in error:
            raise OSError(errno.ENOSPC, f"trial {record.trial} cannot store its checkpoints: {error}")
        if self._write_end(record, "error", None, error=error):
            self._tell_end(record)
        self._tidy(record)

    def end(self, record: TrialRecord, reason: str, detail: str) -> None:
        """End a trial that an earlier driver left and that does not start again."""
        if self._write_end(record, reason, detail):
            self._tell_end(record)
        self._tidy(record)

    def _tidy(self, record: TrialRecord) -> None:
        if record.passed(self._gate):
            return
        try:
            remove_checkpoints(record)
        except OSError as error:  # a bucket that does not answer must not end the search
            self._listeners.on_notice(f"trial {record.trial}: its checkpoints could not be removed ({one_line(error)})")

    def _record(self, trial: Trial) -> TrialRecord:
        return self._journal.state.trials[trial.config["trial"]]

    def _write_epoch(self, record: TrialRecord, trial: Trial, result: Mapping[str, Any]) -> dict[str, Any]:
        row = {key: result.get(key) for key in ROW_KEYS}
        row |= {key: value for key, value in result.items() if key.startswith((ATTENTION_ENTROPY, NKAT_PREFIX))}
        name = result.get("checkpoint_dir_name")
        path = f"{self._folder}/{trial.storage.trial_dir_name}/{name}" if name and trial.storage else None
        self._journal.write("result", trial=record.trial, row=row, checkpoint=path)
        return row

    def _write_end(
        self, record: TrialRecord, reason: str | None, detail: str | None, *, error: str | None = None
    ) -> bool:
        """Write the trial's end; False if it had ended before."""
        if record.ended:
            return False
        reason, detail = self._reason(record, reason, detail)
        self._journal.write("end", trial=record.trial, stop_reason=reason, stop_detail=detail or error, error=error)
        return True

    def _tell_end(self, record: TrialRecord) -> None:
        self._tell(record)
        self._listeners.on_trial_end(record)

    def _reason(self, record: TrialRecord, reason: str | None, detail: str | None) -> tuple[str, str | None]:
        """The gate's reason or `error` as given; else what the trial's last epoch and the clock say."""
        last = max(record.curve, default=0)
        score = record.curve[last][LOCAL_TPE] if last else math.nan
        # A trial that returns without a new epoch shows the gate no metrics at all: its time was up, or an earlier
        # driver was killed after its last epoch.
        silent = reason == "nan" and (last == 0 or math.isfinite(score))
        if reason is not None and not silent:
            return reason, detail
        if last >= self._max_epochs:
            passed = record.passed(self._gate)
            sign = ">=" if passed else "<"
            return (
                "finished" if passed else "gate",
                f"epoch {last}: Local TPE {_best(record):.4f} {sign} gate {self._gate}",
            )
        if self._expired():
            return "budget", f"epoch {last}: Stage 1's time is used up"
        if silent:
            return "nan", detail
        return "asha", f"epoch {last}: Local TPE {score:.4f} {self._verdict}"


def _best(record: TrialRecord) -> float:
    best = record.best_row()
    return math.nan if best is None else best[LOCAL_TPE]


def _error_of(trial: Trial) -> str:
    """The newest error of a trial. Read from the driver's own file: what `get_error` reads is copied there later."""
    path = trial.error_file
    return one_line(Path(path).read_text()) if path and Path(path).exists() else "its process was lost"


def one_line(error: object) -> str:
    """The last non-empty line of an error's text: with Ray, the exception that the trial raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__


def remove_checkpoints(record: TrialRecord) -> None:
    """Free the disk of a trial that did not survive: its curve stays in the journal, its weights serve nobody."""
    for path in record.checkpoints:
        filesystem, inside = pyarrow.fs.FileSystem.from_uri(path)
        if filesystem.get_file_info(inside).type == pyarrow.fs.FileType.Directory:
            filesystem.delete_dir(inside)
