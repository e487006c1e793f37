"""`nkat evaluate --official RUN`: retrain the winner's design in full with several seeds, and run Stage 2 on each.

A run's own scores belong to one network: the best of many trials, trained with one seed. This step estimates what the
design itself reaches (docs/spec.md section 6.4).
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from nkat_ray.commands.evaluate import EvaluateConfig, WithoutNotices, refuse_changed_data, run_config
from nkat_ray.config import STAGE1_DATASET, RunConfig, TrialConfig, config_of_json
from nkat_ray.data import Dataset
from nkat_ray.data.selection import select_images, training_limits
from nkat_ray.data.suite import describe_data, open_datasets
from nkat_ray.errors import DONE, FAULT, UserError
from nkat_ray.files import BEST_FOLDER, CONFIG_FILE, STAGE2_FILE, SUMMARY_FILE, WEIGHTS_FILE, write_atomically
from nkat_ray.metrics import STAGE2_DATASETS, Stage2Scores
from nkat_ray.record import scoring, tables
from nkat_ray.record.journal import Journal
from nkat_ray.record.run import Run
from nkat_ray.record.scoring import number
from nkat_ray.record.storage import RunStorage
from nkat_ray.report.progress import Progress
from nkat_ray.report.terminal import VERDICT_STYLE, Screen

if TYPE_CHECKING:
    from nkat_ray.cluster.resources import Cluster  # loads Ray, which bad input should not wait for

OFFICIAL_FILE = "official.json"
FIRST_SEED = 2_000_000  # number that the first seed is derived from; the trials use the numbers from 0 on


def recalculate(config: EvaluateConfig, screen: Screen) -> int:
    """Retrain the winner with several seeds, evaluate each, and print means with their interval and the verdict.

    Work that an earlier call of the same command finished is not repeated.

    Returns:
        The exit code: 0, or 1 if no dataset counts or a training failed.

    Raises:
        UserError: the target is not a run with a winner, or its folder `official` holds another recalculation.
    """
    from nkat_ray.cluster.connect import connected, describe_cluster
    from nkat_ray.cluster.resources import refuse_oversized, trial_share
    from nkat_ray.search.searcher import trial_seed

    run = official_run(config)
    out = config.out or config.target / "official"
    _refuse_other_content(out, config)
    with screen.phase("reading the datasets"):
        run, datasets = open_datasets(run, screen)
    datasets = refuse_changed_data(config.target, datasets)
    seeds = {number: trial_seed(run.seed, FIRST_SEED + number) for number in range(config.seeds)}
    with screen.entering("starting Ray", connected(run.address, verbose=run.verbose)):
        cluster = describe_cluster(run.gpus_per_trial)
        refuse_oversized([trial_share(run.trial, run, cluster)], cluster)
        journal = _open_journal(out, config)
        context = Run(config=run, domains={}, datasets=datasets, storage=RunStorage(out, None), journal=journal)
        try:
            winner = _train_and_evaluate(config, context, seeds, cluster, screen)
        except RuntimeError as error:  # a training failed; finished ones are kept
            text = f"error: {error}; to continue from what is finished in {out}, repeat the command"
            Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
            return FAULT
        finally:
            journal.close()
    rows = list(journal.state.tested.values())
    tables.write_rows(out / STAGE2_FILE, rows)
    scores = {number: scoring.result_scores(rows, number) for number in seeds}
    found = scoring.official(rows, list(seeds))
    code = DONE if scoring.datasets_counted(rows, winner) else FAULT
    document = {
        "run": config.target.absolute(), "config": dataclasses.asdict(run.trial), "lambda_model": run.lambda_model,
        "seeds": list(seeds.values()), "data": describe_data(datasets), **dataclasses.asdict(found),
        "by_seed": [dataclasses.asdict(score) for score in scores.values()], "exit_code": code,
    }  # fmt: skip
    tables.write_json(out / OFFICIAL_FILE, document)
    lines = scoring.notices({"data": document["data"]})
    for line in lines:
        screen.print(f"! {line}", style="bold yellow", markup=False, highlight=False)
    screen.print(_table(rows, scores, found))
    screen.print(found.verdict.sentence, style=VERDICT_STYLE[found.verdict.status], highlight=False)
    screen.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)
    document |= {"stage2": rows, "folder": out.absolute()}
    screen.conclude(document, [*lines, found.verdict.sentence, f"results: {out}"])
    return code


def official_run(config: EvaluateConfig) -> RunConfig:
    """Return the run's configuration with the winner's design and recipe, this command's flags, and all images.

    Raises:
        UserError: the target has no winner.
    """
    path = config.target / SUMMARY_FILE
    summary = tables.read_summary(path) if path.exists() else {"winner": None}
    winner = summary.get("winner")
    if not winner:
        raise UserError(f"target is {str(config.target)!r}; --official needs a finished run with a winner")
    base = run_config(config)
    design = dict(vars(config_of_json(TrialConfig, winner["config"])))
    # The grace period has no meaning here, but must not exceed the epochs.
    design |= {"train_images": config.train_images, "grace": min(base.grace, design["epochs"])}
    return dataclasses.replace(base, **design)


def _refuse_other_content(out: Path, config: EvaluateConfig) -> None:
    """Refuse a folder that holds anything but this recalculation; a continuation may change the `free` flags."""
    free = {
        "address", "compile", "data_dir", "json", "quiet", "verbose", "out", "target", "cpus_per_trial",
        "gpus_per_trial",
    }  # fmt: skip
    path = out / CONFIG_FILE
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in tables.plain(dataclasses.asdict(config)).items():
            if name not in free and saved.get(name) != value:
                raise UserError(
                    f"{name} is {value!r}; {out} contains a recalculation with {saved.get(name)!r}; continue that one, "
                    "or choose another --out"
                )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"out is {str(out)!r}; it contains something else; choose another folder")


def _open_journal(out: Path, config: EvaluateConfig) -> Journal:
    """Create the folder with its configuration if necessary, and open its journal."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / CONFIG_FILE).exists():
        tables.write_json(out / CONFIG_FILE, dataclasses.asdict(config))
    journal = Journal(out)
    journal.write("run")
    return journal


