"""OptunaSearch that knows how a trial ended, and a study that a killed driver finds again.

The study lives in Optuna's own journal file in the run's folder, so that optuna-dashboard opens it. What Optuna is
told: COMPLETE for a trial that finished or passed the gate, PRUNED (with the values on the way) for one that the
scheduler or the gate stopped, FAIL for one whose score was not finite or that raised.
"""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from nkat_ray.config import Domain
from nkat_ray.files import STUDY_FILE
from nkat_ray.metrics import EPOCH, LAMBDA_THEORY, LOCAL_TPE
from nkat_ray.search.journal import Journal, TrialRecord, WarmTrial
from nkat_ray.search.sampler import make_sampler
from nkat_ray.search.space import distribution

STUDY_NAME = "nkat"
GATE_CONSTRAINT = "gate"  # <= 0 where the trial passed; set only where the gate was really judged
DUPLICATE_TRIES = 20  # draws before a repeated proposal is accepted: a small space may hold nothing new

PRUNED_REASONS = ("asha", "smoke", "gate", "budget")
JUDGED_REASONS = ("gate", "smoke", "finished")  # ends at which the gate had its full say
FAILED_REASONS = ("nan", "error")  # nothing to learn from, also where the trial had passed before
OBJECTIVES = {"local_tpe": LOCAL_TPE, "lambda": LAMBDA_THEORY}  # the words of --objective -> keys of a result
DIRECTIONS = {LOCAL_TPE: "max", LAMBDA_THEORY: "min"}
WARM_START = "warm_start"  # user attribute of a trial that an earlier run has had: "<run>/<number>"


def trial_seed(run_seed: int, trial: int) -> int:
    """Seed of a trial's weights and draws: follows from the run's seed and the trial's number alone."""
    return int(np.random.SeedSequence([run_seed, trial]).generate_state(1)[0])


def best_local_tpe(record: TrialRecord) -> float | None:
    """What a trial is worth by itself."""
    best = record.best_row()
    return None if best is None else float(best[LOCAL_TPE])


