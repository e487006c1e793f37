"""Several runs side by side: the page of `nkat report A B`."""

from collections.abc import Mapping, Sequence
from typing import Any

from nkat_ray.config import RunConfig, TrialConfig, field_names
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record import scoring
from nkat_ray.record.run_folder import RecordedRun
from nkat_ray.record.tables import STOP_REASONS
from nkat_ray.report import charts
from nkat_ray.report.page import Page

NOT_COMPARED = ("name", "storage_path", "resume", "dry_run", "verbose", "quiet", "json", "own_space")


def compare_page(runs: Sequence[RecordedRun]) -> Page:
    """Return the page that sets runs side by side."""
    named = distinct_names(runs)
    datasets = list(dict.fromkeys([*STAGE2_DATASETS, *(name for run in runs for name in run.datasets)]))
    datasets = [name for name in datasets if any(name in run.datasets for run in runs)]
    rows = {name: scoring.rows_by_dataset(run.stage2, run.winner) for name, run in named.items()}
    return Page(
        "comparison.html",
        {"datasets": charts.dataset_bars(rows, datasets, score="test_accuracy"), "search": charts.best_so_far(named)},
        {
            "title": "NKAT-Ray: " + " against ".join(named),
            "runs": named,
            "headline": headline(named),
            "notices": {name: scoring.notices(run.summary) for name, run in named.items()},
            "cards": {name: scoring.scorecard(run.stage2, run.winner) for name, run in named.items()},
            "counted": {name: scoring.datasets_counted(run.stage2, run.winner) for name, run in named.items()},
            "ends": {name: scoring.stop_counts(run.trials) for name, run in named.items()},
            "epochs": {name: scoring.epochs_of(run.trials) for name, run in named.items()},
            "reasons": STOP_REASONS,
            "differences": differences(named),
        },
    )


def distinct_names(runs: Sequence[RecordedRun]) -> dict[str, RecordedRun]:
    """Return runs by name; those whose names repeat, by folder."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.folder): run for run in runs}


def headline(named: Mapping[str, RecordedRun]) -> str:
    """Return one sentence on the table's test figures: which run is ahead, and whether the intervals overlap."""
    found = []
    for name, run in named.items():
        interval = None if run.winner is None else scoring.global_interval(run.stage2, run.winner)
        if interval is not None and scoring.datasets_counted(run.stage2, run.winner) == len(STAGE2_DATASETS):
            found.append((scoring.result_scores(run.stage2, run.winner or 0).global_tpe, *interval, name))
    found.sort(reverse=True)
    if not found:
        return "No run has a winner that counts on all four datasets."
    best, low, high, name = found[0]
    said = f"{name} has the highest Global TPE on test: {best:.3f} (95 % interval {low:.3f} to {high:.3f})"
    if len(found) == 1:
        return f"{said}, the only one that counts on all four datasets."
    near = [other for _, _, top, other in found[1:] if top >= low]
    apart = f"; its interval overlaps that of {', '.join(near)}." if near else "; its interval overlaps no other."
    return said + apart


def differences(named: Mapping[str, RecordedRun]) -> dict[str, list[Any]]:
    """Return the settings in which the runs, or the trials that won them, differ: a value per run."""
    trial = field_names(TrialConfig)
    configs = {
        name: {**run.config, **(run.summary["winner"]["config"] if run.winner is not None else {})}
        for name, run in named.items()
    }
    keys = [*trial, *(key for key in field_names(RunConfig) if key not in (*trial, *NOT_COMPARED))]
    rows = {key: [_listed(config.get(key)) for config in configs.values()] for key in keys}
    return {key: values for key, values in rows.items() if len({str(value) for value in values}) > 1}


def _listed(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
