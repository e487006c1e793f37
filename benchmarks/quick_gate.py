"""Test whether the gate of the preset `quick` separates trials: Stage 1 over several seeds, one line per seed.

python benchmarks/quick_gate.py --seeds 0 1 2 3 4 5 6 7 8 9
"""

import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from nkat_ray.cluster.connect import connected, describe_cluster
from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data import Dataset
from nkat_ray.data.selection import select_images, training_limits
from nkat_ray.data.suite import open_datasets
from nkat_ray.record.journal import Journal
from nkat_ray.record.observer import Observer
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.search.stage1 import Stage1
from nkat_ray.search.trainable import Stage1Data
from nkat_ray.search.vault import open_vault
from nkat_ray.space import space_of


@dataclass(frozen=True, kw_only=True)
class Args:
    """Set the seeds to try."""

    seeds: tuple[int, ...] = tuple(range(10))
    """Seeds of the runs."""


def main(args: Args) -> None:
    console = Console(highlight=False)
    run = RunConfig.from_preset("quick", datasets=(STAGE1_DATASET,))
    run, datasets = open_datasets(run, console)
    found = datasets[STAGE1_DATASET]
    assert isinstance(found, Dataset)
    images = select_images(found, training_limits(found, run))
    data = Stage1Data(name=found.name, selection=images, num_classes=found.classes, grey=found.grey, flip=found.flip)
    console.print(f"{found.source}; gate {run.gate}")
    console.print(
        "| seed | trials | passed | best Local TPE | worst Local TPE | all, by number | stop reasons | seconds |"
    )
    with connected(run.address), tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            print_line(seed, data, Path(scratch), console)


def print_line(seed: int, data: Stage1Data, scratch: Path, console: Console) -> None:
    run = RunConfig.from_preset("quick", seed=seed, name=f"seed-{seed}", datasets=(STAGE1_DATASET,))
    folder, clock = scratch / str(run.name), time.monotonic()
    folder.mkdir()
    journal = Journal(folder)
    journal.write("run")
    context = Run(
        config=run, domains=space_of(run).domains, datasets={}, storage=RunStorage(folder, None), journal=journal
    )
    vault = open_vault(str(run.name))
    Stage1(context, data, cluster=describe_cluster(), vault=vault, observer=Observer()).run()
    records = [record for _, record in sorted(journal.state.trials.items())]
    scores = [row["local_tpe"] if (row := record.best_row()) else float("nan") for record in records]
    reasons = Counter(str(record.stop_reason) for record in records)
    cells = [
        seed, len(records), len(journal.state.survivors(run.gate)), f"{max(scores):.3f}", f"{min(scores):.3f}",
        ", ".join(f"{score:.3f}" for score in scores), ", ".join(f"{r} {n}" for r, n in sorted(reasons.items())),
        f"{time.monotonic() - clock:.0f}",
    ]  # fmt: skip
    console.print("| " + " | ".join(map(str, cells)) + " |", soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
