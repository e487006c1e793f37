"""One run from first to last: data, Ray, Stage 1, Stage 2, report. What tune_round2.py and `nkat tune` both call.

The order is what makes a run safe: everything that can be refused is refused before anything is written; the
configuration is written before Ray starts; what happens is in the journal before anybody acts on it.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from nkat_ray import __version__
from nkat_ray.config import STAGE1_DATASET, RunConfig, default_storage_path, field_names
from nkat_ray.data import Dataset, Missing, open_dataset, split_validation
from nkat_ray.data.selection import select_images, training_limits
from nkat_ray.metrics import GLOBAL_TARGETS
from nkat_ray.report import results, tables
from nkat_ray.report.html import write_report
from nkat_ray.report.tensorboard import TensorBoardLog
from nkat_ray.report.terminal import Progress, final_report
from nkat_ray.search.journal import Journal, RunState, TrialRecord
from nkat_ray.search.rows import curve_rows, training_share, trial_row, trial_rows
from nkat_ray.search.space import domains, refuse_impossible, round1_point
from nkat_ray.search.storage import (
    CONFIG_FILE,
    RunStorage,
    check_owner,
    check_writable,
    newest_run,
    run_storage,
)

SURVIVED, FAULT, BAD_INPUT, NO_SURVIVOR, INTERRUPTED = 0, 1, 2, 3, 130  # exit codes, docs/spec.md section 8
SNAPSHOT_S = 10.0  # least time between two writings of the tables while a run goes on
PACKAGES = ("torch", "torchvision", "timm", "ray", "optuna", "numpy", "pyarrow")


class UsageError(ValueError):
    """Bad input: one line that names the value, the allowed range and what to do. Exit code 2."""


@dataclass
class _Run:
    """What the parts of a run share."""

    config: RunConfig
    fixed: tuple[str, ...]
    datasets: Mapping[str, Dataset | Missing]
    storage: RunStorage
    journal: Journal
    console: Console
    board: TensorBoardLog
    rows: list[dict[str, Any]] = field(default_factory=list)  # stage2.parquet
    snapshot_s: float = 0.0


def start(config: RunConfig, fixed: Collection[str], console: Console) -> int:
    """Begin a run; returns its exit code.

    Args:
        config: the run; without a name it gets `<preset>-<UTC time>`.
        fixed: searched parameters that the user typed.

    Raises:
        ValueError: bad input, before anything is written.
    """
    refuse_impossible(config, fixed)
    check_writable(config.storage_path)
    name = config.name or f"{config.preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    config = dataclasses.replace(config, name=name)
    storage = run_storage(config.storage_path, name)
    if storage.exists():
        raise UsageError(
            f"name is {name!r}; that run exists in {config.storage_path}; continue it with --resume, or choose another"
        )
    datasets = open_datasets(config, console)
    with storage.lock():
        write_config(storage, config, fixed, datasets)
        try:
            return _drive(config, tuple(fixed), datasets, storage, console)
        except UsageError:  # the cluster showed what the flags could not: as if it had never begun
            shutil.rmtree(storage.local)
            raise


def saved_config(storage_path: str, name: str | None) -> tuple[RunConfig, tuple[str, ...]]:
    """Configuration and typed parameters of the run that --resume continues.

    Raises:
        UsageError: there is no such run, or it belongs to another user.
    """
    check_writable(storage_path)
    name = name or newest_run(storage_path)
    if name is None:
        raise UsageError(f"storage_path is {storage_path!r}; it holds no run to resume; start one without --resume")
    storage = run_storage(storage_path, name)
    if storage.remote is not None and storage.exists():
        storage.pull()
    path = storage.local / CONFIG_FILE
    if not path.exists():
        raise UsageError(f"name is {name!r}; {storage_path} holds no such run; `ls {storage_path}` shows what there is")
    check_owner(storage.local)
    check_owner(path)
    saved = json.loads(path.read_text())
    return config_of_json(saved, name=name, storage_path=storage_path), tuple(saved["fixed"])


def resume(config: RunConfig, fixed: Collection[str], console: Console) -> int:
    """Continue a run (as `saved_config` gave it); prints the report of one that is finished. Returns its exit code.

    Raises:
        ValueError: the data are not those of before, or another driver holds the run.
    """
    assert config.name is not None
    storage = run_storage(config.storage_path, config.name)
    with storage.lock():
        summary = storage.local / "summary.json"
        if summary.exists():
            code = tables.read_summary(summary)["exit_code"]
            if code not in (None, INTERRUPTED, FAULT):
                print_report(storage.local, console)
                return int(code)
        datasets = open_datasets(config, console)
        _refuse_other_data(storage, datasets)
        return _drive(config, tuple(fixed), datasets, storage, console)


def open_datasets(config: RunConfig, console: Console) -> dict[str, Dataset | Missing]:
    """Find and check the datasets; without CIFAR-10 there is no Stage 1.

    Raises:
        ValueError: CIFAR-10 is missing, or a file is damaged.
    """

    def notice(text: str) -> None:
        console.print(f"note: {text}", style="yellow", markup=False, highlight=False)

    found: dict[str, Dataset | Missing] = {}
    # Stage 1's dataset first: without it nothing else need be looked for, and if it is generated, so are the others:
    # scores over real and generated images together would say nothing about either.
    for name in sorted(config.datasets, key=lambda name: name != STAGE1_DATASET):
        first = name == STAGE1_DATASET
        found[name] = dataset = open_dataset(
            name, config, allow_synthetic=first and config.preset == "quick", notice=notice
        )
        if first and isinstance(dataset, Missing):
            advice = "give --data_dir, or try it out with --preset quick --data synthetic"
            raise UsageError(f"{STAGE1_DATASET} cannot be had: {dataset.reason}; {advice}")
        if first and isinstance(dataset, Dataset) and dataset.source.startswith("synthetic"):
            config = dataclasses.replace(config, data="synthetic")
    for name, dataset in found.items():
        if isinstance(dataset, Missing):
            notice(f"{name} is missing and will lower Robustness: {dataset.reason}")
        else:
            limits = training_limits(dataset, config)
            split_validation(dataset.labels("train"), val_images=limits.val_images, train_images=limits.train_images)
    return {name: found[name] for name in config.datasets}


def config_of_json(saved: Mapping[str, Any], **replaced: Any) -> RunConfig:
    """A RunConfig from config.json, which knows neither tuples nor paths."""
    values: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in saved.items() if key in field_names(RunConfig)
    }
    values["data_dir"] = Path(values["data_dir"]) if values["data_dir"] else None
    return RunConfig(**{**values, **replaced})


def write_config(
    storage: RunStorage, config: RunConfig, fixed: Collection[str], datasets: Mapping[str, Dataset | Missing]
) -> None:
    """Write config.json: what --resume starts from."""
    if config.data_dir is not None:
        config = dataclasses.replace(config, data_dir=config.data_dir.absolute())
    content = {**tables.plain(asdict(config)), "fixed": sorted(fixed), "data": describe_data(datasets)}
    temporary = storage.local / f".{CONFIG_FILE}"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, storage.local / CONFIG_FILE)
    storage.push()


def describe_data(datasets: Mapping[str, Dataset | Missing]) -> dict[str, Any]:
    """Source, digest and number of images of each dataset; the reason where one is missing."""
    return {
        name: {"source": None, "digest": None, "images": 0, "missing": found.reason}
        if isinstance(found, Missing)
        else {"source": found.source, "digest": found.digest, "images": found.sizes, "verified": found.verified}
        for name, found in datasets.items()
    }


def _refuse_other_data(storage: RunStorage, datasets: Mapping[str, Dataset | Missing]) -> None:
    before = json.loads((storage.local / CONFIG_FILE).read_text())["data"]
    for name, now in describe_data(datasets).items():
        if now["digest"] != before[name]["digest"]:
            raise UsageError(
                f"{name} has digest {now['digest']}; this run began with {before[name]['digest']}; "
                "give the --data_dir of before"
            )


def _drive(
    config: RunConfig,
    fixed: tuple[str, ...],
    datasets: Mapping[str, Dataset | Missing],
    storage: RunStorage,
    console: Console,
) -> int:
    """Run, or run on, to the end; whatever ends it, the tables and the report are written."""
    journal = Journal(storage.local)
    journal.write("run")
    board = TensorBoardLog(storage.local / "tensorboard", domains(config, fixed))
    run = _Run(config, fixed, datasets, storage, journal, console, board)
    code, interrupted = FAULT, False
    try:
        with _terminated_like_interrupted():
            code = _stages(run)
    except KeyboardInterrupt:
        code, interrupted = INTERRUPTED, True
    except UsageError:
        raise
    except Exception:
        log = storage.local / "error.log"
        log.write_text(traceback.format_exc())
        console.print(
            f"error: {traceback.format_exc().strip().splitlines()[-1]}; the log is {log}", markup=False, soft_wrap=True
        )
    _finish(run, code)
    if interrupted:
        command = f"python tune_round2.py --resume --name {config.name}"
        path = "" if config.storage_path == default_storage_path() else f" --storage_path {config.storage_path}"
        console.print(f"interrupted; continue with: {command}{path}", markup=False, soft_wrap=True)
    return code


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM (a batch system, a spot instance) ends a run in order, as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stages(run: _Run) -> int:
    from nkat_ray.search.cluster import connected, describe_cluster, nodes_without, refuse_infeasible
    from nkat_ray.search.resources import slots, trial_share
    from nkat_ray.search.vault import open_vault

    config = run.config
    with connected(config) as where:
        if run.storage.remote is None and (blind := nodes_without(run.storage.local / CONFIG_FILE)):
            raise UsageError(
                f"storage_path is {config.storage_path!r}; node {blind[0]} does not see it; "
                "with several nodes give a shared folder or a bucket URI"
            )
        cluster = describe_cluster()
        try:
            refuse_infeasible(trial_share(config.trial, config, cluster))
        except ValueError as error:
            raise UsageError(str(error)) from error
        vault = open_vault(str(config.name))
        progress = Progress(
            name=str(config.name), preset=config.preset, gate=config.gate, data=data_phrase(run.datasets),
            epochs=config.epochs, console=run.console,
        )  # fmt: skip
        with progress:
            progress.notice(
                f"{where}: {cluster.cpus} CPU, {cluster.gpus:g} GPU, {slots(config, cluster)} trials at a time"
            )
            if not run.journal.state.stage1_done:
                _stage1(run, progress, cluster=cluster, vault=vault)
            if not run.journal.state.survivors(config.gate):
                return NO_SURVIVOR
            return _stage2(run, progress, cluster=cluster, vault=vault)


def _stage1(run: _Run, progress: Progress, *, cluster: Any, vault: Any) -> None:
    from nkat_ray.search.callbacks import Listeners
    from nkat_ray.search.tuner import tune_stage1

    config, state = run.config, run.journal.state
    _, bent = round1_point(config, domains(config, run.fixed))
    if bent:
        progress.notice(f"Round-1's best is projected onto this space: {', '.join(bent)}")
    ended = [trial_row(record, config, state) for record in state.trials.values() if record.ended]
    progress.on_start(config.num_samples, ended)

    def on_result(trial: int, row: Mapping[str, Any]) -> None:
        progress.on_result(trial, row)
        run.board.on_result(trial, row)

    def on_trial_end(record: TrialRecord) -> None:
        row = trial_row(record, config, state)
        progress.on_trial_end(record.trial, row)
        run.board.on_trial_end(record.trial, row)
        _snapshot(run)

    listeners = Listeners(
        on_trial_start=progress.on_trial_start, on_result=on_result, on_trial_end=on_trial_end,
        on_survivor=progress.on_survivor, on_notice=progress.notice,
    )  # fmt: skip
    tune_stage1(
        config, fixed=run.fixed, data=stage1_data(config, run.datasets), cluster=cluster, vault=vault,
        journal=run.journal, folder=run.storage.local, tune_folder=run.storage.tune_folder, listeners=listeners,
    )  # fmt: skip


def stage1_data(config: RunConfig, datasets: Mapping[str, Dataset | Missing]) -> Any:
    """CIFAR-10's images that Stage 1 uses, decoded once: training and validation, both from the training split."""
    from nkat_ray.search.trainable import Stage1Data

    found = datasets[STAGE1_DATASET]
    assert isinstance(found, Dataset)
    selection = select_images(found, training_limits(found, config))
    return Stage1Data(name=found.name, selection=selection, num_classes=found.classes, grey=found.grey, flip=found.flip)


