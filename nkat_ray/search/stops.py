"""Reasons for the end of a trial; whatever stops a trial states one."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Final, NamedTuple, TypeGuard

from ray.tune import Stopper
from ray.tune.experiment import Trial

from nkat_ray.metrics import STOP_DETAIL, STOP_REASON

ON_TRIAL: Final = "nkat_stop"  # attribute of Tune's trial


class Stop(NamedTuple):
    """A stop reason of docs/spec.md section 6.1, with one line of explanation."""

    reason: str
    detail: str | None

    def columns(self) -> dict[str, str | None]:
        """Return the reason as entries of a trial's result."""
        return {STOP_REASON: self.reason, STOP_DETAIL: self.detail}


def out_of_time(epoch: int) -> Stop:
    """Return the stop of a trial when Stage 1's time is up; `epoch` is its last one, 0 before the first."""
    return Stop("budget", f"epoch {epoch}: Stage 1's time is up")


def at_last_epoch(epoch: int, best: float, gate: float) -> Stop:
    """Return the stop of a trial at its last epoch: `finished` for a survivor, else `gate`.

    Args:
        best: the trial's best Local TPE, -inf if no score was finite.
    """
    passed = best >= gate
    detail = f"epoch {epoch}: Local TPE {best:.4f} {'>=' if passed else '<'} gate {gate}"
    return Stop("finished" if passed else "gate", detail)


def leave_on_trial(trial: Trial, stop: Stop) -> None:
    """Store a scheduler's reason on Tune's trial, since a scheduler receives only a copy of the result."""
    setattr(trial, ON_TRIAL, stop)


def stop_of(trial: Trial, result: Mapping[str, Any]) -> Stop | None:
    """Return the stop from the result (stated by worker or stopper), else from the trial (scheduler), else None."""
    if result.get(STOP_REASON) is not None:
        return Stop(result[STOP_REASON], result.get(STOP_DETAIL))
    return getattr(trial, ON_TRIAL, None)


def is_finite(value: Any) -> TypeGuard[float]:
    """Return whether a value of a result is a finite number, numpy's included."""
    return isinstance(value, Real) and math.isfinite(value)


class TrialStopper(Stopper):
    """A stopper that ends trials one by one, so that searcher, scheduler and callbacks see each end."""

    def stop_all(self) -> bool:
        """Return False: this stopper never ends the whole experiment."""
        return False
