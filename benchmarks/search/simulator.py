"""Simulate a search without training: the real gate, ASHA and searcher over recorded learning curves.

Events follow one another as in Tune: a free slot takes a paused trial that the rule resumes, else the next trial; an
epoch ends when its seconds are over; its result goes to the gate and then, if the gate does not stop the trial, to the
rule; the searcher receives the results of trials that ended. Only Tune's processes and the training itself are left
out: pausing and resuming a trial costs nothing unless `resume_epochs` says so.
"""

import heapq
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
from scipy import stats

from nkat_ray.config import RunConfig
from nkat_ray.metrics import EPOCH, LOCAL_TPE, STOP_REASON, VAL_ACCURACY
from nkat_ray.record.journal import Journal
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.search.gate import LocalTPEGate
from nkat_ray.search.scheduler import ResumableASHA
from nkat_ray.search.searcher import GatedOptunaSearch
from nkat_ray.space import Choice, Domain

PAUSE = "pause"  # a trial gives its slot back and keeps its checkpoint


@dataclass(frozen=True)
class Curve:
    """Hold a finished curve of the table: parameters, and Local TPE, accuracy and seconds of each epoch."""

    params: Mapping[str, Any]
    scores: Sequence[float]
    accuracies: Sequence[float]
    seconds: Sequence[float]

    @property
    def best(self) -> float:
        """Return the final score: the best of the curve."""
        return max(self.scores)


class Rule:
    """A stopping rule, here one that never stops a trial before its last epoch. `PAUSE` is one of its decisions."""

    def on_start(self, trial: Any) -> None:
        """Learn of a trial that starts."""

    def judge(self, trial: Any, epoch: int, score: float) -> str | None:
        """Return why a trial that is not at its last epoch stops here, PAUSE, or None if it goes on."""
        return None

    def on_last(self, trial: Any, result: dict[str, Any]) -> None:
        """Learn of a trial that the gate or its last epoch has ended."""

    def resume(self, *, waiting: bool, running: int) -> int | None:
        """Return the number of a paused trial that takes a free slot; None if there is none.

        Args:
            waiting: there are trials that have not started yet.
            running: trials that have a slot.
        """
        return None


class RayASHA(Rule):
    """The product's scheduler: Ray's ASHA, which stops for good what is not among the best of its rung so far."""

    def __init__(self, *, epochs: int, grace: int = 1, reduction: int = 3) -> None:
        self._asha = ResumableASHA(max_t=epochs, grace_period=grace, reduction_factor=reduction)

    def on_start(self, trial: Any) -> None:
        """Add the trial."""
        self._asha.on_trial_add(None, trial)

    def judge(self, trial: Any, epoch: int, score: float) -> str | None:
        """Ask Ray."""
        result = {EPOCH: epoch, LOCAL_TPE: score, "config": trial.config}
        return "asha" if self._asha.on_trial_result(None, trial, result) == "STOP" else None

    def on_last(self, trial: Any, result: dict[str, Any]) -> None:
        """Enter the last score."""
        self._asha.on_trial_complete(None, trial, result)


class OptunaHalving(Rule):
    """Optuna's SuccessiveHalvingPruner, asked after every epoch."""

    def __init__(self, *, grace: int = 1, reduction: int = 3) -> None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=reduction)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="maximize", pruner=pruner)
        self._trials: dict[int, optuna.Trial] = {}

    def on_start(self, trial: Any) -> None:
        """Ask for a trial of the study."""
        self._trials[trial.config["trial"]] = self._study.ask()

    def judge(self, trial: Any, epoch: int, score: float) -> str | None:
        """Report the score and ask the pruner."""
        asked = self._trials[trial.config["trial"]]
        asked.report(score, epoch)
        if not asked.should_prune():
            return None
        self._study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        return "pruned"

    def on_last(self, trial: Any, result: dict[str, Any]) -> None:
        """Tell the study the last score."""
        self._study.tell(self._trials[trial.config["trial"]], result[LOCAL_TPE])


