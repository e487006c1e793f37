"""Limit Stage 1: its time (`--stage1_hours`), survivors (`--max_survivors`) and failed trials (`--max_failed`)."""

import math
import time
from collections.abc import Collection
from typing import Any

from nkat_ray.config import RunConfig
from nkat_ray.metrics import BEST_LOCAL_TPE, EPOCH, LOCAL_TPE, STOP_REASON
from nkat_ray.record.journal import RunState, TrialRecord
from nkat_ray.search.stops import Stop, TrialStopper, is_finite, out_of_time


class Budget(TrialStopper):
    """Close Stage 1 at its limits, and stop its trials at their next result (docs/spec.md section 6.1).

    When the time is up, every trial stops. When enough trials have passed the gate, each trial stops whose best Local
    TPE is below the best survivor's; a survivor that is stopped this way remains a survivor. The gate must run before
    the budget, because its reasons take precedence.

    A trial also measures the remaining time itself and returns within an epoch. The driver's clock is needed for trials
    that were restarted after an error.
    """

    def __init__(self, run: RunConfig, state: RunState) -> None:
        self._limit, self._gate, self._state = run.max_survivors, run.gate, state
        left_s = math.inf if run.stage1_hours is None else 3600 * run.stage1_hours - state.earlier_s
        self._deadline_s = time.monotonic() + left_s

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles its stoppers but never restores this one."""
        return {}

    def seconds_left(self) -> float | None:
        """Return the remaining seconds of Stage 1, >= 0; None without a limit."""
        left_s = self._deadline_s - time.monotonic()
        return None if left_s == math.inf else max(0.0, left_s)

    def expired(self) -> bool:
        """Return whether the time of Stage 1 is up."""
        return time.monotonic() >= self._deadline_s

    def closed(self) -> bool:
        """Return whether Stage 1 starts no further trials."""
        return self.expired() or (self._limit is not None and len(self._state.survivors(self._gate)) >= self._limit)

    def stop(self, trial: int, epoch: int, best: float) -> Stop | None:
        """Return the reason to stop a trial now; None if it may continue.

        Args:
            epoch: last finished epoch, 0 before the first.
            best: best Local TPE so far, -inf if no score was finite.
        """
        return out_of_time(epoch) if self.expired() else self._surplus(trial, epoch, best)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Decide whether a trial stops at this result, and add the reason to the result."""
        if LOCAL_TPE not in result:  # the trial ended itself and stated its reason
            return False
        trial, epoch = result["config"]["trial"], result.get(EPOCH) or 0
        scores = (result[LOCAL_TPE], result.get(BEST_LOCAL_TPE), self._state.trials[trial].best_score)
        best = max(filter(is_finite, scores), default=-math.inf)
        # A survivor's last epoch already has a reason, which the time limit must not replace.
        stop = self._surplus(trial, epoch, best) if STOP_REASON in result else self.stop(trial, epoch, best)
        result.update(stop.columns() if stop else {})
        return stop is not None

    def _surplus(self, trial: int, epoch: int, best: float) -> Stop | None:
        """Return the reason to stop a trial if there are enough survivors and one of them is better."""
        if self._limit is None:
            return None
        passed = self._state.survivor_scores(self._gate)
        if best >= self._gate:  # its newest score is not in the journal yet
            passed[trial] = best
        if len(passed) < self._limit or best >= max(passed.values()):
            return None
        enough = f"{len(passed)} trials have passed the gate, which is enough (max_survivors)"
        return Stop("budget", f"epoch {epoch}: {enough}; the best has {max(passed.values()):.4f}")


def only_failures(records: Collection[TrialRecord], limit: int | None) -> str | None:
    """Say in one line that the trials so far have failed and the next ones would fail as well; None if not.

    A trial that has not failed and has a finite score, if only of one epoch, is a success.

    Args:
        limit: number of failed trials that ends the run (`--max_failed`), >= 1; None for no limit.
    """
    failed = [record for record in records if record.failed]
    if limit is None or len(failed) < limit or any(r.finite_rows() for r in records if not r.failed):
        return None
    first = min(failed, key=lambda record: record.ended_s or 0.0)
    return (
        f"{len(failed)} trials have failed and none has succeeded (max_failed is {limit}); the first error, of trial "
        f"{first.trial}: {first.stop_detail}; remove its cause, then --resume"
    )
