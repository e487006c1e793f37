r"""Measure how much the winner's score depends on the seed, from the folders of runs that differ in the seed alone.

for seed in 0 1 2 3 4; do python tune_round2.py --preset quick --seed $seed --name seed-$seed; done
python benchmarks/seeds.py runs/seed-0 runs/seed-1 runs/seed-2 runs/seed-3 runs/seed-4
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from nkat_ray.record import scoring
from nkat_ray.record.run_folder import RecordedRun, load_run

FIGURES = ("Local TPE", "Global TPE, validation", "Global TPE, test", "Consistency, test")


@dataclass(frozen=True)
class Args:
    """Name the runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished runs with a winner."""


def main(args: Args) -> None:
    runs = [load_run(folder) for folder in args.runs]
    table = Table("seed", "survivors", "winner", *FIGURES, "95 % interval of test", title=f"n = {len(runs)} searches")
    for run in runs:
        low, high = scoring.global_interval(run.stage2, run.winner or 0) or (float("nan"),) * 2
        shown = [f"{value:.3f}" for value in figures(run)]
        survivors = f"{len(run.summary['survivors'])} of {len(run.trials)}"
        table.add_row(str(run.summary["seed"]), survivors, winner(run), *shown, f"{low:.3f} to {high:.3f}")
    table.add_section()
    columns = list(zip(*map(figures, runs), strict=True))
    table.add_row("mean", "", "", *(f"{statistics.fmean(values):.3f}" for values in columns))
    table.add_row("standard deviation", "", "", *(f"{statistics.stdev(values):.3f}" for values in columns))
    table.add_row("95 % interval of the mean", "", "", *map(interval, columns))
    Console(width=150).print(table)


def figures(run: RecordedRun) -> tuple[float, ...]:
    """Return the winner's scores in the order of `FIGURES`."""
    assert run.winner is not None, f"{run.folder} has no winner"
    row = next(row for row in run.trials if row["trial"] == run.winner)
    validation, test = (score(run.stage2, run.winner) for score in (scoring.validation_scores, scoring.result_scores))
    return row["best_local_tpe"], validation.global_tpe, test.global_tpe, test.consistency


def winner(run: RecordedRun) -> str:
    config: dict[str, Any] = run.summary["winner"]["config"]
    return f"{config['conv_stem'] or 'off'}, {config['embed_dim']} x {config['depth']}, lr {config['lr']:.2g}"


def interval(values: tuple[float, ...]) -> str:
    """Format the 95 % interval of the mean by Student's t."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values) - half:.3f} to {statistics.fmean(values) + half:.3f}"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
