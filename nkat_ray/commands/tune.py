"""The main job: one run from the command line to its report.

The order makes a run safe: bad input is refused before anything is written, and Ray is connected before the run starts.
"""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nkat_ray.commands.driver import Driver, Prepared
from nkat_ray.commands.plan import print_plan
from nkat_ray.config import RunConfig
from nkat_ray.data.suite import open_datasets, refuse_other_data
from nkat_ray.errors import RESUMABLE, UserError
from nkat_ray.files import CONFIG_FILE, SUMMARY_FILE
from nkat_ray.flags import Program, continued, more_of_trial
from nkat_ray.record import tables
from nkat_ray.record.journal import read_state
from nkat_ray.record.saved import saved_config, write_config
from nkat_ray.record.storage import LOCK_FILE, RunStorage, check_writable, run_storage
from nkat_ray.record.warm_start import Earlier, read_earlier
from nkat_ray.report.terminal import Screen, print_report, screen_of
from nkat_ray.search.tracking import refuse_absent
from nkat_ray.signals import Interruption
from nkat_ray.space import SearchSpace, corner_configs, refuse_impossible, space_of

if TYPE_CHECKING:
    from nkat_ray.cluster.resources import Cluster  # loads Ray; bad input is refused without it


FREE_ON_RESUME = (  # may differ
    "address", "data_dir", "dry_run", "json", "log_to", "max_failed", "quiet", "resume", "verbose",
)  # fmt: skip
BUDGET = ("epochs", "train_images", "stage1_hours", "max_survivors", "max_concurrent")

