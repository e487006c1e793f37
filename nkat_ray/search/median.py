"""The median stopping rule whose time is the trial's own epoch, and whose memory a restart does not empty.

Golovin et al. 2017, "Google Vizier: A Service for Black-Box Optimization", KDD.
"""

import math
from collections.abc import Iterable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import MedianStoppingRule, TrialScheduler

from nkat_ray.metrics import EPOCH, LOCAL_TPE
from nkat_ray.search.journal import TrialRecord


class ResumableMedian(MedianStoppingRule):
    """Ray's median rule, filled at its start with the results of the trials that an earlier driver saw.

    A trial stops whose best score so far is below the median of the others' mean scores up to the same epoch. It never
    pauses a trial. A score that is not finite, and an epoch that was reported before (after a fault), are passed over.

    Args:
        grace_period: epochs before a trial may be stopped, >= 1; earlier epochs do not count in the means either.
        min_samples: other trials that have come as far, before anybody is stopped, >= 1.
        earlier: trials of the journal, in any order.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, *, grace_period: int, min_samples: int = 3, earlier: Iterable[TrialRecord] = ()) -> None:
        for name, value in (("grace_period", grace_period), ("min_samples", min_samples)):
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed: >= 1")
        super().__init__(
            time_attr=EPOCH, metric=LOCAL_TPE, mode="max", grace_period=grace_period, min_samples_required=min_samples,
        )  # fmt: skip
        for record in earlier:
            if rows := record.finite_rows():
                self._results[_key(record.trial)] = rows

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Hand the results of a continued trial over to its new self."""
        super().on_trial_add(tune_controller, trial)
        old = _key(trial.config["trial"])
        if old in self._results:
            self._results[trial] = self._results.pop(old)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if not self._is_new(trial, result):
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """The trial is over; its last score counts if it is finite and was not seen before."""
        if self._is_new(trial, result):
            super().on_trial_complete(tune_controller, trial, result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        """With too few others a trial goes on. Ray's rule would pause it where another waits for a slot."""
        return str(TrialScheduler.CONTINUE)

    def _is_new(self, trial: Trial, result: dict[str, Any]) -> bool:
        score, seen = result.get(LOCAL_TPE), self._results.get(trial)
        finite = score is not None and math.isfinite(score)
        return finite and (not seen or result[EPOCH] > seen[-1][EPOCH])


def _key(trial: int) -> str:
    return f"trial-{trial}"
