"""Count a run's trials and evaluations, and estimate the work that is left."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data import Dataset, Missing
from nkat_ray.data.selection import training_limits
from nkat_ray.metrics import EPOCH, LOCAL_TPE

SCORING_COST: Final = 0.1  # of scoring without training, relative to a transfer to a dataset


@dataclass
class Running:
    """A running trial: its newest epoch (0 before the first), and the row that this epoch reported."""

    epoch: int = 0
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Trials:
    """Count Stage 1's trials."""

    epochs: int  # epochs of a trial that is not stopped early
    total: int = 0  # trials of the run
    epochs_done: int = 0  # epochs since this process began, without those before a resume
    running: dict[int, Running] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    epochs_ended: int = 0  # of the ended trials
    reasons: Counter[str] = field(default_factory=Counter)
    labels: dict[int, str] = field(default_factory=dict)
    survivors: set[int] = field(default_factory=set)
    best: tuple[float, int] = (-math.inf, -1)  # Local TPE, trial

    def start(self, trial: int, label: str) -> None:
        """Count a trial as running, from its beginning."""
        self.labels[trial] = label
        self.running[trial] = Running()

    def epoch(self, trial: int, row: Mapping[str, Any]) -> None:
        """Count an epoch; `row` is what the trial reported."""
        self.running[trial] = Running(int(row[EPOCH]), row)
        self.epochs_done += 1
        self._score(trial, row.get(LOCAL_TPE))

    def end(self, trial: int, row: Mapping[str, Any]) -> None:
        """Count a trial as ended; `row` is its row of trials.parquet."""
        self.running.pop(trial, None)
        self.ended.add(trial)
        self.epochs_ended += int(row.get("epochs") or 0)
        self.reasons[row.get("stop_reason") or "?"] += 1
        if row.get("passed_gate"):
            self.survivors.add(trial)
        self._score(trial, row.get("best_local_tpe"))

    def epochs_left(self) -> float:
        """Estimate the epochs still to train; future trials are assumed to train as long as the ended ones."""
        typical = self.epochs_ended / len(self.ended) if self.ended else self.epochs
        to_come = max(0, self.total - len(self.ended) - len(self.running))
        ends = ((min(self.epochs, max(typical, trial.epoch)), trial.epoch) for trial in self.running.values())
        return to_come * typical + sum(end - epoch for end, epoch in ends)

    def expected_survivors(self) -> float:
        """Estimate the final number of survivors: those so far, and the same share (at first 1/3) of open trials."""
        open_trials = max(0, self.total - len(self.ended))
        return len(self.survivors) + open_trials * (len(self.survivors) + 1) / (len(self.ended) + 3)

    def summary(self) -> str:
        """Return one line of counts: ended trials by reason, survivors, the best score."""
        reasons = [f"{reason} {n}" for reason, n in sorted(self.reasons.items())]
        best = [f"best Local TPE {self.best[0]:.3f} (trial {self.best[1]})"] if self.best[1] >= 0 else []
        return "  ".join([*reasons, f"survivors {len(self.survivors)}", *best]) if self.total else ""

    def _score(self, trial: int, tpe: float | None) -> None:
        if tpe is not None and math.isfinite(tpe):
            self.best = max(self.best, (tpe, trial), key=lambda pair: pair[0])


@dataclass
class Evaluations:
    """Count Stage 2's evaluations: each survivor is validated and tested on each dataset."""

    survivors: list[int]
    datasets: list[str]
    began: float
    rows: dict[tuple[int, str], list[Mapping[str, Any]]] = field(default_factory=dict)
    cost_done: float = 0.0  # in this process

    @property
    def total(self) -> int:
        """Number of evaluations: a validation and a test per cell."""
        return 2 * len(self.survivors) * len(self.datasets)

    @property
    def done(self) -> int:
        """Number of finished evaluations, including those of earlier drivers."""
        return sum(len(rows) for rows in self.rows.values())

    def add(self, row: Mapping[str, Any], *, earlier: bool = False) -> None:
        """Count an evaluation; `row` is its row of stage2.parquet. One of an earlier driver adds no cost."""
        rows = self.rows.setdefault((row["trial"], row["dataset"]), [])
        if not earlier:
            self.cost_done += self._cost(row["dataset"], len(rows))
        rows.append(row)

    def cost_left(self) -> float:
        """Return the cost of the evaluations that are left; a transfer to a dataset costs 1."""
        return sum(
            self._cost(dataset, step)
            for trial in self.survivors
            for dataset in self.datasets
            for step in range(len(self.rows.get((trial, dataset), ())), 2)
        )

    def is_finished(self, trial: int) -> bool:
        """Return whether a survivor has been validated and tested on every dataset."""
        return all(len(self.rows.get((trial, dataset), ())) >= 2 for dataset in self.datasets)

    @staticmethod
    def _cost(dataset: str, step: int) -> float:
        """Return the cost of a validation (step 0) or a test (step 1); CIFAR-10 needs no training."""
        return 1.0 if step == 0 and dataset != STAGE1_DATASET else SCORING_COST


def survivor_cost(config: RunConfig, datasets: Mapping[str, Dataset | Missing]) -> float:
    """Estimate the cost of Stage 2 per survivor, in epochs of Stage 1, from the numbers of training images."""

    def trained(name: str) -> int:
        dataset = datasets.get(name)
        if not isinstance(dataset, Dataset):
            return 0
        limits = training_limits(dataset, config)
        return limits.train_images or dataset.sizes["train"] - limits.val_images

    per_epoch = trained(STAGE1_DATASET)
    sizes = [size for name in datasets if name != STAGE1_DATASET and (size := trained(name))]
    return sum(config.stage2_epochs(size) * size for size in sizes) / per_epoch if per_epoch else 0.0