class PromotingASHA(Rule):
    """ASHA as published (Li et al. 2020, arXiv:1810.05934, algorithm 2).

    A trial pauses at each rung. A free slot resumes the best trial that is among the best 1 / reduction of its rung so
    far and was not resumed from it before, highest rung first; only where there is none, a new trial starts.
    """

    def __init__(self, *, epochs: int, grace: int = 1, reduction: int = 3) -> None:
        self._reduction = reduction
        self._rungs: dict[int, dict[int, float]] = {}  # epoch -> score of each trial that paused there
        self._promoted: dict[int, set[int]] = {}
        while grace < epochs:
            self._rungs[grace], self._promoted[grace] = {}, set()
            grace *= reduction

    def judge(self, trial: Any, epoch: int, score: float) -> str | None:
        """Pause the trial at a rung."""
        if epoch not in self._rungs:
            return None
        self._rungs[epoch][trial.config["trial"]] = score
        return PAUSE

    def resume(self, *, waiting: bool, running: int) -> int | None:
        """Promote the best trial that may be promoted."""
        for epoch, rung in reversed(self._rungs.items()):
            best = sorted(rung, key=lambda number: -rung[number])[: len(rung) // self._reduction]
            for number in best:
                if number not in self._promoted[epoch]:
                    self._promoted[epoch].add(number)
                    return number
        return None


class OneEpochThenBest(Rule):
    """All trials train one epoch; then the best few of them go on to the end."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._scores: dict[int, float] = {}
        self._best: list[int] | None = None  # those that have not been resumed yet, the best one last

    def judge(self, trial: Any, epoch: int, score: float) -> str | None:
        """Pause the trial after its first epoch."""
        if epoch > 1:
            return None
        self._scores[trial.config["trial"]] = score
        return PAUSE

    def resume(self, *, waiting: bool, running: int) -> int | None:
        """Resume the next best one once all have had their first epoch."""
        if self._best is None and not waiting and not running:
            self._best = sorted(self._scores, key=lambda number: self._scores[number])[-self._number :]
        return self._best.pop() if self._best else None


@dataclass
class Outcome:
    """Collect the results of a simulated search."""

    results: list[tuple[float, int, float]] = field(default_factory=list)  # seconds since the start, row, score
    ends: dict[int, tuple[str, int]] = field(default_factory=dict)  # row of the table -> stop reason, epoch

    @property
    def epochs(self) -> int:
        """Count the trained epochs of all trials."""
        return len(self.results)

    @property
    def seconds(self) -> float:
        """Return the simulated time until the last epoch ended."""
        return self.results[-1][0] if self.results else 0.0

    @property
    def best(self) -> float:
        """Return the highest score of any trial."""
        return max((score for _, _, score in self.results), default=-math.inf)

    def seconds_until(self, score: float) -> float | None:
        """Return the simulated time until a trial has reached the score; None if none has."""
        return next((now for now, _, found in self.results if found >= score), None)

    def reached(self, score: float) -> set[int]:
        """Return the rows of the trials that have reached the score."""
        return {row for _, row, found in self.results if found >= score}

    def reasons(self) -> Counter[str]:
        """Count the trials per stop reason."""
        return Counter(reason for reason, _ in self.ends.values())


class InOrder:
    """Propose rows of the table in a given order."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._rows: Iterator[int] = iter(rows)

    def next(self, trial: int) -> int | None:
        """Return the row of the next trial; None when there is none."""
        return next(self._rows, None)

    def on_result(self, trial: int, result: Mapping[str, Any]) -> None:
        """Do nothing: an order learns nothing."""

    def on_end(self, trial: int, reason: str) -> None:
        """Do nothing: an order learns nothing."""


class BySearcher:
    """Propose what GatedOptunaSearch proposes, mapped to the nearest row that was not used yet.

    The distance is the mean over the parameters of |difference| / range (0 or 1 for a choice). The searcher receives
    the row's score under the parameters that it proposed: to the searcher, the distance between the two is noise, the
    more so the smaller the table is. A table of n rows in d dimensions is a coarse picture of its space. So this shows
    that the parts work together and what the rules do to a searcher's proposals, not how good the searcher is.
    """

    def __init__(
        self, table: Sequence[Curve], space: Mapping[str, Domain], *, folder: Path, trials: int, seed: int, gate: float
    ) -> None:
        self._table, self._space, self._unused = table, space, set(range(len(table)))
        self.journal = Journal(folder)
        config = RunConfig(num_samples=trials, seed=seed, gate=gate)
        self._searcher = GatedOptunaSearch(
            Run(config=config, domains=space, datasets={}, storage=RunStorage(folder, None), journal=self.journal)
        )

    def next(self, trial: int) -> int | None:
        """Return the unused row nearest to the searcher's proposal; None when it proposes nothing more."""
        proposal = self._searcher.suggest(f"t{trial}")
        if not isinstance(proposal, dict):
            return None
        row = min(sorted(self._unused), key=lambda row: distance(self._space, proposal, self._table[row].params))
        self._unused.remove(row)
        return row

    def on_result(self, trial: int, result: Mapping[str, Any]) -> None:
        """Write the result into the journal, as the recorder does."""
        row = {key: result[key] for key in (EPOCH, VAL_ACCURACY, LOCAL_TPE)}
        self.journal.write("result", trial=trial, row=row, checkpoint=None)

    def on_end(self, trial: int, reason: str) -> None:
        """Write the end into the journal, then report it to the searcher."""
        self.journal.write("end", trial=trial, stop_reason=reason, stop_detail=None, error=None)
        self._searcher.tell(self.journal.state.trials[trial])


def distance(space: Mapping[str, Domain], a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Return the mean over the parameters of |difference| / range, in logarithms for log domains; 0..1."""
    return statistics.fmean(_difference(domain, a[name], b[name]) for name, domain in space.items())


def _difference(domain: Domain, a: Any, b: Any) -> float:
    if isinstance(domain, Choice):
        return float(a != b)
    scale = np.log if domain.log else float
    return float(abs(scale(a) - scale(b)) / (scale(domain.high) - scale(domain.low)))


@dataclass
class _Running:
    """A trial that has started."""

    row: int
    handle: Any  # as Tune's schedulers see a trial
    epoch: int = 0  # finished


def simulate(
    table: Sequence[Curve],
    rule: Rule,
    source: InOrder | BySearcher,
    *,
    slots: int,
    gate: float | None = None,
    resume_epochs: float = 0.0,
) -> Outcome:
    """Run one search over the table until neither the source nor the rule has a trial for a free slot.

    Args:
        table: curves of equally many epochs.
        rule: decides at every epoch but the last.
        source: proposes the trials.
        slots: trials at a time.
        gate: Local TPE to reach, judged by the product's gate; None leaves it out.
        resume_epochs: what resuming a paused trial costs, in epochs of that trial.
    """
    epochs = len(table[0].scores)
    judge = None if gate is None else LocalTPEGate(gate, smoke_epoch=epochs + 1, max_epochs=epochs)
    outcome, queue, trials, waiting = Outcome(), list[tuple[float, int]](), list[_Running](), True

    def fill(now: float) -> None:
        nonlocal waiting
        while len(queue) < slots:
            number = rule.resume(waiting=waiting, running=len(queue))
            overhead = 0.0 if number is None else resume_epochs
            if number is None:
                row = source.next(len(trials)) if waiting else None
                if row is None:
                    if waiting:
                        waiting = False
                        continue  # a rule may resume trials now
                    return
                number = len(trials)
                trials.append(_Running(row, SimpleNamespace(trial_id=f"t{number}", config={"trial": number})))
                rule.on_start(trials[number].handle)
            _train(now, number, overhead)

    def _train(now: float, number: int, overhead: float = 0.0) -> None:
        seconds = table[trials[number].row].seconds[trials[number].epoch]
        heapq.heappush(queue, (now + (1 + overhead) * seconds, number))

    fill(0.0)
    while queue:
        now, number = heapq.heappop(queue)
        trial = trials[number]
        trial.epoch += 1
        curve, epoch = table[trial.row], trial.epoch
        result = {
            EPOCH: epoch, VAL_ACCURACY: curve.accuracies[epoch - 1], LOCAL_TPE: curve.scores[epoch - 1],
            "config": trial.handle.config,
        }  # fmt: skip
        outcome.results.append((now, trial.row, result[LOCAL_TPE]))
        source.on_result(number, result)
        if (judge is not None and judge(trial.handle.trial_id, result)) or epoch >= epochs:
            rule.on_last(trial.handle, result)
            decision: str | None = str(result.get(STOP_REASON, "finished"))
        else:
            decision = rule.judge(trial.handle, epoch, result[LOCAL_TPE])
        if decision is None:
            _train(now, number)
            continue
        outcome.ends[trial.row] = (decision, epoch)
        if decision != PAUSE:
            source.on_end(number, decision)
        fill(now)
    return outcome


def curves_of(rows: Iterable[Mapping[str, Any]], space: Mapping[str, Domain]) -> list[Curve]:
    """Group the table's rows into curves, by number; incomplete ones (a loss was not finite) are left out."""
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


def on_quiet_machine(table: Sequence[Curve], structure: Sequence[str]) -> list[Curve]:
    """Replace each curve's seconds per epoch by the shortest epoch of any curve with the same structure.

    The machine that recorded the table was busy with other work at times, so that the recorded seconds say more about
    the moment than about the network. Other load only ever lengthens an epoch.

    Args:
        table: the curves.
        structure: names of the parameters that decide what an epoch costs.
    """
    shortest: dict[tuple[Any, ...], float] = {}
    for curve in table:
        key = tuple(curve.params[name] for name in structure)
        shortest[key] = min(shortest.get(key, math.inf), *curve.seconds)
    keys = [tuple(curve.params[name] for name in structure) for curve in table]
    return [replace(c, seconds=[shortest[key]] * len(c.seconds)) for c, key in zip(table, keys, strict=True)]


@contextmanager
def by_searcher(
    table: Sequence[Curve], space: Mapping[str, Domain], *, trials: int, seed: int, gate: float
) -> Iterator[BySearcher]:
    """Open a searcher whose study and journal live as long as this context."""
    with tempfile.TemporaryDirectory() as folder:
        source = BySearcher(table, space, folder=Path(folder), trials=trials, seed=seed, gate=gate)
        try:
            yield source
        finally:
            source.journal.close()


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, half of the 95 % interval (Student's t) and standard error of at least two values."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error, error
