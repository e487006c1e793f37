"""`nkat evaluate --official RUN`: the winner's design trained anew, in full, with several seeds; then Stage 2 on each.

A run's own figures belong to the one network that won: the best of many, with one seed. Whether the design reaches the
target is another question, and this is the step that answers it (docs/spec.md section 6.4).
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nkat_ray.commands.evaluate import EvaluateConfig, refuse_other_than_the_runs, run_config
from nkat_ray.config import STAGE1_DATASET, RunConfig, TrialConfig, field_names
from nkat_ray.data import Dataset
from nkat_ray.data.selection import select_images, training_limits
from nkat_ray.exit_codes import DONE, FAULT
from nkat_ray.files import BEST_FOLDER, CONFIG_FILE, STAGE2_FILE, SUMMARY_FILE, WEIGHTS_FILE, write_atomically
from nkat_ray.metrics import STAGE2_DATASETS, Stage2Scores
from nkat_ray.outputs import data_phrase
from nkat_ray.prepare import Datasets, describe_data, open_datasets
from nkat_ray.report import results, tables
from nkat_ray.report.progress import Progress
from nkat_ray.report.results import number
from nkat_ray.report.terminal import VERDICT_STYLE, Screen
from nkat_ray.search.journal import Journal
from nkat_ray.stage2 import evaluate_survivors, model_survivor

OFFICIAL_FILE = "official.json"
FIRST_SEED = 2_000_000  # of the numbers that seeds follow from; the trials have those from 0 on


def recalculate(config: EvaluateConfig, screen: Screen) -> int:
    """Train, evaluate, print means with their interval and the verdict; exit code 0, or 1 when no dataset counts.

    What was finished by the same command before is not done again.

    Raises:
        ValueError: the target is no run with a winner, or its folder `official` holds another recalculation.
    """
    from nkat_ray.search.cluster import connected, describe_cluster, refuse_infeasible
    from nkat_ray.search.resources import trial_share
    from nkat_ray.search.searcher import trial_seed

    run = official_run(config)
    out = config.out or config.target / "official"
    _refuse_other(out, config)
    run, datasets = open_datasets(run, screen)
    datasets = refuse_other_than_the_runs(config.target, datasets)
    seeds = {number: trial_seed(run.seed, FIRST_SEED + number) for number in range(config.seeds)}
    with connected(run.address, verbose=run.verbose):
        share = trial_share(run.trial, run, describe_cluster())
        refuse_infeasible([share])
        journal = _opened(out, config)
        try:
            winner = _evaluated(config, run, datasets, seeds, share, journal, out, screen)
        except RuntimeError as error:  # of a training; those that are finished are kept
            text = f"error: {error}; the same command goes on from what is finished in {out}"
            Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
            return FAULT
        finally:
            journal.close()
    rows = list(journal.state.tested.values())
    tables.write_stage2(out / STAGE2_FILE, rows)
    scores = {number: results.result_scores(rows, number) for number in seeds}
    found = results.official(rows, list(seeds))
    code = DONE if results.datasets_counted(rows, winner) else FAULT
    document = {
        "run": config.target.absolute(), "config": dataclasses.asdict(run.trial), "lambda_model": run.lambda_model,
        "seeds": list(seeds.values()), "data": describe_data(datasets), **dataclasses.asdict(found),
        "by_seed": [dataclasses.asdict(score) for score in scores.values()], "exit_code": code,
    }  # fmt: skip
    (out / OFFICIAL_FILE).write_text(json.dumps(tables.plain(document), indent=2) + "\n")
    lines = results.notices({"data": document["data"]})
    for line in lines:
        screen.print(f"! {line}", style="bold yellow", markup=False, highlight=False)
    screen.print(_table(rows, scores, found))
    screen.print(found.verdict.sentence, style=VERDICT_STYLE[found.verdict.status], highlight=False)
    screen.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)
    document |= {"stage2": rows, "folder": out.absolute()}
    screen.conclude(document, [*lines, found.verdict.sentence, f"results: {out}"])
    return code


def official_run(config: EvaluateConfig) -> RunConfig:
    """The run's configuration with the winner's design and recipe, this command's flags, and all images.

    Raises:
        ValueError: the target has no winner.
    """
    path = config.target / SUMMARY_FILE
    summary = tables.read_summary(path) if path.exists() else {"winner": None}
    winner = summary.get("winner")
    if not winner:
        raise ValueError(f"target is {str(config.target)!r}; --official needs a finished run with a winner")
    base = run_config(config)
    known = set(field_names(TrialConfig))
    design = {key: _as_tuple(value) for key, value in winner["config"].items() if key in known}
    # The grace period has no meaning here, but must not exceed the epochs.
    design |= {"train_images": config.train_images, "grace": min(base.grace, design["epochs"])}
    return dataclasses.replace(base, **design)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _refuse_other(out: Path, config: EvaluateConfig) -> None:
    """Refuse a folder that holds something else than this recalculation; `free` flags may differ when it goes on."""
    free = {"address", "data_dir", "json", "quiet", "verbose", "out", "target", "cpus_per_trial", "gpus_per_trial"}
    path = out / CONFIG_FILE
    if path.exists():
        saved = json.loads(path.read_text())
        for name, value in tables.plain(dataclasses.asdict(config)).items():
            if name not in free and saved.get(name) != value:
                raise ValueError(
                    f"{name} is {value!r}; {out} holds a recalculation with {saved.get(name)!r}; continue that one, or "
                    "choose another --out"
                )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"out is {str(out)!r}; it holds something else; choose another folder")


def _opened(out: Path, config: EvaluateConfig) -> Journal:
    """The recalculation's journal, in a folder that says what it is."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / CONFIG_FILE).exists():
        (out / CONFIG_FILE).write_text(json.dumps(tables.plain(dataclasses.asdict(config)), indent=2) + "\n")
    journal = Journal(out)
    journal.write("run")
    return journal


