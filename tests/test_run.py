"""A run through the door that a user takes: the program itself, real Ray, real faults."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nkat_ray.report.study import load_study
from nkat_ray.run import _terminated_like_interrupted

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[1]
TINY = (
    "--preset quick --data synthetic --embed_dim 16 --depth 1 --num_samples 5 --epochs 2 --grace 1 --warmup 0 "
    "--train_images 400 --val_images 200 --transfer_images 300 --test_images 200 --transfer_epochs 1 --max_concurrent 1"
).split()


def launch(folder, *flags, resume=False):
    given = ["--resume"] if resume else TINY
    command = [sys.executable, ROOT / "tune_round2.py", *given, "--storage_path", folder, "--name", "r", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=900):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def events(folder):
    path = folder / "r" / "journal.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def wait_for(folder, kind, count, process, timeout=1200):
    end = time.monotonic() + timeout
    while sum(event["event"] == kind for event in events(folder)) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"{count} x {kind} did not come"
        time.sleep(0.05)


def ended(folder):
    return [event["trial"] for event in events(folder) if event["event"] == "end"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run from first to last, nothing in its way."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = finish(launch(folder, "--gate", "0.12"))
    assert code == 0, output
    return folder / "r", output


def test_a_run_ends_with_its_files_and_says_what_a_reader_must_know(whole):
    folder, output = whole
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["exit_code"] == 0
    assert summary["winner"]["trial"] in summary["survivors"]
    assert "SYNTHETIC" in output
    assert "0.12" in output
    assert "0.60" in output
    assert not re.search(r"\(raylet|WARNING|Traceback", output)
    for name in ("trials.parquet", "curves.parquet", "stage2.parquet", "report.html", "best/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    assert set(pq.read_table(folder / "stage2.parquet")["node"].to_pylist()) == {socket.gethostname()}


def test_the_same_seed_gives_the_same_trials_and_scores(whole, tmp_path):
    code, output = finish(launch(tmp_path, "--gate", "0.12"))
    assert code == 0, output
    columns = ["trial", "config/temperature", "config/conv_stem", "best_local_tpe", "stop_reason", "epochs", "seed"]
    first, second = (
        pq.read_table(f / "trials.parquet", columns=columns).to_pylist() for f in (whole[0], tmp_path / "r")
    )
    assert first == second
    scores = ["trial", "dataset", "val_accuracy", "test_accuracy"]
    first, second = (
        pq.read_table(f / "stage2.parquet", columns=scores).to_pylist() for f in (whole[0], tmp_path / "r")
    )
    assert first == second


def test_a_finished_run_is_reported_again_without_running(whole):
    before = (whole[0] / "journal.jsonl").read_bytes()
    code, output = finish(launch(whole[0].parent, resume=True), timeout=120)
    assert code == 0
    assert "Global TPE" in output
    assert (whole[0] / "journal.jsonl").read_bytes() == before


def test_a_flag_that_disagrees_is_refused(whole):
    code, output = finish(launch(whole[0].parent, "--epochs", "3", resume=True), timeout=120)
    assert code == 2
    assert "epochs is 3" in output


def test_no_survivor_is_exit_code_3_with_a_report_that_says_what_was_missing(tmp_path):
    code, output = finish(launch(tmp_path, "--gate", "1.0", "--num_samples", "2"))
    assert code == 3, output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["survivors"] == []
    assert summary["winner"] is None
    assert set(summary["stop_reasons"]) <= {"gate", "asha"}
    assert "accuracy" in output
    assert (tmp_path / "r" / "report.html").exists()


@pytest.mark.parametrize("kind", ["result", "end", "stage2"])
def test_a_killed_driver_loses_nothing_and_repeats_nothing(kind, whole, tmp_path):
    process = launch(tmp_path, "--gate", "0.12")
    wait_for(tmp_path, kind, 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = ended(tmp_path)
    done_before = [e for e in events(tmp_path) if e["event"] in ("stage2", "tested")]
    code, output = finish(launch(tmp_path, resume=True))
    assert code == 0, output
    after = ended(tmp_path)
    assert after[: len(before)] == before
    assert sorted(after) == list(range(5))  # each trial ended once
    rows = [
        (e["event"], e["row"]["trial"], e["row"]["dataset"])
        for e in events(tmp_path)
        if e["event"] in ("stage2", "tested")
    ]
    assert len(rows) == len(set(rows)) >= len(done_before)
    columns = ["trial", "best_local_tpe", "stop_reason", "epochs", "passed_gate", "config/temperature"]
    first, second = (
        pq.read_table(f / "trials.parquet", columns=columns).to_pylist() for f in (whole[0], tmp_path / "r")
    )
    enqueued = [row for row in second if row["trial"] < 2]  # the sampler's draws start anew after a resume
    assert enqueued == first[:2]


def test_sigterm_is_whatever_ctrl_c_is_at_that_moment():
    """While Tune runs, Ctrl-C sets a flag of Tune's; else it raises."""
    caught = []
    with _terminated_like_interrupted():
        before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
        signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGINT, before)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_run_that_resume_continues(number, tmp_path):
    process = launch(tmp_path, "--gate", "0.12")
    wait_for(tmp_path, "end", 1, process)
    process.send_signal(number)
    code, output = finish(process, timeout=600)  # in order, so after what runs; a busy machine takes its time
    assert code == 130, output
    assert "--resume --name r" in output
    assert "Traceback" not in output
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["exit_code"] == 130
    assert "This run has not ended" in (tmp_path / "r" / "report.html").read_text()
    before = ended(tmp_path)
    code, output = finish(launch(tmp_path, resume=True))
    assert code == 0, output
    assert sorted(ended(tmp_path)) == list(range(5))
    assert ended(tmp_path)[: len(before)] == before


