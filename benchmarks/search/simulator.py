"""A search without training: the real gate, ASHA, searcher and projection over curves that are known already.

Event by event, as Tune does it: a free slot takes the next trial; an epoch ends when its time is over; its result goes
to the gate, then (if it said no) to the scheduler; what stops is told to the searcher. Only Tune's processes and the
training itself are left out.
"""

import heapq
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from nkat_ray.config import Choice, Domain
from nkat_ray.metrics import EPOCH, LOCAL_TPE, STOP_DETAIL, STOP_REASON, VAL_ACCURACY
from nkat_ray.search.gate import LocalTPEGate
from nkat_ray.search.journal import Journal
from nkat_ray.search.projection import GateProjection, student_t
from nkat_ray.search.scheduler import ResumableASHA
from nkat_ray.search.searcher import GatedOptunaSearch


@dataclass(frozen=True)
class Curve:
    """A finished curve of the table: Local TPE, accuracy and seconds of each epoch, and the parameters."""

    params: Mapping[str, Any]
    scores: Sequence[float]
    accuracies: Sequence[float]
    seconds: Sequence[float]

    @property
    def best(self) -> float:
        """The final score: the best of the curve."""
        return max(self.scores)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What may stop a trial. A gate of None lets everything pass."""

    gate: float | None = None
    projection: bool = False
    asha: bool = False
    grace: int = 1
    reduction: int = 3


@dataclass
class Outcome:
    """What a simulated search came to."""

    scores: list[float] = field(default_factory=list)  # of every epoch of every trial, in the order of their ends
    seconds: float = 0.0  # of simulated time, until the last trial ended
    ends: dict[int, tuple[str, int]] = field(default_factory=dict)  # row of the table -> stop reason, epoch
    projected: set[int] = field(default_factory=set)  # rows that the projection stopped

    @property
    def epochs(self) -> int:
        """Epochs that were trained, of all trials together."""
        return len(self.scores)

    @property
    def best(self) -> float:
        """The highest score that any trial has shown."""
        return max(self.scores, default=-math.inf)

    def epochs_until(self, score: float) -> int | None:
        """Epochs of all trials together until one has reached the score; None if none has."""
        return next((number for number, found in enumerate(self.scores, 1) if found >= score), None)

    def reasons(self) -> Counter[str]:
        """How many trials ended by which reason."""
        return Counter(reason for reason, _ in self.ends.values())


class InOrder:
    """Proposes rows of the table in a given order."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._rows: Iterator[int] = iter(rows)

    def next(self, trial: int) -> int | None:
        """The row of the next trial; None when there is none."""
        return next(self._rows, None)

    def on_result(self, trial: int, result: Mapping[str, Any]) -> None:
        """An order learns nothing."""

    def on_end(self, trial: int, reason: str) -> None:
        """An order learns nothing."""


class BySearcher:
    """Proposes what GatedOptunaSearch does, mapped to the nearest row that was not used yet.

    Nearest by the mean over the parameters of |difference| / range (0 or 1 for a choice). The score is that of the row,
    told under the parameters that were proposed: to the searcher the distance between the two is noise, the more so the
    smaller the table is. A table of n rows in d dimensions is a coarse picture of its space, so this shows that the
    parts work together and what the rules do to a searcher's proposals, not how good the searcher is.
    """

    def __init__(
        self, table: Sequence[Curve], space: Mapping[str, Domain], *, folder: Path, trials: int, seed: int, gate: float
    ) -> None:
        self._table, self._space, self._unused = table, space, set(range(len(table)))
        self.journal = Journal(folder)
        self._searcher = GatedOptunaSearch(
            space, folder=folder, journal=self.journal, points=[], num_samples=trials, run_seed=seed, gate=gate
        )

    def next(self, trial: int) -> int | None:
        """The unused row nearest to the searcher's proposal; None when it proposes nothing more."""
        proposal = self._searcher.suggest(f"t{trial}")
        if not isinstance(proposal, dict):
            return None
        row = min(sorted(self._unused), key=lambda row: distance(self._space, proposal, self._table[row].params))
        self._unused.remove(row)
        return row

    def on_result(self, trial: int, result: Mapping[str, Any]) -> None:
        """Into the journal, as JournalCallback does it."""
        row = {key: result[key] for key in (EPOCH, VAL_ACCURACY, LOCAL_TPE)}
        self.journal.write("result", trial=trial, row=row, checkpoint=None)

    def on_end(self, trial: int, reason: str) -> None:
        """Into the journal, then to the searcher."""
        self.journal.write("end", trial=trial, stop_reason=reason, stop_detail=None, error=None)
        self._searcher.tell(self.journal.state.trials[trial])


