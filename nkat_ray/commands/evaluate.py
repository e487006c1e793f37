"""`nkat evaluate`: Stage 2 alone, on the survivors of a run or on one checkpoint."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro

from nkat_ray.config import (
    AutoFloat,
    AutoInt,
    DataConfig,
    LambdaModel,
    OptionalInt,
    RunConfig,
    ScreenConfig,
    Transfer,
    field_names,
)
from nkat_ray.data import Dataset, Missing
from nkat_ray.exit_codes import DONE, FAULT
from nkat_ray.files import CONFIG_FILE, JOURNAL_FILE, STAGE2_FILE, WEIGHTS_FILE
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.outputs import data_phrase
from nkat_ray.prepare import Datasets, config_of_json, describe_data, open_datasets, refuse_other_data
from nkat_ray.report import results, tables
from nkat_ray.report.progress import Progress
from nkat_ray.report.terminal import Screen, final_report, result_lines
from nkat_ray.search.journal import Journal, TrialRecord, read_state
from nkat_ray.search.resources import trial_share
from nkat_ray.stage2 import evaluate_survivors, model_survivor, survivor_of


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig, ScreenConfig):
    """Stage 2 alone: transfer to the datasets, validation, ranking, test figures."""

    target: tyro.conf.Positional[Path]
    """Folder of a run (its survivors are evaluated), or of one model (`best/`, a checkpoint: weights.safetensors)."""
    transfer: Transfer = "finetune"
    """finetune (all behind a fresh head), probe (head only) or scratch (new weights)."""
    transfer_epochs: int = 5
    """Epochs of the transfer, 1..1000."""
    transfer_lr: float = 5e-4
    """Peak learning rate of the transfer, 0 < transfer_lr <= 1."""
    transfer_images: OptionalInt = None
    """Training images of each transfer (stratified, fixed), >= 10; off takes all that validation leaves."""
    test_images: OptionalInt = None
    """Test images a dataset (stratified, fixed), >= 10; off takes all."""
    datasets: tuple[str, ...] = STAGE2_DATASETS
    """Datasets; cifar10 must be among them."""
    lambda_model: LambdaModel = "notes"
    """Lambda in the TPE score: notes, counted or millions."""
    seed: int = 0
    """Seed of the transfers."""
    gpus_per_trial: AutoFloat = None
    """Share of a GPU an evaluation asks for; auto: by the estimated memory."""
    cpus_per_trial: AutoInt = None
    """CPU cores an evaluation asks for; auto: by the machine."""
    address: str | None = None
    """Ray: an address, `auto` or `local`."""
    out: Path | None = None
    """Folder for the results. Default: <target>/evaluations/<UTC time>; with --official <target>/official."""
    official: bool = False
    """Train the run's winner anew, in full, with several seeds, and evaluate each: the official recalculation. The same
    command again continues it."""
    seeds: int = 3
    """Seeds of --official, 1..100."""
    train_images: OptionalInt = None
    """CIFAR-10 images that --official trains on (stratified, fixed), >= 10; off takes all that validation leaves."""
    verbose: bool = False
    """Show Ray's own output too."""

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= 100:
            raise ValueError(f"seeds is {self.seeds}; allowed: 1..100")
        if not self.official and self.train_images is not None:
            raise ValueError(f"train_images is {self.train_images}; only --official trains on CIFAR-10; add it")


SHARED = sorted(  # flags that a run has too; what the screen shows is this command's own
    (set(field_names(EvaluateConfig)) & set(field_names(RunConfig))) - {*field_names(ScreenConfig), "train_images"}
)
LIMITS = ("transfer_images", "test_images")


def with_defaults_of(target: Path, *, official: bool = False) -> EvaluateConfig:
    """What the command does by itself: a run is evaluated as it would evaluate itself, on its own data; officially, on
    all of it.

    Raises:
        ValueError: the target is neither a run nor a model.
    """
    _refuse_neither(target)
    if not _is_run(target):
        return EvaluateConfig(target=target)
    saved = config_of_json(tables.read_summary(target / CONFIG_FILE))
    taken = [name for name in SHARED if not (official and name in LIMITS)]
    return EvaluateConfig(target=target, **{name: getattr(saved, name) for name in taken})


