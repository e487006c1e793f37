"""How much of the slots' time goes into training, and what does it cost to start a trial?

First 50 simulated trials of 2 to 20 seconds on 8 slots, through Stage 1 itself: searcher, journal, gate, ASHA, Tune and
its processes are the real ones, and a trial sleeps instead of computing, so that eight fit on any machine. Then real
trials of a tiny network, one at a time, each in the worker process of the one before.

    python benchmarks/packing.py
"""

import math
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tyro
from rich.console import Console
from rich.table import Table

from nkat_ray.config import RunConfig
from nkat_ray.search import tuner
from nkat_ray.search.callbacks import Listeners
from nkat_ray.search.cluster import describe_cluster
from nkat_ray.search.journal import Journal, RunState
from nkat_ray.search.rows import start_seconds, training_share
from nkat_ray.search.vault import open_vault

EPOCHS = 4


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is run."""

    trials: int = 50
    """Simulated trials."""
    slots: int = 8
    """Slots for them."""
    real_trials: int = 12
    """Real trials, one at a time; 0 leaves that part out."""
    cores_for_all: bool = True
    """Start the slots' processes as Ray does where each slot has a core of its own, all at once; with
    `--no-cores_for_all` as many at once as this machine has cores."""
    seed: int = 0
    """Seed of the run, hence of the trials' lengths."""


def main(args: Args) -> None:
    if args.cores_for_all:  # Ray starts as many processes at once as the machine has cores, whatever num_cpus says
        os.environ["RAY_worker_maximum_startup_concurrency"] = str(args.slots)  # noqa: SIM112
    ray.init(address="local", num_cpus=args.slots, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    table = Table(
        "what", "trials", "slots", "training_share", "start of a trial, s: first", "of the others: median", "largest"
    )
    run = RunConfig(
        preset="quick", name="packing", num_samples=args.trials, max_concurrent=args.slots, epochs=EPOCHS,
        grace=EPOCHS, gate=0.001, warmup=0, seed=args.seed,
    )  # fmt: skip
    real, tuner.train_trial = tuner.train_trial, simulated_trial
    table.add_row("simulated, 2 to 20 s", *described(stage1(run, None), args.slots))
    tuner.train_trial = real
    if args.real_trials:
        tiny = dict(embed_dim=16, num_heads=2, depth=1, batch_size=32, randaugment=None, cutout=None)
        run = RunConfig(**{**vars(run), **tiny, "num_samples": args.real_trials, "max_concurrent": 1, "val_images": 40})
        table.add_row("real, tiny network", *described(stage1(run, noise()), 1))
    Console(width=120).print(table)


def simulated_trial(params: Mapping[str, Any], *, run: RunConfig, **_: Any) -> None:
    """As `train_trial` seen from outside: an epoch takes its time and is reported with a checkpoint."""
    import tempfile
    import time

    import numpy as np
    from ray import tune

    length_s = np.random.default_rng(params["seed"]).uniform(2, 20)
    for epoch in range(1, run.epochs + 1):
        started_s = time.time()
        time.sleep(length_s / run.epochs)
        row = {"epoch": epoch, "train_loss": 1.0, "val_accuracy": 0.5, "local_tpe": 0.3, "best_local_tpe": 0.3}
        row |= {"lr": 1e-3, "images_per_s": 1.0, "lambda_theory": 22.0, "parameters": 1, "nkat_parameters": 1}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "state").write_bytes(bytes(100_000))
            row |= {"started_s": started_s, "epoch_s": time.time() - started_s}
            tune.report(row, checkpoint=tune.Checkpoint(folder))


def noise() -> Any:
    from nkat_ray.data.selection import Selection
    from nkat_ray.search.trainable import Stage1Data

    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (2040, 3, 32, 32), np.uint8), generator.integers(0, 10, 2040)
    selection = Selection(images, labels, np.arange(2000), np.arange(2000, 2040))
    return Stage1Data(name="cifar10", selection=selection, num_classes=10, grey=False, flip=True)


def stage1(run: RunConfig, data: Any) -> RunState:
    with tempfile.TemporaryDirectory() as name:
        folder, vault = Path(name), open_vault("packing")
        journal = Journal(folder)
        journal.write("run")
        fixed = ("embed_dim", "depth", "patch_size") if data else ()
        tuner.tune_stage1(
            run, fixed=fixed, data=data, cluster=describe_cluster(), vault=vault, journal=journal, folder=folder,
            tune_folder=str(folder / "tune"), listeners=Listeners(),
        )  # fmt: skip
        journal.close()
        return journal.state


def described(state: RunState, slots: int) -> list[str]:
    starts = [start_seconds(record, state) or math.nan for record in state.trials.values()]
    later = starts[slots:]
    figures = [training_share(state) or math.nan, max(starts[:slots]), statistics.median(later), max(later)]
    return [str(len(starts)), str(slots), *(f"{figure:.3f}" for figure in figures)]


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
