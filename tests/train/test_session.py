import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nkat_ray.config import TrialConfig
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Selection
from nkat_ray.train.images import TrainingData
from nkat_ray.train.session import create_network, create_trainer, training_data

CONFIG = TrialConfig(embed_dim=16, num_heads=2, depth=1, batch_size=32, epochs=2, warmup=1, color_norm="residual")
DIGITS = Traits(name="digits", num_classes=3, grey=True, flip=False)


@pytest.fixture
def data(tinted: Callable[..., Any]) -> TrainingData:
    """Grey images of 28x28 in three classes: 120 to train on, 30 to validate."""
    images, labels = tinted(150, channels=1, size=28)
    selection = Selection(images, labels % 3, np.arange(120), np.arange(120, 150))
    return training_data(selection, DIGITS, torch.device("cpu"))


def test_the_data_have_both_parts_and_the_statistics_of_the_training_images(data: TrainingData) -> None:
    assert (len(data.train), len(data.val)) == (120, 30)
    assert (data.mean, data.std) == data.train.statistics()
    assert (data.mean, data.std) != data.val.statistics()
    assert data.device == torch.device("cpu")


def test_a_new_network_fits_the_data(data: TrainingData) -> None:
    model = create_network(CONFIG, data, seed=0)
    assert (model.grey, model.num_classes) == (True, 3)
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == (data.mean, data.std)


def test_the_seed_decides_the_weights_whatever_ran_before(data: TrainingData) -> None:
    first = create_network(CONFIG, data, seed=3).state_dict()
    torch.rand(5)
    same, other = (create_network(CONFIG, data, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_trainer_trains_a_new_network_or_the_one_it_is_given(data: TrainingData) -> None:
    new = create_trainer(CONFIG, data, seed=3, notice=print)
    assert torch.equal(new.model.head.weight, create_network(CONFIG, data, seed=3).head.weight)  # type: ignore[union-attr, arg-type]
    given = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))
    steps: list[float] = []
    recipe = dataclasses.replace(CONFIG, ema=None)
    trainer = create_trainer(recipe, data, seed=3, notice=print, model=given, on_step=steps.append)
    assert trainer.model is given
    assert len(list(trainer.epochs())) == 2
    assert steps == [pytest.approx(step / 4) for step in range(1, 9)]  # 120 images, 32 per step
    assert list(create_trainer(CONFIG, data, seed=3, notice=print, deadline_s=0.0).epochs()) == []


def test_a_large_step_is_recomputed_on_a_cpu_with_the_same_numbers(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [result.train_loss for result in create_trainer(CONFIG, data, seed=3, notice=print).epochs()]
    monkeypatch.setattr("nkat_ray.cost.RECOMPUTE_BYTES", 0)
    trainer = create_trainer(CONFIG, data, seed=3, notice=print)
    assert trainer.model.grad_checkpointing
    assert [result.train_loss for result in trainer.epochs()] == plain
