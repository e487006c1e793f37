"""Stage 2 with real workers: a tiny network, four small datasets of tinted noise."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.data import DataError, Dataset, Missing, Split
from nkat_ray.evaluate import Survivor, WeightSource, payload_path, score_on_test, validate_survivors
from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.metrics import STAGE2_DATASETS, tpe_score, wilson_interval
from nkat_ray.search.resources import Share
from nkat_ray.search.vault import deposit, withdraw
from nkat_ray.train.checkpoint import Weights

TINY = TrialConfig(
    embed_dim=16, num_heads=2, depth=1, batch_size=32, epochs=2, warmup=1, lr=2e-3, ema=0.9, mixup=0.0, cutmix=0.0,
    randaugment=None, cutout=None,
)  # fmt: skip


@dataclass(frozen=True)
class ArrayReader:
    """120 images to train on and 60 to test on, made anew at each load; `broken` cannot be decoded."""

    make: Callable[..., tuple[np.ndarray, np.ndarray]]
    channels: int
    broken: bool = False

    def load(self, split: str, rows: Any = None) -> Split:
        if self.broken:
            raise DataError("row 3 is damaged")
        images, labels = self.make(120 if split == "train" else 60, channels=self.channels, seed=len(split))
        rows = np.arange(len(labels)) if rows is None else rows
        return Split(images[rows], labels[rows])

    def labels(self, split: str) -> Any:
        return np.arange(120 if split == "train" else 60, dtype=np.int64) % 10


@pytest.fixture(scope="module")
def datasets(tinted: Callable[..., Any]) -> dict[str, Dataset | Missing]:
    def one(name: str) -> Dataset:
        grey = name != "cifar10"
        return Dataset(
            name=name, class_names=tuple("abcdefghij"), grey=grey, flip=False, source="test", digest="", verified=True,
            sizes={"train": 120, "test": 60}, reader=ArrayReader(tinted, 1 if grey else 3),
        )  # fmt: skip

    return {name: one(name) for name in STAGE2_DATASETS}


@pytest.fixture(scope="module")
def payload() -> bytes:
    """A network's weights as a trial hands them over; not trained."""
    import torch

    from nkat_ray.model import create_nkat_vit

    torch.manual_seed(0)
    model = create_nkat_vit(TINY, num_classes=10)
    return Weights(
        config=TINY, dataset="cifar10", num_classes=10, grey=False, mean=(0.5,) * 3, std=(0.2,) * 3, epoch=1,
        val_accuracy=0.5, seed=0, tensors=model.state_dict(),
    ).to_bytes()  # fmt: skip


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return RunConfig(
        preset="quick", name="r", val_images=20, transfer_epochs=1, transfer_images=60, test_images=40, batch_size=32
    )


def survivor(trial: int = 0, *, checkpoints: tuple[str, ...] = ()) -> Survivor:
    return Survivor(
        trial=trial, epoch=1, checkpoints=checkpoints, conv_stem="tiny", embed_dim=16, nkat_parameters=4,
        parameters=1000, share=Share(cpus=1, gpus=0.0),
    )  # fmt: skip


def validated(
    survivors: list[Survivor], datasets: Any, run: RunConfig, vault: Any, notice: Any = print, done: Any = ()
) -> dict[tuple[int, str], tuple[dict[str, Any], bytes | None]]:
    rows = validate_survivors(
        survivors, datasets, run=run, vault=vault, done=dict.fromkeys(done), notice=notice
    )  # fmt: skip
    return {(row["trial"], row["dataset"]): (row, weights) for row, weights in rows}


@pytest.fixture(scope="module")
def whole(datasets: Any, run: RunConfig, vault: Any, payload: bytes, tmp_path_factory: Any) -> Any:
    """One survivor through both halves; what the vault held afterwards."""
    deposit(vault, 0, 0.5, payload)
    rows = validated([survivor()], datasets, run, vault)
    left = withdraw(vault, 0)
    folder = tmp_path_factory.mktemp("stage2")
    for (trial, name), (_, weights) in rows.items():
        assert weights is not None
        payload_path(folder, trial, name).write_bytes(weights)
    tested = score_on_test([row for row, _ in rows.values()], folder, {0: survivor()}, datasets, run=run)
    return rows, {row["dataset"]: row for row in tested}, left


def test_every_dataset_gets_a_validation_row_and_weights_of_its_own(whole: Any, payload: bytes) -> None:
    rows, _, _ = whole
    assert sorted(name for _, name in rows) == sorted(STAGE2_DATASETS)
    for (_, name), (row, weights) in rows.items():
        assert row["n_val"] == 20
        assert row["test_accuracy"] is None
        assert (weights == payload) == (name == "cifar10")  # which is scored as it is
        assert row["mode"] == ("as trained" if name == "cifar10" else "finetune")
        assert Weights.from_bytes(weights).dataset == name


