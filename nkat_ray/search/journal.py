"""The run's journal: one JSON line for everything that happened, written before anybody acts on it.

It is the only truth that a resumed run starts from: finished trials, curves, checkpoints, Stage 2 rows. Nothing is
unpickled, and nothing depends on Tune's own snapshots, which are ten seconds old or more when a driver is killed.
"""

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nkat_ray.files import JOURNAL_FILE
from nkat_ray.metrics import EPOCH, LOCAL_TPE


@dataclass
class TrialRecord:
    """What is known of one trial."""

    trial: int
    params: dict[str, Any]  # what the searcher proposed
    seed: int
    study_number: int  # the trial's number in the Optuna study
    trial_id: str | None = None  # Tune's name for it; a continued trial gets a new one
    proposed_s: float | None = None  # since 1970
    started_s: float | None = None  # since 1970, of its first start
    curve: dict[int, dict[str, Any]] = field(default_factory=dict)  # epoch -> the row that was reported
    checkpoints: list[str] = field(default_factory=list)  # paths or URIs, oldest first
    stop_reason: str | None = None
    stop_detail: str | None = None
    error: str | None = None
    ended_s: float | None = None

    @property
    def ended(self) -> bool:
        """Whether the trial is over."""
        return self.stop_reason is not None

    def finite_rows(self) -> list[dict[str, Any]]:
        """The curve's rows with a finite score, by epoch."""
        return [row for _, row in sorted(self.curve.items()) if math.isfinite(row[LOCAL_TPE])]

    def best_row(self) -> dict[str, Any] | None:
        """The row with the highest Local TPE (the first of equals); None if no score was ever finite."""
        return max(self.finite_rows(), key=lambda row: row[LOCAL_TPE], default=None)

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best row: whose weights are kept."""
        best = self.best_row()
        return None if best is None else int(best[EPOCH])

    def passed(self, gate: float) -> bool:
        """Whether the trial is a survivor: its Local TPE has once reached the gate."""
        best = self.best_row()
        return best is not None and best[LOCAL_TPE] >= gate


@dataclass(frozen=True, kw_only=True)
class WarmTrial:
    """A trial of an earlier run, as this run's sampler learns from it."""

    name: str  # "<run>/<number>"
    record: TrialRecord  # its params are those of this run's space
    score: float | None  # what it is worth if it passes this run's gate


