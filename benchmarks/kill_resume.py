"""Is anything lost when the driver is killed? Quick runs, each killed (SIGKILL) at a random moment and resumed.

    python benchmarks/kill_resume.py --kills 10

Each run is a short `--preset quick` on generated images, of the same seed. What the files held before the kill is
compared with what they hold after the resume: trials that had ended, their stop reasons and curves, ASHA's rungs,
Optuna's study, the survivors; no trial may end twice, and no epoch that was in the journal may be trained again. A table
of what was found goes to standard output; the exit code is 1 if anything differed.
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

from nkat_ray.prepare import config_of_json
from nkat_ray.report.html import load_study
from nkat_ray.report.tables import read_trials
from nkat_ray.search.journal import JOURNAL_FILE, read_state
from nkat_ray.search.scheduler import ResumableASHA
from nkat_ray.search.searcher import STUDY_FILE

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--preset quick --data synthetic --embed_dim 16 --depth 1 --num_samples 6 --epochs 3 --grace 1 --warmup 0 "
    "--gate 0.12 --train_images 600 --val_images 200 --transfer_images 300 --test_images 200 --transfer_epochs 1 "
    "--max_concurrent 1"
).split()


def launch(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "tune_round2.py", *flags, "--storage_path", folder, "--name", "r"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], timeout_s: float) -> int:
    output, _ = process.communicate(timeout=timeout_s)
    if process.returncode:
        print(output[-2000:], file=sys.stderr)
    return process.returncode


def events(folder: Path) -> list[dict[str, Any]]:
    path = folder / JOURNAL_FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last is empty, or cut short
    return [json.loads(line) for line in lines]


def rungs(folder: Path) -> dict[float, dict[str, float]]:
    """ASHA's rungs as a driver that starts now would have them."""
    config = config_of_json(json.loads((folder / "config.json").read_text()))
    earlier = read_state(folder).trials.values()
    return ResumableASHA(
        max_t=config.epochs, grace_period=config.grace, reduction_factor=config.reduction, earlier=earlier
    ).rungs()


def told(folder: Path) -> dict[int, tuple[str, Any, Any]]:
    """What Optuna's study says of every trial that it was told of."""
    study = load_study(folder / STUDY_FILE) if (folder / STUDY_FILE).exists() else None
    trials = [] if study is None else study.get_trials(deepcopy=False)
    return {t.number: (t.state.name, t.values, t.params) for t in trials if t.state.is_finished()}


def subset(before: Any, after: Any) -> bool:
    """Whether all that was there before is there unchanged."""
    if isinstance(before, dict):
        return all(key in after and subset(value, after[key]) for key, value in before.items())
    nan = all(isinstance(value, float) and math.isnan(value) for value in (before, after))
    return nan or bool(before == after)


def faults(folder: Path, before: dict[str, Any], code: int, trials: int) -> list[str]:
    """What a resumed run lost, repeated or changed; empty if nothing."""
    found = [] if code == 0 else [f"exit code {code}"]
    state, seen = read_state(folder), events(folder)
    ends = Counter(event["trial"] for event in seen if event["event"] == "end")
    epochs = Counter((event["trial"], event["row"]["epoch"]) for event in seen if event["event"] == "result")
    stage2 = Counter(
        (event["event"], event["row"]["trial"], event["row"]["dataset"])
        for event in seen
        if event["event"] in ("stage2", "tested")
    )
    if ends != Counter(range(trials)):
        found.append(f"ends {dict(ends)}")
    for name, counted in (("epochs", epochs), ("Stage 2 rows", stage2)):
        if repeated := [key for key, n in counted.items() if n > 1]:
            found.append(f"{name} twice: {repeated}")
    reasons = {number: record.stop_reason for number, record in state.trials.items()}
    curves = {number: record.curve for number, record in state.trials.items()}
    after = {"reasons": reasons, "curves": curves, "rungs": rungs(folder), "study": told(folder)}
    found += [f"{name} changed" for name, value in after.items() if not subset(before[name], value)]
    if not set(before["survivors"]) <= set(state.survivors(0.12)):
        found.append("survivors lost")
    rows = {row["trial"]: row["stop_reason"] for row in read_trials(folder / "trials.parquet")}
    if rows != reasons:
        found.append("trials.parquet differs from the journal")
    if any(trial.state.name == "RUNNING" for trial in load_study(folder / STUDY_FILE).get_trials()):
        found.append("a trial of the study runs for ever")
    return found


def snapshot(folder: Path) -> dict[str, Any]:
    state = read_state(folder)
    return {
        "reasons": {number: record.stop_reason for number, record in state.trials.items() if record.ended},
        "curves": {number: dict(record.curve) for number, record in state.trials.items()},
        "rungs": rungs(folder), "study": told(folder), "survivors": state.survivors(0.12),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--timeout_s", type=float, default=900, help="for one run")
    parser.add_argument("--flags", default="", help="more flags for the runs, e.g. '--feedback global'")
    options = parser.parse_args()
    more = options.flags.split()
    trials = int(FLAGS[FLAGS.index("--num_samples") + 1])
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="nkat-kill-") as place:
        clock = time.monotonic()
        code = finish(launch(Path(place) / "whole", *FLAGS, *more), options.timeout_s)
        whole = events(Path(place) / "whole" / "r")
        assert code == 0, f"the undisturbed run ended with {code}"
        print(f"undisturbed: {time.monotonic() - clock:.0f} s, {len(whole)} events in its journal\n")
        print("| kill | event of the journal | stage | ended before | ended after | faults |")
        print("|---|---|---|---|---|---|")
        bad = 0
        for kill in range(options.kills):
            folder = Path(place) / f"kill{kill}" / "r"
            at = draw.randrange(1, len(whole))  # an event of the journal, then up to 2 s on
            process = launch(folder.parent, *FLAGS, *more)
            while len(events(folder)) < at and process.poll() is None:
                time.sleep(0.1)
            time.sleep(draw.uniform(0, 2))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            before, seen = snapshot(folder), events(folder)
            code = finish(launch(folder.parent, "--resume"), options.timeout_s)
            found = faults(folder, before, code, trials)
            stage = "Stage 2" if any(event["event"] == "stage1_done" for event in seen) else "Stage 1"
            ended = len(before["reasons"])
            print(f"| {kill + 1} | {len(seen)}, {seen[-1]['event']} | {stage} | {ended} | all {trials} | ", end="")
            print(f"{'; '.join(found) or 'none'} |", flush=True)
            bad += bool(found)
    print(f"\n{options.kills - bad} of {options.kills} without a fault")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
