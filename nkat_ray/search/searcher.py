"""OptunaSearch that knows how a trial ended, and a study that a killed driver finds again.

The study lives in Optuna's own journal file in the run's folder, so that optuna-dashboard opens it. What Optuna is
told: COMPLETE for a trial that finished or passed the gate, PRUNED (with the values on the way) for one that ASHA or
the gate stopped, FAIL for one whose score was not finite or that raised.
"""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from nkat_ray.config import Domain
from nkat_ray.metrics import EPOCH, LOCAL_TPE
from nkat_ray.search.journal import Journal, TrialRecord
from nkat_ray.search.space import distribution

STUDY_FILE = "optuna_journal.log"
STUDY_NAME = "nkat"
GATE_CONSTRAINT = "gate"  # <= 0 where the trial passed; set only where the gate was really judged
DUPLICATE_TRIES = 20  # draws before a repeated proposal is accepted: a small space may hold nothing new

PRUNED_REASONS = ("asha", "smoke", "gate", "budget")
JUDGED_REASONS = ("gate", "smoke", "finished")  # ends at which the gate had its full say


def trial_seed(run_seed: int, trial: int) -> int:
    """Seed of a trial's weights and draws: follows from the run's seed and the trial's number alone."""
    return int(np.random.SeedSequence([run_seed, trial]).generate_state(1)[0])


