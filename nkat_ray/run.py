"""One run from first to last: data, Ray, Stage 1, Stage 2, report. What tune_round2.py and `nkat tune` both call.

The order is what makes a run safe: everything that can be refused is refused before anything is written (prepare.py);
the configuration is written before Ray starts; what happens is in the journal before anybody acts on it.
"""

import contextlib
import dataclasses
import signal
import time
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from nkat_ray.config import STAGE1_DATASET, RunConfig, default_storage_path
from nkat_ray.data import Dataset, Missing
from nkat_ray.data.selection import select_images, training_limits
from nkat_ray.earlier import read_earlier
from nkat_ray.exit_codes import DONE, FAULT, INTERRUPTED, NO_SURVIVOR, RESUMABLE
from nkat_ray.files import BEST_FOLDER, CONFIG_FILE, SUMMARY_FILE, TENSORBOARD_FOLDER, WEIGHTS_FILE
from nkat_ray.outputs import data_phrase, print_report, stage2_rows, summarise, write_tables
from nkat_ray.prepare import Datasets, UsageError, describe_data, open_datasets, refuse_other_data, write_config
from nkat_ray.report import results, tables
from nkat_ray.report.html import write_report
from nkat_ray.report.progress import Progress
from nkat_ray.report.tensorboard import TensorBoardLog
from nkat_ray.report.terminal import Screen
from nkat_ray.search.journal import Journal, TrialRecord, WarmTrial, read_state
from nkat_ray.search.rows import curve_rows, trial_row
from nkat_ray.search.space import corner_configs, domains, refuse_impossible, round1_point
from nkat_ray.search.storage import RunStorage, check_writable, run_storage
from nkat_ray.search.tracking import refuse_absent
from nkat_ray.stage2 import EarlyStage2, evaluate_survivors, survivor_of

SNAPSHOT_S = 10.0  # least time between two writings of the tables while a run goes on,
SNAPSHOT_SHARE = 0.05  # and the largest share of the driver's time that they take: they grow with the trials


@dataclass
class _Run:
    """What the parts of a run share."""

    config: RunConfig
    fixed: tuple[str, ...]
    datasets: Datasets
    storage: RunStorage
    journal: Journal
    console: Screen
    board: TensorBoardLog
    next_snapshot_s: float = 0.0


