"""Stage 1 put together: space, searcher, scheduler, gate and trainable in one Tune experiment."""

import math
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from ray import tune
from ray.actor import ActorHandle
from ray.tune import Callback
from ray.tune.execution.placement_groups import PlacementGroupFactory

from nkat_ray.config import RunConfig
from nkat_ray.metrics import EPOCH, LOCAL_TPE
from nkat_ray.search.callbacks import JournalCallback, Listeners
from nkat_ray.search.gate import LocalTPEGate
from nkat_ray.search.journal import Journal, TrialRecord
from nkat_ray.search.projection import GateProjection
from nkat_ray.search.resources import Cluster, slots, trial_share
from nkat_ray.search.scheduler import ResumableASHA
from nkat_ray.search.searcher import GatedOptunaSearch
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
    clock: Callable[[], float] = time.time,
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
        clock: seconds since 1970.
    """
    left_s = math.inf if run.stage1_hours is None else 3600 * run.stage1_hours - journal.state.earlier_s
    deadline_s = clock() + left_s

    def expired() -> bool:
        return clock() >= deadline_s

    space = domains(run, fixed)
    searcher = GatedOptunaSearch(
        space, folder=folder, journal=journal, points=[baseline_point(run, space), round1_point(run, space)[0]],
        num_samples=run.num_samples, run_seed=run.seed, gate=run.gate, closed=expired,
    )  # fmt: skip
    earlier = journal.state.trials.values()
    open_trials = run.num_samples - sum(record.ended for record in earlier)
    attempt = f"attempt_{len(journal.state.attempts):03d}"
    at_a_time = slots(run, cluster)
    journal.write("slots", slots=at_a_time)
    if open_trials > 0:
        _fit(
            run, data=data, cluster=cluster, vault=vault, deadline_s=deadline_s, open_trials=open_trials,
            at_a_time=at_a_time, searcher=searcher, tune_folder=tune_folder, attempt=attempt,
            scheduler=ResumableASHA(
                max_t=run.epochs, grace_period=run.grace, reduction_factor=run.reduction, earlier=earlier
            ),
            gate=gate_of(run, earlier),
            callback=JournalCallback(
                journal, folder=f"{tune_folder}/{attempt}", gate=run.gate, max_epochs=run.epochs, tell=searcher.tell,
                expired=expired, listeners=listeners,
            ),
            trackers=trackers_of(run, folder),
        )  # fmt: skip
    if any(not record.ended for record in earlier) or (len(earlier) < run.num_samples and not expired()):
        raise KeyboardInterrupt  # Tune ends in order on a signal of its own (SIGUSR1): the stage is not over
    journal.write("stage1_done")


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
    scheduler: ResumableASHA,
    gate: LocalTPEGate,
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
            max_concurrent_trials=at_a_time,
            reuse_actors=True,  # starting a process and importing torch costs more than a short trial
        ),
        run_config=tune.RunConfig(
            name=attempt,
            storage_path=tune_folder,
            stop=gate,
            callbacks=[callback, *trackers],
            verbose=1 if run.verbose else 0,
            failure_config=tune.FailureConfig(max_failures=run.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),  # the one before is used if the last is cut short
        ),
    ).fit()


def gate_of(run: RunConfig, earlier: Iterable[TrialRecord]) -> LocalTPEGate:
    """The run's gate; its projection has learnt from the curves of the journal."""
    curves = ((record.trial, {row[EPOCH]: row[LOCAL_TPE] for row in record.finite_rows()}) for record in earlier)
    projection = GateProjection(max_epochs=run.epochs, earlier=curves) if run.gate_projection else None
    return LocalTPEGate(run.gate, run.smoke_epoch, run.smoke_accuracy, run.epochs, projection=projection)
