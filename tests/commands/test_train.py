"""`nkat train` as a user runs it: the console script's own function, small data, real kills."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nkat_ray.commands import train as command
from nkat_ray.data import Split
from nkat_ray.data.parquet import pair_path, write_split
from nkat_ray.metrics import NKAT_SCALARS, wilson_interval
from nkat_ray.model.capture import nkat_scalars
from nkat_ray.record.tables import read_rows
from nkat_ray.train.images import normalise, to_network_size
from nkat_ray.train.loop import Trainer

TINY = (
    "--dataset tints --embed_dim 16 --num_heads 2 --depth 1 --epochs 3 --warmup 1 --lr 1e-2 --batch_size 32 "
    "--ema 0.9 --mixup 0 --cutmix 0 --randaugment off --cutout off --val_images 40"
)
NOTES = (
    "--conv_stem tiny --patch_size 2 --embed_dim 384 --depth 7 --temperature 0.65 --top_k 6 --top_p 0.80 "
    "--nkat_strength 0.0024 --nkat_decay 0.99 --dropout_attn 0.17 --dropout_embed 0.08 --mixup 0.1 --cutmix 0.2 "
    "--randaugment 2 9 --lr 2e-4 --ema 0.9995 --clip_grad 1.0"
)


@pytest.fixture(scope="module")
def folder(tinted: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of one's own: `tints` can be learnt in seconds, `noise` has labels that mean nothing."""
    made = tmp_path_factory.mktemp("data")
    names = tuple(f"tint {n}" for n in range(10))
    for split, n in (("train", 400), ("test", 100)):
        images, labels = tinted(n, seed=n)
        shuffled = np.random.default_rng(n).permutation(labels)
        for name, given in (("tints", labels), ("noise", shuffled)):
            path = pair_path(made, name, split)  # type: ignore[arg-type]
            write_split(path, Split(images, given), class_names=names, source="a test", encoding="png", flip=True)
    return made