def _stage2(run: _Run, progress: Progress, *, cluster: Any, vault: Any) -> int:
    config, state = run.config, run.journal.state
    survivors = [survivor_of(state.trials[trial], config, cluster) for trial in state.survivors(config.gate)]
    best = evaluate_survivors(
        survivors, run.datasets, config=config, vault=vault, journal=run.journal, folder=run.storage.local,
        progress=progress, notice=progress.notice,
    )  # fmt: skip
    if results.datasets_counted(state.tested.values(), best) == 0:
        raise RuntimeError("Stage 2 ended without a single dataset that counts; stage2.parquet has each one's error")
    return SURVIVED


def evaluate_survivors(
    survivors: Sequence[Any],
    datasets: Mapping[str, Dataset | Missing],
    *,
    config: RunConfig,
    vault: Any,
    journal: Journal,
    folder: Path,
    progress: Progress,
    notice: Callable[[str], None],
) -> int:
    """Stage 2 from the survivors to the winner; rows go into the journal, weights below `folder`. Returns the winner.

    The ranking is fixed, by validation scores, before any test image is read.
    """
    from nkat_ray.evaluate import payload_path, test_survivors, validate_survivors
    from nkat_ray.train.checkpoint import Weights, write_atomically
    from nkat_ray.train.transfer import save_weights

    state = journal.state
    moved = folder / "stage2"
    moved.mkdir(exist_ok=True)
    progress.stage2_start(2 * len(survivors) * len(datasets) - len(state.stage2) - len(state.tested))
    validated = validate_survivors(survivors, datasets, run=config, vault=vault, done=state.stage2, notice=notice)
    for row, payload in validated:
        if payload is not None:
            write_atomically(payload_path(moved, row["trial"], row["dataset"]), payload)
        journal.write("stage2", row=row)
        progress.stage2_done(row["trial"], row["dataset"], row)
    lambdas = {survivor.trial: survivor.lambdas()[config.lambda_model] for survivor in survivors}
    order = results.rank(state.stage2.values(), lambdas)
    journal.write("ranked", order=order)
    untested = [row for key, row in state.stage2.items() if key not in state.tested]
    by_trial = {survivor.trial: survivor for survivor in survivors}
    for row in test_survivors(untested, moved, by_trial, datasets, run=config):
        journal.write("tested", row=row)
        progress.stage2_done(row["trial"], row["dataset"], row)
    payload = payload_path(moved, order[0], STAGE1_DATASET).read_bytes()
    save_weights(Weights.from_bytes(payload), payload, folder / "best")
    return order[0]


