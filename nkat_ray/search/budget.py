"""A Stopper that closes Stage 1 once enough trials have passed the gate (`--max_survivors`)."""

import math
from collections.abc import Mapping
from typing import Any

from ray.tune import Stopper

from nkat_ray.metrics import BEST_LOCAL_TPE, EPOCH, LOCAL_TPE, STOP_DETAIL, STOP_REASON


class SurvivorBudget(Stopper):
    """Ends the trials below the best survivor, one by one at their next result, once `limit` have passed.

    A trial's best Local TPE so far is what is compared; the best survivor, and whoever is level with it, may come to
    the last epoch. A survivor that is ended stays one. Who passed in earlier drivers is handed in from the journal;
    everything since is in the results. Belongs behind the gate, whose reasons come first.

    Args:
        limit: survivors that are enough, >= 1.
        gate: Local TPE to reach.
        passed: best Local TPE of the trials that have passed so far, by number.

    Raises:
        ValueError: limit < 1.
    """

    def __init__(self, limit: int, *, gate: float, passed: Mapping[int, float] | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; allowed: >= 1")
        self._limit, self._gate, self._passed = limit, gate, dict(passed or {})

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops here. Asking twice about one result gives the same answer."""
        if LOCAL_TPE not in result:  # it returned by itself: that has its own reason
            return False
        trial = result["config"]["trial"]
        scores = (result[LOCAL_TPE], result.get(BEST_LOCAL_TPE), self._passed.get(trial))
        best = max((score for score in scores if score is not None and math.isfinite(score)), default=-math.inf)
        if best >= self._gate:
            self._passed[trial] = best
        if len(self._passed) < self._limit or best >= max(self._passed.values()):
            return False
        result[STOP_REASON], result[STOP_DETAIL] = "budget", budget_detail(result.get(EPOCH), self._passed)
        return True

    def stop_all(self) -> bool:
        """Never: trials are stopped one by one, so that searcher, scheduler and callbacks see every end."""
        return False


def budget_detail(epoch: int | None, passed: Mapping[int, float]) -> str:
    """The line that explains such an end."""
    enough = f"{len(passed)} trials have passed the gate, which is enough (max_survivors)"
    return f"epoch {epoch or 0}: {enough}; the best has {max(passed.values()):.4f}"