def distance(space: Mapping[str, Domain], a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Mean over the parameters of |difference| / range, in the logarithm where the domain has one; 0..1."""
    return statistics.fmean(_difference(domain, a[name], b[name]) for name, domain in space.items())


def _difference(domain: Domain, a: Any, b: Any) -> float:
    if isinstance(domain, Choice):
        return float(a != b)
    scale = np.log if domain.log else float
    return float(abs(scale(a) - scale(b)) / (scale(domain.high) - scale(domain.low)))


def simulate(
    table: Sequence[Curve], rules: Rules, source: InOrder | BySearcher, *, slots: int, unit_time: bool = False
) -> Outcome:
    """One search over the table, until the source proposes nothing more. All curves have the same number of epochs."""
    epochs = len(table[0].scores)
    gate = LocalTPEGate(
        1.0 if rules.gate is None else rules.gate, smoke_epoch=epochs + 1, max_epochs=epochs,
        projection=GateProjection(max_epochs=epochs) if rules.projection else None,
    )  # fmt: skip
    asha = ResumableASHA(max_t=epochs, grace_period=rules.grace, reduction_factor=rules.reduction)
    outcome, queue, started = Outcome(), [], 0

    def start(now: float) -> None:
        nonlocal started
        row = source.next(started)
        if row is None:
            return
        trial: Any = SimpleNamespace(trial_id=f"t{started}", config={"trial": started})
        asha.on_trial_add(None, trial)
        heapq.heappush(queue, (now + (1.0 if unit_time else table[row].seconds[0]), started, row, 1, trial))
        started += 1

    for _ in range(slots):
        start(0.0)
    while queue:
        now, number, row, epoch, trial = heapq.heappop(queue)
        curve = table[row]
        result = {
            EPOCH: epoch, VAL_ACCURACY: curve.accuracies[epoch - 1], LOCAL_TPE: curve.scores[epoch - 1],
            "config": trial.config,
        }  # fmt: skip
        outcome.scores.append(curve.scores[epoch - 1])
        outcome.seconds = now
        reason = _judge(rules, gate, asha, trial, result, epochs)
        source.on_result(number, result)
        if reason is None:
            seconds = 1.0 if unit_time else curve.seconds[epoch]
            heapq.heappush(queue, (now + seconds, number, row, epoch + 1, trial))
            continue
        outcome.ends[row] = (reason, epoch)
        if "projected" in result.get(STOP_DETAIL, ""):
            outcome.projected.add(row)
        source.on_end(number, reason)
        start(now)
    return outcome


def _judge(
    rules: Rules, gate: LocalTPEGate, asha: ResumableASHA, trial: Any, result: dict[str, Any], epochs: int
) -> str | None:
    """The stop reason, in Tune's order: Stopper, then scheduler. None where the trial goes on."""
    stopped = gate(trial.trial_id, result) if rules.gate is not None else False
    last = result[EPOCH] >= epochs
    if stopped or last:
        asha.on_trial_complete(None, trial, result)
        return str(result.get(STOP_REASON, "finished"))
    if rules.asha and asha.on_trial_result(None, trial, result) == "STOP":
        return "asha"
    return None


def curves_of(rows: Iterable[Mapping[str, Any]], space: Mapping[str, Domain]) -> list[Curve]:
    """The table's rows as curves, by number; those that are not whole (a loss was not finite) are left out."""
    by_number: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_number.setdefault(row["curve"], []).append(row)
    longest = max(len(group) for group in by_number.values())
    curves = []
    for _, group in sorted(by_number.items()):
        group = sorted(group, key=lambda row: row[EPOCH])
        columns = [[row[key] for row in group] for key in (LOCAL_TPE, VAL_ACCURACY, "epoch_s")]
        if len(group) == longest and np.isfinite(columns[0]).all():
            curves.append(Curve({name: group[0][name] for name in space}, *columns))
    return curves


@contextmanager
def by_searcher(
    table: Sequence[Curve], space: Mapping[str, Domain], *, trials: int, seed: int, gate: float
) -> Iterator[BySearcher]:
    """A searcher whose study and journal live as long as this context."""
    with tempfile.TemporaryDirectory() as folder:
        source = BySearcher(table, space, folder=Path(folder), trials=trials, seed=seed, gate=gate)
        try:
            yield source
        finally:
            source.journal.close()


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, half of the 95 % interval (Student's t) and standard error, of at least ten values."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), student_t(0.975, len(values) - 1) * error, error
