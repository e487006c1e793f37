"""Stage 1: train trials on CIFAR-10 until the search is complete.

propose (searcher) -> train (trainable, on a worker) -> judge (gate, budget, scheduler) -> record (recorder) -> tell
"""

import logging
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final

from ray import tune
from ray.actor import ActorHandle
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.stopper import CombinedStopper

from nkat_ray.cluster.connect import live_cluster
from nkat_ray.cluster.resources import Cluster, Kinds, room, trial_share
from nkat_ray.cluster.slots import Slots
from nkat_ray.config import RunConfig
from nkat_ray.files import STOP_FOLDER
from nkat_ray.metrics import GPU_KIND
from nkat_ray.record.journal import TrialRecord
from nkat_ray.record.observer import Observer
from nkat_ray.record.rows import trial_row
from nkat_ray.record.run import Run
from nkat_ray.search.budget import Budget, only_failures
from nkat_ray.search.feedback import Feedback, SurvivorValidation
from nkat_ray.search.gate import LocalTPEGate
from nkat_ray.search.recorder import Recorder
from nkat_ray.search.scheduler import make_scheduler
from nkat_ray.search.searcher import GatedOptunaSearch, Pace
from nkat_ray.search.stops import Stop, at_last_epoch
from nkat_ray.search.tracking import trackers_of
from nkat_ray.search.trainable import Stage1Data, train_trial
from nkat_ray.search.user_stops import UserStops
from nkat_ray.signals import Interrupted, Interruption
from nkat_ray.space import baseline_point, corner_configs, round1_point, trial_config

KEPT_CHECKPOINTS: Final = 2  # the one before is used if the last is cut short


