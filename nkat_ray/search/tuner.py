"""Stage 1 put together: space, searcher, scheduler, gate and trainable in one Tune experiment."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.actor import ActorHandle
from ray.tune import Callback, Stopper
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.schedulers import TrialScheduler
from ray.tune.stopper import CombinedStopper

from nkat_ray.config import RunConfig
from nkat_ray.metrics import EPOCH, LOCAL_TPE
from nkat_ray.search.budget import SurvivorBudget, budget_detail
from nkat_ray.search.callbacks import JournalCallback, Listeners
from nkat_ray.search.feedback import Feedback, Stage2
from nkat_ray.search.gate import LocalTPEGate
from nkat_ray.search.journal import Journal, TrialRecord, WarmTrial
from nkat_ray.search.projection import GateProjection
from nkat_ray.search.resources import Cluster, slots, trial_share
from nkat_ray.search.schedulers import VERDICTS, make_scheduler
from nkat_ray.search.searcher import GatedOptunaSearch, best_local_tpe
from nkat_ray.search.slots import Slots
from nkat_ray.search.space import baseline_point, domains, round1_point, trial_config
from nkat_ray.search.tracking import trackers_of
from nkat_ray.search.trainable import Stage1Data, memory_for_trial, train_trial


def tune_stage1(
    run: RunConfig,
    *,
    fixed: Collection[str],
    data: Stage1Data,
    cluster: Cluster,
    vault: ActorHandle[Any],
    journal: Journal,
    folder: Path,
    tune_folder: str,
    listeners: Listeners,
    warm: Iterable[WarmTrial] = (),
    stage2: Stage2 | None = None,
    look: Callable[[], Cluster] | None = None,
) -> None:
    """Run Stage 1 to its end, or continue it; everything that happened is in the journal afterwards.

    Args:
        run: the configuration.
        fixed: searched parameters that the user typed; they keep the typed value.
        data: CIFAR-10, reaching every trial through the object store.
        cluster: what there is to compute on.
        vault: the survivors' weights.
        journal: the run's journal, of earlier drivers too.
        folder: the run's local folder.
        tune_folder: where Tune writes, a path or a URI that every node reaches.
        listeners: told what happens.
        warm: an earlier run's trials, for the sampler to learn from.
        stage2: validates survivors as they pass (`--feedback global`).
        look: the cluster as it is at the moment: nodes join and leave.
    """
    left_s = math.inf if run.stage1_hours is None else 3600 * run.stage1_hours - journal.state.earlier_s
    deadline_s = time.time() + left_s

    def expired() -> bool:
        return time.time() >= deadline_s

    state = journal.state
    records = state.trials.values()  # a view: trials to come are in it too
    passed = set(state.survivors(run.gate))

    def enough() -> bool:
        return run.max_survivors is not None and len(passed) >= run.max_survivors

    def closed() -> bool:
        return expired() or enough()

    def on_slots(number: int) -> None:
        before = state.slot_changes[-1][1]
        journal.write("slots", slots=number)
        listeners.on_notice(f"the cluster has changed: {number} trials at a time, {before} before")

    at_a_time = slots(run, cluster)
    now_at_a_time = Slots(at_a_time, look=lambda: slots(run, look() if look else cluster), on_change=on_slots)
    space = domains(run, fixed)
    feedback: Feedback | None = None
    searcher = GatedOptunaSearch(
        space, folder=folder, journal=journal, points=[baseline_point(run, space), round1_point(run, space)[0]],
        num_samples=run.num_samples, run_seed=run.seed, gate=run.gate, sampler=run.sampler, objective=run.objective,
        warm=warm, score=best_local_tpe if stage2 is None else stage2.score, closed=closed,
        slots=now_at_a_time, held=lambda: feedback is not None and feedback.holds(),
    )  # fmt: skip
    listeners = _after(listeners, on_survivor=passed.add)
    tell: Callable[[TrialRecord], None] = searcher.tell
    advance: Callable[[], None] | None = None
    if stage2 is not None:
        feedback = Feedback(
            stage2, state=state, gate=run.gate, slots=now_at_a_time, tell=searcher.tell,
            exhausted=lambda: len(state.trials) >= run.num_samples or closed(),
        )  # fmt: skip
        listeners = _after(listeners, on_survivor=feedback.on_survivor, on_trial_start=feedback.on_trial_start)
        tell, advance = feedback.on_end, feedback.advance
    attempt = f"attempt_{len(state.attempts):03d}"
    journal.write("warmed")
    journal.write("slots", slots=at_a_time)
    callback = JournalCallback(
        journal, folder=f"{tune_folder}/{attempt}", gate=run.gate, max_epochs=run.epochs, tell=tell, expired=expired,
        listeners=listeners, verdict=VERDICTS[run.scheduler], advance=advance,
    )  # fmt: skip
    scores = {trial: best_local_tpe(state.trials[trial]) or 0.0 for trial in passed}
    if enough():  # an earlier driver was killed between the last pass and the ends that follow from it
        best = max(scores.values())
        for record in [r for r in records if not r.ended and (best_local_tpe(r) or 0.0) < best]:
            searcher.forget(record)
            callback.end(record, "budget", budget_detail(max(record.curve, default=0), scores))
    open_trials = run.num_samples - sum(record.ended for record in records)
    if open_trials > 0:
        _fit(
            run, data=data, cluster=cluster, vault=vault, deadline_s=deadline_s, open_trials=open_trials,
            at_a_time=at_a_time, searcher=searcher, tune_folder=tune_folder, attempt=attempt,
            scheduler=make_scheduler(run, records), callback=callback, trackers=trackers_of(run, folder),
            stoppers=stoppers_of(run, records, scores),
        )  # fmt: skip
    if any(not record.ended for record in records) or (len(records) < run.num_samples and not closed()):
        raise KeyboardInterrupt  # Tune ends in order on a signal of its own (SIGUSR1): the stage is not over
    if feedback:
        feedback.finish()
    journal.write("stage1_done")


def _after(listeners: Listeners, **first: Callable[..., Any]) -> Listeners:
    """The listeners, some of them told after a function of our own."""

    def chain(before: Callable[..., Any], then: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            before(*arguments)
            then(*arguments)

        return call

    chained = {name: chain(before, getattr(listeners, name)) for name, before in first.items()}
    return dataclasses.replace(listeners, **chained)


def _fit(
    run: RunConfig,
    *,
    data: Stage1Data,
    cluster: Cluster,
    vault: ActorHandle[Any],
    deadline_s: float,
    open_trials: int,
    at_a_time: int,
    searcher: GatedOptunaSearch,
    scheduler: TrialScheduler,
    stoppers: list[Stopper],
    callback: JournalCallback,
    trackers: list[Callback],
    tune_folder: str,
    attempt: str,
) -> None:
    def resources(params: dict[str, Any]) -> PlacementGroupFactory:
        share = trial_share(trial_config(run, params), run, cluster)
        return PlacementGroupFactory([{"CPU": share.cpus, "GPU": share.gpus}])

    memory_bytes = memory_for_trial(cluster.memory_bytes, -(-at_a_time // cluster.nodes))
    trainable = tune.with_parameters(
        train_trial, run=run, data=data, vault=vault, deadline_s=deadline_s, memory_bytes=memory_bytes
    )
    tune.Tuner(
        tune.with_resources(trainable, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=open_trials,
            max_concurrent_trials=open_trials,  # the searcher knows how many, from one moment to the next
            # Starting a process and importing torch costs more than a short trial; but a process that waits for the
            # next one keeps its slot, which Stage 2 may need.
            reuse_actors=run.feedback == "off",
        ),
        run_config=tune.RunConfig(
            name=attempt,
            storage_path=tune_folder,
            stop=CombinedStopper(*stoppers),
            callbacks=[callback, *trackers],
            verbose=1 if run.verbose else 0,
            failure_config=tune.FailureConfig(max_failures=run.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),  # the one before is used if the last is cut short
        ),
    ).fit()


def stoppers_of(run: RunConfig, earlier: Iterable[TrialRecord], passed: Mapping[int, float]) -> list[Stopper]:
    """What ends a trial at one of its results; the gate first: the next is asked where it lets the trial go on."""
    stoppers: list[Stopper] = [gate_of(run, earlier)]
    if run.max_survivors is not None:
        stoppers.append(SurvivorBudget(run.max_survivors, gate=run.gate, passed=passed))
    return stoppers


def gate_of(run: RunConfig, earlier: Iterable[TrialRecord]) -> LocalTPEGate:
    """The run's gate; its projection has learnt from the curves of the journal."""
    curves = ((record.trial, {row[EPOCH]: row[LOCAL_TPE] for row in record.finite_rows()}) for record in earlier)
    projection = GateProjection(max_epochs=run.epochs, earlier=curves) if run.gate_projection else None
    return LocalTPEGate(run.gate, run.smoke_epoch, run.smoke_accuracy, run.epochs, projection=projection)
