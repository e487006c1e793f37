"""Test whether anything is lost when the driver is killed (SIGKILL) at random moments and resumed.

    python benchmarks/kill_resume.py --kills 10

A run is a short `--preset quick` on generated images. Its driver is killed a random number of journal events, and a
random fraction of a second, after it has begun to write. It is resumed until the run ends; then the next run begins,
until the requested number of kills is reached and the last run has ended. The files at each kill are compared with
those at the next kill and at the run's end: ended trials, stop reasons and curves, ASHA's rungs, Optuna's study,
survivors. No trial may end twice, and no epoch that is in the journal may be trained again. A table of the findings
goes to standard output; the exit code is 1 if anything differed.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from nkat_ray.config import RunConfig, config_of_json
from nkat_ray.files import JOURNAL_FILE, STUDY_FILE
from nkat_ray.record.journal import read_state
from nkat_ray.record.study import load_study
from nkat_ray.record.tables import read_rows
from nkat_ray.search.scheduler import ResumableASHA

ROOT = Path(__file__).resolve().parents[1]
TRIALS, GATE = 6, 0.12
FLAGS = (
    f"--preset quick --data synthetic --embed_dim 16 --depth 1 --num_samples {TRIALS} --epochs 3 --grace 1 --warmup 0 "
    f"--gate {GATE} --train_images 600 --val_images 200 --transfer_images 300 --test_images 200 --transfer_epochs 1 "
    "--max_concurrent 1"
).split()


def launch(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "tune_round2.py", *flags, "--storage_path", folder, "--name", "r"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], timeout_s: float) -> int:
    output, _ = process.communicate(timeout=timeout_s)
    if process.returncode > 0:
        print(output[-2000:], file=sys.stderr)
    return process.returncode


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / JOURNAL_FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last is empty, or cut short
    return [json.loads(line) for line in lines]


def rungs(folder: Path) -> dict[float, dict[str, float]]:
    """Return ASHA's rungs as a driver that starts now would have them."""
    config = config_of_json(RunConfig, json.loads((folder / "config.json").read_text()))
    earlier = read_state(folder).trials.values()
    return ResumableASHA(
        max_t=config.epochs, grace_period=config.grace, reduction_factor=config.reduction, earlier=earlier
    ).rungs()


def finished_in_study(folder: Path) -> dict[int, tuple[str, Any, Any]]:
    """Return state, values and parameters of every finished trial in Optuna's study."""
    study = load_study(folder / STUDY_FILE) if (folder / STUDY_FILE).exists() else None
    trials = [] if study is None else study.get_trials(deepcopy=False)
    return {t.number: (t.state.name, t.values, t.params) for t in trials if t.state.is_finished()}


def subset(before: Any, after: Any) -> bool:
    """Return whether everything in `before` is in `after`, unchanged."""
    if isinstance(before, dict):
        return all(key in after and subset(value, after[key]) for key, value in before.items())
    nan = all(isinstance(value, float) and math.isnan(value) for value in (before, after))
    return nan or bool(before == after)


def faults(folder: Path, before: dict[str, Any]) -> list[str]:
    """List what was lost, repeated or changed since a snapshot; empty if nothing was."""
    after, seen = snapshot(folder), events(folder)
    found = [
        f"{name} changed" for name in ("reasons", "curves", "rungs", "study") if not subset(before[name], after[name])
    ]
    found += [] if set(before["survivors"]) <= set(after["survivors"]) else ["survivors lost"]
    counted = {
        "ends": Counter(event["trial"] for event in seen if event["event"] == "end"),
        "epochs": Counter((event["trial"], event["row"]["epoch"]) for event in seen if event["event"] == "result"),
        "Stage 2 rows": Counter(
            (event["event"], event["row"]["trial"], event["row"]["dataset"])
            for event in seen
            if event["event"] in ("stage2", "tested")
        ),
    }
    for name, counter in counted.items():
        if repeated := [key for key, n in counter.items() if n > 1]:
            found.append(f"{name} twice: {repeated}")
    return found


def faults_at_the_end(folder: Path, code: int) -> list[str]:
    """List what is wrong with a run that has ended; empty if nothing is."""
    found = [] if code == 0 else [f"exit code {code}"]
    reasons = snapshot(folder)["reasons"]
    if sorted(reasons) != list(range(TRIALS)):
        found.append(f"ended: {sorted(reasons)}")
    if {row["trial"]: row["stop_reason"] for row in read_rows(folder / "trials.parquet")} != reasons:
        found.append("trials.parquet differs from the journal")
    if any(not trial.state.is_finished() for trial in load_study(folder / STUDY_FILE).get_trials()):
        found.append("a trial of the study never ends")
    return found


def snapshot(folder: Path) -> dict[str, Any]:
    """Read everything that must not be lost."""
    state = read_state(folder)
    return {
        "reasons": {number: record.stop_reason for number, record in state.trials.items() if record.ended},
        "curves": {number: dict(record.curve) for number, record in state.trials.items()},
        "rungs": rungs(folder), "study": finished_in_study(folder), "survivors": state.survivors(GATE),
    }  # fmt: skip


def until(process: subprocess.Popen[str], folder: Path, count: int, extra_s: float) -> bool:
    """Wait for `count` events and `extra_s` seconds more; False if the driver ended before."""
    while process.poll() is None and len(events(folder)) < count:
        time.sleep(0.2)
    end = time.monotonic() + extra_s
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    return process.poll() is None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--timeout_s", type=float, default=1800, help="for the last stretch of a run")
    parser.add_argument("--flags", default="", help="more flags for the runs, e.g. '--feedback global'")
    options = parser.parse_args()
    draw, kills, bad, runs = random.Random(options.seed), 0, 0, 0
    print("| kill | run | events | the last one | stage | trials ended | faults since the previous kill |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="nkat-kill-") as place:
        while kills < options.kills:
            runs += 1
            folder, before, flags = Path(place) / f"{runs}" / "r", None, [*FLAGS, *options.flags.split()]
            while True:
                process = launch(folder.parent, *flags)
                flags = ["--resume"]
                alive = kills < options.kills and until(
                    process, folder, len(events(folder)) + draw.randint(2, 14), draw.uniform(0, 1)
                )
                if alive:
                    os.kill(process.pid, signal.SIGKILL)
                code = finish(process, options.timeout_s)
                if not (folder / "config.json").exists():
                    sys.exit(f"the run wrote nothing and ended with {code}")
                found = faults(folder, before) if before else []
                if not alive:
                    found += faults_at_the_end(folder, code)
                before, seen = snapshot(folder), events(folder)
                stage = "Stage 2" if any(event["event"] == "stage1_done" for event in seen) else "Stage 1"
                kills, bad = kills + alive, bad + bool(found)
                where = (
                    f"{kills} | {runs} | {len(seen)} | {seen[-1]['event']} | {stage}"
                    if alive
                    else (f"the run's end | {runs} | {len(seen)} | {seen[-1]['event']} | {stage}")
                )
                print(f"| {where} | {len(before['reasons'])} of {TRIALS} | {'; '.join(found) or 'none'} |", flush=True)
                if not alive:
                    break
    print(f"\n{kills} kills of {runs} runs, {bad} with a fault")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
