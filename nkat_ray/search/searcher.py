"""Propose trials with Optuna and report to it how each one ended; the study survives a kill of the driver.

The study is stored in Optuna's journal format in the run's folder, which optuna-dashboard can open.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, cast

import numpy as np
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from nkat_ray.files import STUDY_FILE, without_cut_line
from nkat_ray.metrics import GPU_KIND, LOCAL_TPE, SECONDS_LEFT
from nkat_ray.record.journal import TrialRecord, WarmTrial
from nkat_ray.record.run import Run
from nkat_ray.record.study import open_study_file
from nkat_ray.search.outcome import constraints, intermediate_values, outcome_of
from nkat_ray.search.sampler import make_sampler
from nkat_ray.space import distribution

STUDY_NAME: Final = "nkat"
DUPLICATE_TRIES: Final = 20  # draws before a duplicate is accepted: a small space may be exhausted
WARM_START: Final = "warm_start"  # user attribute of a trial of an earlier run: "<run>/<number>"


def trial_seed(run_seed: int, trial: int) -> int:
    """Derive the seed of a trial from the run's seed and the trial's number, both >= 0."""
    return int(np.random.SeedSequence([run_seed, trial]).generate_state(1)[0])


class Pace:
    """The limits that a stage sets to its searcher; the base class sets none."""

    def slots(self) -> float:
        """Return the number of trials that may run at the same time now."""
        return math.inf

    def closed(self) -> bool:
        """Return whether no further trial may start."""
        return False

    def holds(self) -> bool:
        """Return whether new trials must wait."""
        return False

    def seconds_left(self) -> float | None:
        """Return the seconds that a trial starting now may train, >= 0; None without a limit."""
        return None

    def gpu_kind(self, trial: int) -> str:
        """Return the kind of GPU for a trial that starts now; empty for any."""
        return ""

    def score(self, record: TrialRecord) -> float | None:
        """Return a survivor's value for Optuna: None while unknown (reported later), NaN if it failed."""
        return record.best_score


