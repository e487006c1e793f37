r"""Does Stage 1's score foretell Stage 2's, and does the gate pay? From the tables of a run that let every trial pass.

Rank correlation between the best Local TPE on CIFAR-10 and the Global TPE over the four datasets (validation, which is
what the ranking reads, and test), with a 95 % interval: Kendall's and Spearman's coefficient, bootstrap over the trials
(BCa). Then the gate, set at percentiles of the run's own Local TPEs: how many epochs until the first trial has passed,
over random orders of the same trials; how much of Stage 2's time it saves; what best Global TPE is left.

    python tune_round2.py --space benchmarks/small.toml --scheduler none --gate 0.001 --num_samples 14 --epochs 6 \
        --warmup 1 --train_images 10000 --val_images 2000 --transfer_epochs 2 --transfer_images 5000 \
        --test_images 2000 --name proxy
    python benchmarks/proxy.py runs/proxy
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from nkat_ray.files import STAGE2_FILE, TRIALS_FILE
from nkat_ray.report import results, tables

ORDERS = 2000  # random orders of the trials
PERCENTILES = (50, 80)


@dataclass(frozen=True)
class Args:
    """Which run."""

    run: tyro.conf.Positional[Path]
    """Folder of a run in which every trial passed the gate."""
    seed: int = 0
    """Seed of bootstrap and orders."""


def main(args: Args) -> None:
    trials = [row for row in tables.read_trials(args.run / TRIALS_FILE) if row["passed_gate"]]
    rows = tables.read_stage2(args.run / STAGE2_FILE)
    local = np.array([row["best_local_tpe"] for row in trials])
    val = np.array([results.validation_scores(rows, row["trial"]).global_tpe for row in trials])
    test = np.array([results.result_scores(rows, row["trial"]).global_tpe for row in trials])
    seconds = np.array([sum(r["seconds"] for r in rows if r["trial"] == row["trial"]) for row in trials])
    epochs = np.array([row["epochs"] for row in trials])
    console = Console(width=120)
    console.print(
        f"{args.run}: n = {len(trials)} trials; Local TPE {low_high(local)}, Global TPE (test) {low_high(test)}"
    )
    console.print(correlations({"validation": val, "test": test}, local, args.seed))
    console.print(gates(local, val, seconds, epochs, args.seed))


def correlations(scores: dict[str, Any], local: Any, seed: int) -> Table:
    table = Table(
        "Global TPE on", "Spearman", "95 % interval", "Kendall", "95 % interval ", title="Local against Global TPE"
    )
    for name, score in scores.items():
        cells = [name]
        for coefficient in (stats.spearmanr, stats.kendalltau):
            found = stats.bootstrap(
                (local, score), lambda a, b, f=coefficient: f(a, b).statistic, paired=True, vectorized=False,
                rng=np.random.default_rng(seed),
            ).confidence_interval  # fmt: skip
            cells += [f"{coefficient(local, score).statistic:.2f}", f"{found.low:.2f} to {found.high:.2f}"]
        table.add_row(*cells)
    return table


def gates(local: Any, val: Any, seconds: Any, epochs: Any, seed: int) -> Table:
    """One trial at a time, in a random order; a trial that passes is known as a survivor at its last epoch."""
    table = Table(
        "gate at percentile", "Local TPE", "survivors", "epochs to the first",
        "epochs to the best that is found",
        "Stage 2 seconds to it", "Stage 2 time", "best Global TPE (validation)",
        title="What the gate saves: mean, and the middle 95 % of the orders",
    )  # fmt: skip
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(local)) for _ in range(ORDERS)]
    for percentile in (None, *PERCENTILES):
        gate = -math.inf if percentile is None else float(np.percentile(local, percentile))
        passed = local >= gate
        first = [epochs[order][: int(np.argmax(passed[order])) + 1].sum() for order in orders]
        best = int(np.argmax(np.where(passed, val, -math.inf)))
        until = [list(order).index(best) + 1 for order in orders]
        spent = [seconds[order[:n]][passed[order[:n]]].sum() for order, n in zip(orders, until, strict=True)]
        trained = [epochs[order[:n]].sum() for order, n in zip(orders, until, strict=True)]
        table.add_row(
            "none" if percentile is None else str(percentile), "-" if percentile is None else f"{gate:.3f}",
            f"{passed.sum()} of {len(local)}", interval(first),
            interval(trained), interval(spent),
            f"{seconds[passed].sum() / seconds.sum():.0%}", f"{val[best]:.4f}",
        )  # fmt: skip
    return table


def low_high(values: Any) -> str:
    return f"{values.min():.3f} to {values.max():.3f}"


def interval(values: Any) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f"{np.mean(values):.1f} ({low:.0f} to {high:.0f})"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
