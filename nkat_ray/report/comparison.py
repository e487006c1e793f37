"""Several runs side by side: the page of `nkat report A B`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.report import charts, results, tables
from nkat_ray.report.page import VERDICT_CLASS, Page, cell, escaped, table
from nkat_ray.report.results import duration, number
from nkat_ray.report.run_folder import Run, load_run


def compare(*run_folders: Path, out: Path) -> Path:
    """Write one page that sets several runs side by side and return its path.

    Raises:
        ValueError: fewer than two folders, or one that holds no run.
    """
    if len(run_folders) < 2:
        raise ValueError(f"compare needs at least two runs, {len(run_folders)} given")
    return compare_page([load_run(folder) for folder in run_folders]).save(out)


def compare_page(runs: Sequence[Run]) -> Page:
    """Several runs side by side."""
    named = _distinct(runs)
    page = Page("NKAT-Ray: " + " against ".join(named))
    page.add(f"<h1>NKAT-Ray: {len(runs)} runs compared</h1>")
    best = _best_run(named)
    page.add(f'<p class="verdict">{escaped(best)}</p>')
    for name, run in named.items():
        for notice in results.notices(run.known):
            page.add(f'<p class="notice">{escaped(name)}: {escaped(notice)}</p>')
    page.section("Against the targets", _run_table(named))
    figure = charts.runs_bars({name: _winner_rows(run) for name, run in named.items()})
    page.section("Datasets", page.chart(figure, "Test accuracy of each run's winner on the four datasets"))
    figure = charts.best_so_far({name: run.trials for name, run in named.items()})
    page.section("The search", page.chart(figure, "Best Local TPE by number of trials"), _reason_table(named))
    page.section("Winners' configurations", _config_table(named))
    return page


def _distinct(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by name; where names repeat, by folder."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.folder): run for run in runs}


def _winner_rows(run: Run) -> dict[str, Mapping[str, Any]]:
    return {} if run.winner is None else results.of_trial(run.stage2, run.winner)


def _best_run(named: Mapping[str, Run]) -> str:
    """One sentence: the run with the best Global TPE among those that count on all four, by validation."""
    scored = {
        name: results.validation_scores(run.stage2, run.winner).global_tpe
        for name, run in named.items()
        if run.winner is not None and results.datasets_counted(run.stage2, run.winner) == len(STAGE2_DATASETS)
    }
    if not scored:
        return "No run has a winner that counts on all four datasets."
    best = max(scored, key=lambda name: scored[name])
    return f"{best} has the highest Global TPE on validation ({scored[best]:.3f})."


def _run_table(named: Mapping[str, Run]) -> str:
    header = ["run", "preset", "gate", "trials", "survivors", "winner", "datasets"]
    header += [*results.METRIC_NAMES.values(), "time", "verdict"]
    rows = []
    for name, run in named.items():
        verdict = results.verdict_of(run.known, run.stage2)
        wall = run.summary.get("wall_s")
        known = run.winner is not None
        rows.append(
            [
                escaped(name),
                escaped(run.config.get("preset", run.summary.get("preset", "-"))),
                f"{run.gate:.2f}",
                str(len(run.trials)),
                str(sum(bool(row.get("passed_gate")) for row in run.trials)),
                str(run.winner) if known else "-",
                f"{results.datasets_counted(run.stage2, run.winner)} of {len(STAGE2_DATASETS)}",
                *(number(line.now if known else None) for line in results.scorecard(run.stage2, run.winner)),
                "-" if wall is None else duration(wall),
                f'<span class="{VERDICT_CLASS[verdict.status]}">{verdict.status}</span>',
            ]
        )
    return table(header, rows, numeric=tuple(range(2, 11)))


def _reason_table(named: Mapping[str, Run]) -> str:
    rows = []
    for name, run in named.items():
        counts = results.stop_counts(run.trials)
        ends = [str(counts.get(kind, 0)) for kind in tables.STOP_REASONS]
        rows.append([escaped(name), *ends, str(results.epochs_of(run.trials))])
    numeric = tuple(range(1, len(tables.STOP_REASONS) + 2))
    return table(["run", *tables.STOP_REASONS, "epochs"], rows, numeric=numeric)


def _config_table(named: Mapping[str, Run]) -> str:
    """The fields in which the winners or the runs' configurations differ."""
    configs = {
        name: dict(run.config) | (dict(run.summary["winner"]["config"]) if run.winner is not None else {})
        for name, run in named.items()
    }
    keys = [key for key in next(iter(configs.values()), {}) if len({str(c.get(key)) for c in configs.values()}) > 1]
    rows = [[escaped(key), *(cell(config.get(key)) for config in configs.values())] for key in keys if key != "name"]
    return table(["field", *named], rows) if rows else "<p>They do not differ.</p>"
