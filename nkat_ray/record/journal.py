"""The run's journal: one JSON line per event, written before any code acts on the event.

A resumed run reads everything from it: finished trials, curves, checkpoints, Stage 2 rows. It unpickles nothing and
does not use Tune's snapshots, which may be ten seconds old or more when a driver is killed.
"""

import errno
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nkat_ray.errors import UserError
from nkat_ray.files import JOURNAL_FILE, without_cut_line
from nkat_ray.metrics import EPOCH, LOCAL_TPE

FAILED_REASONS: Final = ("nan", "error")  # such a trial says nothing about its configuration, even if it had passed
KEPT_BEST: Final = 3  # number of best trials whose weights a run keeps, even if they did not pass the gate
SYNC_S: Final = 1.0  # a power cut loses at most this much,
SYNCED: Final = ("run", "end", "stage1_done", "ranked", "stage2", "tested")  # and none of these events

Row = dict[str, Any]
Key = tuple[int, str]  # trial and dataset


@dataclass
class TrialRecord:
    """Everything that the journal says about one trial."""

    trial: int
    params: dict[str, Any]  # as the searcher proposed them
    seed: int
    study_number: int  # the trial's number in the Optuna study
    trial_id: str | None = None  # Tune's id; a continued trial gets a new one
    proposed_s: float | None = None  # since 1970
    started_s: float | None = None  # since 1970, first start
    curve: dict[int, Row] = field(default_factory=dict)  # epoch -> reported row
    checkpoints: list[str] = field(default_factory=list)  # paths or URIs, oldest first
    stop_reason: str | None = None
    stop_detail: str | None = None
    error: str | None = None
    ended_s: float | None = None  # since 1970

    @property
    def ended(self) -> bool:
        """Whether the trial has ended."""
        return self.stop_reason is not None

    @property
    def failed(self) -> bool:
        """Whether the trial ended with an error or a loss that was not finite."""
        return self.stop_reason in FAILED_REASONS

    def finite_rows(self) -> list[Row]:
        """Return the curve's rows with a finite score, by epoch."""
        return [row for _, row in sorted(self.curve.items()) if math.isfinite(row[LOCAL_TPE])]

    def best_row(self) -> Row | None:
        """Return the row with the highest Local TPE (the first in a tie); None if no score was finite."""
        return max(self.finite_rows(), key=lambda row: row[LOCAL_TPE], default=None)

    @property
    def best_score(self) -> float:
        """Highest Local TPE; -inf if no score was finite."""
        best = self.best_row()
        return -math.inf if best is None else float(best[LOCAL_TPE])

    @property
    def best_epoch(self) -> int | None:
        """Epoch of the best row, whose weights are kept; None if no score was finite."""
        best = self.best_row()
        return None if best is None else int(best[EPOCH])

    def passed(self, gate: float) -> bool:
        """Return whether the trial is a survivor: its best Local TPE is at or above the gate."""
        return self.best_score >= gate


@dataclass(frozen=True, kw_only=True)
class WarmTrial:
    """A trial of an earlier run for this run's sampler."""

    name: str  # "<run>/<number>"
    record: TrialRecord  # with the parameters of this run's space
    score: float  # value for Optuna if the trial passes this run's gate


