"""Run the same six trials under three orchestrators: ours, a plain Ray Tune script, and Optuna in one process.

Every trial trains the `quick` preset's baseline on 4,000 real CIFAR-10 images for four epochs; the trials differ in
their seeds alone, and nothing is stopped early: what is compared is what lies around the training.

- ours: Stage 1 of `tune_round2.py`, journal, gate, vault and checkpoints included;
- ray: `tune.Tuner` with OptunaSearch, ASHAScheduler and one checkpoint per epoch, as Ray's documentation shows it;
- optuna: `study.optimize` with a SuccessiveHalvingPruner, in one process.

Each runs in a process of its own, in turn. Memory is the proportional set size of all its processes together. Last,
each runs once more, and a training process is killed when half of the trials have ended: how many trials are lost?

    python benchmarks/orchestration.py
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from nkat_ray.cluster import SETTINGS
from nkat_ray.config import STAGE1_DATASET, DataConfig, RunConfig
from nkat_ray.data import Dataset, open_dataset
from nkat_ray.data.selection import select_images, training_limits

Name = Literal["ours", "ray", "optuna"]
NAMES: tuple[Name, ...] = ("ours", "ray", "optuna")


@dataclass(frozen=True, kw_only=True)
class Args(DataConfig):
    """Set what is run."""

    rounds: int = 3
    """Rounds of each, in turn."""
    slots: int = 2
    """Trials at a time, for ours and Ray's; Optuna alone has one."""
    only: Name | None = None
    """For the benchmark itself: run this one, in this process."""
    log: Path | None = None
    """For the benchmark itself: the file that gets one line per event."""


def run_of(args: Args) -> RunConfig:
    run = RunConfig.from_preset("quick", name="orchestration", data_dir=args.data_dir, max_concurrent=args.slots)
    return replace(run, grace=run.epochs, gate=0.01)


class Log:
    """Write one line per event for the parent: kind, trial, time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, kind: str, trial: int = -1, **more: Any) -> None:
        """Write one event."""
        with self._path.open("a") as file:
            file.write(
                json.dumps({"kind": kind, "trial": trial, "time_s": time.time(), "pid": os.getpid(), **more}) + "\n"
            )


def stage1_data(run: RunConfig) -> Any:
    from nkat_ray.search.trainable import Stage1Data

    found = open_dataset(STAGE1_DATASET, run, notice=print)
    assert isinstance(found, Dataset), found
    selection = select_images(found, training_limits(found, run))
    return Stage1Data(name=found.name, selection=selection, num_classes=10, grey=False, flip=True)


def epochs_of(seed: int, run: RunConfig, data: Any) -> Iterator[Any]:
    """Train as ours does; Ray's and Optuna's scripts call this."""
    import torch

    from nkat_ray.space import trial_config
    from nkat_ray.train.session import create_trainer, training_data

    torch.set_num_threads(1)
    images = training_data(data.selection, data, torch.device("cpu"))
    trainer = create_trainer(trial_config(run, {}), images, seed=seed, notice=print)
    for result in trainer.epochs():
        yield result, trainer


# --- the three --------------------------------------------------------------------------------------------------------


def ours(run: RunConfig, log: Log) -> None:
    import ray

    from nkat_ray.cluster.connect import describe_cluster
    from nkat_ray.record.journal import Journal
    from nkat_ray.record.observer import Observer
    from nkat_ray.record.run import Run
    from nkat_ray.record.storage import RunStorage
    from nkat_ray.search.stage1 import Stage1
    from nkat_ray.search.vault import open_vault

    ray.init(address="local", num_cpus=run.max_concurrent, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as name:
        folder, journal = Path(name), Journal(Path(name))
        journal.write("run")

        class Logged(Observer):
            """Log epochs and ends."""

            def on_epoch(self, trial: int, row: Mapping[str, Any]) -> None:
                log("epoch", trial, started_s=row["started_s"], epoch_s=row["epoch_s"])

            def on_trial_end(self, trial: int, row: Mapping[str, Any]) -> None:
                log("end", trial, lost=row["stop_reason"] == "error")

        context = Run(config=run, domains={}, datasets={}, storage=RunStorage(folder, None), journal=journal)
        vault = open_vault("orchestration")
        Stage1(context, stage1_data(run), cluster=describe_cluster(), vault=vault, observer=Logged()).run()


def ray_alone(run: RunConfig, log: Log) -> None:
    for name in SETTINGS:  # of our own runs
        os.environ.pop(name, None)
    import ray
    import torch
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    ray.init(address="local", num_cpus=run.max_concurrent, include_dashboard=False, log_to_driver=False)

    def train(config: dict[str, Any], data: Any) -> None:
        for result, trainer in epochs_of(config["seed"], run, data):
            log("epoch", config["seed"], started_s=result.started_s, epoch_s=result.epoch_s)
            with tempfile.TemporaryDirectory() as folder:
                torch.save(trainer.state(), Path(folder) / "state.pt")
                tune.report(
                    {"val_accuracy": result.val_accuracy, "epoch": result.epoch}, checkpoint=tune.Checkpoint(folder)
                )

    with tempfile.TemporaryDirectory() as folder:
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(train, data=stage1_data(run)), {"cpu": 1}),
            param_space={"seed": tune.randint(0, 10**6)},
            tune_config=tune.TuneConfig(
                metric="val_accuracy", mode="max", num_samples=run.num_samples, search_alg=OptunaSearch(seed=0),
                max_concurrent_trials=run.max_concurrent,
                scheduler=ASHAScheduler(max_t=run.epochs, grace_period=run.epochs),
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[ends(log)]),
        ).fit()  # fmt: skip
        assert len(results) == run.num_samples


def ends(log: Log) -> Any:
    from ray.tune import Callback

    class Ends(Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            log("end", trial.config["seed"], lost=False)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            log("end", trial.config["seed"], lost=True)

    return Ends()


def optuna_alone(run: RunConfig, log: Log) -> None:
    import optuna

    data = stage1_data(run)

    def objective(trial: optuna.Trial) -> float:
        seed = trial.suggest_int("seed", 0, 10**6)
        for result, _ in epochs_of(seed, run, data):
            log("epoch", seed, started_s=result.started_s, epoch_s=result.epoch_s)
            trial.report(result.val_accuracy, result.epoch)
            if trial.should_prune():  # after the last epoch at the earliest: it is trained in full
                log("end", seed, lost=False)
                raise optuna.TrialPruned
        log("end", seed, lost=False)
        return float(result.val_accuracy)

    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=run.epochs)
    optuna.create_study(direction="maximize", pruner=pruner).optimize(objective, n_trials=run.num_samples)


RUNNERS: dict[str, Callable[[RunConfig, Log], None]] = {"ours": ours, "ray": ray_alone, "optuna": optuna_alone}


# --- the parent -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Describe one run as measured from outside."""

    wall_s: float
    start_up_s: float  # until the first training step
    training_share: float  # of the slots' time between the first step and the last
    peak_bytes: int
    lost: int


