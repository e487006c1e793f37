"""The main job: one run from the command line to its report.

The order makes a run safe: bad input is refused before anything is written; Ray is connected before the run starts;
each event is in the journal before any code acts on it; the summary, which marks a finished run, is written last.
"""

import contextlib
import dataclasses
import errno
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nkat_ray.commands.plan import print_plan
from nkat_ray.config import STAGE1_DATASET, RunConfig, default_storage_path
from nkat_ray.cost import CHECKPOINT_BYTES
from nkat_ray.data import Dataset
from nkat_ray.data.selection import select_images, training_limits
from nkat_ray.data.suite import Datasets, describe_data, open_datasets, refuse_other_data
from nkat_ray.errors import DONE, FAULT, INTERRUPTED, NO_SURVIVOR, RESUMABLE, UserError, one_line
from nkat_ray.files import BEST_FOLDER, CONFIG_FILE, ERROR_FILE, SUMMARY_FILE, TENSORBOARD_FOLDER, WEIGHTS_FILE
from nkat_ray.flags import Program, continued, more_of_trial
from nkat_ray.record import scoring, tables
from nkat_ray.record.journal import Journal, read_state
from nkat_ray.record.observer import Observer, Observers
from nkat_ray.record.rows import curve_rows, stage2_rows
from nkat_ray.record.run import Run
from nkat_ray.record.saved import saved_config, write_config
from nkat_ray.record.snapshots import NoticesInJournal, Snapshots
from nkat_ray.record.storage import LOCK_FILE, RunStorage, check_writable, run_storage
from nkat_ray.record.summary import summarise, write_tables
from nkat_ray.record.warm_start import Earlier, read_earlier
from nkat_ray.report.progress import Progress
from nkat_ray.report.terminal import Screen, print_report, screen_of
from nkat_ray.report.wording import command_line
from nkat_ray.search.tracking import refuse_absent
from nkat_ray.signals import Interrupted, Interruption
from nkat_ray.space import SearchSpace, corner_configs, refuse_impossible, round1_point, space_of

