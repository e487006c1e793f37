"""What the stopping rules cost and save, replayed over the table of real curves (curves.py).

    OMP_NUM_THREADS=1 python benchmarks/search/replay.py

For each seed the trials of the table come in another order (the same for every rule); `--search` has GatedOptunaSearch
propose half of them instead. Four slots; an epoch takes the time that it took. The gate is at a percentile of the
table's final scores. False stops are those of the projection among the trials that would have passed the gate and that
ASHA did not stop.
"""

import argparse
from pathlib import Path

import numpy as np
from curves import SPACE, TABLE, load
from simulator import Curve, InOrder, Outcome, Rules, by_searcher, curves_of, mean_interval, simulate

SLOTS = 4
COLUMNS = (
    "epochs", "to the first survivor", "to the best final score", "best final score", "survivors",
    "stopped by the projection", "false stops",
)  # fmt: skip


def rules_of(gate: float, grace: int) -> dict[str, Rules]:
    """The rules by name; the gate alone never ends a trial before its last epoch."""
    return {
        "none": Rules(grace=grace),
        "ASHA": Rules(asha=True, grace=grace),
        "gate": Rules(gate=gate, grace=grace),
        "gate + projection": Rules(gate=gate, projection=True, grace=grace),
        "ASHA + gate": Rules(asha=True, gate=gate, grace=grace),
        "ASHA + gate + projection": Rules(asha=True, gate=gate, projection=True, grace=grace),
    }


def run(table: list[Curve], rules: Rules, seed: int, gate: float, *, search: bool) -> Outcome:
    if not search:
        order = np.random.default_rng(seed).permutation(len(table)).tolist()
        return simulate(table, rules, InOrder(order), slots=SLOTS)
    with by_searcher(table, SPACE, trials=len(table) // 2, seed=seed, gate=gate) as source:
        return simulate(table, rules, source, slots=SLOTS)


def false_stops(table: list[Curve], outcome: Outcome, gate: float) -> tuple[int, int]:
    """Trials that the projection stopped though they would have passed, and all that would have passed."""
    would = {row for row, (reason, _) in outcome.ends.items() if table[row].best >= gate and reason != "asha"}
    return len(would & outcome.projected), len(would)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--grace", type=int, default=1)
    parser.add_argument("--search", action="store_true", help="GatedOptunaSearch proposes, not a random order")
    arguments = parser.parse_args()
    table = curves_of(load(arguments.table), SPACE)
    finals = [curve.best for curve in table]
    print(f"{len(table)} curves of {len(table[0].scores)} epochs; final scores {min(finals):.3f} to {max(finals):.3f}")
    for percentile in (50, 80):
        gate = float(np.percentile(finals, percentile))
        print(f"\ngate at the {percentile}th percentile: {gate:.4f}\n")
        print("| " + " | ".join(("rules", *COLUMNS)) + " |\n" + "|---" * (1 + len(COLUMNS)) + "|")
        for name, rules in rules_of(gate, arguments.grace).items():
            outcomes = [run(table, rules, seed, gate, search=arguments.search) for seed in range(arguments.seeds)]
            print(f"| {name} | " + " | ".join(cells(table, outcomes, gate, projecting=rules.projection)) + " |")


def cells(table: list[Curve], outcomes: list[Outcome], gate: float, *, projecting: bool) -> list[str]:
    best, best_half, error = mean_interval([outcome.best for outcome in outcomes])
    passed = [sum(max(table[r].scores[:e]) >= gate for r, (_, e) in o.ends.items()) for o in outcomes]
    wrong, would = np.sum([false_stops(table, outcome, gate) for outcome in outcomes], axis=0)
    return [
        whole([outcome.epochs for outcome in outcomes]),
        whole([outcome.epochs_until(gate) for outcome in outcomes]),
        whole([outcome.epochs_until(outcome.best) for outcome in outcomes]),
        f"{best:.4f} +- {best_half:.4f} (s.e. {error:.4f})",
        f"{np.mean(passed):.1f}",
        f"{np.mean([len(outcome.projected) for outcome in outcomes]):.1f}" if projecting else "",
        f"{wrong} of {would} ({100 * wrong / would:.1f} %)" if projecting and would else "",
    ]


def whole(epochs: list[int | None]) -> str:
    known = [float(number) for number in epochs if number is not None]
    mean, half, _ = mean_interval(known)
    return f"{mean:.0f} +- {half:.0f}" + (f" ({len(known)} of {len(epochs)})" if len(known) < len(epochs) else "")


if __name__ == "__main__":
    main()
