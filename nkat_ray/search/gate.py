"""The gate: a Ray Tune Stopper that lets only trials with a high enough Local TPE on CIFAR-10 survive."""

import math
from collections.abc import Hashable, Mapping
from numbers import Real
from typing import Any, TypeGuard

from ray.tune import Stopper

from nkat_ray.metrics import BEST_LOCAL_TPE, EPOCH, LOCAL_TPE, STOP_DETAIL, STOP_REASON, VAL_ACCURACY
from nkat_ray.search.projection import GateProjection


class LocalTPEGate(Stopper):
    """Decides, result by result, which trial may go on (docs/spec.md section 6.1).

    A ladder, first match wins: a score, accuracy or epoch that is missing or not finite stops the trial (`nan`); a
    trial whose Local TPE has once reached the threshold is a survivor and exempt from the rest; in the smoke epoch
    itself the accuracy must exceed `smoke_accuracy` (`smoke`); at the last epoch, or where the projection says that it
    cannot reach the threshold any more, the trial stops (`gate`). A stop writes its reason and one line of explanation
    into the result. Asking twice about one result gives the same answer.

    Args:
        threshold: Local TPE to reach, 0 < threshold <= 1.
        smoke_epoch: the epoch of the smoke rule, >= 1.
        smoke_accuracy: validation accuracy to exceed in it, 0..1.
        max_epochs: the last epoch, >= 1.
        projection: learns from every finite score and is asked about trials that have not passed; None judges nobody
        before the last epoch. A continued trial is known to it by its number (`config["trial"]` of a result).

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        threshold: float = 0.60,
        smoke_epoch: int = 10,
        smoke_accuracy: float = 0.45,
        max_epochs: int = 40,
        *,
        projection: GateProjection | None = None,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; allowed: 0 < threshold <= 1")
        if smoke_epoch < 1:
            raise ValueError(f"smoke_epoch is {smoke_epoch}; allowed: >= 1")
        if not 0 <= smoke_accuracy <= 1:
            raise ValueError(f"smoke_accuracy is {smoke_accuracy}; allowed: 0..1")
        if max_epochs < 1:
            raise ValueError(f"max_epochs is {max_epochs}; allowed: >= 1")
        self.threshold = threshold
        self.smoke_epoch = smoke_epoch
        self.smoke_accuracy = smoke_accuracy
        self.max_epochs = max_epochs
        self.projection = projection
        self._passed: set[str] = set()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether the trial stops here."""
        decision = self._decide(trial_id, result)
        if decision is None:
            return False
        result[STOP_REASON], result[STOP_DETAIL] = decision
        return True

    def stop_all(self) -> bool:
        """Never: trials are stopped one by one, so that searcher, scheduler and callbacks see every end."""
        return False

    def passed(self, trial_id: str) -> bool:
        """Whether the trial has reached the threshold in any result so far."""
        return trial_id in self._passed

    def _decide(self, trial_id: str, result: Mapping[str, Any]) -> tuple[str, str] | None:
        epoch, accuracy, score = result.get(EPOCH), result.get(VAL_ACCURACY), result.get(LOCAL_TPE)
        if not _finite(epoch) or not _finite(accuracy) or not _finite(score):
            return "nan", f"epoch {epoch}: val_accuracy {accuracy}, local_tpe {score}: missing or not finite"
        key = _key(trial_id, result)
        if self.projection is not None:
            self.projection.learn(key, int(epoch), float(score))
        best = result.get(BEST_LOCAL_TPE)
        if score >= self.threshold or (_finite(best) and best >= self.threshold):
            self._passed.add(trial_id)
        if trial_id in self._passed:
            return None
        if epoch == self.smoke_epoch and not accuracy > self.smoke_accuracy:
            return "smoke", f"epoch {epoch}: accuracy {accuracy:.4f} does not exceed {self.smoke_accuracy}"
        if epoch >= self.max_epochs:
            return (
                "gate",
                f"epoch {epoch}: Local TPE {score:.4f} < gate {self.threshold}{self._missing(accuracy, score)}",
            )
        return self._projected(key, int(epoch), accuracy, score)

    def _projected(self, key: Hashable, epoch: int, accuracy: float, score: float) -> tuple[str, str] | None:
        projected = None if self.projection is None else self.projection.project(key, epoch)
        if projected is None or projected.upper >= self.threshold:
            return None
        return (
            "gate",
            f"epoch {epoch}: Local TPE {score:.4f}, projected to end at {projected.expected:.4f} and at most at "
            f"{projected.upper:.4f} < gate {self.threshold} (by {projected.finished} finished trials)"
            f"{self._missing(accuracy, score)}",
        )

    def _missing(self, accuracy: float, score: float) -> str:
        if score <= 0:
            return ""
        needed = self.threshold * accuracy / score  # accuracy / score is log10(1 + lambda)
        return f", accuracy {accuracy:.4f} misses {needed:.4f} by {needed - accuracy:.4f}"


def _key(trial_id: str, result: Mapping[str, Any]) -> Hashable:
    """The trial's number, which a new driver keeps; Tune's id where a result does not carry its configuration."""
    number: Hashable = (result.get("config") or {}).get("trial", trial_id)
    return number


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and math.isfinite(value)  # numpy's numbers are Real as well
