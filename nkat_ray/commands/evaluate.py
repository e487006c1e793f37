"""`nkat evaluate`: Stage 2 alone, on the survivors of a run or on one checkpoint."""

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from nkat_ray.config import AutoFloat, AutoInt, DataConfig, LambdaModel, OptionalInt, RunConfig, Transfer, field_names
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.report import results, tables
from nkat_ray.report.terminal import Progress, final_report
from nkat_ray.search.journal import Journal, read_state
from nkat_ray.search.storage import CONFIG_FILE


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig):
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
    """Folder for the results. Default: <target>/evaluations/<UTC time>."""
    verbose: bool = False
    """Show Ray's own output too."""


def evaluate(config: EvaluateConfig, console: Console) -> int:
    """Evaluate and print the report; exit code 0, or 1 when no dataset counts.

    Raises:
        ValueError: the target is neither a run with survivors nor a model; or the data cannot be had.
    """
    from nkat_ray.run import FAULT, SURVIVED, describe_data, evaluate_survivors, open_datasets
    from nkat_ray.search.cluster import connected, describe_cluster
    from nkat_ray.search.vault import open_vault

    run = _run_config(config)
    datasets = open_datasets(run, console)
    out = config.out or config.target / "evaluations" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG_FILE).write_text(json.dumps(tables.plain(dataclasses.asdict(config)), indent=2) + "\n")
    journal = Journal(out)
    journal.write("run")
    progress = Progress(
        name=config.target.name,
        preset=run.preset,
        gate=run.gate,
        data=", ".join(datasets),
        epochs=run.epochs,
        console=console,
    )
    with connected(run), progress:
        survivors = _survivors(config, run, describe_cluster())
        winner = evaluate_survivors(
            survivors, datasets, config=run, vault=open_vault(f"evaluate-{out.name}"), journal=journal, folder=out,
            progress=progress, notice=lambda _: None,  # that the weights come from disk is what was asked for
        )  # fmt: skip
    rows = list(journal.state.tested.values())
    tables.write_stage2(out / "stage2.parquet", rows)
    _print(run, rows, winner, describe_data(datasets), console)
    console.print(f"results: {out}", markup=False, soft_wrap=True)
    return SURVIVED if results.datasets_counted(rows, winner) else FAULT


def _run_config(config: EvaluateConfig) -> RunConfig:
    """The run's configuration (a model alone has the trial that made it), with this command's flags."""
    from nkat_ray.run import config_of_json
    from nkat_ray.train.checkpoint import WEIGHTS_FILE, Weights

    shared = set(field_names(EvaluateConfig)) & set(field_names(RunConfig))
    flags = {name: getattr(config, name) for name in shared}
    if (config.target / CONFIG_FILE).exists() and (config.target / "journal.jsonl").exists():
        saved = json.loads((config.target / CONFIG_FILE).read_text())
        return config_of_json(saved, name=config.target.name, **flags)
    weights = config.target / WEIGHTS_FILE
    if not weights.exists():
        raise ValueError(
            f"target is {str(config.target)!r}; it is neither a run's folder nor a model with {WEIGHTS_FILE}"
        )
    trial = Weights.from_bytes(weights.read_bytes()).config
    base = {**vars(trial), "grace": min(5, trial.epochs)}
    return RunConfig(**{**base, **flags, "name": config.target.resolve().name})


def _survivors(config: EvaluateConfig, run: RunConfig, cluster: Any) -> list[Any]:
    from nkat_ray.evaluate import Survivor
    from nkat_ray.model import count_nkat_parameters, count_parameters
    from nkat_ray.run import survivor_of
    from nkat_ray.search.resources import trial_share
    from nkat_ray.train.checkpoint import WEIGHTS_FILE, Weights

    if (config.target / "journal.jsonl").exists():
        state = read_state(config.target)
        passed = [state.trials[number] for number in state.survivors(run.gate)]
        if not passed:
            raise ValueError(f"target is {str(config.target)!r}; none of its trials passed the gate of {run.gate}")
        return [survivor_of(record, run, cluster) for record in passed]
    model = Weights.from_bytes((config.target / WEIGHTS_FILE).read_bytes()).build()
    return [
        Survivor(
            trial=0, checkpoints=[str(config.target.absolute())], conv_stem=run.conv_stem, embed_dim=run.embed_dim,
            nkat_parameters=count_nkat_parameters(model), parameters=count_parameters(model),
            share=trial_share(run.trial, run, cluster),
        )
    ]  # fmt: skip


def _print(run: RunConfig, rows: list[dict[str, Any]], winner: int, data: dict[str, Any], console: Console) -> None:
    summary = {
        "preset": run.preset, "gate": run.gate, "lambda_model": run.lambda_model, "data": data, "exit_code": 0,
        "survivors": sorted({row["trial"] for row in rows}), "stop_reasons": {},
        "winner": {"trial": winner, **dataclasses.asdict(results.result_scores(rows, winner))},
    }  # fmt: skip
    final_report(summary, [], rows, console)