def survivor_of(record: TrialRecord, config: RunConfig, cluster: Any) -> Any:
    """What Stage 2 needs to know of a trial that passed the gate."""
    from nkat_ray.evaluate import Survivor
    from nkat_ray.search.resources import trial_share
    from nkat_ray.search.space import trial_config

    trial, last = trial_config(config, record.params), record.curve[max(record.curve)]
    return Survivor(
        trial=record.trial, checkpoints=record.checkpoints[::-1], conv_stem=trial.conv_stem, embed_dim=trial.embed_dim,
        nkat_parameters=last["nkat_parameters"], parameters=last["parameters"],
        share=trial_share(trial, config, cluster),
    )  # fmt: skip


def _snapshot(run: _Run, *, force: bool = False) -> None:
    """Write the tables as far as the run is, and mirror them."""
    if not force and time.monotonic() - run.snapshot_s < SNAPSHOT_S:
        return
    write_tables(run.storage.local, run.config, run.journal.state)
    run.storage.push()
    run.snapshot_s = time.monotonic()


def write_tables(folder: Path, config: RunConfig, state: RunState) -> None:
    """Write trials.parquet, curves.parquet and stage2.parquet."""
    about = {
        "run": config.name,
        "preset": config.preset,
        "gate": config.gate,
        "notes_gate": results.NOTES_GATE,
        "seed": config.seed,
    }
    tables.write_trials(folder / "trials.parquet", trial_rows(state, config), metadata=about)
    tables.write_curves(folder / "curves.parquet", curve_rows(state), metadata=about)
    tables.write_stage2(folder / "stage2.parquet", stage2_rows(state), metadata=about)