class GatedOptunaSearch(OptunaSearch):
    """Proposes trials, numbers them, and tells Optuna how each one ended.

    Args:
        space: parameter -> domain.
        folder: the run's local folder, for the study's file.
        journal: the run's journal. Its unfinished trials are proposed first, with the checkpoints to continue from;
            those that ended but were not yet told to Optuna are told now.
        points: the first trials, in order; all parameters of the space.
        num_samples: trials in all, those of earlier drivers included.
        run_seed: seed of the sampler and, with its number, of each trial.
        gate: Local TPE to reach.
        sampler: tpe, random, gp or nsga2.
        objective: local_tpe, or local_tpe,lambda: a study of two objectives.
        warm: trials of an earlier run, told to the study once, before anything is proposed.
        score: what a survivor is worth; None while that is not known, which leaves it untold, NaN fails it.
        slots: how many trials may be under way at a time, as it is now.
        closed: asked before each new trial; True proposes no more.
        held: asked before each new trial; True proposes none for now.
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
        sampler: str = "tpe",
        objective: str = "local_tpe",
        warm: Iterable[WarmTrial] = (),
        score: Callable[[TrialRecord], float | None] = best_local_tpe,
        slots: Callable[[], float] = lambda: math.inf,
        closed: Callable[[], bool] = lambda: False,
        held: Callable[[], bool] = lambda: False,
    ) -> None:
        self._journal, self._points, self._num_samples = journal, list(points), num_samples
        self._run_seed, self._gate, self._score = run_seed, gate, score
        self._slots, self._closed, self._held = slots, closed, held
        self._objectives = [OBJECTIVES[word] for word in objective.split(",")]
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # the terminal is the run's own display
        # A resumed study goes on with other draws than the first ones: the seed follows from how far it is.
        sampler_seed = trial_seed(run_seed, 1_000_000 + len(journal.state.trials))
        self._distributions = {name: distribution(domain) for name, domain in space.items()}
        modes = [DIRECTIONS[key] for key in self._objectives]
        super().__init__(
            space=self._distributions,
            metric=self._objectives if self._several else LOCAL_TPE,
            mode=modes if self._several else "max",
            sampler=make_sampler(sampler, seed=sampler_seed, num_samples=num_samples),
            study_name=STUDY_NAME,
            storage=JournalStorage(JournalFileBackend(str(_without_cut_line(folder / STUDY_FILE)))),
        )
        if not space:  # all that could be searched is typed: the trials differ in their seeds alone
            self._setup_study(modes if self._several else "max")
        self._unfinished = [record for record in journal.state.trials.values() if not record.ended]
        self._feed(warm)
        self._tell_what_is_known()
        # What was proposed before -> the study's number of the first such trial. An earlier run's do not count: here
        # they would have another seed, and a survivor's weights are needed.
        self._proposed: dict[tuple[Any, ...], int] = {}
        for frozen in self.study.get_trials(deepcopy=False):
            if WARM_START not in frozen.user_attrs:
                self._remember(frozen.params, frozen.number)

    @property
    def _several(self) -> bool:
        """Whether the study has more than one objective: then Optuna takes no values on the way."""
        return len(self._objectives) > 1

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
        """The next trial: an unfinished one of an earlier driver, an enqueued point, or Optuna's proposal.

        None for now where every slot has its trial, or while `held`.
        """
        number = len(self._journal.state.trials)
        if not self._unfinished and (number >= self._num_samples or self._closed()):
            return Searcher.FINISHED
        if self._journal.state.open_trials - len(self._unfinished) >= self._slots():
            return None
        if self._unfinished:
            return self._continue(trial_id, self._unfinished.pop(0))
        if self._held():
            return None
        trial = self._ask(number)
        self._ot_trials[trial_id] = trial
        seed = trial_seed(self._run_seed, number)
        self._journal.write("proposed", trial=number, params=trial.params, seed=seed, study_number=trial.number)
        return {**trial.params, "trial": number, "seed": seed, "resume_from": []}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing yet: the values on the way are told at the end, the last one included."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing yet: the trial's reason is known once its end is in the journal; see `tell`."""

    def tell(self, record: TrialRecord) -> None:
        """Tell Optuna how a trial ended, once what it is worth is known. Idempotent."""
        frozen = self._frozen(record.study_number)
        verdict = self._verdict(record, self._score)
        if verdict is None or frozen.state.is_finished():
            return
        trial = Trial(self.study, frozen._trial_id)
        for epoch, value in self._on_the_way(record).items():
            if epoch not in frozen.intermediate_values:
                trial.report(value, epoch)
        trial.set_user_attr("trial", record.trial)
        trial.set_user_attr("stop_reason", record.stop_reason)
        for name, value in self._constraints(record).items():
            trial.set_constraint(name, value)
        state, values = verdict
        self.study.tell(trial, values, state=state)

    def forget(self, record: TrialRecord) -> None:
        """Do not continue an unfinished trial: it has been ended otherwise."""
        self._unfinished.remove(record)

    def _frozen(self, number: int) -> FrozenTrial:
        """A trial of the study by its number; the others are not looked at."""
        storage = self.study._storage
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number))

    def _on_the_way(self, record: TrialRecord) -> dict[int, float]:
        return {} if self._several else {row[EPOCH]: row[LOCAL_TPE] for row in record.finite_rows()}

    def _constraints(self, record: TrialRecord) -> dict[str, float]:
        best = record.best_row()
        judged = best is not None and (record.passed(self._gate) or record.stop_reason in JUDGED_REASONS)
        return {GATE_CONSTRAINT: self._gate - best[LOCAL_TPE]} if judged and best is not None else {}

    def _verdict(
        self, record: TrialRecord, score: Callable[[TrialRecord], float | None]
    ) -> tuple[TrialState, list[float] | None] | None:
        """What Optuna is told of an ended trial; None while that is not known."""
        best = record.best_row()
        if best is None or record.stop_reason in FAILED_REASONS:
            return TrialState.FAIL, None
        if record.stop_reason in PRUNED_REASONS and not record.passed(self._gate):
            return TrialState.PRUNED, None  # Optuna takes the last value on the way
        value = score(record)
        if value is None:
            return None
        if not math.isfinite(value):
            return TrialState.FAIL, None
        return TrialState.COMPLETE, [value, *(best[key] for key in self._objectives[1:])]

    def _feed(self, warm: Iterable[WarmTrial]) -> None:
        """Tell the study of an earlier run's trials; those that it has been told of before are left out."""
        known = {frozen.user_attrs.get(WARM_START) for frozen in self.study.get_trials(deepcopy=False)}
        for one in warm:
            verdict = self._verdict(one.record, lambda _, score=one.score: score)  # type: ignore[misc]
            if one.name in known or verdict is None or verdict[0] is TrialState.FAIL:
                continue
            (state, values), on_the_way = verdict, self._on_the_way(one.record)
            if values is None and on_the_way:
                values = [on_the_way[max(on_the_way)]]  # as Optuna itself does when it is told PRUNED
            trial = create_trial(
                state=state, values=values, params=one.record.params, distributions=self._distributions,
                intermediate_values=on_the_way, constraints=self._constraints(one.record),
                user_attrs={WARM_START: one.name, "stop_reason": one.record.stop_reason},
            )  # fmt: skip
            self.study.add_trial(trial)

    def _continue(self, trial_id: str, record: TrialRecord) -> dict[str, Any]:
        self._ot_trials[trial_id] = Trial(self.study, self._frozen(record.study_number)._trial_id)
        return {**record.params, "trial": record.trial, "seed": record.seed, "resume_from": record.checkpoints[::-1]}

    def _ask(self, number: int) -> Trial:
        """A proposal that no earlier trial has had. A twin is told the other's result, so that the sampler moves on."""
        if number < len(self._points):
            self.study.enqueue_trial(dict(self._points[number]))
            trial = self._ask_once()
            self._remember(trial.params, trial.number)
            return trial
        for _ in range(DUPLICATE_TRIES if self._distributions else 0):
            trial = self._ask_once()
            first = self._remember(trial.params, trial.number)
            if first == trial.number:
                return trial
            self._repeat(trial, self._frozen(first))
        return self._ask_once()

    def _repeat(self, trial: Trial, twin: FrozenTrial) -> None:
        """Close a proposal that was tried before with what came of it then; FAIL while that is still running."""
        for name, value in twin.constraints.items():
            trial.set_constraint(name, value)
        for epoch, value in twin.intermediate_values.items():
            trial.report(value, epoch)
        state = twin.state if twin.state.is_finished() else TrialState.FAIL
        self.study.tell(trial, twin.values if state is TrialState.COMPLETE else None, state=state)

    def _ask_once(self) -> Trial:
        return self.study.ask(fixed_distributions=self._distributions)

    def _remember(self, params: Mapping[str, Any], number: int) -> int:
        """Take a proposal in; the number of the first trial that had these values."""
        return self._proposed.setdefault(tuple(params.get(name) for name in self._distributions), number)

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
