"""ASHA whose time is the trial's own epoch, and whose rungs a restart does not empty (Li et al. 2020,
arXiv:1810.05934)."""

import math
from collections.abc import Iterable
from typing import Any

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
        earlier: trials of the journal, in any order.
    """

    def __init__(
        self, *, max_t: int, grace_period: int, reduction_factor: int, earlier: Iterable[TrialRecord] = ()
    ) -> None:
        super().__init__(
            time_attr=EPOCH, metric=LOCAL_TPE, mode="max", max_t=max_t, grace_period=grace_period,
            reduction_factor=reduction_factor, brackets=1,  # more brackets draw from an unseeded generator
        )  # fmt: skip
        for record in earlier:
            self._recall(record)

    def rungs(self) -> dict[float, dict[str, float]]:
        """Score of each trial at each rung, rungs by epoch."""
        return {milestone: dict(recorded) for milestone, recorded in self._brackets[0]._rungs}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Hand the rungs of a continued trial over to its new id."""
        super().on_trial_add(tune_controller, trial)
        old = _key(trial.config["trial"])
        for _, recorded in self._brackets[0]._rungs:
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
        for milestone, recorded in self._brackets[0]._rungs:
            row = next((r for r in record.finite_rows() if r[EPOCH] >= milestone), None)
            if row is not None:
                recorded[_key(record.trial)] = row[LOCAL_TPE]


def _finite(score: Any) -> bool:
    return score is not None and math.isfinite(score)


def _key(trial: int) -> str:
    return f"trial-{trial}"
