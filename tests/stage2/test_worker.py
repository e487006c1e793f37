"""What workers do in Stage 2, here in this process."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nkat_ray.cluster.resources import Share
from nkat_ray.data import Dataset
from nkat_ray.data.selection import select_images, training_limits
from nkat_ray.stage2.worker import transfer_weights
from nkat_ray.train.checkpoint import Weights


def test_a_transfer_takes_its_epochs_and_is_validated(
    payload: bytes, tmp_path: Path, datasets: Mapping[str, Dataset], make_run: Callable[..., Any]
) -> None:
    config, mnist = make_run(tmp_path, transfer_epochs=3).config, datasets["mnist"]
    images = select_images(mnist, training_limits(mnist, config))
    moved, figures, notices = transfer_weights(payload, images, mnist.traits, config, 0, Share(cpus=1, gpus=0.0))
    weights = Weights.from_bytes(moved)
    assert (weights.dataset, weights.epoch, weights.val_accuracy) == ("mnist", 3, figures["val_accuracy"])
    assert (figures["n_val"], notices) == (20, [])


def test_cifar10_is_scored_as_it_is(
    payload: bytes, tmp_path: Path, datasets: Mapping[str, Dataset], make_run: Callable[..., Any]
) -> None:
    config, cifar10 = make_run(tmp_path).config, datasets["cifar10"]
    images = select_images(cifar10, training_limits(cifar10, config))
    same, _, _ = transfer_weights(payload, images, cifar10.traits, config, 0, Share(cpus=1, gpus=0.0))
    assert same == payload