def test_the_tests_figures_follow_from_the_counts(whole: Any, run: RunConfig) -> None:
    _, tested, _ = whole
    for row in tested.values():
        assert row["n_test"] == 40
        correct = round(row["test_accuracy"] * 40)
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(wilson_interval(correct, 40))
        if row["status"] == "ok":
            assert row["tpe"] == pytest.approx(tpe_score(row["test_accuracy"], survivor().lambdas()["notes"]))
        else:
            assert "chance" in row["error"]


def test_what_is_no_longer_needed_is_released(whole: Any) -> None:
    assert whole[2] is None


def test_the_same_seed_gives_the_same_weights(
    whole: Any, datasets: Any, run: RunConfig, vault: Any, payload: bytes
) -> None:
    deposit(vault, 0, 0.5, payload)
    again = validated([survivor()], datasets, run, vault)
    assert {key: weights for key, (_, weights) in again.items()} == {k: weights for k, (_, weights) in whole[0].items()}


def test_what_an_earlier_driver_finished_is_left_out(datasets: Any, run: RunConfig, vault: Any, payload: bytes) -> None:
    deposit(vault, 0, 0.5, payload)
    done = [(0, name) for name in STAGE2_DATASETS if name != "cifar10"]
    assert list(validated([survivor()], datasets, run, vault, done=done)) == [(0, "cifar10")]


def test_weights_that_the_vault_lacks_are_read_from_disk_with_a_notice(
    datasets: Any, run: RunConfig, vault: Any, payload: bytes, tmp_path: Path
) -> None:
    cut, whole_one, notices = tmp_path / "new", tmp_path / "old", []
    for folder, data in ((cut, payload[:-9]), (whole_one, payload)):
        folder.mkdir()
        (folder / WEIGHTS_FILE).write_bytes(data)
    cifar = {"cifar10": datasets["cifar10"]}
    one = survivor(7, checkpoints=(str(cut), str(whole_one)))
    ((_, weights),) = validated([one], cifar, run, vault, notices.append).values()
    assert weights == payload
    assert notices == ["trial 7: its weights were not in the object store and were read from disk"]


def test_weights_that_are_nowhere_fail_that_survivor_alone(
    datasets: Any, run: RunConfig, vault: Any, payload: bytes
) -> None:
    deposit(vault, 1, 0.5, payload)
    cifar = {"cifar10": datasets["cifar10"]}
    rows = validated([survivor(0), survivor(1)], cifar, run, vault)
    assert rows[0, "cifar10"][0]["status"] == "failed"
    assert rows[0, "cifar10"][0]["error"] == "its weights are neither in the object store nor on disk"
    assert rows[1, "cifar10"][0]["n_val"] == 20


def test_a_missing_and_a_damaged_dataset_fail_alone(datasets: Any, run: RunConfig, vault: Any, payload: bytes) -> None:
    damaged = datasets["mnist"]
    broken = dataclasses.replace(damaged, reader=dataclasses.replace(damaged.reader, broken=True))
    found = {"mnist": broken, "fashion_mnist": Missing("fashion_mnist", "no network"), "cifar10": datasets["cifar10"]}
    deposit(vault, 0, 0.5, payload)
    rows = {name: row for (_, name), (row, _) in validated([survivor()], found, run, vault).items()}
    assert (rows["mnist"]["status"], rows["mnist"]["error"]) == ("failed", "row 3 is damaged")
    assert (rows["fashion_mnist"]["status"], rows["fashion_mnist"]["error"]) == ("missing", "no network")
    assert rows["cifar10"]["n_val"] == 20


def test_a_row_without_weights_is_passed_on_and_test_images_are_not_read(
    datasets: Any, run: RunConfig, tmp_path: Path
) -> None:
    row = {"trial": 0, "dataset": "mnist", "classes": 10, "status": "failed", "error": "why"}
    assert list(score_on_test([row], tmp_path, {0: survivor()}, datasets, run=run)) == [row]


def test_weights_are_fetched_once_until_they_are_forgotten(ray_local: Any, vault: Any, payload: bytes) -> None:
    source = WeightSource(vault, print)
    deposit(vault, 3, 0.5, payload)
    first = source.get(survivor(3))
    deposit(vault, 3, 0.6, payload + b"better")
    assert source.get(survivor(3)) == first
    source.forget(survivor(3))
    assert ray_local.get(source.get(survivor(3))) == payload + b"better"
    source.release(3)
    assert withdraw(vault, 3) is None
