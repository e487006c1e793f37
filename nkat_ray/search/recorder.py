"""Write Tune's events into the run's journal, then pass them to the stage."""

import errno
import locale
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow.fs
from ray.tune import Callback
from ray.tune.experiment import Trial

from nkat_ray.errors import one_line
from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.metrics import (
    ATTENTION_ENTROPY,
    EPOCH,
    LAMBDA_THEORY,
    LOCAL_TPE,
    NKAT_PREFIX,
    NOTICES,
    TRAIN_ACCURACY,
    TRAIN_LOSS,
    VAL_ACCURACY,
)
from nkat_ray.record.journal import KEPT_BEST, Journal, TrialRecord, stored
from nkat_ray.search.stops import Stop, stop_of

if TYPE_CHECKING:
    from nkat_ray.search.stage1 import Stage1

ROW_KEYS: Final = (
    EPOCH, TRAIN_LOSS, TRAIN_ACCURACY, VAL_ACCURACY, LOCAL_TPE, "lr", "images_per_s", "epoch_s", "started_s",
    LAMBDA_THEORY, "node", "gpus", "cpus", "parameters", "nkat_parameters",
)  # fmt: skip
UNEXPLAINED: Final = "it returned without a reason"


class Recorder(Callback):
    """Adapt Tune's callbacks to the journal and the stage.

    Args:
        journal: journal of the run; each event is written before it is passed on.
        folder: Tune's folder of this attempt, a path or a URI, which contains the checkpoints.

    Attributes:
        first_error: error of the first trial of this driver that failed, with its traceback as text.
    """

    def __init__(self, journal: Journal, *, gate: float, folder: str, stage: "Stage1") -> None:
        self._journal, self._gate, self._folder, self._stage = journal, gate, folder, stage
        self.first_error: RuntimeError | None = None
        self._best = journal.state.stored()[: KEPT_BEST + 1]  # so that no end looks at all trials

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles its callbacks but never restores this one."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Run the stage's periodic work."""
        self._stage.on_step(trials)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record that a trial has started in a slot."""
        self._journal.write("started", trial=trial.config["trial"], trial_id=trial.trial_id)
        self._stage.on_trial_start(self._record(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Record an epoch and the decision about it, then pass both on."""
        record = self._record(trial)
        was_survivor = record.passed(self._gate)
        row = self._write_epoch(record, trial, result) if LOCAL_TPE in result else None
        ended = bool(result.get("done")) and self._write_end(record, stop_of(trial, result))
        if row is not None:
            self._stage.on_epoch(record, row)
        for text in result.get(NOTICES) or ():
            self._stage.on_notice(f"trial {record.trial}: {text}")
        if record.passed(self._gate) and not was_survivor:
            self._stage.on_survivor(record)
        if ended:
            self._stage.on_end(record)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the end of a trial that returned by itself, and remove the checkpoints that are not kept."""
        self.end(self._record(trial), stop_of(trial, trial.last_result or {}))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Report a trial that is retried from its checkpoint after an error or the loss of its process."""
        error = one_line(_error_of(trial))
        self._stage.on_notice(f"trial {trial.config['trial']} is retried after an error: {error}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the end of a trial that failed more often than `max_failures` allows, or that was killed on purpose.

        Raises:
            OSError: the storage is full. Other trials would fail too, so the run ends; `--resume` continues this trial.
        """
        record, text, stop = self._record(trial), _error_of(trial), stop_of(trial, {})
        if stop is not None:  # whoever killed it left the reason
            self.end(record, stop)
            return
        error = one_line(text)
        if os.strerror(errno.ENOSPC) in error:
            raise OSError(errno.ENOSPC, f"trial {record.trial} cannot store its checkpoints: {error}")
        self.first_error = self.first_error or RuntimeError(text)
        self.end(record, Stop("error", error))

    def end(self, record: TrialRecord, stop: Stop | None) -> None:
        """Record the end of a trial, unless it has ended, and remove the checkpoints that are not kept."""
        if self._write_end(record, stop):
            self._stage.on_end(record)
        try:
            self._tidy(record)
        except OSError as error:  # an unreachable bucket must not end the search
            self._stage.on_notice(f"trial {record.trial}: its checkpoints could not be removed ({one_line(error)})")

    def _tidy(self, record: TrialRecord) -> None:
        """Remove the checkpoints of this trial and of the one that it displaces from the best, except kept weights."""
        known = {one.trial: one for one in (*self._best, record)}  # an end can be told twice
        self._best = stored(known.values())[: KEPT_BEST + 1]
        kept = [one.trial for one in self._best[:KEPT_BEST]]
        for one in (record, *self._best[KEPT_BEST:]):
            if not one.passed(self._gate):
                remove_checkpoints(one, keep_weights=one.trial in kept)

    def _record(self, trial: Trial) -> TrialRecord:
        return self._journal.state.trials[trial.config["trial"]]

    def _write_epoch(self, record: TrialRecord, trial: Trial, result: Mapping[str, Any]) -> dict[str, Any]:
        row = {key: result.get(key) for key in ROW_KEYS}
        row |= {key: value for key, value in result.items() if key.startswith((ATTENTION_ENTROPY, NKAT_PREFIX))}
        name = result.get("checkpoint_dir_name")
        path = f"{self._folder}/{trial.storage.trial_dir_name}/{name}" if name and trial.storage else None
        self._journal.write("result", trial=record.trial, row=row, checkpoint=path)
        return row

    def _write_end(self, record: TrialRecord, stop: Stop | None) -> bool:
        """Write a trial's end; return False if it had already ended. An end without a reason is an error."""
        if record.ended:
            return False
        reason, detail = stop or Stop("error", UNEXPLAINED)
        error = detail if reason == "error" else None
        self._journal.write("end", trial=record.trial, stop_reason=reason, stop_detail=detail, error=error)
        return True


def _error_of(trial: Trial) -> str:
    """Return a trial's errors, the newest last, from the driver's file (that of `get_error` is written later)."""
    path = trial.error_file
    if not path or not Path(path).exists():
        return "its process was lost"
    data = Path(path).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError:  # Tune writes it in the locale's encoding
        return data.decode(locale.getencoding(), errors="replace")


def remove_checkpoints(record: TrialRecord, *, keep_weights: bool) -> None:
    """Remove a trial's checkpoints; its curve stays in the journal.

    Args:
        keep_weights: whether the newest checkpoint keeps the best weights, without the state of the training.
    """
    for place, path in enumerate(reversed(record.checkpoints)):
        filesystem, inside = pyarrow.fs.FileSystem.from_uri(path)
        if filesystem.get_file_info(inside).type != pyarrow.fs.FileType.Directory:
            continue
        if place == 0 and keep_weights:
            for file in filesystem.get_file_info(pyarrow.fs.FileSelector(inside)):
                if file.base_name != WEIGHTS_FILE:
                    filesystem.delete_file(file.path)
        else:
            filesystem.delete_dir(inside)