PROGRAM = Program(
    name="tune_round2.py",
    config=RunConfig,
    summary="Tune NKAT-ViT in two stages: train trials on CIFAR-10 (Stage 1), evaluate those that pass the gate on "
    "four datasets (Stage 2), and write a report.",
    groups={
        "Start here": ("preset", "name", "data_dir", "data", "storage_path", "resume", "dry_run"),
        "Search": (
            "space", "num_samples", "sampler", "scheduler", "gate", "lambda_model", "warm_start", "feedback", "seed",
        ),
        "Budget": (*BUDGET, "gpus_per_trial", "address"),
        "Stage 2": ("datasets", "transfer", "transfer_epochs", "transfer_images", "test_images"),
        "Output": ("quiet", "json", "verbose", "log_to"),
    },
    more={
        "More of the search": (
            "cpus_per_trial", "transfer_lr", "grace", "reduction", "max_failures",
            "max_failed", "checkpoint_epochs",
        ),
        **more_of_trial(*BUDGET),
    },
    examples=(
        "python tune_round2.py --preset quick",
        "python tune_round2.py --preset laptop --dry_run",
        "python tune_round2.py --space mine.toml --num_samples 12 --seed 1",
        "python tune_round2.py --resume",
    ),
    removed={
        "--gate_projection": "early stopping does its work: --scheduler asha",
        "--objective": "Local TPE is the only objective: leave it out",
        "--sampler nsga2": "use --sampler tpe",
        "--smoke_accuracy": "the smoke rule is fixed: more than 45 % accuracy in epoch 10",
        "--smoke_epoch": "the smoke rule is fixed: more than 45 % accuracy in epoch 10",
        "--scheduler hyperband": "use --scheduler asha",
        "--scheduler median": "use --scheduler asha",
    },
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Search, continue a search, or print a plan, as the command line says; return the exit code."""
    run, space = read(argv)
    with screen_of(run) as screen:
        if run.dry_run:
            return print_plan(run, space, screen)
        return (resume if run.resume else start)(run, space, screen)


def read(argv: Sequence[str]) -> tuple[RunConfig, SearchSpace]:
    """Read the run and its search space from the command line; see `configured`."""
    return configured(PROGRAM.read(argv))


def configured(typed: Mapping[str, Any]) -> tuple[RunConfig, SearchSpace]:
    """Return the run that these flags mean, with its search space; with `resume` both are the saved ones.

    Raises:
        UserError: a value that is not allowed, or a flag that a run which goes on cannot change.
    """
    if not typed.get("resume"):
        run = RunConfig.from_preset(**{"preset": "round2", **typed})
        return run, space_of(run, typed)
    where = RunConfig(**{name: typed[name] for name in ("name", "storage_path") if name in typed})
    saved, space = saved_config(where.storage_path, where.name)
    saved = dataclasses.replace(saved, quiet=False, json=False)
    if typed.get("num_samples", 0) > saved.num_samples:  # the run is extended
        saved = dataclasses.replace(saved, num_samples=typed["num_samples"])
    return continued(saved, typed, FREE_ON_RESUME), space


def start(config: RunConfig, space: SearchSpace, screen: Screen) -> int:
    """Begin a run; return its exit code.

    Raises:
        UserError: bad input, or a cluster that cannot run this; nothing is left behind.
    """
    from nkat_ray.cluster.connect import refuse_no_ray

    began_s = time.time()
    refuse_impossible(config, space.domains)
    refuse_absent(config)
    check_writable(config.storage_path)
    refuse_no_ray(config.address)
    earlier = read_earlier(config, space.domains)
    config = dataclasses.replace(config, name=config.name or f"{config.preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    storage = run_storage(config.storage_path, str(config.name))
    _refuse_existing(config, storage)
    with screen.phase("reading the datasets"):
        config, datasets = open_datasets(config, screen)
    prepared = Prepared(
        config=config, space=space, datasets=datasets, storage=storage, earlier=earlier, began_s=began_s
    )
    with Interruption() as interruption, undone_unless_begun(storage) as undo, storage.lock():
        _refuse_existing(config, storage)  # the data may have taken minutes
        with _connected(prepared, interruption, screen) as (where, cluster):
            write_config(storage, config, space, datasets)
            undo.pop_all()
            return Driver(prepared, cluster, screen, interruption).drive(where)


def resume(config: RunConfig, space: SearchSpace, screen: Screen) -> int:
    """Continue a run (as `saved_config` gave it), or print the report of one that is finished; return its exit code.

    More `num_samples` than the run began with extend it, also after its end: Stage 2 then covers old and new survivors.

    Raises:
        UserError: the data are not those of before, another driver holds the run, or the cluster cannot run it.
    """
    began_s = time.time()
    refuse_absent(config)
    storage = run_storage(config.storage_path, str(config.name))
    with Interruption() as interruption, storage.lock():
        summary, saved = storage.local / SUMMARY_FILE, tables.read_summary(storage.local / CONFIG_FILE, "found")
        extended = config.num_samples > saved["num_samples"]
        if summary.exists() and not extended:
            code = tables.read_summary(summary)["exit_code"]
            if code not in RESUMABLE:
                storage.push()  # the driver may have been lost between its summary and the bucket
                print_report(storage.local, screen)
                return int(code)
        with screen.phase("reading the datasets"):
            datasets = refuse_other_data(saved["found"], open_datasets(config, screen)[1])
        warmed = read_state(storage.local).warmed
        prepared = Prepared(
            config=config, space=space, datasets=datasets, storage=storage, began_s=began_s,
            extended_from=saved["num_samples"] if extended else None,
            earlier=Earlier(trials=[], notice="") if warmed else read_earlier(config, space.domains),
        )  # fmt: skip
        with _connected(prepared, interruption, screen) as (where, cluster):
            if extended:
                write_config(storage, config, space, datasets)
            return Driver(prepared, cluster, screen, interruption).drive(where)


def _refuse_existing(config: RunConfig, storage: RunStorage) -> None:
    if storage.exists():
        raise UserError(
            f"name is {config.name!r}; that run exists in {config.storage_path}; "
            "continue it with --resume, or choose another"
        )


@contextlib.contextmanager
def undone_unless_begun(storage: RunStorage) -> Iterator[contextlib.ExitStack]:
    """Remove the run's folder at the end, if this start made it; `pop_all` on what this yields keeps it."""
    with contextlib.ExitStack() as undo:
        if not storage.local.exists():
            undo.callback(shutil.rmtree, storage.local, ignore_errors=True)
        yield undo


@contextlib.contextmanager
def _connected(prepared: Prepared, interruption: Interruption, screen: Screen) -> Iterator[tuple[str, "Cluster"]]:
    """Connect to Ray, and refuse what its nodes cannot run.

    Raises:
        UserError: there is no cluster at the address, PyTorch cannot use a GPU that Ray offers, a trial fits no
            node, or a node does not see the storage path.
    """
    from nkat_ray.cluster.connect import connected, describe_cluster, nodes_without
    from nkat_ray.cluster.resources import refuse_oversized, trial_share

    config, storage = prepared.config, prepared.storage
    with screen.entering("starting Ray", connected(config.address, verbose=config.verbose)) as where:
        interruption.install()  # ray.init has set a handler of its own for SIGTERM
        if storage.remote is None and (blind := nodes_without(storage.local / LOCK_FILE)):
            raise UserError(
                f"storage_path is {config.storage_path!r}; node {blind[0]} does not see it; "
                "with several nodes give a shared folder or a bucket URI"
            )
        cluster = describe_cluster(config.gpus_per_trial)
        corners = corner_configs(config, prepared.space.domains)
        refuse_oversized((trial_share(trial, config, cluster) for trial in corners), cluster)
        yield where, cluster
