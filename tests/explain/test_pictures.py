"""What training sees and what the winner looks at, against the functions that really do it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nkat_ray.config import DataConfig, RunConfig, TrialConfig
from nkat_ray.data import Dataset, open_dataset
from nkat_ray.data.selection import Limits, Selection
from nkat_ray.explain.pictures import SHOWN, augmented_batch, winner_attention
from nkat_ray.model import create_nkat_vit
from nkat_ray.train.checkpoint import Weights

PLAIN = TrialConfig(randaugment=None, cutout=None, mixup=0.0, cutmix=0.0)


def halves(picture: Any) -> tuple[np.ndarray, np.ndarray]:
    """The left and the right grid, a pixel of the images each, (256, 256, 3)."""
    pixels = np.asarray(picture)
    assert pixels.shape == (512, 2 * 512 + 8, 3)
    return pixels[::2, :512:2], pixels[::2, 520::2]


def selection(tinted: Any, n: int) -> Selection:
    images, labels = tinted(n + 20)
    return Selection(images, labels, np.arange(20, n + 20), np.arange(20))


def test_left_are_the_training_images_as_they_are(tinted: Any) -> None:
    data = selection(tinted, 100)
    left, right = halves(augmented_batch(PLAIN, data, num_classes=10, flip=False, seed=0))
    for n in (0, 7, 63):
        row, column = 32 * (n // 8), 32 * (n % 8)
        assert (left[row : row + 32, column : column + 32] == data.images[20 + n].transpose(1, 2, 0)).all()
    assert (left != right).any()  # the crop is always made


def test_right_is_what_the_recipe_makes_of_them(tinted: Any) -> None:
    data = selection(tinted, 64)
    pictures = {
        name: halves(augmented_batch(config, data, num_classes=10, flip=True, seed=seed))[1]
        for name, config, seed in [
            ("plain", PLAIN, 0), ("again", PLAIN, 0), ("other", PLAIN, 1),
            ("mixed", dataclasses.replace(PLAIN, mixup=1.0), 0),
        ]
    }  # fmt: skip
    assert (pictures["plain"] == pictures["again"]).all()
    assert (pictures["plain"] != pictures["other"]).any()
    assert (pictures["plain"] != pictures["mixed"]).any()


def test_few_grey_images_leave_black(tinted: Any) -> None:
    images, labels = tinted(30, channels=1, size=28)
    data = Selection(images, labels, np.arange(3), np.arange(3, 30))
    left, _ = halves(augmented_batch(TrialConfig(), data, num_classes=10, flip=False, seed=0))
    assert left[:32, :96].any()
    assert not left[:32, 96:].any()
    assert not left[32:].any()


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The generated one."""
    monkeypatch.delenv("NKAT_DATA_DIR", raising=False)
    found = open_dataset("cifar10", DataConfig(data_dir=None, data="synthetic"), notice=print)
    assert isinstance(found, Dataset)
    return found


@pytest.fixture
def weights() -> Weights:
    """A network that has learned nothing."""
    config = TrialConfig(embed_dim=64, depth=2, epochs=10, train_images=100, val_images=50)
    torch.manual_seed(0)
    return Weights(
        config=config, dataset="cifar10", num_classes=10, grey=False, mean=(0.5,) * 3, std=(0.2,) * 3, epoch=1,
        val_accuracy=0.1, seed=0, tensors=create_nkat_vit(config, num_classes=10).state_dict(),
    )  # fmt: skip


def test_the_winner_is_shown_over_validation_images(cifar10: Dataset, weights: Weights) -> None:
    pictures = winner_attention(weights, cifar10, Limits(val_images=50, train_images=100))
    assert len(pictures) == SHOWN
    for n, (tag, picture) in enumerate(pictures.items()):
        assert tag.startswith(f"attention/{n}_")
        assert "_predicted_" in tag
        assert picture.width > 8 * 3 * 32  # eight heads
        assert picture.height > 2 * 3 * 32  # two blocks


def test_a_run_shows_the_model_in_its_best_folder(cifar10: Dataset, weights: Weights, tmp_path: Path) -> None:
    from nkat_ray.commands.driver import Driver
    from nkat_ray.train.transfer import save_weights

    save_weights(weights, weights.to_bytes(), tmp_path / "best")
    config = RunConfig.from_preset("quick", train_images=100, val_images=50)
    driver: Any = SimpleNamespace(_run=SimpleNamespace(folder=tmp_path), _config=config, _stage1_dataset=cifar10)
    shown = Driver._winner_pictures(driver, {"winner": {"trial": 0}})
    expected = winner_attention(weights, cifar10, Limits(val_images=50, train_images=100))
    assert {tag: picture.tobytes() for tag, picture in shown.items()} == {
        tag: picture.tobytes() for tag, picture in expected.items()
    }
    assert Driver._winner_pictures(driver, {"winner": None}) == {}
