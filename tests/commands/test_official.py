"""`nkat evaluate --official`: what it refuses, and one recalculation of a real run, stopped and continued."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nkat_ray.commands.evaluate import EvaluateConfig, with_defaults_of
from nkat_ray.commands.official import OFFICIAL_FILE
from nkat_ray.config import RunConfig
from nkat_ray.record import tables

ROOT = Path(__file__).parents[2]
TINY = (
    "--preset quick --data synthetic --embed_dim 16 --depth 1 --num_samples 1 --epochs 2 --grace 1 --warmup 0 "
    "--gate 0.05 --train_images 400 --val_images 200 --transfer_images 300 --test_images 200 --transfer_epochs 1 "
    "--max_concurrent 1"
).split()
SMALL = "--seeds 2 --train_images 400 --transfer_images 300 --test_images 200".split()


def save_config(folder: Path, **fields: Any) -> None:
    config = RunConfig.from_preset("quick", name="r", **fields)
    saved = {**tables.plain(dataclasses.asdict(config)), "found": {}, "fixed": []}
    (folder / "config.json").write_text(json.dumps(saved))


def test_a_folder_without_a_winner_is_refused(nkat_script: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"event": "run", "time_s": 0.0}\n')
    save_config(tmp_path)
    code, _, error = nkat_script("evaluate", "--official", tmp_path)
    assert code == 2
    assert "--official needs a finished run with a winner" in error
    assert error.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": 101}, "1..100"),
        ({"train_images": 50}, "--official"),
        ({"compile": True}, "--official"),
    ],
)
def test_flags_out_of_range(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        EvaluateConfig(target=tmp_path, **fields)


def test_officially_all_images_are_used_unless_a_number_is_typed(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    save_config(tmp_path, test_images=200, transfer_images=300, seed=5)
    as_run, official = (with_defaults_of(tmp_path, official=official) for official in (False, True))
    assert (as_run.test_images, as_run.transfer_images, as_run.seed) == (200, 300, 5)
    assert (official.test_images, official.transfer_images, official.seed) == (None, None, 5)


@pytest.mark.cluster
def test_a_recalculation_that_is_killed_goes_on_and_ends_with_a_verdict(tmp_path: Path) -> None:
    tune = [sys.executable, ROOT / "tune_round2.py", *TINY, "--storage_path", tmp_path, "--name", "r"]
    subprocess.run(tune, check=True, timeout=900, stdout=subprocess.DEVNULL)
    out, code = tmp_path / "r" / "official", "from nkat_ray.cli import main; main()"
    command = [sys.executable, "-c", code, "evaluate", "--official", tmp_path / "r", *SMALL]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 600
    while not list(out.glob("retrained/*/weights.safetensors")):
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    for seed in range(2):  # one that was killed between the folder and the weights leaves it empty
        (out / "retrained" / f"seed_{seed:03d}").mkdir(exist_ok=True)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("retrained/*/weights.safetensors")}
    done = subprocess.run([*command, "--json", "--quiet"], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert document["verdict"]["status"] in ("not reached", "undecided")
    assert len(set(document["seeds"])) == len(document["by_seed"]) == 2
    assert document["config"]["train_images"] == 400
    low, high = document["interval"]
    assert low < document["global_tpe"] < high
    assert json.loads((out / OFFICIAL_FILE).read_text())["global_tpe"] == document["global_tpe"]
    rows = pq.read_table(out / "stage2.parquet").to_pylist()
    assert sorted({(row["trial"], row["n_test"]) for row in rows}) == [(0, 200), (1, 200)]
    other = subprocess.run([*command, "--seeds", "3"], capture_output=True, text=True, timeout=300, check=False)
    assert other.returncode == 2
    assert "seeds is 3" in other.stderr
    for official in ([], ["--official"]):  # no machine has so many cores: Ray would wait in silence
        words = [*command[:4], *official, "--cpus_per_trial", "1000", tmp_path / "r", "--out", tmp_path / "new"]
        large = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        assert large.returncode == 2, large.stderr
        assert "needs 1000 CPU" in large.stderr
        assert not (tmp_path / "new").exists()
