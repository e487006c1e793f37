"""Measure what a result costs as trials grow: 10,000 simulated trials on 1,000 slots through Tune's controller.

    OMP_NUM_THREADS=1 python benchmarks/search/load.py
    OMP_NUM_THREADS=1 python benchmarks/search/load.py --part searcher
    OMP_NUM_THREADS=1 python benchmarks/search/load.py --part files

`control`: results and ends go through Ray's real TuneController (its result path and stop_trial; only actors and
processes are left out, which would need a cluster for 1,000 slots) to our gate, our ASHA and our the recorder with a
journal on disk. CPU time is summed per part and result (ends included) and shown for the results that arrived while so
many trials had ended; the rest of the controller's time is Ray's, as is nearly all of ASHA (percentile of a rung).
Memory is what the process holds when so many have ended, all of Tune's trials among it.
`searcher`: a study and a journal that already hold so many trials, then the CPU time of one `suggest` and one `tell`;
most of a suggest is Optuna's TPESampler. `files`: a journal of so many trials of 12 epochs; the size of its files, and
the CPU time of reading the journal (a resume) and of writing the tables (a snapshot).
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import psutil
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from nkat_ray.config import RunConfig
from nkat_ray.metrics import EPOCH, LOCAL_TPE, TRAIN_LOSS, VAL_ACCURACY
from nkat_ray.record.journal import Journal, read_state
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.record.summary import write_tables
from nkat_ray.report.tensorboard import TensorBoardLog
from nkat_ray.search.gate import LocalTPEGate
from nkat_ray.search.recorder import ROW_KEYS, Recorder
from nkat_ray.search.scheduler import ResumableASHA
from nkat_ray.search.searcher import GatedOptunaSearch
from nkat_ray.search.stage1 import Stage1
from nkat_ray.space import SPACES, distribution

EPOCHS, SLOTS, GATE, SIZES = 20, 1000, 0.36, (100, 1000, 10_000)


class Meter:
    """Measure CPU seconds by part, of the current result and of all earlier ones."""

    def __init__(self) -> None:
        self.now: dict[str, float] = defaultdict(float)
        self.rows: list[tuple[int, dict[str, float]]] = []  # ended trials, seconds by part
        self.memory: dict[int, int] = {}  # ended trials -> bytes that the process holds

    def wrap(self, part: str, owner: Any, *methods: str) -> None:
        """Measure some methods of an object, less what is measured inside them."""
        for method in methods:
            setattr(owner, method, self._timed(part, getattr(owner, method)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(part):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the CPU time of the block to a part, less what is measured within."""
        before, clock = sum(self.now.values()), time.process_time()
        try:
            yield
        finally:
            inside = sum(self.now.values()) - before
            self.now[part] += time.process_time() - clock - inside

    def close_result(self, ended: int) -> None:
        """Close the current result, at which `ended` trials had ended."""
        self.rows.append((ended, dict(self.now)))
        if ended in (0, *SIZES) and ended not in self.memory:
            gc.collect()
            self.memory[ended] = psutil.Process().memory_info().rss
        self.now.clear()


def curves(trials: int, seed: int) -> np.ndarray:
    """Draw saturating curves with noise, of shape (trials, EPOCHS)."""
    generator = np.random.default_rng(seed)
    final, speed = generator.normal(0.3, 0.05, (trials, 1)), generator.uniform(0.1, 0.6, (trials, 1))
    noise = generator.normal(0, 0.01, (trials, EPOCHS))
    return np.clip(final * (1 - np.exp(-speed * np.arange(1, EPOCHS + 1))) + noise, 0, 1)