class GatedOptunaSearch(OptunaSearch):
    """Propose and number trials, and report to Optuna how each one ended.

    Unfinished trials of the journal are proposed first, with the checkpoints to continue from. At its start the
    searcher brings the study up to date with the journal, and adds the trials of an earlier run (`run.warm`) once.

    Args:
        points: the first trials, in order, each with all parameters of the space.
        pace: limits on new trials, and the value of a survivor.
    """

    def __init__(self, run: Run, *, points: Collection[Mapping[str, Any]] = (), pace: Pace | None = None) -> None:
        self._run, self._journal, self._gate = run, run.journal, run.config.gate
        self._points, self._pace = list(points), pace or Pace()
        self._begun: set[int] = set()  # trials that this driver has proposed
        self._distributions = {name: distribution(domain) for name, domain in run.domains.items()}
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # keeps the run's own display intact
        # The seed depends on the number of trials, so that a resumed study does not repeat its first draws.
        sampler_seed = trial_seed(run.config.seed, 1_000_000 + len(run.state.trials))
        super().__init__(
            space=self._distributions,
            metric=LOCAL_TPE,
            mode="max",
            sampler=make_sampler(run.config.sampler, seed=sampler_seed),
            study_name=STUDY_NAME,
            storage=open_study_file(without_cut_line(run.folder / STUDY_FILE)),
        )
        if not self._distributions:  # every parameter is fixed: the trials differ only in their seeds
            self._setup_study("max")
        self._add_earlier(run.warm)
        self._catch_up()
        # Proposed values -> number (in the study) of the first trial with them. An earlier run's trials are left out:
        # repeating them is not redundant, since this run needs the weights of its survivors.
        self._proposed: dict[tuple[Any, ...], int] = {}
        for frozen in self.study.get_trials(deepcopy=False):
            if WARM_START not in frozen.user_attrs:
                self._remember(frozen.params, frozen.number)

    @property
    def study(self) -> optuna.Study:
        """The Optuna study."""
        return cast(optuna.Study, self._ot_study)

    def __getstate__(self) -> dict[str, Any]:
        """Return an empty state: Tune pickles its searcher with every snapshot but never restores this one."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's file and the journal hold the state."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a string
        """Propose the next trial: an unfinished one of an earlier driver, an enqueued point, or Optuna's draw.

        Returns:
            The parameters for `train_trial`; None if no slot is free or new trials must wait; FINISHED at the end.
        """
        trials = self._journal.state.trials
        unfinished = [record for record in trials.values() if not record.ended and record.trial not in self._begun]
        if not unfinished and (len(trials) >= self._run.config.num_samples or self._pace.closed()):
            return Searcher.FINISHED
        if sum(not trials[number].ended for number in self._begun) >= self._pace.slots():
            return None
        if not unfinished and self._pace.holds():
            return None
        record = unfinished[0] if unfinished else self._propose(len(trials))
        self._begun.add(record.trial)
        return {
            **record.params, "trial": record.trial, "seed": record.seed, "resume_from": record.checkpoints[::-1],
            SECONDS_LEFT: self._pace.seconds_left(), GPU_KIND: self._pace.gpu_kind(record.trial),
        }  # fmt: skip

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: `tell` reports the values of all epochs at the end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `tell` reports the end, once it is in the journal with its reason."""

    def tell(self, record: TrialRecord) -> None:
        """Report to Optuna how a trial ended; does nothing while its value is unknown, or when called again."""
        frozen = self._frozen(record.study_number)
        outcome = outcome_of(record, self._gate, self._pace.score(record))
        if outcome is None or frozen.state.is_finished():
            return
        trial = Trial(self.study, frozen._trial_id)
        for epoch, value in intermediate_values(record).items():
            if epoch not in frozen.intermediate_values:
                trial.report(value, epoch)
        trial.set_user_attr("trial", record.trial)
        trial.set_user_attr("stop_reason", record.stop_reason)
        for name, value in constraints(record, self._gate).items():
            trial.set_constraint(name, value)
        self.study.tell(trial, outcome.value, state=outcome.state)  # PRUNED: Optuna takes the last intermediate value

    def _frozen(self, number: int) -> FrozenTrial:
        """Return a trial of the study by its number, without copying all the others."""
        storage = self.study._storage
        return storage.get_trial(storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number))

    def _add_earlier(self, warm: Iterable[WarmTrial]) -> None:
        """Add an earlier run's trials to the study, except those that are already in it."""
        known = {frozen.user_attrs.get(WARM_START) for frozen in self.study.get_trials(deepcopy=False)}
        for one in warm:
            outcome, values = outcome_of(one.record, self._gate, one.score), intermediate_values(one.record)
            if one.name in known or outcome is None or outcome.state is TrialState.FAIL:
                continue
            trial = create_trial(
                state=outcome.state, value=values[max(values)] if outcome.value is None else outcome.value,
                params=one.record.params, distributions=self._distributions, intermediate_values=values,
                constraints=constraints(one.record, self._gate),
                user_attrs={WARM_START: one.name, "stop_reason": one.record.stop_reason},
            )  # fmt: skip
            self.study.add_trial(trial)

    def _catch_up(self) -> None:
        """Synchronise the study with the journal: report ended trials, fail those that the journal does not know."""
        records = {record.study_number: record for record in self._journal.state.trials.values()}
        for frozen in self.study.get_trials(deepcopy=False):
            record = records.get(frozen.number)
            if record is not None and record.ended:
                self.tell(record)
            elif record is None and not frozen.state.is_finished():  # may be WAITING, which `tell` refuses
                self.study._storage.set_trial_state_values(frozen._trial_id, TrialState.FAIL)

    def _propose(self, number: int) -> TrialRecord:
        """Draw a new trial and write it into the journal."""
        trial, seed = self._draw(number), trial_seed(self._run.config.seed, number)
        self._journal.write("proposed", trial=number, params=trial.params, seed=seed, study_number=trial.number)
        return self._journal.state.trials[number]

    def _draw(self, number: int) -> Trial:
        """Draw new values; a duplicate gets its twin's result, so that the sampler does not draw it again."""
        if number < len(self._points):
            self.study.enqueue_trial(dict(self._points[number]))
            trial = self._ask()
            self._remember(trial.params, trial.number)
            return trial
        for _ in range(DUPLICATE_TRIES if self._distributions else 0):
            trial = self._ask()
            first = self._remember(trial.params, trial.number)
            if first == trial.number:
                return trial
            self._repeat(trial, self._frozen(first))
        return self._ask()

    def _ask(self) -> Trial:
        return self.study.ask(fixed_distributions=self._distributions)

    def _remember(self, params: Mapping[str, Any], number: int) -> int:
        """Remember a draw; return the number of the first trial with these values."""
        return self._proposed.setdefault(tuple(params.get(name) for name in self._distributions), number)

    def _repeat(self, trial: Trial, twin: FrozenTrial) -> None:
        """Report a duplicate with its twin's result; as FAIL while the twin is still running."""
        for name, value in twin.constraints.items():
            trial.set_constraint(name, value)
        for epoch, value in twin.intermediate_values.items():
            trial.report(value, epoch)
        state = twin.state if twin.state.is_finished() else TrialState.FAIL
        self.study.tell(trial, twin.values if state is TrialState.COMPLETE else None, state=state)