def measure(name: Name, args: Args, *, kill: bool = False) -> Measured:
    run = run_of(args)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        path.touch()
        data_dir = ["--data_dir", str(args.data_dir)] if args.data_dir else []
        command = [sys.executable, __file__, "--only", name, "--log", str(path), "--slots", str(args.slots), *data_dir]
        start, peak, killed = time.time(), 0, False
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None:
            family = descendants(process.pid)
            peak = max(peak, sum(map(proportional_bytes, family)))
            events = [json.loads(line) for line in path.read_text().splitlines()]
            if kill and not killed and sum(event["kind"] == "end" for event in events) >= run.num_samples // 2:
                killed = kill_training(name, process.pid, family)
            time.sleep(0.3)
        wall_s = time.time() - start
        events = [json.loads(line) for line in path.read_text().splitlines()]
    epochs = [event for event in events if event["kind"] == "epoch"]
    first, last = min(e["started_s"] for e in epochs), max(e["started_s"] + e["epoch_s"] for e in epochs)
    slots = 1 if name == "optuna" else args.slots
    whole = sum(event["kind"] == "end" and not event["lost"] for event in events)
    share = sum(e["epoch_s"] for e in epochs) / (slots * (last - first))
    return Measured(wall_s, first - start, share, peak, run.num_samples - whole)


def kill_training(name: Name, parent: int, family: list[int]) -> bool:
    if name == "optuna":
        os.kill(parent, signal.SIGKILL)
        return True
    for process in family:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::ImplicitFunc"):
                os.kill(process, signal.SIGKILL)
                return True
    return False


def descendants(parent: int) -> list[int]:
    found, todo = [], [parent]
    while todo:
        process = todo.pop()
        found.append(process)
        with contextlib.suppress(OSError):
            todo += [
                int(word)
                for task in Path(f"/proc/{process}/task").iterdir()
                for word in (task / "children").read_text().split()
            ]
    return found


def proportional_bytes(process: int) -> int:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0


def main(args: Args) -> None:
    if args.only:
        assert args.log is not None
        RUNNERS[args.only](run_of(args), Log(args.log))
        return
    rounds: dict[Name, list[Measured]] = {name: [] for name in NAMES}
    for _ in range(args.rounds):
        for name in NAMES:
            rounds[name].append(measure(name, args))
            print(name, asdict(rounds[name][-1]), flush=True)
    killed = {name: measure(name, args, kill=True) for name in NAMES}
    table = Table(
        "", "wall, s", "to the first step, s", "without start-up, s", "ratio to ours", "training share", "peak, MiB",
        "trials lost by a kill", title=f"medians of {args.rounds} rounds (smallest to largest)",
    )  # fmt: skip
    for name, runs in rounds.items():
        after = [r.wall_s - r.start_up_s for r in runs]
        ratios = [a / (o.wall_s - o.start_up_s) for a, o in zip(after, rounds["ours"], strict=True)]
        table.add_row(
            name, spread([r.wall_s for r in runs]), spread([r.start_up_s for r in runs]), spread(after),
            spread(ratios, 2), spread([r.training_share for r in runs], 2),
            spread([r.peak_bytes / 2**20 for r in runs], 0), f"{killed[name].lost} of {run_of(args).num_samples}",
        )  # fmt: skip
    Console(width=160).print(table)


def spread(values: list[float], digits: int = 1) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