def _evaluated(
    config: EvaluateConfig,
    run: RunConfig,
    datasets: Datasets,
    seeds: Mapping[int, int],
    share: Any,
    journal: Journal,
    out: Path,
    screen: Screen,
) -> int:
    """Train what is missing, then Stage 2 on all seeds; the number of the seed that is best on validation."""
    from nkat_ray.retrain import retrained
    from nkat_ray.search.vault import open_vault

    folders = {number: out / "retrained" / f"seed_{number:03d}" for number in seeds}
    missing = {number: seeds[number] for number, folder in folders.items() if not (folder / WEIGHTS_FILE).exists()}
    found = datasets[STAGE1_DATASET]
    assert isinstance(found, Dataset)  # prepare.py refuses a run without it
    progress = Progress(
        name=f"{config.target.name}, official", preset=run.preset, gate=run.gate, data=data_phrase(datasets),
        epochs=run.epochs, console=screen, quiet=screen.quiet,
    )  # fmt: skip
    with progress:
        if missing:
            payload = (config.target / BEST_FOLDER / WEIGHTS_FILE).read_bytes()
            images = select_images(found, training_limits(found, run))
            for number, weights in retrained(payload, found, images, missing, share):
                folders[number].mkdir(parents=True, exist_ok=True)  # an earlier call may have got no further
                write_atomically(folders[number] / WEIGHTS_FILE, weights)
                progress.notice(f"seed {number + 1} of {len(seeds)} is trained: {run.epochs} epochs")
        survivors = [model_survivor(folder, run, share, trial=number) for number, folder in folders.items()]
        return evaluate_survivors(
            survivors, datasets, config=run, vault=open_vault("official"), journal=journal, folder=out,
            progress=progress, notice=lambda _: None,  # that the weights come from disk is how it is meant
        )  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]], scores: Mapping[int, Stage2Scores], found: results.Official) -> Table:
    """A line a seed: test accuracies and aggregates; the mean below, with its interval."""
    table = Table(title="The winner's design, trained anew: test figures", title_justify="left", box=None)
    table.add_column("seed")
    for name in (*(results.DATASET_NAMES[name] for name in STAGE2_DATASETS), "Global TPE", "Consist.", "Robust."):
        table.add_column(name, justify="right", overflow="fold")  # 80 columns
    accuracies = {
        name: [results.of_trial(rows, number).get(name, {}).get("test_accuracy") for number in scores]
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