def evaluate(config: EvaluateConfig, screen: Screen) -> int:
    """Evaluate and print the report; exit code 0, or 1 when no dataset counts.

    Raises:
        ValueError: the target is no run and no model, or has no survivor; or the data cannot be had, or are not those
            of the run.
    """
    from nkat_ray.search.cluster import connected, describe_cluster, refuse_infeasible
    from nkat_ray.search.vault import open_vault

    _refuse_neither(config.target)
    run = run_config(config)
    records = _passed(config.target, run.gate) if _is_run(config.target) else []
    out = config.out or config.target / "evaluations" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if out.exists():
        raise ValueError(f"out is {str(out)!r}; it exists; choose another folder")
    run, datasets = open_datasets(run, screen)
    if _is_run(config.target):
        datasets = refuse_other_than_the_runs(config.target, datasets)
    progress = Progress(
        name=config.target.name, preset=run.preset, gate=run.gate, data=data_phrase(datasets), epochs=run.epochs,
        console=screen, quiet=screen.quiet,
    )  # fmt: skip
    with connected(run.address, verbose=run.verbose):
        cluster = describe_cluster()
        survivors = [survivor_of(record, run, cluster) for record in records] or [
            model_survivor(config.target, run, trial_share(run.trial, run, cluster))
        ]
        refuse_infeasible(survivor.share for survivor in survivors)
        out.mkdir(parents=True)
        (out / CONFIG_FILE).write_text(json.dumps(tables.plain(dataclasses.asdict(config)), indent=2) + "\n")
        journal = Journal(out)
        journal.write("run")
        with progress, contextlib.closing(journal):
            winner = evaluate_survivors(
                survivors, datasets, config=run, vault=open_vault(out.name), journal=journal, folder=out,
                progress=progress, notice=lambda _: None,  # that the weights come from disk is what was asked for
            )  # fmt: skip
    rows = list(journal.state.tested.values())
    tables.write_stage2(out / STAGE2_FILE, rows)
    code = DONE if results.datasets_counted(rows, winner) else FAULT
    summary = _summary(run, rows, winner, describe_data(datasets))
    final_report(summary, [], rows, screen)
    screen.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)
    document = {**summary, "exit_code": code, "stage2": rows, "folder": out.absolute()}
    screen.conclude(document, [*result_lines(summary, rows), f"results: {out}"])
    return code


def refuse_other_than_the_runs(target: Path, datasets: Datasets) -> dict[str, Dataset | Missing]:
    """The datasets as the run had them; those that it did not have are taken as they are.

    Raises:
        ValueError: one of them has other images now.
    """
    saved = tables.read_summary(target / CONFIG_FILE, "found")["found"]
    before = {name: saved.get(name, described) for name, described in describe_data(datasets).items()}
    return refuse_other_data(before, datasets)


def _is_run(target: Path) -> bool:
    return (target / JOURNAL_FILE).exists() and (target / CONFIG_FILE).exists()


def _refuse_neither(target: Path) -> None:
    if not _is_run(target) and not (target / WEIGHTS_FILE).exists():
        raise ValueError(f"target is {str(target)!r}; it is neither a run's folder nor a model with {WEIGHTS_FILE}")


def run_config(config: EvaluateConfig) -> RunConfig:
    """The run's configuration (a model alone has the trial that made it), with this command's flags."""
    flags = {name: getattr(config, name) for name in SHARED}
    if _is_run(config.target):
        return config_of_json(tables.read_summary(config.target / CONFIG_FILE), **flags)
    from nkat_ray.train.checkpoint import CheckpointError, Weights

    try:
        trial = Weights.from_bytes((config.target / WEIGHTS_FILE).read_bytes()).config
    except CheckpointError as error:
        raise ValueError(f"target is {str(config.target)!r}; its {WEIGHTS_FILE} cannot be read: {error}") from error
    return RunConfig(**{**vars(trial), "grace": min(5, trial.epochs), **flags})


def _passed(target: Path, gate: float) -> list[TrialRecord]:
    state = read_state(target)
    passed = [state.trials[number] for number in state.survivors(gate)]
    if not passed:
        raise ValueError(f"target is {str(target)!r}; none of its trials passed the gate of {gate}")
    return passed


def _summary(run: RunConfig, rows: list[dict[str, Any]], winner: int, data: dict[str, Any]) -> dict[str, Any]:
    """Of summary.json's keys those that an evaluation has."""
    return {
        "preset": run.preset, "gate": run.gate, "lambda_model": run.lambda_model, "data": data, "exit_code": 0,
        "survivors": sorted({row["trial"] for row in rows}), "stop_reasons": {},
        "winner": {"trial": winner, **dataclasses.asdict(results.result_scores(rows, winner))},
    }  # fmt: skip
