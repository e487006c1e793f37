"""`nkat evaluate`: what it refuses, which trials it chooses, and a run that nobody passed, evaluated after the fact."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nkat_ray.commands.evaluate import chosen_trials, read
from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.model import create_nkat_vit
from nkat_ray.record import tables
from nkat_ray.record.journal import Journal
from nkat_ray.train.checkpoint import Weights

ROOT = Path(__file__).parents[2]
SCORES = {0: 0.30, 1: 0.48, 2: 0.45, 3: 0.20}  # best Local TPE by trial; the run's gate is 0.60


@pytest.fixture
def refused(nkat_script: Callable[..., Any]) -> Callable[..., str]:
    """Runs `nkat evaluate`, which must end with exit code 2 and one line; returns the line."""

    def run(*words: object) -> str:
        code, _, error = nkat_script("evaluate", *words)
        assert code == 2
        assert error.startswith("error: ")
        assert error.strip().count("\n") == 0
        return str(error)

    return run


def test_a_target_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "neither a run's folder nor a model" in refused(tmp_path / "never-was", "--data", "synthetic")


def test_a_folder_with_neither_run_nor_model(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "neither a run's folder nor a model" in refused(tmp_path, "--data", "synthetic")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_none(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"not a model")
    assert "weights.safetensors cannot be read" in refused(tmp_path, "--data", "synthetic")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_folder_that_belongs_to_a_flag_is_no_target(refused: Callable[..., str], tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    model.mkdir()
    data.mkdir()
    (model / "weights.safetensors").write_bytes(b"not a model")
    assert f"target is {str(model)!r}" in refused("--data_dir", data, model)


@pytest.mark.parametrize(("flag", "value", "said"), [("--transfer", "guess", "guess"), ("--transfer_epochs", 0, "0")])
def test_flags_out_of_range(refused: Callable[..., str], tmp_path: Path, flag: str, value: object, said: str) -> None:
    (tmp_path / "weights.safetensors").touch()
    assert said in refused(tmp_path, flag, value)


# --- trials that the run's own gate did not choose --------------------------------------------------------------------


@pytest.fixture
def tiny_weights() -> bytes:
    """A network of one block."""
    config = TrialConfig(conv_stem="off", patch_size=8, embed_dim=16, num_heads=2, depth=1, top_k=None)
    return Weights(
        config=config, dataset="cifar10", num_classes=10, grey=False, mean=(0.5,) * 3, std=(0.25,) * 3, epoch=1,
        val_accuracy=0.3, seed=0, tensors=create_nkat_vit(config, num_classes=10).state_dict(),
    ).to_bytes()  # fmt: skip


@pytest.fixture
def missed(tmp_path: Path, tiny_weights: bytes) -> Path:
    """A run that nobody passed: trial 2 is the only one of the better ones without weights."""
    folder = tmp_path / "missed"
    folder.mkdir()
    config = RunConfig.from_preset("quick", name="missed", gate=0.6)
    saved = {**tables.plain(dataclasses.asdict(config)), "found": {}, "fixed": []}
    (folder / "config.json").write_text(json.dumps(saved))
    journal = Journal(folder)
    journal.write("run")
    for trial, score in SCORES.items():
        checkpoint = folder / "tune" / f"trial_{trial:04d}" / "checkpoint_000000"
        if trial != 2:
            checkpoint.mkdir(parents=True)
            (checkpoint / "weights.safetensors").write_bytes(tiny_weights)
        row = {"epoch": 1, "val_accuracy": score, "local_tpe": score}
        journal.write("proposed", trial=trial, params={}, seed=1, study_number=trial)
        journal.write("result", trial=trial, row=row, checkpoint=str(checkpoint))
        journal.write("end", trial=trial, stop_reason="gate", stop_detail=None, error=None)
    journal.close()
    return folder


def everything_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--best", 0], ["best is 0", "1..1000"]),
        (["--gate", 0], ["gate is 0", "> 0 and <= 1"]),
        (["--gate", 1.5], ["gate is 1.5"]),
        (["--gate", "nan"], ["gate is nan"]),
        (["--gate", 0.4, "--best", 2], ["best is 2", "give one of the two"]),
        (["--best", 1, "--official"], ["best is 1", "--official"]),
        (["--gate", 0.5], ["gate is 0.5", "its best trial, 1, has Local TPE 0.4800"]),
        ([], ["none of its trials passed the gate of 0.6", "--best 3"]),
    ],
)
def test_a_choice_that_cannot_be_made(
    refused: Callable[..., str], missed: Path, words: list[object], said: list[str]
) -> None:
    before = everything_in(missed)
    line = refused(missed, "--data", "synthetic", *words)
    for text in said:
        assert text in line
    assert everything_in(missed) == before


def test_a_run_that_kept_no_weights_is_named(refused: Callable[..., str], missed: Path) -> None:
    for path in missed.rglob("weights.safetensors"):
        path.write_bytes(b"cut short")
    line = refused(missed, "--data", "synthetic", "--best", 2)
    assert f"target is {str(missed)!r}; it has no weights of trials 1, 2" in line
    assert not (missed / "evaluations").exists()


def test_a_run_without_a_score_has_no_best_trial(refused: Callable[..., str], missed: Path) -> None:
    (missed / "journal.jsonl").write_text('{"event": "run", "time_s": 0.0}\n')
    assert "none of its trials has a score" in refused(missed, "--data", "synthetic", "--best", 1)


def test_a_model_has_no_trials_to_choose_from(refused: Callable[..., str], tmp_path: Path, tiny_weights: bytes) -> None:
    (tmp_path / "weights.safetensors").write_bytes(tiny_weights)
    assert "best is 2; the target is one model" in refused(tmp_path, "--data", "synthetic", "--best", 2)


@pytest.mark.parametrize(
    ("words", "chosen", "notice"),
    [
        (["--best", 1], [1], "evaluated after the fact with its best trial; the run's gate was 0.60"),
        (
            ["--gate", 0.45],  # reached exactly by trial 2, which has no weights
            [1],
            "evaluated after the fact with gate 0.45; the run's gate was 0.60; left out without weights: trials 2",
        ),
        (["--gate", 0.481], None, ""),
        (
            ["--best", 9],
            [1, 0, 3],
            "evaluated after the fact with its 9 best trials; the run's gate was 0.60; left out without weights: "
            "trials 2",
        ),
        (["--gate", 0.475], [1], "evaluated after the fact with gate 0.475; the run's gate was 0.60"),
    ],
)
def test_trials_are_chosen_after_the_fact(
    missed: Path, words: list[object], chosen: list[int] | None, notice: str
) -> None:
    config = read([str(missed), "--data", "synthetic", *map(str, words)])
    if chosen is None:
        with pytest.raises(ValueError, match="no trial"):
            chosen_trials(config, 0.6)
        return
    records, notices = chosen_trials(config, 0.6)
    assert [record.trial for record in records] == chosen
    assert notices == [notice]


@pytest.mark.cluster
def test_a_run_without_survivors_is_evaluated_after_the_fact_and_stays_as_it_was(tmp_path: Path) -> None:
    words = (
        "--preset quick --data synthetic --embed_dim 16 --depth 1 --num_samples 5 --epochs 2 --grace 1 --warmup 0 "
        "--gate 0.99 --train_images 400 --val_images 200 --transfer_images 300 --test_images 200 --transfer_epochs 1 "
        "--max_concurrent 1"
    ).split()
    tune = [sys.executable, ROOT / "tune_round2.py", *words, "--storage_path", tmp_path, "--name", "r"]
    ran = subprocess.run(tune, capture_output=True, text=True, timeout=900, check=False)
    assert ran.returncode == 3, ran.stdout + ran.stderr
    folder, summary = tmp_path / "r", json.loads((tmp_path / "r" / "summary.json").read_text())
    assert f"nkat evaluate {folder} --best 3" in ran.stdout
    scores = {row["trial"]: row["best_local_tpe"] for row in pq.read_table(folder / "trials.parquet").to_pylist()}
    assert summary["weights_kept"] == sorted(scores, key=lambda trial: (-scores[trial], trial))[:3]
    checkpoints = sorted(path.relative_to(folder / "tune") for path in folder.glob("tune/*/trial_*/checkpoint_*/*"))
    assert [path.name for path in checkpoints] == ["weights.safetensors"] * 3  # one each, without the training's state
    before = everything_in(folder)

    gate = sorted(scores.values())[-2] - 1e-4
    code = "from nkat_ray.cli import main; main()"
    command = [sys.executable, "-c", code, "evaluate", folder, "--gate", f"{gate:.4f}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode in (0, 1), done.stderr  # a network of these may be no better than chance everywhere
    document = json.loads(done.stdout)
    notice = f"evaluated after the fact with gate {gate:.4f}; the run's gate was 0.99"
    assert document["notices"] == [notice]
    assert f"! {notice}" in done.stderr
    assert sorted(document["survivors"]) == sorted(summary["weights_kept"][:2])
    assert all(row["n_test"] == 200 for row in document["stage2"] if row["status"] == "ok")
    out = Path(document["folder"])
    assert json.loads((out / "config.json").read_text())["notices"] == [notice]
    assert pq.read_schema(out / "stage2.parquet").metadata[b"notices"] == notice.encode()
    events = [json.loads(line)["event"] for line in (out / "journal.jsonl").read_text().splitlines()]
    assert events.index("ranked") < events.index("tested")
    assert {path: data for path, data in everything_in(folder).items() if out not in path.parents} == before