def by_score(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the trials with a finite score, by falling Local TPE; in a tie the lower number is first."""
    scored = [record for record in records if record.best_row() is not None]
    return sorted(scored, key=lambda record: (-record.best_score, record.trial))


def stored(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the ended trials with weights on disk, best first."""
    return by_score(record for record in records if record.ended and record.checkpoints)


@dataclass
class RunState:
    """The state that the events of a journal add up to."""

    trials: dict[int, TrialRecord] = field(default_factory=dict)
    attempts: list[tuple[float, float]] = field(default_factory=list)  # (start, last event) per driver, since 1970
    warmed: bool = False  # the study has the trials of --warm_start
    stage1_done: bool = False
    order: list[int] = field(default_factory=list)  # survivors, best first, once they are ranked
    slot_changes: list[tuple[float, int]] = field(default_factory=list)  # (since 1970, number of slots from then on)
    stage2: dict[Key, Row] = field(default_factory=dict)  # validation rows
    stage2_epochs: dict[Key, int | None] = field(default_factory=dict)  # epoch of the validated weights
    stage2_ended_s: dict[Key, float] = field(default_factory=dict)  # since 1970, end of the validation
    tested: dict[Key, Row] = field(default_factory=dict)  # test rows
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Best Local TPE per trial, -inf without one: the gate is asked at each result.
        self._scores = dict[int, float]()
        for record in self.trials.values():
            self._score(record)

    def _score(self, record: TrialRecord) -> None:
        self._scores[record.trial] = record.best_score

    @property
    def earlier_s(self) -> float:
        """Working time of the drivers before this one, in seconds."""
        return sum(last - start for start, last in self.attempts[:-1])

    @property
    def wall_s(self) -> float:
        """Working time of all drivers, in seconds."""
        return sum(last - start for start, last in self.attempts)

    def by_score(self) -> list[TrialRecord]:
        """Return the trials with a finite score, by falling Local TPE; in a tie the lower number is first."""
        return by_score(self.trials.values())

    def stored(self) -> list[TrialRecord]:
        """Return the ended trials with weights on disk, best first."""
        return stored(self.trials.values())

    def weights_kept(self, gate: float) -> list[int]:
        """Return the numbers of the ended trials whose weights are kept, the best first."""
        return [r.trial for place, r in enumerate(self.stored()) if place < KEPT_BEST or r.passed(gate)]

    def survivors(self, gate: float) -> list[int]:
        """Return the numbers of the trials that passed the gate, in ascending order."""
        return list(self.survivor_scores(gate))

    def survivor_scores(self, gate: float) -> dict[int, float]:
        """Return the best Local TPE of each trial that passed the gate, by number, in ascending order."""
        return dict(sorted((trial, score) for trial, score in self._scores.items() if score >= gate))

    def validated(self, trial: int, epoch: int | None) -> dict[Key, Row]:
        """Return a trial's validation rows for the weights of an epoch, and those whose epoch is unknown."""
        return {
            key: row for key, row in self.stage2.items() if key[0] == trial and self.stage2_epochs[key] in (None, epoch)
        }

    def apply(self, event: Mapping[str, Any]) -> None:
        """Apply one event; applying the same result twice has no further effect."""
        kind, now = event["event"], event["time_s"]
        if kind == "run":
            self.attempts.append((event.get("began_s", now), now))
        elif self.attempts:
            start, last = self.attempts[-1]
            self.attempts[-1] = (start, max(now, last))
        handler = getattr(self, f"_on_{kind}", None)
        if handler is not None:
            handler(event)

    def _on_proposed(self, event: Mapping[str, Any]) -> None:
        keys = ("trial", "params", "seed", "study_number")
        record = TrialRecord(**{key: event[key] for key in keys}, proposed_s=event["time_s"])
        self.trials[event["trial"]] = record
        self._score(record)

    def _on_started(self, event: Mapping[str, Any]) -> None:
        record = self.trials[event["trial"]]
        record.started_s = record.started_s or event["time_s"]
        record.trial_id = event["trial_id"]

    def _on_result(self, event: Mapping[str, Any]) -> None:
        record = self.trials[event["trial"]]
        record.curve[event["row"][EPOCH]] = event["row"]
        self._score(record)
        if event["checkpoint"] is not None:
            record.checkpoints = [path for path in record.checkpoints if path != event["checkpoint"]]
            record.checkpoints.append(event["checkpoint"])

    def _on_end(self, event: Mapping[str, Any]) -> None:
        record = self.trials[event["trial"]]
        record.stop_reason, record.stop_detail = event["stop_reason"], event["stop_detail"]
        record.error, record.ended_s = event["error"], event["time_s"]

    def _on_slots(self, event: Mapping[str, Any]) -> None:
        self.slot_changes.append((event["time_s"], event["slots"]))

    def _on_warmed(self, event: Mapping[str, Any]) -> None:
        self.warmed = True

    def _on_stage1_done(self, event: Mapping[str, Any]) -> None:
        self.stage1_done = True

    def _on_extended(self, event: Mapping[str, Any]) -> None:
        """Reopen both stages; survivors that were tested are not tested again."""
        self.stage1_done, self.order = False, []
        self.tested = {key: row for key, row in self.tested.items() if row["test_accuracy"] is not None}

    def _on_ranked(self, event: Mapping[str, Any]) -> None:
        self.order = event["order"]

    def _on_stage2(self, event: Mapping[str, Any]) -> None:
        key = event["row"]["trial"], event["row"]["dataset"]
        self.stage2[key], self.stage2_epochs[key] = event["row"], event.get("epoch")
        self.stage2_ended_s[key] = event["time_s"]

    def _on_tested(self, event: Mapping[str, Any]) -> None:
        self.tested[event["row"]["trial"], event["row"]["dataset"]] = event["row"]

    def _on_notice(self, event: Mapping[str, Any]) -> None:
        if event["text"] not in self.notices:
            self.notices.append(event["text"])


class Journal:
    """The open journal of a run and its current state.

    Args:
        folder: the run's local folder. Events of earlier drivers are read first; an incomplete last line, which a kill
            leaves, is dropped.

    Raises:
        UserError: a line is damaged; nothing was written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_FILE
        self.state = read_state(folder)
        self._file = without_cut_line(self.path).open("ab", buffering=0)
        self._whole = self._file.tell()
        self._synced_s = -math.inf

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event without buffering, so that a kill loses nothing, and apply it to `state`.

        Raises:
            OSError: the disk is full; the journal is unchanged.
        """
        event = {"event": kind, "time_s": time.time(), **fields}
        line = json.dumps(event).encode() + b"\n"
        if self._file.write(line) != len(line):  # a partial line would damage the next one
            self._file.truncate(self._whole)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._whole += len(line)
        if kind in SYNCED or time.monotonic() - self._synced_s >= SYNC_S:
            os.fsync(self._file.fileno())
            self._synced_s = time.monotonic()
        self.state.apply(event)

    def close(self) -> None:
        """Close the file; the state remains readable."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_state(folder: Path) -> RunState:
    """Return the state of a run without opening its journal for writing; the run may be in progress.

    Args:
        folder: the run's local folder. Without a journal the state is empty. An incomplete last line is ignored: a
            kill has truncated it, or it is being written.

    Raises:
        UserError: a line is damaged.
    """
    state, path = RunState(), folder / JOURNAL_FILE
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, start=1):
        try:
            state.apply(json.loads(line))
        except (ValueError, TypeError, LookupError) as error:  # not JSON, or an event about an unknown trial
            command = f"sed -i.damaged '{number},$d' {shlex.quote(str(path))}"
            cut = f"`{command}` removes it with what follows and keeps a copy"
            if sys.platform == "win32":
                cut = "copy the file, then delete this line and what follows in a text editor"
            raise UserError(
                f"{path}: line {number} of {len(lines)} is damaged, e.g. by a power cut; {cut}; --resume then "
                "continues from the line before"
            ) from error
    return state