if TYPE_CHECKING:
    from nkat_ray.cluster.resources import Cluster  # loads Ray; bad input is refused without it


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The inputs of a run, checked before it starts or continues."""

    config: RunConfig
    space: SearchSpace
    datasets: Datasets
    storage: RunStorage
    earlier: Earlier
    began_s: float
    extended_from: int | None = None  # trials that the run had when it was to end; None unless --resume adds some


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


class Driver:
    """One driver of a run: its stages, its observers, and what it leaves behind however it ends."""

    def __init__(self, prepared: Prepared, cluster: "Cluster", screen: Screen, interruption: Interruption) -> None:
        from nkat_ray.report.tensorboard import TensorBoardLog  # loading it takes longer than refusing a flag

        config, storage = prepared.config, prepared.storage
        self._config, self._cluster, self._screen, self._interruption = config, cluster, screen, interruption
        space = prepared.space.domains
        self._run = Run(
            config=config, domains=space, datasets=prepared.datasets, storage=storage,
            journal=Journal(storage.local), warm=prepared.earlier.trials,
        )  # fmt: skip
        self._board = TensorBoardLog(storage.local / TENSORBOARD_FOLDER, space, config.trial)
        self._progress = Progress(config, prepared.datasets, console=screen)
        self._observer: Observer = Observers(
            [NoticesInJournal(self._run), self._progress, self._board, Snapshots(self._run)]
        )
        self._notices = [line for line in (prepared.earlier.notice, *_projected(config, space)) if line]
        self._began_s, self._extended_from = prepared.began_s, prepared.extended_from
        self._disk_is_full = False

    def drive(self, where: str) -> int:
        """Run, or run on, to the end; return the exit code. Whatever ends it, the tables and the report are written."""
        (self._run.folder / SUMMARY_FILE).unlink(missing_ok=True)  # of an earlier driver
        self._run.journal.write("run", began_s=self._began_s)
        if self._extended_from is not None:
            self._extend(self._extended_from)
        code = FAULT
        try:
            with self._progress:
                code = self._stages(where)
        except (KeyboardInterrupt, Interrupted):
            code = INTERRUPTED
        except Exception as error:
            self._log_fault(error)
        with self._interruption.deferred():
            try:
                with self._screen.phase("writing the report"):
                    self._finish(code)
                print_report(self._run.folder, self._screen)
            except Exception as error:
                self._log_fault(error)
                code = code if code == INTERRUPTED else FAULT
        if code == INTERRUPTED:
            own = self._config.storage_path != default_storage_path()
            path = ["--storage_path", self._config.storage_path] if own else []
            command = command_line(["python", "tune_round2.py", "--resume", "--name", str(self._config.name), *path])
            self._screen.print(f"interrupted; continue with: {command}", markup=False, soft_wrap=True)
        return code

    def _extend(self, before: int) -> None:
        """Reopen a run for more trials; survivors that were tested are not tested again."""
        tested = bool(self._run.state.tested)
        self._run.journal.write("extended", num_samples=self._config.num_samples)
        known = "; test scores of its survivors were known by then" if tested else ""
        text = f"{scoring.EXTENDED} from {before} to {self._config.num_samples} trials{known}"
        self._run.journal.write("notice", text=text)

    def _stages(self, where: str) -> int:
        from nkat_ray.cluster.resources import room
        from nkat_ray.search.stage1 import Stage1
        from nkat_ray.search.vault import open_vault
        from nkat_ray.stage2.stage2 import Stage2

        run, cluster, state = self._run, self._cluster, self._run.state
        there = room(self._config, cluster, corner_configs(self._config, run.domains))
        self._observer.on_notice(f"{where}: {cluster.cpus} CPU, {cluster.gpus:g} GPU, {there.slots} trials at a time")
        for text in there.notices:
            self._observer.on_notice(text)
        vault = open_vault(str(self._config.name))
        stage2 = Stage2(run, cluster=cluster, vault=vault, observer=self._observer)
        if not state.stage1_done:
            for line in self._notices:
                self._observer.on_notice(line)
            Stage1(
                run, self._stage1_data(), cluster=cluster, vault=vault, observer=self._observer,
                validation=stage2.validation if self._config.feedback == "global" else None,
                interruption=self._interruption,
            ).run()  # fmt: skip
        if not state.survivors(self._config.gate):
            return NO_SURVIVOR
        if scoring.datasets_counted(state.tested.values(), stage2.run()) == 0:
            raise RuntimeError(
                "Stage 2 ended without a single dataset that counts; stage2.parquet has each one's error"
            )
        return DONE

    def _stage1_data(self) -> Any:
        """Return CIFAR-10 for the trials, and show an augmented batch of it in TensorBoard."""
        from nkat_ray.explain.pictures import augmented_batch
        from nkat_ray.search.trainable import Stage1Data

        found = self._stage1_dataset
        data = Stage1Data(**vars(found.traits), selection=select_images(found, training_limits(found, self._config)))
        picture = augmented_batch(
            self._config, data.selection, num_classes=data.num_classes, flip=data.flip, seed=self._config.seed
        )
        self._board.samples({"augmented_batch": picture})
        return data

    @property
    def _stage1_dataset(self) -> Dataset:
        found = self._run.datasets[STAGE1_DATASET]
        assert isinstance(found, Dataset)  # data/suite.py refuses a run without it
        return found

    def _finish(self, code: int) -> None:
        """Write all files of a run that has ended or was interrupted; the summary is the last."""
        from nkat_ray.report.html import write_report  # loads plotly

        run, folder = self._run, self._run.folder
        write_tables(folder, run.config, run.state)
        summary = summarise(run.config, run.state, describe_data(run.datasets), code)
        self._board.stage2(summary, stage2_rows(run.state), curve_rows(run.state), self._winner_pictures(summary))
        self._board.close()
        write_report(folder, summary=summary)
        run.journal.close()
        run.storage.push()
        tables.write_summary(folder / SUMMARY_FILE, summary)
        run.storage.push()

    def _winner_pictures(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Return pictures of the winner's attention, by tag; none without a winner."""
        from nkat_ray.explain.pictures import winner_attention
        from nkat_ray.train.checkpoint import Weights

        if summary["winner"] is None:
            return {}
        weights = Weights.from_bytes((self._run.folder / BEST_FOLDER / WEIGHTS_FILE).read_bytes())
        found = self._stage1_dataset
        return winner_attention(weights, found, training_limits(found, self._config))

    def _log_fault(self, error: Exception) -> None:
        """Report an internal error: print one line, and write the traceback into a file."""
        log, said = self._run.folder / ERROR_FILE, one_line("".join(traceback.format_exception(error)))
        if f"[Errno {errno.ENOSPC}]" in said:  # Tune wraps what a callback raises: only the text is left
            if self._disk_is_full:
                return  # said once, though every later file fails too
            self._disk_is_full, said = True, self._full_disk(error)
        try:
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            said += f"; the log is {log}"
        except OSError as unwritten:  # the disk that is full may be what this is about
            said += f"; there is no log ({unwritten.strerror})"
        self._screen.fault(said)

    def _full_disk(self, error: Exception) -> str:
        """Say which disk is full, what a checkpoint takes, and what to do."""
        where = Path(getattr(error, "filename", None) or self._run.folder)
        free = shutil.disk_usage(where if where.exists() else self._run.folder).free
        rows = (row for record in self._run.state.trials.values() for row in record.curve.values())
        largest = max((row["parameters"] for row in rows), default=0)
        needed = f"a checkpoint takes up to {CHECKPOINT_BYTES * largest / 1e6:.0f} MB" if largest else "more is needed"
        return f"no space left on the disk of {where}: {free / 1e6:.0f} MB free, {needed}; make room, then --resume"


def _projected(config: RunConfig, space: Mapping[str, Any]) -> list[str]:
    """Return one notice if Round-1's best does not lie in the space as it was."""
    changes = round1_point(config, space)[1]
    return [f"Round-1's best is projected onto this space: {'; '.join(changes)}"] if changes else []