class GatedOptunaSearch(OptunaSearch):
    """Proposes trials, numbers them, and tells Optuna how each one ended.

    Args:
        space: parameter -> domain.
        folder: the run's local folder, for the study's file.
        journal: the run's journal. Its unfinished trials are proposed first, with the checkpoints to continue from;
        those
            that ended but were not yet told to Optuna are told now.
        points: the first trials, in order; all parameters of the space.
        num_samples: trials in all, those of earlier drivers included.
        run_seed: seed of the sampler and, with its number, of each trial.
        gate: Local TPE to reach.
        closed: asked before each new trial; True proposes no more.
    """

    def __init__(
        self,
        space: Mapping[str, Domain],
        *,
        folder: Path,
        journal: Journal,
        points: Collection[Mapping[str, Any]],
        num_samples: int,
        run_seed: int,
        gate: float,
        closed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._journal, self._points, self._num_samples = journal, list(points), num_samples
        self._run_seed, self._gate, self._closed = run_seed, gate, closed
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the terminal is the run's own display
        # A resumed study goes on with other draws than the first ones: the seed follows from how far it is.
        sampler_seed = trial_seed(run_seed, 1_000_000 + len(journal.state.trials))
        self._distributions = {name: distribution(domain) for name, domain in space.items()}
        super().__init__(
            space=self._distributions,
            metric=LOCAL_TPE,
            mode="max",
            sampler=optuna.samplers.TPESampler(seed=sampler_seed, multivariate=True, constant_liar=True),
            study_name=STUDY_NAME,
            storage=JournalStorage(JournalFileBackend(str(_without_cut_line(folder / STUDY_FILE)))),
        )
        if not space:  # all that could be searched is typed: the trials differ in their seeds alone
            self._setup_study("max")
        self._unfinished = [record for record in journal.state.trials.values() if not record.ended]
        self._running: dict[str, int] = {}  # Tune's trial id -> trial number
        self._tell_what_is_known()

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return cast(optuna.Study, self._ot_study)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher with every snapshot; nothing here is restored from one."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study's file and the journal are the state."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a string
        """The next trial: an unfinished one of an earlier driver, an enqueued point, or Optuna's proposal."""
        if self._unfinished:
            return self._continue(trial_id, self._unfinished.pop(0))
        number = len(self._journal.state.trials)
        if number >= self._num_samples or self._closed():
            return Searcher.FINISHED
        trial = self._ask(number)
        self._ot_trials[trial_id], self._running[trial_id] = trial, number
        seed = trial_seed(self._run_seed, number)
        self._journal.write("proposed", trial=number, params=trial.params, seed=seed, study_number=trial.number)
        return {**trial.params, "trial": number, "seed": seed, "resume_from": []}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing yet: the values on the way are told at the end, the last one included."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing yet: the trial's reason is known once its end is in the journal; see `tell`."""

    def tell(self, record: TrialRecord) -> None:
        """Tell Optuna how a trial ended. Idempotent."""
        frozen = self.study.get_trials(deepcopy=False)[record.study_number]
        if frozen.state.is_finished():
            return
        trial = Trial(self.study, frozen._trial_id)
        for row in record.finite_rows():
            if row[EPOCH] not in frozen.intermediate_values:
                trial.report(row[LOCAL_TPE], row[EPOCH])
        trial.set_user_attr("trial", record.trial)
        trial.set_user_attr("stop_reason", record.stop_reason)
        self._set_constraint(trial, record)
        state, value = self._verdict(record)
        self.study.tell(trial, value, state=state)

    def _set_constraint(self, trial: Trial, record: TrialRecord) -> None:
        best = record.best_row()
        if best is not None and (record.passed(self._gate) or record.stop_reason in JUDGED_REASONS):
            trial.set_constraint(GATE_CONSTRAINT, self._gate - best[LOCAL_TPE])

    def _verdict(self, record: TrialRecord) -> tuple[TrialState, float | None]:
        best = record.best_row()
        if best is None or record.stop_reason in ("nan", "error"):
            return TrialState.FAIL, None
        if record.stop_reason in PRUNED_REASONS and not record.passed(self._gate):
            return TrialState.PRUNED, None  # Optuna takes the last value on the way
        return TrialState.COMPLETE, best[LOCAL_TPE]

    def _continue(self, trial_id: str, record: TrialRecord) -> dict[str, Any]:
        frozen = self.study.get_trials(deepcopy=False)[record.study_number]
        self._ot_trials[trial_id] = Trial(self.study, frozen._trial_id)
        self._running[trial_id] = record.trial
        return {**record.params, "trial": record.trial, "seed": record.seed, "resume_from": record.checkpoints[::-1]}

    def _ask(self, number: int) -> Trial:
        """A proposal that no earlier trial has had. A twin is told the other's result, so that the sampler moves on."""
        if number < len(self._points):
            self.study.enqueue_trial(dict(self._points[number]))
            return self._ask_once()
        for _ in range(DUPLICATE_TRIES if self._distributions else 0):
            trial = self._ask_once()
            twin = self._twin(trial)
            if twin is None:
                return trial
            self._repeat(trial, twin)
        return self._ask_once()

    def _repeat(self, trial: Trial, twin: FrozenTrial) -> None:
        """Close a proposal that was tried before with what came of it then; FAIL while that is still running."""
        for name, value in twin.constraints.items():
            trial.set_constraint(name, value)
        for epoch, value in twin.intermediate_values.items():
            trial.report(value, epoch)
        state = twin.state if twin.state.is_finished() else TrialState.FAIL
        self.study.tell(trial, twin.value if state is TrialState.COMPLETE else None, state=state)

    def _ask_once(self) -> Trial:
        return self.study.ask(fixed_distributions=self._distributions)

    def _twin(self, trial: Trial) -> FrozenTrial | None:
        earlier = self.study.get_trials(deepcopy=False)[: trial.number]
        return next((other for other in earlier if other.params == trial.params), None)

    def _tell_what_is_known(self) -> None:
        """Bring the study up to the journal after a kill: tell what ended, drop what the journal never saw."""
        records = {record.study_number: record for record in self._journal.state.trials.values()}
        for frozen in self.study.get_trials(deepcopy=False):
            record = records.get(frozen.number)
            if record is not None and record.ended:
                self.tell(record)
            elif record is None and not frozen.state.is_finished():  # may be WAITING, which `tell` refuses
                self.study._storage.set_trial_state_values(frozen._trial_id, TrialState.FAIL)


def _without_cut_line(path: Path) -> Path:
    """Drop a last line that was cut short: Optuna would append to it and could never read the file again."""
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
    return path
