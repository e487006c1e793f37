"""The gate: a Ray Tune Stopper that lets only trials with a high enough Local TPE on CIFAR-10 survive."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from nkat_ray.fields import Checked, Range
from nkat_ray.metrics import (
    BEST_LOCAL_TPE,
    EPOCH,
    LOCAL_TPE,
    NOTES_GATE,
    SMOKE_ACCURACY,
    SMOKE_EPOCH,
    STOP_REASON,
    VAL_ACCURACY,
)
from nkat_ray.search.stops import Stop, TrialStopper, is_finite


@dataclass(eq=False)
class LocalTPEGate(Checked, TrialStopper):
    """Decide at every result whether a trial may continue (docs/spec.md section 6.1).

    The first rule that matches decides: a score, accuracy or epoch that is missing or not finite stops the trial
    (`nan`); a trial whose Local TPE has once reached the threshold is a survivor and exempt from the other rules; in
    the smoke epoch the accuracy must exceed `smoke_accuracy` (`smoke`); at the last epoch the trial stops (`gate`). A
    stop adds its reason and one line of explanation to the result. Decisions are idempotent.

    Raises:
        UserError: a value is out of range; it is a ValueError.
    """

    threshold: Annotated[float, Range(gt=0, le=1)] = NOTES_GATE
    """Local TPE to reach."""
    smoke_epoch: Annotated[int, Range(ge=1)] = SMOKE_EPOCH
    """Epoch at which the smoke rule applies."""
    smoke_accuracy: Annotated[float, Range(ge=0, le=1)] = SMOKE_ACCURACY
    """Validation accuracy to exceed in the smoke epoch."""
    max_epochs: Annotated[int, Range(ge=1)] = 40
    """Last epoch of a trial."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._passed: set[str] = set()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Decide whether the trial stops here."""
        if STOP_REASON in result and LOCAL_TPE not in result:
            return False  # the worker ended the trial without a new epoch and stated the reason
        decision = self._decide(trial_id, result)
        if decision is None:
            return False
        result.update(decision.columns())
        return True

    def passed(self, trial_id: str) -> bool:
        """Return whether the trial has reached the threshold in any result so far."""
        return trial_id in self._passed

    def _decide(self, trial_id: str, result: Mapping[str, Any]) -> Stop | None:
        epoch, accuracy, score = result.get(EPOCH), result.get(VAL_ACCURACY), result.get(LOCAL_TPE)
        if not is_finite(epoch) or not is_finite(accuracy) or not is_finite(score):
            return Stop("nan", f"epoch {epoch}: val_accuracy {accuracy}, local_tpe {score}: missing or not finite")
        best = result.get(BEST_LOCAL_TPE)
        if score >= self.threshold or (is_finite(best) and best >= self.threshold):
            self._passed.add(trial_id)
        if trial_id in self._passed:
            return None
        if epoch == self.smoke_epoch and not accuracy > self.smoke_accuracy:
            return Stop("smoke", f"epoch {epoch}: accuracy {accuracy:.4f} does not exceed {self.smoke_accuracy}")
        if epoch >= self.max_epochs:
            lacks = self._missing(accuracy, score)
            return Stop("gate", f"epoch {epoch}: Local TPE {score:.4f} < gate {self.threshold}{lacks}")
        return None

    def _missing(self, accuracy: float, score: float) -> str:
        if score <= 0:
            return ""
        needed = self.threshold * accuracy / score  # accuracy / score is log10(1 + lambda)
        return f", accuracy {accuracy:.4f} misses {needed:.4f} by {needed - accuracy:.4f}"
