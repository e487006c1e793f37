"""A Stopper that closes Stage 1 once enough trials have passed the gate (`--max_survivors`)."""

from collections.abc import Collection
from typing import Any

from ray.tune import Stopper

from nkat_ray.metrics import EPOCH, LOCAL_TPE, STOP_REASON
from nkat_ray.search.gate import BEST_LOCAL_TPE, STOP_DETAIL


class SurvivorBudget(Stopper):
    """Ends the trials below the gate, one by one at their next result, once `limit` trials have passed it.

    A survivor is exempt, as from the gate's own rules: it may come to its last epoch. Who passed in earlier drivers is
    handed in from the journal; everything since is in the results. Belongs behind the gate, whose reasons come first.

    Args:
        limit: survivors that are enough, >= 1.
        gate: Local TPE to reach.
        passed: numbers of the trials that have passed so far.

    Raises:
        ValueError: limit < 1.
    """

    def __init__(self, limit: int, *, gate: float, passed: Collection[int] = ()) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; allowed: >= 1")
        self._limit, self._gate, self._passed = limit, gate, set(passed)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops here. Asking twice about one result gives the same answer."""
        scores = (result.get(LOCAL_TPE), result.get(BEST_LOCAL_TPE))
        trial = result["config"]["trial"]
        if trial in self._passed or any(score is not None and score >= self._gate for score in scores):
            self._passed.add(trial)
            return False
        if len(self._passed) < self._limit or LOCAL_TPE not in result:  # it returned by itself: that has its own reason
            return False
        result[STOP_REASON], result[STOP_DETAIL] = "budget", budget_detail(result.get(EPOCH), len(self._passed))
        return True

    def stop_all(self) -> bool:
        """Never: trials are stopped one by one, so that searcher, scheduler and callbacks see every end."""
        return False


def budget_detail(epoch: int | None, survivors: int) -> str:
    """The line that explains such an end."""
    return f"epoch {epoch or 0}: {survivors} trials have passed the gate, which is enough (max_survivors)"
