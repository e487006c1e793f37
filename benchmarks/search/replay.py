"""Replay the stopping rules over the table of real curves (curves.py) and print how many seconds each needs.

    OMP_NUM_THREADS=1 python benchmarks/search/replay.py
    OMP_NUM_THREADS=1 python benchmarks/search/replay.py --seconds recorded
    OMP_NUM_THREADS=1 python benchmarks/search/replay.py --search --seeds 5

For each seed the trials of the table come in another order (the same for every rule); `--search` has GatedOptunaSearch
propose half of them instead. Times are simulated seconds on four slots. `--seconds quiet` takes for an epoch what it
takes on a quiet machine (the shortest recorded epoch of any curve with the same structure), `recorded` what it took.
A survivor is a trial that reaches the gate, a percentile of the table's final scores; lost are those survivors that
would have been found without any rule. A ratio compares a rule with ASHA order by order (geometric mean, 95 % interval)
over the orders in which both got there.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from curves import RECORDINGS, Recording, load
from simulator import (
    Curve,
    InOrder,
    OneEpochThenBest,
    OptunaHalving,
    Outcome,
    PromotingASHA,
    RayASHA,
    Rule,
    by_searcher,
    curves_of,
    mean_interval,
    on_quiet_machine,
    simulate,
)

from nkat_ray.cost import epoch_flops
from nkat_ray.space import Domain

SLOTS, CLOSE, BEST = 4, 0.001, 10
COLUMNS = (
    "rule", "epochs", "seconds in all", "to the first survivor", f"to within {CLOSE} of the best", "survivors lost",
    "in all / ASHA", "first survivor / ASHA", "best / ASHA",
)  # fmt: skip
BASELINE = "ASHA"

Order = Callable[[Sequence[int]], list[int]]


class Candidate(NamedTuple):
    """A rule, the order in which it takes the proposals, and what a resumed trial costs."""

    rule: Callable[[], Rule]
    order: Order = list
    gate: bool = False
    resume_epochs: float = 0.0


def candidates(recording: Recording, table: list[Curve], grace: int) -> dict[str, Candidate]:
    """Return what is compared, by name."""
    epochs = len(table[0].scores)

    def asha() -> Rule:
        return RayASHA(epochs=epochs, grace=grace)

    def promoting() -> Rule:
        return PromotingASHA(epochs=epochs, grace=grace)

    seconds = [curve.seconds[0] for curve in table]
    flops = [epoch_flops(recording.config_of(curve.params), recording.fixed["train_images"]) for curve in table]
    return {
        "none": Candidate(Rule),
        BASELINE: Candidate(asha),
        "ASHA + gate": Candidate(asha, gate=True),
        "Optuna's SuccessiveHalvingPruner": Candidate(lambda: OptunaHalving(grace=grace)),
        f"one epoch, then the best {BEST}": Candidate(lambda: OneEpochThenBest(BEST)),
        "ASHA that promotes": Candidate(promoting),
        "ASHA that promotes, a resume costs an epoch": Candidate(promoting, resume_epochs=1.0),
        "ASHA, cheapest first": Candidate(asha, cheapest_first(seconds)),
        "ASHA, fewest FLOPs first": Candidate(asha, cheapest_first(flops)),
        "ASHA, the cheaper of two": Candidate(asha, cheaper_of_two(seconds)),
        "ASHA that promotes, cheapest first": Candidate(promoting, cheapest_first(seconds)),
    }


def cheapest_first(costs: Sequence[float]) -> Order:
    """Return the order of ascending cost; what costs the same stays in the given order."""
    return lambda rows: sorted(rows, key=lambda row: costs[row])


def cheaper_of_two(costs: Sequence[float]) -> Order:
    """Return the order in which the cheaper of two proposals comes first; the other one meets the next proposal."""

    def ordered(rows: Sequence[int]) -> list[int]:
        held, taken = rows[0], []
        for row in rows[1:]:
            taken.append(min(held, row, key=lambda one: costs[one]))
            held = max(row, held, key=lambda one: costs[one])
        return [*taken, held]

    return ordered


def run(
    table: list[Curve], candidate: Candidate, seed: int, gate: float, *, space: Mapping[str, Domain] | None
) -> Outcome:
    """Simulate one search; with a space, GatedOptunaSearch proposes half of the curves."""
    judged = gate if candidate.gate else None
    rule, resume_epochs = candidate.rule(), candidate.resume_epochs
    if space is not None:
        with by_searcher(table, space, trials=len(table) // 2, seed=seed, gate=gate) as source:
            return simulate(table, rule, source, slots=SLOTS, gate=judged, resume_epochs=resume_epochs)
    order = candidate.order(np.random.default_rng(seed).permutation(len(table)).tolist())
    return simulate(table, rule, InOrder(order), slots=SLOTS, gate=judged, resume_epochs=resume_epochs)


class Times(NamedTuple):
    """What one simulated search needed, in seconds; None where it did not get there."""

    in_all: float
    first_survivor: float | None
    best: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", choices=RECORDINGS, nargs="?", default="small")
    parser.add_argument("--table", type=Path, help="default: the recording's own")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--grace", type=int, default=1)
    parser.add_argument("--seconds", choices=("quiet", "recorded"), default="quiet")
    parser.add_argument("--search", action="store_true", help="GatedOptunaSearch proposes, not a random order")
    arguments = parser.parse_args()
    recording = RECORDINGS[arguments.recording]
    rows = load(arguments.table or recording.table)
    if not rows:
        raise SystemExit(f"no curve is recorded: run benchmarks/search/curves.py {arguments.recording} first")
    table = curves_of(rows, recording.space)
    if arguments.seconds == "quiet":
        table = on_quiet_machine(table, recording.structure)
    finals = [curve.best for curve in table]
    print(f"{len(table)} curves of {len(table[0].scores)} epochs; final scores {min(finals):.3f} to {max(finals):.3f}")
    for percentile in (50, 80):
        gate = float(np.percentile(finals, percentile))
        print(f"\ngate at the {percentile}th percentile: {gate:.4f}; {arguments.seconds} seconds\n")
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
        compare(recording, table, gate, arguments)


def compare(recording: Recording, table: list[Curve], gate: float, arguments: argparse.Namespace) -> None:
    """Print one row per candidate."""
    found: list[set[int]] = []  # survivors per seed without a rule
    baseline: list[Times] = []
    rows: dict[str, str] = {}
    for name, candidate in candidates(recording, table, arguments.grace).items():
        if arguments.search and candidate.order is not list:
            continue  # the searcher has an order of its own
        space = recording.space if arguments.search else None
        outcomes = [run(table, candidate, seed, gate, space=space) for seed in range(arguments.seeds)]
        times = [times_of(outcome, gate, max(curve.best for curve in table)) for outcome in outcomes]
        survivors = [outcome.reached(gate) for outcome in outcomes]
        found = found or survivors
        baseline = times if name == BASELINE else baseline
        lost = [float(len(all_of_them - kept)) for all_of_them, kept in zip(found, survivors, strict=True)]
        cells = [
            interval([float(outcome.epochs) for outcome in outcomes]),
            *(interval([one[column] for one in times]) for column in range(3)),
            interval(lost),
        ]
        if baseline and name != BASELINE:
            cells += [ratio([(a[c], b[c]) for a, b in zip(times, baseline, strict=True)]) for c in range(3)]
        rows[name] = f"| {name} | " + " | ".join(cells) + " |" + " |" * (len(COLUMNS) - 1 - len(cells))
    print("\n".join(rows.values()))


def times_of(outcome: Outcome, gate: float, best: float) -> Times:
    return Times(outcome.seconds, outcome.seconds_until(gate), outcome.seconds_until(best - CLOSE))


def interval(values: Sequence[float | None]) -> str:
    """Write a mean with its 95 % interval, and how many values there are if some are missing."""
    known = [value for value in values if value is not None]
    count = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    if len(known) < 2:
        return f"-{count}"
    mean, half, _ = mean_interval(known)
    digits = 1 if mean < 100 else 0
    return f"{mean:.{digits}f} ± {half:.{digits}f}{count}"


def ratio(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """Write the geometric mean of a / b with its 95 % interval, over the pairs that are complete."""
    logs = [float(np.log(a / b)) for a, b in pairs if a is not None and b is not None]
    if len(logs) < 2:
        return "-"
    mean, half, _ = mean_interval(logs)
    count = f" ({len(logs)} of {len(pairs)})" if len(logs) < len(pairs) else ""
    return f"{np.exp(mean):.2f} ({np.exp(mean - half):.2f} to {np.exp(mean + half):.2f}){count}"


if __name__ == "__main__":
    main()
