"""ASHA whose time is the trial's own epoch, and whose rungs a restart does not empty (Li et al. 2020,
arXiv:1810.05934); with several brackets it is asynchronous Hyperband."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from nkat_ray.metrics import EPOCH, LOCAL_TPE
from nkat_ray.search.journal import TrialRecord


class ResumableASHA(AsyncHyperBandScheduler):
    """Ray's ASHA, filled at its start with the results of the trials that an earlier driver saw.

    Rungs are kept under the trial's number, which stays, not under Tune's trial id, which a new driver draws anew: a
    trial that is continued is not judged a second time at a rung that it has passed.

    Args:
        max_t: last epoch, >= 1.
        grace_period: epochs before a trial may be stopped, 1..max_t.
        reduction_factor: one trial in this many goes on at each rung, >= 2.
        brackets: rung ladders, >= 1; in each the first rung lies one reduction later than in the one before.
        seed: of the bracket of each trial, which follows from it and the trial's number alone.
        earlier: trials of the journal, in any order.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        *,
        max_t: int,
        grace_period: int,
        reduction_factor: int,
        brackets: int = 1,
        seed: int = 0,
        earlier: Iterable[TrialRecord] = (),
    ) -> None:
        if not 1 <= grace_period <= max_t:
            raise ValueError(f"grace_period is {grace_period}; allowed: 1..{max_t} (max_t)")
        if reduction_factor < 2:
            raise ValueError(f"reduction_factor is {reduction_factor}; allowed: >= 2")
        most = brackets_of(max_t, grace_period, reduction_factor)
        if not 1 <= brackets <= most:
            raise ValueError(f"brackets is {brackets}; allowed: 1..{most}, so that each has a rung")
        super().__init__(
            time_attr=EPOCH, metric=LOCAL_TPE, mode="max", max_t=max_t, grace_period=grace_period,
            reduction_factor=reduction_factor, brackets=brackets,
        )  # fmt: skip
        self._seed = seed
        for record in earlier:
            self._recall(record)

    def rungs(self, bracket: int = 0) -> dict[float, dict[str, float]]:
        """Score of each trial at each rung of a bracket, rungs by epoch."""
        return {milestone: dict(recorded) for milestone, recorded in self._brackets[bracket]._rungs}

    def bracket_of(self, trial: int) -> int:
        """The bracket of a trial: drawn with Ray's own weights, but not from its unseeded generator."""
        sizes = np.array([len(bracket._rungs) for bracket in self._brackets])
        weights = np.exp(sizes - sizes.max())
        return int(np.random.default_rng([self._seed, trial]).choice(len(sizes), p=weights / weights.sum()))

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Put a trial into its bracket; a continued one finds its rungs there and hands them over to its new id."""
        bracket = self._brackets[self.bracket_of(trial.config["trial"])]
        self._trial_info[trial.trial_id] = bracket
        old = _key(trial.config["trial"])
        for _, recorded in bracket._rungs:
            if old in recorded:
                recorded[trial.trial_id] = recorded.pop(old)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on. A score that is not finite is the gate's business and never enters a rung."""
        if not _finite(result.get(LOCAL_TPE)):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """The trial is over; its last score counts in its rung if it is finite."""
        if _finite(result.get(LOCAL_TPE)):
            super().on_trial_complete(tune_controller, trial, result)

    def _recall(self, record: TrialRecord) -> None:
        """Enter the earlier results as they came: at each rung the first score at or after its epoch."""
        for milestone, recorded in self._brackets[self.bracket_of(record.trial)]._rungs:
            row = next((r for r in record.finite_rows() if r[EPOCH] >= milestone), None)
            if row is not None:
                recorded[_key(record.trial)] = row[LOCAL_TPE]


def brackets_of(max_t: int, grace_period: int, reduction_factor: int) -> int:
    """Brackets of Hyperband: as many as have a rung at or before the last epoch."""
    return int(math.log(max_t / grace_period) / math.log(reduction_factor)) + 1


def _finite(score: Any) -> bool:
    return score is not None and math.isfinite(score)


def _key(trial: int) -> str:
    return f"trial-{trial}"
