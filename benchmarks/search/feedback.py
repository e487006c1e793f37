"""Does a search that learns Global TPE (`--feedback global`) find a better one than a search that learns Local TPE?

A table of trials whose Stage 2 is known is recorded once, at random, with nothing stopped early:

    python tune_round2.py --preset quick --sampler random --scheduler none --num_samples 60 --gate 0.01 --seed 7 \
        --name table
    python benchmarks/search/feedback.py --run runs/table --table benchmarks/search/feedback.parquet

Then the product's sampler searches it: each proposal is answered by the nearest trial that it has not had. Both ways
validate the same survivors, so that they take the same seconds for the same number of trials. For each seed: the
highest validation Global TPE among the trials so far that passed the gate.

    python benchmarks/search/feedback.py
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from optuna.trial import TrialState, create_trial
from rich.console import Console
from rich.table import Table
from scipy import stats
from simulator import mean_interval

from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record.journal import read_state
from nkat_ray.search.sampler import make_sampler
from nkat_ray.space import SPACES, Span, distribution

SPACE = SPACES["quick"]
DISTRIBUTIONS = {name: distribution(domain) for name, domain in SPACE.items()}
COUNTS = (6, 12, 20, 30)  # trials after which the best is compared
WAYS = ("local", "global", "random")


@dataclass(frozen=True)
class Known:
    """A recorded trial: its parameters, Local TPE, and Global TPE on the validation images."""

    params: dict[str, Any]
    local: float
    whole: float


def recorded(run_folder: Path) -> list[dict[str, Any]]:
    """Read the trials of a run that have all four validations; the run may still be in progress."""
    state, rows = read_state(run_folder), []
    for trial, record in sorted(state.trials.items()):
        scores = [row["val_tpe"] for (number, _), row in state.stage2.items() if number == trial]
        if len(scores) == len(STAGE2_DATASETS) and None not in scores:
            params = {name: record.params[name] for name in SPACE}
            rows.append({"trial": trial, **params, "local": record.best_score, "global": float(np.mean(scores))})
    return rows


def coordinates(params: dict[str, Any]) -> NDArray[np.float64]:
    """Return the parameters as fractions of their ranges."""
    values = []
    for name, domain in SPACE.items():
        assert isinstance(domain, Span)
        low, high, value = domain.low, domain.high, params[name]
        if domain.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        values.append((value - low) / (high - low))
    return np.array(values)


def search(table: Sequence[Known], way: str, gate: float, seed: int) -> list[float]:
    """Search the table; return the best Global TPE of the trials that passed, after each trial (0 before the first)."""
    sampler = make_sampler("random" if way == "random" else "tpe", seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    places, left = np.array([coordinates(known.params) for known in table]), list(range(len(table)))
    best, course = 0.0, []
    while left and len(course) < max(COUNTS):
        asked = study.ask(fixed_distributions=DISTRIBUTIONS)
        distances = np.linalg.norm(places[left] - coordinates(asked.params), axis=1)
        known = table[left.pop(int(distances.argmin()))]
        study.tell(asked, state=TrialState.FAIL)  # the sampler ignores it; it learns from the trial that answers
        passed = known.local >= gate
        study.add_trial(
            create_trial(
                params=known.params, distributions=DISTRIBUTIONS, constraints={"gate": gate - known.local},
                value=known.whole if way == "global" and passed else known.local,
            )
        )  # fmt: skip
        best = max(best, known.whole if passed else 0.0)
        course.append(best)
    return course


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="write the table from this run, then stop")
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("feedback.parquet"))
    parser.add_argument("--seeds", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.run is not None:
        pq.write_table(pa.Table.from_pylist(recorded(arguments.run)), arguments.table, compression="zstd")
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = pq.read_table(arguments.table).to_pylist()
    table = [Known({name: row[name] for name in SPACE}, row["local"], row["global"]) for row in rows]
    local, whole = np.array([known.local for known in table]), np.array([known.whole for known in table])
    console = Console(width=120)
    console.print(
        f"{len(table)} trials; Spearman between Local and Global TPE {stats.spearmanr(local, whole).statistic:.2f}; "
        f"highest Global TPE {whole.max():.4f}"
    )
    for percentile in (0, 50):
        gate = float(np.percentile(local, percentile))
        shown = Table("trials", *WAYS, "global - local", title=f"gate at {gate:.3f} (percentile {percentile})")
        courses = {way: np.array([search(table, way, gate, seed) for seed in range(arguments.seeds)]) for way in WAYS}
        for count in (count for count in COUNTS if count <= len(table)):
            found = {way: course[:, count - 1] for way, course in courses.items()}
            mean, half, _ = mean_interval((found["global"] - found["local"]).tolist())
            gain = f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"
            shown.add_row(str(count), *(f"{found[way].mean():.4f}" for way in WAYS), gain)
        console.print(shown)


if __name__ == "__main__":
    main()