def _train_and_evaluate(
    config: EvaluateConfig, context: Run, seeds: Mapping[int, int], cluster: "Cluster", screen: Screen
) -> int:
    """Train what is missing, run Stage 2 on all seeds, and return the number of the best one on validation."""
    from nkat_ray.cluster.resources import trial_share
    from nkat_ray.search.vault import open_vault
    from nkat_ray.stage2.retrain import retrained
    from nkat_ray.stage2.stage2 import Stage2
    from nkat_ray.stage2.survivor import model_survivor

    run, datasets, out = context.config, context.datasets, context.folder
    share = trial_share(run.trial, run, cluster)
    folders = {number: out / "retrained" / f"seed_{number:03d}" for number in seeds}
    missing = {number: seeds[number] for number, folder in folders.items() if not (folder / WEIGHTS_FILE).exists()}
    found = datasets[STAGE1_DATASET]
    assert isinstance(found, Dataset)  # data/suite.py refuses a run without it
    progress = Progress(run, datasets, title=f"{config.target.name}, official", console=screen)
    with progress:
        if missing:
            payload = (config.target / BEST_FOLDER / WEIGHTS_FILE).read_bytes()
            images = select_images(found, training_limits(found, run))
            for number, weights in retrained(
                payload, found, images, missing, share, progress.on_notice, compile=config.compile
            ):
                folders[number].mkdir(parents=True, exist_ok=True)  # may be left empty by an earlier call
                write_atomically(folders[number] / WEIGHTS_FILE, weights)
                progress.on_notice(f"seed {number + 1} of {len(seeds)} is trained: {run.epochs} epochs")
        survivors = [model_survivor(folder, share, trial=number) for number, folder in folders.items()]
        observer = WithoutNotices([progress])
        return Stage2(context, cluster=cluster, vault=open_vault("official"), observer=observer).evaluate(survivors)


def _table(rows: Sequence[Mapping[str, Any]], scores: Mapping[int, Stage2Scores], found: scoring.Official) -> Table:
    """Return a table with one row per seed (test accuracies and aggregates) and a row with the means."""
    table = Table(title="The winner's design, retrained: test scores", title_justify="left", box=None)
    table.add_column("seed")
    for name in (*(scoring.DATASET_NAMES[name] for name in STAGE2_DATASETS), "Global TPE", "Consist.", "Robust."):
        table.add_column(name, justify="right", overflow="fold")  # 80 columns
    accuracies = {
        name: [scoring.of_trial(rows, number).get(name, {}).get("test_accuracy") for number in scores]
        for name in STAGE2_DATASETS
    }
    for position, (seed, score) in enumerate(scores.items()):
        cells = [number(accuracies[name][position]) for name in STAGE2_DATASETS]
        table.add_row(
            str(seed + 1), *cells, number(score.global_tpe), number(score.consistency), number(score.robustness)
        )
    means = [_mean(accuracies[name]) for name in STAGE2_DATASETS]
    table.add_row("mean", *means, number(found.global_tpe), number(found.consistency), number(found.robustness))
    return table


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(statistics.fmean(known) if known else None)