def stage2_rows(state: RunState) -> list[dict[str, Any]]:
    """Rows of stage2.parquet: tested where they have been, else as validated."""
    return [state.tested.get(key, row) for key, row in sorted(state.stage2.items())]


def _finish(run: _Run, code: int) -> None:
    """Everything that is written at the end, also at an early one; then the report on the terminal."""
    with _uninterrupted():
        folder, state = run.storage.local, run.journal.state
        _snapshot(run, force=True)
        rows = stage2_rows(state)
        summary = summarise(run.config, state, describe_data(run.datasets), code)
        tables.write_summary(folder / "summary.json", summary)
        run.board.stage2(summary, trial_rows(state, run.config), rows, curve_rows(state))
        run.board.close()
        write_report(folder)
        run.journal.close()
        run.storage.push()
        print_report(folder, run.console)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def summarise(config: RunConfig, state: RunState, data: Mapping[str, Any], code: int | None) -> dict[str, Any]:
    """summary.json (docs/spec.md section 8); `data` is `describe_data`'s, a code of None means that the run goes on."""
    trials, rows = trial_rows(state, config), stage2_rows(state)
    survivors = state.survivors(config.gate)
    lambdas = {row["trial"]: row["lambda_theory"] for row in trials if row["trial"] in survivors}
    tested = list(state.tested.values())
    winner = results.rank(tested, lambdas)[0] if tested and code == SURVIVED else None
    summary = {
        "name": config.name,
        "preset": config.preset,
        "gate": config.gate,
        "notes_gate": results.NOTES_GATE,
        "lambda_model": config.lambda_model,
        "space": config.space,
        "seed": config.seed,
        "data": data,
        "n_trials": len(trials),
        "stop_reasons": results.stop_counts(trials),
        "survivors": survivors,
        "winner": None if winner is None else _winner(winner, trials, rows),
        "targets": GLOBAL_TARGETS,
        "training_share": training_share(state),
        "wall_s": state.wall_s,
        "versions": versions(),
        "exit_code": code,
    }
    verdict = results.verdict_of(summary, rows)
    return {**summary, "verdict": verdict.status, "verdict_sentence": verdict.sentence}