class Stage1(Pace):
    """Stage 1 of one run: start or continue it, and record every event in the run's journal.

    Args:
        data: CIFAR-10, passed to every trial through the object store.
        observer: receives every event after it is in the journal.
        validation: validates survivors on the datasets of Stage 2 as they pass (`--feedback global`).
    """

    def __init__(
        self,
        run: Run,
        data: Stage1Data,
        *,
        cluster: Cluster,
        vault: ActorHandle[Any],
        observer: Observer,
        validation: SurvivorValidation | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self._run, self._data, self._cluster, self._vault, self._observer = run, data, cluster, vault, observer
        self._config, self._journal, self._state = run.config, run.journal, run.state
        self._interruption = interruption or Interruption()
        self._budget, self._user_stops = Budget(run.config, run.state), UserStops(run.folder, run.state)
        self._corners = corner_configs(run.config, run.domains)
        self._kinds = Kinds(run.config, cluster, run.state)
        self._slots = Slots(
            room(run.config, cluster, self._corners).slots, count=self._count_slots, on_change=self._on_slots
        )
        self._feedback = None if validation is None else Feedback(validation, run.state, run.config.gate, self)
        points = [baseline_point(run.config, run.domains), round1_point(run.config, run.domains)[0]]
        self._searcher = GatedOptunaSearch(run, points=points, pace=self)
        self._only_failures: str | None = None
        self._attempt = f"attempt_{len(run.state.attempts):03d}"
        folder = f"{run.storage.tune_folder}/{self._attempt}"
        self._recorder = Recorder(run.journal, gate=run.config.gate, folder=folder, stage=self)

    def run(self) -> None:
        """Run the stage to its end.

        Raises:
            Interrupted: a signal ended the run; `--resume` continues it from the journal.
            RuntimeError: the first trials have all failed (`--max_failed`); `--resume` continues with the next ones.
        """
        at_a_time = self._slots()
        self._journal.write("warmed")
        self._journal.write("slots", slots=at_a_time)
        ended = [trial_row(record, self._config, self._state) for record in self._records() if record.ended]
        self._observer.on_stage1_start(self._config.num_samples, ended)
        with self._interruption.deferred():
            self._end_decided_trials()
            if self._trials_left():
                self._tune()
            if not self._over():  # also after Tune has ended in order on SIGUSR1, which it handles itself
                raise Interrupted
            if self._feedback is not None:
                self._feedback.finish()
        shutil.rmtree(self._run.folder / STOP_FOLDER, ignore_errors=True)  # requests that came too late
        self._journal.write("stage1_done")

    # --- state of the stage, for its parts ----------------------------------------------------------------------------

    def slots(self) -> int:
        """Return the number of trials that may run at the same time on the cluster as it is now."""
        return self._slots()

    def seconds_left(self) -> float | None:
        """Return the remaining seconds of Stage 1, >= 0; None without a limit."""
        return self._budget.seconds_left()

    def gpu_kind(self, trial: int) -> str:
        """Return the kind of GPU for a trial that starts now; empty for any."""
        return self._kinds.choose(trial)

    def closed(self) -> bool:
        """Return whether the budget allows no further trial."""
        return self._budget.closed()

    def exhausted(self) -> bool:
        """Return whether no further trial will be proposed."""
        return len(self._state.trials) >= self._config.num_samples or self.closed()

    def holds(self) -> bool:
        """Return whether a new trial would occupy a slot that the validation of a survivor needs."""
        return self._feedback is not None and self._feedback.holds()

    def score(self, record: TrialRecord) -> float | None:
        """Return a survivor's value for Optuna: its Local TPE, or with feedback its validation Global TPE."""
        return record.best_score if self._feedback is None else self._feedback.score(record)

    def tell(self, record: TrialRecord) -> None:
        """Report to Optuna how a trial ended."""
        self._searcher.tell(record)

    def tick(self) -> None:
        """End the stage if a signal has arrived (the state is consistent here); let observers do periodic work."""
        self._interruption.check()
        self._observer.on_tick()

    # --- events from the recorder, each in the journal already --------------------------------------------------------

    def on_trial_start(self, record: TrialRecord) -> None:
        """Pass on that a trial has started or restarted in a slot."""
        if self._feedback is not None:
            self._feedback.on_trial_start(record)
        self._observer.on_trial_start(record.trial, record.params)

    def on_epoch(self, record: TrialRecord, row: Mapping[str, Any]) -> None:
        """Pass on an epoch that a trial has reported."""
        self._observer.on_epoch(record.trial, row)

    def on_survivor(self, record: TrialRecord) -> None:
        """Pass on that a trial has reached the gate for the first time."""
        self._observer.on_survivor(record.trial)

    def on_end(self, record: TrialRecord) -> None:
        """Pass on that a trial has ended: to Optuna first, then to the observers."""
        if self._feedback is None:
            self.tell(record)
        else:
            self._feedback.on_end(record)
        self._observer.on_trial_end(record.trial, trial_row(record, self._config, self._state))
        if record.failed and not self._over():
            self._only_failures = only_failures(self._records(), self._config.max_failed)

    def on_step(self, trials: Iterable[Trial]) -> None:
        """Do periodic work between two steps of Tune's loop, about ten times per second; `trials` are Tune's."""
        self.tick()
        self._user_stops.act(trials)
        if self._only_failures is not None:
            raise RuntimeError(self._only_failures) from self._recorder.first_error
        if self._feedback is not None:
            self._feedback.advance()

    def on_notice(self, text: str) -> None:
        """Pass on a notice of one line."""
        self._observer.on_notice(text)

    # --- the parts ----------------------------------------------------------------------------------------------------

    def _records(self) -> list[TrialRecord]:
        return list(self._state.trials.values())

    def _trials_left(self) -> int:
        return self._config.num_samples - sum(record.ended for record in self._records())

    def _over(self) -> bool:
        return self.exhausted() and all(record.ended for record in self._records())

    def _end_decided_trials(self) -> None:
        """End the trials whose driver was killed after a final result but before it had recorded the end."""
        for record in self._records():
            epoch, best = max(record.curve, default=0), record.best_score
            if epoch >= self._config.epochs:
                stop: Stop | None = at_last_epoch(epoch, best, self._config.gate)
            else:
                stop = self._user_stops.stop(record) or self._budget.stop(record.trial, epoch, best)
            if stop is not None and not record.ended:
                self._recorder.end(record, stop)

    def _tune(self) -> None:
        if not self._config.verbose:  # a trial's error is shown as a notice, without a traceback
            logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        config, trials = self._config, self._trials_left()
        trainable = tune.with_parameters(train_trial, run=config, data=self._data, vault=self._vault)
        tune.Tuner(
            tune.with_resources(trainable, partial(trial_resources, config, self._cluster)),
            tune_config=tune.TuneConfig(
                search_alg=self._searcher,
                scheduler=make_scheduler(config, self._records()),
                num_samples=trials,
                trial_dirname_creator=trial_folder,
                max_concurrent_trials=trials,  # no limit here: the searcher limits them, as the cluster changes
                # Starting a process and importing torch takes longer than a short trial. But an idle process keeps its
                # slot, which Stage 2 may need.
                reuse_actors=self._feedback is None,
            ),
            run_config=tune.RunConfig(
                name=self._attempt,
                storage_path=self._run.storage.tune_folder,
                stop=CombinedStopper(LocalTPEGate(config.gate, max_epochs=config.epochs), self._budget),
                callbacks=[self._recorder, *trackers_of(config, self._run.folder)],
                verbose=1 if config.verbose else 0,
                progress_reporter=tune.CLIReporter(),  # Tune's choice in a notebook clears what the cell has shown
                failure_config=tune.FailureConfig(max_failures=config.max_failures),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            ),
        ).fit()

    def _count_slots(self) -> int:
        return room(self._config, live_cluster(self._cluster), self._corners).slots

    def _on_slots(self, number: int) -> None:
        before = self._state.slot_changes[-1][1]
        self._journal.write("slots", slots=number)
        self.on_notice(f"the cluster has changed: {number} trials at a time, {before} before")


def trial_folder(trial: Trial) -> str:
    """Name a trial's folder by its number: Tune's names have 200 characters, and Windows limits paths to 260."""
    return f"trial_{trial.config['trial']:04d}"


def trial_resources(config: RunConfig, cluster: Cluster, params: Mapping[str, Any]) -> PlacementGroupFactory:
    """Return the resources of a trial with these proposed values."""
    share = trial_share(trial_config(config, params), config, cluster, kind=params[GPU_KIND])
    return PlacementGroupFactory([share.bundle])
