"""ASHA with rungs that survive a restart of the driver (Li et al. 2020, arXiv:1810.05934)."""

from collections.abc import Iterable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from nkat_ray.config import RunConfig
from nkat_ray.metrics import EPOCH, LOCAL_TPE, STOP_REASON
from nkat_ray.record.journal import TrialRecord
from nkat_ray.search.stops import Stop, is_finite, leave_on_trial


class ResumableASHA(AsyncHyperBandScheduler):
    """Ray's ASHA with one bracket, initialised with the results of earlier drivers.

    Tune assigns new trial ids with every driver. Earlier results are therefore stored under the trial's number until
    the trial is added again, so that a continued trial is not judged again at a rung that it has passed.

    Args:
        reduction_factor: at each rung the best 1 / reduction_factor of the trials continue, >= 2.
    """

    def __init__(
        self, *, max_t: int, grace_period: int, reduction_factor: int, earlier: Iterable[TrialRecord] = ()
    ) -> None:
        super().__init__(
            time_attr=EPOCH, metric=LOCAL_TPE, mode="max", max_t=max_t, grace_period=grace_period,
            reduction_factor=reduction_factor,
        )  # fmt: skip
        for record in earlier:
            self._recall(record)

    def rungs(self) -> dict[float, dict[str, float]]:
        """Return epoch of the rung -> trial -> score."""
        return {milestone: dict(recorded) for milestone, recorded in self._rungs()}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Add a trial; the earlier results of a continued one move to its new id."""
        super().on_trial_add(tune_controller, trial)
        old = _key(trial.config["trial"])
        for _, recorded in self._rungs():
            if old in recorded:
                recorded[trial.trial_id] = recorded.pop(old)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide whether a trial continues; a score that is not finite is left to the gate and enters no rung."""
        if not is_finite(result.get(LOCAL_TPE)):
            return str(TrialScheduler.CONTINUE)
        decision = str(super().on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP and result.get(STOP_REASON) is None:
            score = f"Local TPE {result[LOCAL_TPE]:.4f}"
            leave_on_trial(trial, Stop("asha", f"epoch {result[EPOCH]}: {score} is not among the rung's best"))
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Enter the last score of an ended trial into its rung, if it is finite."""
        if is_finite(result.get(LOCAL_TPE)):
            super().on_trial_complete(tune_controller, trial, result)

    def _rungs(self) -> list[tuple[float, dict[str, float]]]:
        rungs: list[tuple[float, dict[str, float]]] = self._brackets[0]._rungs
        return rungs

    def _recall(self, record: TrialRecord) -> None:
        """Enter a trial's earlier results: at each rung the first score at or after its epoch."""
        for milestone, recorded in self._rungs():
            row = next((r for r in record.finite_rows() if r[EPOCH] >= milestone), None)
            if row is not None:
                recorded[_key(record.trial)] = row[LOCAL_TPE]


def make_scheduler(run: RunConfig, earlier: Iterable[TrialRecord] = ()) -> TrialScheduler:
    """Create the scheduler of a run, initialised with the results of earlier drivers."""
    if run.scheduler == "none":
        return FIFOScheduler()
    return ResumableASHA(max_t=run.epochs, grace_period=run.grace, reduction_factor=run.reduction, earlier=earlier)


def _key(trial: int) -> str:
    return f"trial-{trial}"