@pytest.mark.parametrize("killed", [False, True])
def test_feedback_tells_optuna_global_tpe_before_any_test_image_is_read(killed, tmp_path):
    flags = ["--gate", "0.12", "--num_samples", "3", "--feedback", "global"]
    process = launch(tmp_path, *flags)
    if killed:  # amid the validation of the first survivor
        wait_for(tmp_path, "stage2", 2, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process = launch(tmp_path, resume=True)
    code, output = finish(process)
    assert code == 0, output
    kinds = [event["event"] for event in events(tmp_path)]
    first, done = kinds.index("stage2"), kinds.index("stage1_done")
    assert first < kinds.index("proposed", kinds.index("proposed") + 1) < done  # told before the second trial
    assert "stage2" not in kinds[done:]  # nothing is validated again
    assert kinds.index("ranked") < kinds.index("tested")
    rows = pq.read_table(tmp_path / "r" / "stage2.parquet").to_pylist()
    survivors = json.loads((tmp_path / "r" / "summary.json").read_text())["survivors"]
    assert len(rows) == 4 * len(survivors) > 0
    told = {t.user_attrs["trial"]: t for t in load_study(tmp_path / "r" / "optuna_journal.log").trials}
    for trial in survivors:
        mine = [row["val_tpe"] or 0.0 for row in rows if row["trial"] == trial]
        assert told[trial].value == pytest.approx(sum(mine) / 4)
        assert told[trial].constraints["gate"] <= 0
    assert all(trial.state.is_finished() for trial in told.values())


def test_enough_survivors_close_stage_1_and_an_earlier_run_warms_up_the_next(tmp_path):
    more = ["--scheduler", "median", "--sampler", "nsga2", "--objective", "local_tpe,lambda"]
    code, output = finish(launch(tmp_path, "--gate", "0.05", "--max_survivors", "2", *more))
    assert code == 0, output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert len(summary["survivors"]) == 2
    assert summary["n_trials"] == 2  # of five: nothing started afterwards
    front = load_study(tmp_path / "r" / "optuna_journal.log").best_trials
    assert {trial.user_attrs["trial"] for trial in front} <= set(summary["survivors"])
    assert front
    next_run = [*TINY, "--gate", "0.05", "--storage_path", tmp_path, "--name", "next", "--warm_start", "r"]
    command = [sys.executable, ROOT / "tune_round2.py", *next_run, "--num_samples", "1", "--scheduler", "hyperband"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    assert "warm start: 2 of 2 trials of r were taken" in " ".join(done.stdout.split())
    assert pq.read_table(tmp_path / "next" / "trials.parquet").num_rows == 1
    study = load_study(tmp_path / "next" / "optuna_journal.log")
    assert [trial.user_attrs.get("warm_start") for trial in study.trials] == ["r/0", "r/1", None]


def test_a_run_that_another_driver_holds_is_refused(tmp_path):
    process = launch(tmp_path, "--gate", "0.12")
    try:
        wait_for(tmp_path, "run", 1, process)
        code, output = finish(launch(tmp_path, resume=True), timeout=120)
        assert code == 2
        assert "another live driver" in output
    finally:
        process.kill()
        process.wait()


def test_missing_datasets_lower_robustness_and_stop_nothing(tmp_path):
    real = os.environ.get("NKAT_DATA_DIR")
    if not real:
        pytest.skip("NKAT_DATA_DIR is unset: no real data")
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"cifar10-{split}.parquet").symlink_to(Path(real) / f"cifar10-{split}.parquet")
    flags = ["--data", "auto", "--data_dir", folder, "--gate", "0.05", "--num_samples", "1"]
    code, output = finish(launch(tmp_path, *flags))
    assert code == 0, output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["winner"]["robustness"] == 0.25
    assert summary["verdict"] == "undecided"
    assert {name: found["digest"] is None for name, found in summary["data"].items()} == {
        "mnist": True, "fashion_mnist": True, "emnist_letters": True, "cifar10": False,
    }  # fmt: skip
    assert "1 of 4" in output


def test_an_address_without_a_cluster_is_refused_and_leaves_nothing(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        code, output = finish(launch(tmp_path, "--address", address), timeout=120)
    assert code == 2, output
    assert "no Ray cluster answers" in output
    assert "Traceback" not in output
    assert not (tmp_path / "r").exists()
