"""A run through the door that a user takes: the program itself, real Ray, real faults."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nkat_ray.commands.tune import undone_unless_begun
from nkat_ray.record.requests import request_stop
from nkat_ray.record.storage import run_storage
from nkat_ray.record.study import load_study

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
TINY = (
    "--preset quick --data synthetic --embed_dim 16 --depth 1 --num_samples 5 --epochs 2 --grace 1 --warmup 0 "
    "--train_images 400 --val_images 200 --transfer_images 300 --test_images 200 --transfer_epochs 1 --max_concurrent 1"
).split()


def launch(folder, *flags, resume=False, umask=-1, **environment):
    given = ["--resume"] if resume else TINY
    command = [sys.executable, ROOT / "tune_round2.py", *given, "--storage_path", folder, "--name", "r", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", preexec_fn=usual_signals,
        umask=umask, env=os.environ | environment,
    )  # fmt: skip


def usual_signals():
    """Undo what a background shell or nohup has set: a program inherits which signals are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(process, timeout=900):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def stop(folder, trial):
    """`nkat stop`: exit code, and what it says."""
    command = [Path(sys.executable).with_name("nkat"), "stop", folder / "r", str(trial)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


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


# Reported in mlfoundations/open_lm#154
def test_a_run_takes_no_more_disk_than_its_plan_says(whole):
    code, output = finish(launch(whole[0].parent, "--gate", "0.12", "--dry_run", "--quiet"), timeout=120)
    assert code == 0, output
    planned_gb = float(re.search(r"^disk: at most (\S+) GB below ", output, re.MULTILINE)[1])
    taken = sum(file.stat().st_size for file in whole[0].rglob("*"))
    assert taken <= planned_gb * 1e9 <= 5 * taken


# Reported in safetensors/safetensors#782, huggingface/sentence-transformers#4010
# Reported in Textualize/rich#826, httpie/cli#1008, Aider-AI/aider#4582
@pytest.mark.parametrize(
    ("umask", "environment", "shown"),
    [
        (0o022, {"PYTHONIOENCODING": "ascii"}, r"\u5b9f\u9a13"),
        (0o077, {"LC_ALL": "C", "PYTHONIOENCODING": ""}, "実験"),  # which Python takes for C.UTF-8
    ],
)
def test_modes_follow_the_umask_and_no_screen_decides_the_outcome(umask, environment, shown, tmp_path):
    folder = tmp_path / "実験"
    flags = ("--gate", "0.05", "--num_samples", "1")
    code, output = finish(launch(folder, *flags, umask=umask, **environment))
    assert code == 0, output
    assert json.loads((folder / "r" / "summary.json").read_text())["exit_code"] == 0
    for file in ("report.html", "best", "trials.parquet"):
        assert f"{tmp_path}/{shown}/r/{file}" in output
    assert (folder / "r" / "best" / "model.safetensors").exists()
    modes = {path: path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}
    odd = {path: oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask}
    assert odd == {}


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


# Reported in pytorch/pytorch#67538, keyu-tian/SparK#19
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


def test_a_second_interrupt_ends_at_once_and_loses_nothing(tmp_path):
    process = launch(tmp_path, "--gate", "0.12")
    wait_for(tmp_path, "end", 1, process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    code, output = finish(process, timeout=60)
    assert code == 130, output
    assert time.monotonic() - began < 20
    assert not (tmp_path / "r" / "summary.json").exists()
    code, output = finish(launch(tmp_path, resume=True))
    assert code == 0, output
    assert sorted(ended(tmp_path)) == list(range(5))


def test_a_fault_in_the_last_step_leaves_a_run_that_resume_finishes(tmp_path):
    """The summary says that a run is over, so it is written last."""
    process = launch(tmp_path, "--gate", "0.12", "--num_samples", "2")
    wait_for(tmp_path, "end", 1, process)
    (tmp_path / "r" / "report.html" / "in the way").mkdir(parents=True)  # the report cannot be written
    code, output = finish(process)
    assert code == 1, output
    assert "error.log" in output
    assert not (tmp_path / "r" / "summary.json").exists()
    shutil.rmtree(tmp_path / "r" / "report.html")
    tested = [event for event in events(tmp_path) if event["event"] == "tested"]
    code, output = finish(launch(tmp_path, resume=True))
    assert code == 0, output
    assert [event for event in events(tmp_path) if event["event"] == "tested"] == tested  # not read again
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["exit_code"] == 0
    assert (tmp_path / "r" / "report.html").is_file()


# Reported in ray-project/ray#21222
def test_a_run_whose_first_trials_all_fail_ends_and_resume_goes_on_once_the_cause_is_gone(tmp_path):
    """Files lie where the trials' folders should be, for this driver and the next: no checkpoint can be written."""
    flags = ("--gate", "0.12", "--max_failed", "2", "--max_failures", "0")
    process = launch(tmp_path, *flags)
    wait_for(tmp_path, "run", 1, process)
    for attempt in ("attempt_001", "attempt_002"):
        for trial in range(5):
            file = tmp_path / "r" / "tune" / attempt / f"trial_{trial:04d}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    code, output = finish(process)
    assert code == 1, output
    assert ended(tmp_path) == [0, 1]
    assert "2 trials have failed and none has succeeded (max_failed is 2); the first error, of trial 0: " in output
    assert "error.log" in output
    log = (tmp_path / "r" / "error.log").read_text()
    assert "trial_0000" in log  # the worker's own traceback
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["exit_code"] == 1

    code, output = finish(launch(tmp_path, resume=True))
    assert code == 1, output
    assert ended(tmp_path) == [0, 1, 2]  # one more failure is enough
    assert "3 trials have failed" in output

    code, output = finish(launch(tmp_path, resume=True))
    assert code == 0, output
    assert ended(tmp_path) == [0, 1, 2, 3, 4]
    stop_reasons = json.loads((tmp_path / "r" / "summary.json").read_text())["stop_reasons"]
    assert stop_reasons["error"] == 3


# Asked for in ray-project/ray#4355
def test_trials_are_stopped_from_outside_and_stay_survivors(tmp_path):
    """Trials without end; the request for the second one is left to the next driver."""
    forever = ("--epochs", "9999", "--grace", "9999", "--num_samples", "2", "--gate", "0.05")
    process = launch(tmp_path, *forever)
    wait_for(tmp_path, "result", 1, process)
    assert stop(tmp_path, 7) == (2, "error: trial is 7; the run has no such trial; under way: 0\n")
    assert stop(tmp_path, 0)[0] == 0
    wait_for(tmp_path, "end", 1, process)
    (end,) = [event for event in events(tmp_path) if event["event"] == "end"]
    assert (end["trial"], end["stop_reason"], end["error"]) == (0, "user", None)
    code, said = stop(tmp_path, 0)
    assert (code, "it has ended (user)" in said) == (2, True)
    while not any(event["event"] == "result" and event["trial"] == 1 for event in events(tmp_path)):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.kill()
    process.wait()
    code, said = stop(tmp_path, 1)
    assert (code, "it is not in progress" in said) == (2, True)

    request_stop(tmp_path / "r", 1)
    code, output = finish(launch(tmp_path, resume=True))
    assert code == 0, output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["stop_reasons"], summary["survivors"]) == ({"user": 2}, [0, 1])
    assert len(pq.read_table(tmp_path / "r" / "stage2.parquet")) == 8  # both had weights
    assert not (tmp_path / "r" / "stop").exists()


# Reported in ray-project/ray#20886, ray-project/ray#42221
def test_a_finished_run_is_extended_and_tests_its_first_survivors_once(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "r")
    before = [event["row"] for event in events(tmp_path) if event["event"] == "tested"]
    code, output = finish(launch(tmp_path, "--num_samples", "7", resume=True))
    assert code == 0, output
    assert sorted(ended(tmp_path)) == list(range(7))
    tested = [event["row"] for event in events(tmp_path) if event["event"] == "tested"]
    assert tested[: len(before)] == before
    assert len({(row["trial"], row["dataset"]) for row in tested}) == len(tested)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["n_trials"] == 7
    assert any("this run was extended from 5 to 7 trials" in notice for notice in summary["notices"])
    assert "extended from 5 to 7 trials" in (folder / "report.html").read_text()
    code, output = finish(launch(tmp_path, "--num_samples", "6", resume=True))
    assert code == 2
    assert "num_samples is 6" in output


# Reported in pirovc/ganon#175
@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_fails_before_it_has_begun_removes_only_what_it_made(there, tmp_path):
    storage = run_storage(str(tmp_path), "r")
    if there:
        storage.local.mkdir()
        (storage.local / "mine.txt").touch()
    with pytest.raises(ValueError, match="inside Ray"), undone_unless_begun(storage), storage.lock():
        raise ValueError("inside Ray")
    assert (storage.local / "mine.txt").exists() == storage.local.exists() == there


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
    code, output = finish(launch(tmp_path, "--gate", "0.05", "--max_survivors", "2", "--sampler", "random"))
    assert code == 0, output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert len(summary["survivors"]) == 2
    assert summary["n_trials"] == 2  # of five: nothing started afterwards
    best = load_study(tmp_path / "r" / "optuna_journal.log").best_trial
    assert best.user_attrs["trial"] in summary["survivors"]
    next_run = [*TINY, "--gate", "0.05", "--storage_path", tmp_path, "--name", "next", "--warm_start", "r"]
    command = [sys.executable, ROOT / "tune_round2.py", *next_run, "--num_samples", "1", "--scheduler", "none"]
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


# Reported in ray-project/ray#15780
def test_an_address_without_a_cluster_is_refused_and_leaves_nothing(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        code, output = finish(launch(tmp_path, "--address", address), timeout=120)
    assert code == 2, output
    assert "nothing answers there" in output
    assert "Traceback" not in output
    assert not (tmp_path / "r").exists()