@dataclass
class RunState:
    """Everything that the journal tells."""

    trials: dict[int, TrialRecord] = field(default_factory=dict)
    attempts: list[tuple[float, float]] = field(default_factory=list)  # (start, last sign of life), since 1970
    warmed: bool = False  # the study knows the trials of --warm_start
    stage1_done: bool = False
    order: list[int] = field(default_factory=list)  # of the survivors, once it is fixed: nothing is validated any more
    slot_changes: list[tuple[float, int]] = field(default_factory=list)  # (since 1970, trials at a time from then on)
    stage2: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)  # (trial, dataset) -> validation row
    stage2_epochs: dict[tuple[int, str], int | None] = field(default_factory=dict)  # epoch of the weights behind it
    tested: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)  # (trial, dataset) -> test row
    notices: list[str] = field(default_factory=list)
    _open: set[int] = field(default_factory=set)

    @property
    def open_trials(self) -> int:
        """Trials that were proposed and have not ended."""
        return len(self._open)

    @property
    def earlier_s(self) -> float:
        """Seconds during which drivers before this one were at work."""
        return sum(last - start for start, last in self.attempts[:-1])

    @property
    def wall_s(self) -> float:
        """Seconds during which a driver was at work."""
        return sum(last - start for start, last in self.attempts)

    def survivors(self, gate: float) -> list[int]:
        """Numbers of the trials that passed the gate, in order."""
        return sorted(number for number, record in self.trials.items() if record.passed(gate))

    def validated(self, trial: int, epoch: int | None) -> dict[tuple[int, str], dict[str, Any]]:
        """Stage 2's validation rows of a trial, made with the weights of that epoch (or of one that nobody noted)."""
        return {
            key: row for key, row in self.stage2.items() if key[0] == trial and self.stage2_epochs[key] in (None, epoch)
        }

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take one event in. Applying a result twice changes nothing: it is kept by trial and epoch."""
        kind, now = event["event"], event["time_s"]
        if kind == "run":
            self.attempts.append((now, now))
        elif self.attempts:
            self.attempts[-1] = (self.attempts[-1][0], max(now, self.attempts[-1][1]))
        handler = getattr(self, f"_on_{kind}", None)
        if handler is not None:
            handler(event)

    def _on_proposed(self, event: Mapping[str, Any]) -> None:
        keys = ("trial", "params", "seed", "study_number")
        self.trials[event["trial"]] = TrialRecord(**{key: event[key] for key in keys}, proposed_s=event["time_s"])
        self._open.add(event["trial"])

    def _on_started(self, event: Mapping[str, Any]) -> None:
        record = self.trials[event["trial"]]
        record.started_s = record.started_s or event["time_s"]
        record.trial_id = event["trial_id"]

    def _on_result(self, event: Mapping[str, Any]) -> None:
        record = self.trials[event["trial"]]
        record.curve[event["row"][EPOCH]] = event["row"]
        if event["checkpoint"] is not None:
            record.checkpoints = [path for path in record.checkpoints if path != event["checkpoint"]]
            record.checkpoints.append(event["checkpoint"])

    def _on_end(self, event: Mapping[str, Any]) -> None:
        record = self.trials[event["trial"]]
        record.stop_reason, record.stop_detail = event["stop_reason"], event["stop_detail"]
        record.error, record.ended_s = event["error"], event["time_s"]
        self._open.discard(event["trial"])

    def _on_slots(self, event: Mapping[str, Any]) -> None:
        self.slot_changes.append((event["time_s"], event["slots"]))

    def _on_warmed(self, event: Mapping[str, Any]) -> None:
        self.warmed = True

    def _on_stage1_done(self, event: Mapping[str, Any]) -> None:
        self.stage1_done = True

    def _on_ranked(self, event: Mapping[str, Any]) -> None:
        self.order = event["order"]

    def _on_stage2(self, event: Mapping[str, Any]) -> None:
        key = event["row"]["trial"], event["row"]["dataset"]
        self.stage2[key], self.stage2_epochs[key] = event["row"], event.get("epoch")

    def _on_tested(self, event: Mapping[str, Any]) -> None:
        self.tested[event["row"]["trial"], event["row"]["dataset"]] = event["row"]

    def _on_notice(self, event: Mapping[str, Any]) -> None:
        if event["text"] not in self.notices:
            self.notices.append(event["text"])


class Journal:
    """The open journal of a run and the state it adds up to.

    Args:
        folder: the run's local folder. What an earlier driver wrote there is read first; a last line that was cut short
            by a kill is dropped.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_FILE
        self.state = RunState()
        whole = 0
        for line, event in _whole_lines(self.path):
            whole += len(line)
            self.state.apply(event)
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(whole)
        self._whole = whole

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event and take it into `state`. Unbuffered: a killed driver loses nothing that it had written.

        Raises:
            OSError: the disk is full; the journal is as it was before.
        """
        event = {"event": kind, "time_s": time.time(), **fields}
        line = json.dumps(event).encode() + b"\n"
        if self._file.write(line) != len(line):  # the disk took a part of it, which would spoil the next line
            self._file.truncate(self._whole)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._whole += len(line)
        self.state.apply(event)

    def close(self) -> None:
        """Close the file; the state stays readable."""
        self._file.close()


def read_state(folder: Path) -> RunState:
    """The state of a run, without opening its journal for writing: also of one that is still going."""
    state = RunState()
    for _, event in _whole_lines(folder / JOURNAL_FILE):
        state.apply(event)
    return state


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line, json.loads(line)