class Gate:
    """Wrap the gate as Tune's controller calls it, and measure it."""

    def __init__(self, gate: LocalTPEGate, meter: Meter) -> None:
        self._gate, self._meter = gate, meter

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return whether the gate stops the trial."""
        with self._meter.measure("gate"):
            return self._gate(trial_id, result)


def control(trials: int, seed: int, folder: Path) -> Meter:
    meter, table = Meter(), curves(trials, seed)
    journal = Journal(folder)
    gate = LocalTPEGate(GATE, EPOCHS + 1, 0.45, EPOCHS)
    asha = ResumableASHA(max_t=EPOCHS, grace_period=5, reduction_factor=3)
    callback = Recorder(journal, gate=GATE, folder=str(folder), stage=mock.Mock(spec=Stage1))
    meter.wrap("ASHA", asha, "on_trial_result", "on_trial_complete")
    meter.wrap("callback", callback, "on_trial_result", "on_trial_complete")
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(SLOTS)  # else it asks a cluster that is not there
    controller = TuneController(scheduler=asha, stopper=Gate(gate, meter), callbacks=[callback])
    running: list[tuple[Trial, int]] = []
    started = ended = 0
    while running or started < trials:
        while len(running) < SLOTS and started < trials:
            running.append((_start(controller, journal, started), 1))
            started += 1
        going = []
        for trial, epoch in running:
            score = float(table[trial.config["trial"], epoch - 1])
            result = {
                EPOCH: epoch, TRAIN_LOSS: 1.0, VAL_ACCURACY: score, LOCAL_TPE: score, "training_iteration": epoch,
                "time_total_s": 1.0 * epoch, "config": trial.config,
            }  # fmt: skip
            with meter.measure("Ray"):
                decision = controller._process_trial_result(trial, result)
                if decision == TrialScheduler.STOP:
                    controller.stop_trial(trial)
            if decision == TrialScheduler.STOP:
                ended += 1
            else:
                going.append((trial, epoch + 1))
            meter.close_result(ended)
        running = going
    journal.close()
    assert all(record.ended for record in journal.state.trials.values())
    return meter


def _start(controller: TuneController, journal: Journal, number: int) -> Trial:
    journal.write("proposed", trial=number, params={}, seed=number, study_number=number)
    trial = Trial("load", config={"trial": number}, trial_id=f"{number:08d}", stub=True)
    controller._trials.append(trial)
    controller._live_trials.add(trial)
    controller._running_trials.add(trial)
    controller._scheduler_alg.on_trial_add(controller, trial)
    trial.set_status(Trial.RUNNING)
    return trial


def print_control(meter: Meter) -> None:
    parts = ("gate", "callback", "ASHA", "Ray")
    print(
        "| trials ended | results | gate, us | callback, us | ours, us | ASHA, us | rest of Ray, us | Ray's share "
        "| memory, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        rows = [times for ended, times in meter.rows if 0.8 * size <= ended <= size]
        if not rows:
            continue
        mean = {part: 1e6 * statistics.fmean(times.get(part, 0.0) for times in rows) for part in parts}
        ours, total = mean["gate"] + mean["callback"], sum(mean.values())
        print(
            f"| {size} | {len(rows)} | {mean['gate']:.0f} | {mean['callback']:.0f} | {ours:.0f} | {mean['ASHA']:.0f} | "
            f"{mean['Ray']:.0f} | {100 * (total - ours) / total:.0f} % | {meter.memory[size] / 1e6:.0f} |"
        )


def searcher(size: int, repeats: int, seed: int, folder: Path) -> tuple[float, float]:
    """Return the median CPU milliseconds of one `suggest` and one `tell`, with `size` trials in study and journal."""
    space = SPACES["round2"]
    journal = Journal(folder)
    config = RunConfig(num_samples=10 * size, seed=seed, gate=GATE)
    subject = GatedOptunaSearch(
        Run(config=config, domains=space, datasets={}, storage=RunStorage(folder, None), journal=journal)
    )
    distributions = {name: distribution(domain) for name, domain in space.items()}
    draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    for number in range(size):
        params = draws.ask(distributions).params
        value = float(np.random.default_rng([seed, number]).normal(0.3, 0.05))
        journal.write("proposed", trial=number, params=params, seed=number, study_number=number)
        journal.write("result", trial=number, row={EPOCH: 1, LOCAL_TPE: value}, checkpoint=None)
        journal.write("end", trial=number, stop_reason="finished", stop_detail=None, error=None)
        subject.study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    suggests, tells = [], []
    for number in range(size, size + repeats):
        clock = time.process_time()
        subject.suggest(f"t{number}")
        suggests.append(time.process_time() - clock)
        journal.write("result", trial=number, row={EPOCH: 1, LOCAL_TPE: 0.3}, checkpoint=None)
        journal.write("end", trial=number, stop_reason="finished", stop_detail=None, error=None)
        clock = time.process_time()
        subject.tell(journal.state.trials[number])
        tells.append(time.process_time() - clock)
    journal.close()
    return 1e3 * statistics.median(suggests), 1e3 * statistics.median(tells)


def files(size: int, folder: Path) -> tuple[float, float, float, float, float]:
    """Return bytes per trial of journal, TensorBoard and tables, and the seconds of a resume and of a snapshot."""
    run = RunConfig()
    journal, board = Journal(folder), TensorBoardLog(folder / "tensorboard", {})
    journal.write("run")
    scalars = {
        f"nkat/{name}/block_{b}": 0.1234567
        for name in ("alpha", "beta", "attention_gain", "mlp_gain")
        for b in range(7)
    }
    entropies = {f"attention/entropy/block_{b}": 1.234567 for b in range(7)}
    shown = min(size, 20)  # of TensorBoard, which has one file per trial
    for number in range(size):
        journal.write("proposed", trial=number, params={"depth": 7}, seed=number, study_number=number)
        journal.write("started", trial=number, trial_id=f"{number:08d}")
        for epoch in range(1, 13):
            row = dict.fromkeys(ROW_KEYS, 0.1234567) | {EPOCH: epoch, "node": "ip-10-0-0-1"} | scalars | entropies
            checkpoint = f"s3://bucket/runs/name/tune/attempt_001/trial_{number:04d}/checkpoint_{epoch:06d}"
            journal.write("result", trial=number, row=row, checkpoint=checkpoint)
            if number < shown:
                board.on_epoch(number, row)
        journal.write("end", trial=number, stop_reason="asha", stop_detail="epoch 12: not among the best", error=None)
    journal.close()
    board.close()
    events = sum(path.stat().st_size for path in (folder / "tensorboard").rglob("*") if path.is_file())
    clock = time.process_time()
    state = read_state(folder)
    resume_s = time.process_time() - clock
    clock = time.process_time()
    write_tables(folder, run, state)
    snapshot_s = time.process_time() - clock
    weight = sum(path.stat().st_size for path in folder.glob("*.parquet")) / size
    return journal.path.stat().st_size / size, events / shown, weight, resume_s, snapshot_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("control", "searcher", "files"), default="control")
    parser.add_argument("--trials", type=int, default=SIZES[-1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.part == "control":
        with tempfile.TemporaryDirectory() as folder:
            print_control(control(arguments.trials, arguments.seed, Path(folder)))
        return
    if arguments.part == "files":
        print(
            "| trials | journal, bytes each | TensorBoard, bytes each | tables, bytes each | resume, s | snapshot, s |"
        )
        print("|---|---|---|---|---|---|")
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                a, b, c, resume_s, snapshot_s = files(size, Path(folder))
            print(f"| {size} | {a:,.0f} | {b:,.0f} | {c:,.0f} | {resume_s:.2f} | {snapshot_s:.2f} |", flush=True)
        return
    print("| trials in the study | suggest, ms | tell, ms |\n|---|---|---|")
    for size in SIZES:
        if size <= arguments.trials:
            with tempfile.TemporaryDirectory() as folder:
                suggest, tell = searcher(size, arguments.repeats, arguments.seed, Path(folder))
            print(f"| {size} | {suggest:.1f} | {tell:.1f} |", flush=True)


if __name__ == "__main__":
    main()