def _winner(trial: int, trials: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    row = next(row for row in trials if row["trial"] == trial)
    scores = results.result_scores(rows, trial)
    mine = results.of_trial(rows, trial)
    return {
        "trial": trial,
        "config": tables.config_of({key: value for key, value in row.items() if key.startswith("config/")}),
        "seed": row["seed"],
        "lambda_theory": row["lambda_theory"],
        "val_global_tpe": results.validation_scores(rows, trial).global_tpe,
        **asdict(scores),
        "global_tpe_interval": results.global_interval(rows, trial),
        "global_tpe_by_model": results.global_tpe_by_model(rows, trial),
        "counted": results.datasets_counted(rows, trial),
        "datasets": {
            name: {"accuracy": r["test_accuracy"], "tpe": r["tpe"], "n": r["n_test"], "status": r["status"]}
            for name, r in mine.items()
        },
    }


def versions() -> dict[str, str]:
    """Versions of what computed the figures."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"nkat_ray": __version__, "python": platform.python_version(), **found}


def data_phrase(datasets: Mapping[str, Dataset | Missing]) -> str:
    """One phrase for people on where the images come from."""
    parts = [f"{name} {'MISSING' if isinstance(d, Missing) else d.source}" for name, d in datasets.items()]
    return "; ".join(parts)


def print_report(folder: Path, console: Console) -> None:
    """The report of a run on the terminal, from its files."""
    final_report(
        tables.read_summary(folder / "summary.json"), tables.read_trials(folder / "trials.parquet"),
        tables.read_stage2(folder / "stage2.parquet"), console, folder=folder,
    )  # fmt: skip