@pytest.fixture
def nkat(folder: Path, nkat_script: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `nkat train` on the datasets above."""
    return lambda line, *more: nkat_script("train", "--data_dir", folder, *line.split(), *more)


def saved_model(folder: Path) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def accuracies(out: Path) -> list[float]:
    events = EventAccumulator(str(next((out / "tensorboard").glob("trial_*/*tfevents*"))))
    events.Reload()
    return [event.value for event in events.Scalars("curves/val_accuracy")]


# --- one training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(), ("--compile",)])
def test_compile_reaches_the_training_which_says_where_it_cannot(flags, nkat, tmp_path, no_compiler):
    code, said, _ = nkat(TINY, "--epochs", 1, "--warmup", 0, "--out", tmp_path / "a", *flags)
    assert code == 0
    assert ("compile: trained without it" in said) == bool(flags)


def test_it_trains_scores_the_test_images_once_and_says_what_came_out(nkat, folder, tmp_path, tinted):
    code, said, _ = nkat(TINY, "--out", tmp_path / "a", "--seed", 3)
    assert code == 0
    assert [int(n) for n in re.findall(r"epoch (\d)/3:", said)] == [1, 2, 3]
    result = json.loads((tmp_path / "a" / "result.json").read_text())

    model = saved_model(tmp_path / "a" / "best")  # the accuracy again, from what was left behind
    images, labels = tinted(100, seed=100)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    with torch.no_grad():
        predicted = model(normalise(to_network_size(torch.from_numpy(images)), mean, std)).argmax(1).numpy()
    correct = int((predicted == labels).sum())
    assert result["test_accuracy"] == correct / 100
    assert (result["ci_low"], result["ci_high"]) == wilson_interval(correct, 100)
    assert correct > 50  # it has learnt: chance is 10

    curve = accuracies(tmp_path / "a")
    assert len(curve) == 3
    assert result["best_epoch"] == 1 + int(np.argmax(curve))
    assert result["val_accuracy"] == pytest.approx(max(curve))
    last = said.strip().splitlines()[-1]
    for shown in (f"{correct / 100:.4f}", "95 % interval", "n = 100", "seed 3", "notes", "counted", "millions"):
        assert shown in last


def test_a_progress_bar_is_shown_where_there_is_a_terminal(nkat, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, said, _ = nkat(TINY, "--out", tmp_path / "a")
    assert "3/3" in said
    assert "━" in said


# --- stopped and continued --------------------------------------------------------------------------------------------


def test_a_training_stopped_after_an_epoch_goes_on_bit_for_bit(nkat, tmp_path, monkeypatch):
    assert nkat(TINY, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "_checkpoint", stopping_after(1))
        assert nkat(TINY, "--out", tmp_path / "cut")[0] == 130
    code, said, _ = nkat("--resume", "--out", tmp_path / "cut")
    assert code == 0
    assert "continued after epoch 1" in said
    assert "epoch 1/3" not in said
    whole, cut = (tmp_path / name / "best" / "model.safetensors" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()
    curves = [read_rows(tmp_path / name / "curves.parquet") for name in ("whole", "cut")]
    times = ("started_s", "epoch_s", "images_per_s")
    of_both = [[{key: row[key] for key in row if key not in times} for row in rows] for rows in curves]
    assert of_both[0] == of_both[1]
    assert [row["epoch"] for row in curves[1]] == [1, 2, 3]
    started = [row["started_s"] for row in curves[1]]
    assert started == sorted(started)
    assert started[0] >= 0


def test_its_curve_has_the_scalars_of_the_model_that_it_keeps(nkat, tmp_path):
    nkat(TINY, "--out", tmp_path / "a", "--depth", 2)
    found = nkat_scalars(saved_model(tmp_path / "a" / "best"))
    best = json.loads((tmp_path / "a" / "result.json").read_text())["best_epoch"]
    (row,) = [row for row in read_rows(tmp_path / "a" / "curves.parquet") if row["epoch"] == best]
    assert {name: row[name] for name in NKAT_SCALARS} == {name: found[name] for name in NKAT_SCALARS}
    assert row["val_accuracy"] == max(row["val_accuracy"] for row in read_rows(tmp_path / "a" / "curves.parquet"))


def test_a_checkpoint_that_was_cut_short_is_passed_over(nkat, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(command, "_checkpoint", stopping_after(2))
        nkat(TINY, "--out", tmp_path / "a")
    newest = tmp_path / "a" / "checkpoints" / "epoch_00002" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    code, said, _ = nkat("--resume", "--out", tmp_path / "a")
    assert code == 0
    assert "continued after epoch 1" in said


def test_without_a_whole_checkpoint_it_begins_again(nkat, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(command, "_checkpoint", stopping_after(1))
        nkat(TINY, "--out", tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    code, said, _ = nkat("--resume", "--out", tmp_path / "a")
    assert code == 0
    assert "epoch 1/3" in said


def stopping_after(epoch: int) -> Callable[..., None]:
    """Stands in for the writer of checkpoints: as Ctrl-C right after one is on disk."""
    write = command._checkpoint

    def stop(out: Path, state: dict[str, Any], weights: bytes | None) -> None:
        write(out, state, weights)
        if state["trainer"]["epoch"] == epoch:
            raise KeyboardInterrupt

    return stop


def test_a_training_with_muon_and_stochastic_depth_goes_on_bit_for_bit(nkat, tmp_path, monkeypatch):
    line = f"{TINY} --optimizer muon --drop_path 0.3 --depth 2"
    assert nkat(line, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(command, "_checkpoint", stopping_after(1))
        assert nkat(line, "--out", tmp_path / "cut")[0] == 130
    assert nkat("--resume", "--out", tmp_path / "cut")[0] == 0
    whole, cut = (tmp_path / name / "best" / "model.safetensors" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_killed_training_goes_on_bit_for_bit(nkat, folder, tmp_path):
    line = TINY.replace("--epochs 3", "--epochs 12")
    assert nkat(line, "--out", tmp_path / "whole")[0] == 0
    words = ["train", *line.split(), "--data_dir", str(folder), "--out", str(tmp_path / "cut")]
    process = subprocess.Popen([sys.executable, "-c", "from nkat_ray.cli import main; main()", *words])
    end = time.monotonic() + 300
    while not list((tmp_path / "cut" / "checkpoints").glob("epoch_0000[3-9]")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    code, said, _ = nkat("--resume", "--out", tmp_path / "cut")
    assert code == 0
    assert "continued after epoch" in said
    whole, cut = (tmp_path / name / "best" / "model.safetensors" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()


# --- the ten-epoch rule -----------------------------------------------------------------------------------------------

TEN = TINY.replace("--epochs 3", "--epochs 20")


def test_smoke_says_go_and_stops_at_epoch_ten(nkat, tmp_path):
    code, said, _ = nkat(TEN, "--smoke", "--out", tmp_path / "a")
    assert code == 0
    assert "epoch 11/20" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("GO: ")
    assert f"{accuracies(tmp_path / 'a')[-1]:.4f}" in last
    assert not (tmp_path / "a" / "result.json").exists()  # the test images are not read for it


def test_smoke_says_no_go_with_exit_code_4(nkat, tmp_path):
    code, said, _ = nkat(TEN.replace("tints", "noise"), "--smoke", "--out", tmp_path / "a")
    assert code == 4
    assert said.strip().splitlines()[-1].startswith("NO-GO: ")


@pytest.mark.parametrize(("tenth", "code"), [(0.4500, 4), (0.4501, 0)])
def test_smoke_judges_the_tenth_epoch_itself(nkat, tmp_path, monkeypatch, tenth, code):
    scores = iter([*[0.9] * 9, tenth])
    monkeypatch.setattr(Trainer, "accuracy", lambda self, images: next(scores))
    assert nkat(TEN, "--smoke", "--out", tmp_path / "a")[0] == code
    assert nkat("--resume", "--out", tmp_path / "a")[0] == code  # and says so again, without training


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_training_that_diverges_stops_itself_and_keeps_its_last_finite_state(nkat, tmp_path, monkeypatch):
    step = Trainer._step
    monkeypatch.setattr(
        Trainer, "_step", lambda self, batch, n: step(self, batch, n) * (torch.nan if self.epoch == 1 else 1.0)
    )
    code, said, _ = nkat(TINY, "--out", tmp_path / "a")
    assert code == 1
    assert "not finite in epoch 2" in said
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["epoch_00001"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dataset dogs", "'dogs' is missing"),
        ("--dataset tints --smoke --epochs 9 --warmup 1", "epochs is 9; --smoke needs at least 10"),
        ("--dataset tints --train_images 5000", "train_images is 5000"),
        ("--dataset tints --patch_size 3", "patch_size is 3"),
        ("--dataset tints --optimizer lion", "lion"),
        ("--dataset tints --optimizer muon --lr 1.5", "lr is 1.5; allowed: a number, > 0 and <= 1"),
        ("--dataset tints --optimizer muon --lr 0", "lr is 0.0; allowed: a number, > 0 and <= 1"),
        ("--dataset tints --drop_path 1", "drop_path is 1.0; allowed: a number, 0..0.9"),
        ("--dataset tints --split_heads --num_heads 4", "split_heads"),
        ("--dataset tints --mixup 0.6 --cutmix 0.6", "mixup + cutmix must be <= 1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(nkat, tmp_path, flags, said):
    code, _, error = nkat(flags, "--out", tmp_path / "a")
    assert code == 2
    assert said in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "a").exists()


def test_a_folder_that_holds_a_training_is_refused(nkat, tmp_path):
    (tmp_path / "training.json").write_text("{}")
    code, _, error = nkat(TINY, "--out", tmp_path)
    assert code == 2
    assert "--resume" in error


def test_nothing_to_resume_and_a_flag_that_disagrees_are_refused(nkat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nkat("--resume")[0] == 2
    assert nkat("--resume", "--out", tmp_path / "none")[0] == 2
    with monkeypatch.context() as patch:
        patch.setattr(command, "_checkpoint", stopping_after(1))
        nkat(TINY, "--out", tmp_path / "a")
    code, _, error = nkat("--resume --lr 0.5", "--out", tmp_path / "a")
    assert code == 2
    assert "lr is 0.5" in error


def test_a_training_of_a_newer_version_is_refused_with_its_unknown_settings(nkat, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(command, "_checkpoint", stopping_after(1))
        nkat(TINY, "--out", tmp_path / "a")
    path = tmp_path / "a" / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "experts": 4}))
    code, _, error = nkat("--resume", "--out", tmp_path / "a")
    assert code == 2
    assert "does not know: experts;" in " ".join(error.split())


def test_without_out_trainings_are_kept_and_resumed_under_the_storage_path(nkat, tmp_path, monkeypatch):
    monkeypatch.setenv("NKAT_STORAGE_PATH", str(tmp_path / "shared"))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(command, "_checkpoint", stopping_after(1))
        nkat(TINY)
    assert [path.parent.name for path in (tmp_path / "shared").glob("train-tints-*/training.json")]
    assert not (tmp_path / "runs").exists()
    code, said, _ = nkat("--resume")
    assert code == 0
    assert "continued after epoch 1" in said


def test_a_bucket_as_storage_path_needs_a_folder_of_its_own(nkat, tmp_path, monkeypatch):
    monkeypatch.setenv("NKAT_STORAGE_PATH", "s3://bucket/runs")
    monkeypatch.chdir(tmp_path)
    for line in (TINY, "--resume"):
        code, _, error = nkat(line)
        assert code == 2
        assert "'s3://bucket/runs'; `nkat train` writes to a folder; give one with --out" in " ".join(error.split())
    assert list(tmp_path.iterdir()) == []
    assert nkat(TINY, "--out", tmp_path / "a")[0] == 0


# --- the notes' command, and data of one's own ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["emnist_letters"])  # the smallest test split: the network has 12.6 M parameters
def test_the_notes_command_trains_the_notes_network(nkat, data_dir, tmp_path, dataset):
    """Its own flags; only the amount of work is cut."""
    work = "--epochs 1 --warmup 0 --train_images 130 --val_images 50"
    code, said, _ = nkat(f"--dataset {dataset} {NOTES} {work} --out {tmp_path}/a --data_dir {data_dir}", "--seed", 0)
    assert code == 0, said
    config = json.loads((tmp_path / "a" / "training.json").read_text())
    assert (config["embed_dim"], config["depth"], config["randaugment"]) == (384, 7, [2, 9])


def test_a_folder_of_images_becomes_a_dataset_that_trains(nkat, nkat_script, tmp_path):
    generator = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for n in range(40):
            pixels = generator.integers(0, 100, (28, 24, 3), dtype=np.uint8) + np.uint8(100 * number)
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{n}.png")
    code, _, error = nkat_script("data", "import", tmp_path / "pets", "--out", tmp_path / "own", "--name", "pets")
    assert code == 0, error
    line = TINY.replace("tints", "pets").replace("--val_images 40", "")  # a fifth of 64 images at most
    code, said, _ = nkat(f"{line} --out {tmp_path}/a --data_dir {tmp_path}/own")
    assert code == 0, said
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["n_test"] == 16
    assert result["test_accuracy"] > 0.8