def start(config: RunConfig, fixed: Collection[str], console: Screen) -> int:
    """Begin a run; returns its exit code.

    Args:
        config: the run; without a name it gets `<preset>-<UTC time>`.
        fixed: searched parameters that the user typed.

    Raises:
        ValueError: bad input; nothing is left behind.
    """
    refuse_impossible(config, fixed)
    refuse_absent(config)
    check_writable(config.storage_path)
    read_earlier(config, domains(config, fixed))  # refused before anything is written
    config = dataclasses.replace(config, name=config.name or f"{config.preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    storage = run_storage(config.storage_path, str(config.name))
    _refuse_existing(config, storage)
    config, datasets = open_datasets(config, console)
    with storage.lock():
        _refuse_existing(config, storage)  # the data may have taken minutes
        write_config(storage, config, fixed, datasets)
        try:
            return _drive(config, tuple(fixed), datasets, storage, console)
        except UsageError:  # the cluster showed what the flags could not: as if it had never begun
            storage.remove()
            raise


def resume(config: RunConfig, fixed: Collection[str], console: Screen) -> int:
    """Continue a run (as `saved_config` gave it); prints the report of one that is finished. Returns its exit code.

    Raises:
        ValueError: the data are not those of before, or another driver holds the run.
    """
    refuse_absent(config)
    storage = run_storage(config.storage_path, str(config.name))
    with storage.lock():
        summary = storage.local / SUMMARY_FILE
        if summary.exists():
            code = tables.read_summary(summary)["exit_code"]
            if code not in RESUMABLE:
                print_report(storage.local, console)
                return int(code)
        saved = tables.read_summary(storage.local / CONFIG_FILE, "found")["found"]
        datasets = refuse_other_data(saved, open_datasets(config, console)[1])
        if not read_state(storage.local).warmed:
            read_earlier(config, domains(config, fixed))
        return _drive(config, tuple(fixed), datasets, storage, console)


def _refuse_existing(config: RunConfig, storage: RunStorage) -> None:
    if storage.exists():
        raise UsageError(
            f"name is {config.name!r}; that run exists in {config.storage_path}; "
            "continue it with --resume, or choose another"
        )


def _drive(config: RunConfig, fixed: tuple[str, ...], datasets: Datasets, storage: RunStorage, console: Screen) -> int:
    """Run, or run on, to the end; whatever ends it, the tables and the report are written."""
    (storage.local / SUMMARY_FILE).unlink(missing_ok=True)  # an earlier driver's: the run goes on
    journal = Journal(storage.local)
    journal.write("run")
    board = TensorBoardLog(storage.local / TENSORBOARD_FOLDER, domains(config, fixed))
    run, code = _Run(config, fixed, datasets, storage, journal, console, board), FAULT
    try:
        code = _stages(run)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except UsageError:
        raise
    except Exception:
        _log_fault(run)
    with _uninterrupted():
        try:
            _finish(run, code)
        except Exception:
            _log_fault(run)
            code = code if code == INTERRUPTED else FAULT
    if code == INTERRUPTED:
        path = "" if config.storage_path == default_storage_path() else f" --storage_path {config.storage_path}"
        command = f"python tune_round2.py --resume --name {config.name}{path}"
        console.print(f"interrupted; continue with: {command}", markup=False, soft_wrap=True)
    return code


def _log_fault(run: _Run) -> None:
    """An internal fault: one line for people, the rest into a file."""
    log, text = run.storage.local / "error.log", traceback.format_exc()
    said = f"error: {text.strip().splitlines()[-1]}; the log is {log}"
    try:
        log.write_text(text)
    except OSError as error:  # the disk that is full may be what this is about
        said = f"error: {text.strip().splitlines()[-1]}; there is no log ({error.strerror})"
    Console(stderr=True).print(said, markup=False, highlight=False, soft_wrap=True)


def _stages(run: _Run) -> int:
    from nkat_ray.search.cluster import connected, describe_cluster, nodes_without, refuse_infeasible
    from nkat_ray.search.resources import slots, trial_share
    from nkat_ray.search.vault import open_vault

    config = run.config
    with contextlib.ExitStack() as stack:
        try:
            where = stack.enter_context(connected(config.address, verbose=config.verbose))
            stack.enter_context(_terminated_like_interrupted())  # after ray.init, which sets a handler of its own
            if run.storage.remote is None and (blind := nodes_without(run.storage.local / CONFIG_FILE)):
                raise UsageError(
                    f"storage_path is {config.storage_path!r}; node {blind[0]} does not see it; "
                    "with several nodes give a shared folder or a bucket URI"
                )
            cluster = describe_cluster()
            configs = corner_configs(config, run.fixed)
            refuse_infeasible(trial_share(trial, config, cluster) for trial in configs)
        except (ValueError, ConnectionError) as error:
            raise UsageError(str(error)) from error
        vault = open_vault(str(config.name))
        progress = Progress(
            name=str(config.name), preset=config.preset, gate=config.gate, data=data_phrase(run.datasets),
            epochs=config.epochs, console=run.console, quiet=run.console.quiet,
        )  # fmt: skip
        with progress:
            at_a_time = slots(config, cluster)
            _notice(run, progress, f"{where}: {cluster.cpus} CPU, {cluster.gpus:g} GPU, {at_a_time} trials at a time")
            if not run.journal.state.stage1_done:
                _stage1(run, progress, cluster=cluster, vault=vault)
            if not run.journal.state.survivors(config.gate):
                return NO_SURVIVOR
            return _stage2(run, progress, cluster=cluster, vault=vault)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM (a batch system, a spot instance) ends a run in order, as Ctrl-C does.

    It is handed on as Ctrl-C: while Tune runs that only sets a flag. An exception raised from here instead could hit
    Optuna between two steps of its file's lock, and come out as another one.
    """

    def interrupt(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _notice(run: _Run, progress: Progress, text: str) -> None:
    """Something that a reader should know: on the screen, and in the outputs."""
    progress.notice(text)
    run.journal.write("notice", text=text)


def _stage1(run: _Run, progress: Progress, *, cluster: Any, vault: Any) -> None:
    from nkat_ray.search.callbacks import Listeners
    from nkat_ray.search.cluster import live_cluster
    from nkat_ray.search.trainable import Stage1Data
    from nkat_ray.search.tuner import tune_stage1

    config, state = run.config, run.journal.state
    _, bent = round1_point(config, domains(config, run.fixed))
    if bent:
        _notice(run, progress, f"Round-1's best is projected onto this space: {'; '.join(bent)}")
    ended = [trial_row(record, config, state) for record in state.trials.values() if record.ended]
    progress.on_start(config.num_samples, ended)
    for row in ended:  # a driver that was killed may not have told TensorBoard
        run.board.on_trial_end(row["trial"], row)

    def on_result(trial: int, row: Mapping[str, Any]) -> None:
        progress.on_result(trial, row)
        run.board.on_result(trial, row)

    def on_trial_end(record: TrialRecord) -> None:
        row = trial_row(record, config, state)
        progress.on_trial_end(record.trial, row)
        run.board.on_trial_end(record.trial, row)
        _snapshot(run, progress)

    def on_notice(text: str) -> None:
        _notice(run, progress, text)

    listeners = Listeners(
        on_trial_start=progress.on_trial_start, on_result=on_result, on_trial_end=on_trial_end,
        on_survivor=progress.on_survivor, on_notice=on_notice,
    )  # fmt: skip
    found = run.datasets[STAGE1_DATASET]
    assert isinstance(found, Dataset)  # prepare.py refuses a run without it
    data = Stage1Data(
        name=found.name, selection=select_images(found, training_limits(found, config)), num_classes=found.classes,
        grey=found.grey, flip=found.flip,
    )  # fmt: skip
    run.board.samples({"augmented_batch": _sample(config, data)})
    stage2 = None
    if config.feedback == "global":
        stage2 = EarlyStage2(
            run.datasets, config=config, vault=vault, journal=run.journal, folder=run.storage.local, cluster=cluster,
            notice=on_notice,
        )  # fmt: skip
    tune_stage1(
        config, fixed=run.fixed, data=data, cluster=cluster, vault=vault, journal=run.journal,
        folder=run.storage.local, tune_folder=run.storage.tune_folder, listeners=listeners, stage2=stage2,
        warm=_earlier_trials(run, progress), look=lambda: live_cluster(cluster),
    )  # fmt: skip


def _sample(config: RunConfig, data: Any) -> Any:
    """What training sees: the first images as they are, and as the baseline's recipe shows them."""
    from nkat_ray.pictures import augmented_batch

    return augmented_batch(
        config, data.selection, num_classes=data.num_classes, flip=data.flip, seed=config.seed
    )  # fmt: skip


def _winner_pictures(run: _Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Where the winner looks; nothing without one."""
    from nkat_ray.pictures import winner_attention
    from nkat_ray.train.checkpoint import Weights

    found = run.datasets[STAGE1_DATASET]
    if summary["winner"] is None or isinstance(found, Missing):
        return {}
    weights = Weights.from_bytes((run.storage.local / BEST_FOLDER / WEIGHTS_FILE).read_bytes())
    return winner_attention(weights, found, training_limits(found, run.config))


def _earlier_trials(run: _Run, progress: Progress) -> list[WarmTrial]:
    """Trials of the run that --warm_start names, with a notice of how many could be taken."""
    if run.config.warm_start is None or run.journal.state.warmed:
        return []
    earlier = read_earlier(run.config, domains(run.config, run.fixed))
    _notice(run, progress, earlier.notice)
    return earlier.trials


def _stage2(run: _Run, progress: Progress, *, cluster: Any, vault: Any) -> int:
    config, state = run.config, run.journal.state
    survivors = [survivor_of(state.trials[trial], config, cluster) for trial in state.survivors(config.gate)]
    best = evaluate_survivors(
        survivors, run.datasets, config=config, vault=vault, journal=run.journal, folder=run.storage.local,
        progress=progress, notice=lambda text: _notice(run, progress, text), on_row=lambda: _snapshot(run, progress),
    )  # fmt: skip
    if results.datasets_counted(state.tested.values(), best) == 0:
        raise RuntimeError("Stage 2 ended without a single dataset that counts; stage2.parquet has each one's error")
    return DONE


def _snapshot(run: _Run, progress: Progress) -> None:
    """Write the tables as far as the run is, and mirror them; a bucket that does not answer now is asked again
    later."""
    started_s = time.monotonic()
    if started_s < run.next_snapshot_s:
        return
    try:
        write_tables(run.storage.local, run.config, run.journal.state)
        run.storage.push()
    except OSError as error:
        _notice(run, progress, f"the run's files could not be written or mirrored just now ({error})")
    now_s = time.monotonic()
    run.next_snapshot_s = now_s + max(SNAPSHOT_S, (now_s - started_s) / SNAPSHOT_SHARE)


def _finish(run: _Run, code: int) -> None:
    """Everything that is written at the end, also at an early one; then the report on the terminal."""
    folder, state = run.storage.local, run.journal.state
    write_tables(folder, run.config, state)
    rows = stage2_rows(state)
    summary = summarise(run.config, state, describe_data(run.datasets), code)
    tables.write_summary(folder / SUMMARY_FILE, summary)
    run.board.stage2(
        summary, rows, curve_rows(state), _winner_pictures(run, summary)
    )  # fmt: skip
    run.board.close()
    write_report(folder)
    run.journal.close()
    run.storage.push()
    print_report(folder, run.console)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Neither Ctrl-C nor SIGTERM cuts short what is written at the end."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
