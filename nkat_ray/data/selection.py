"""The images that a training uses, decoded once: its training and validation images, both from the training split."""

from dataclasses import dataclass

import numpy as np

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data.dataset import Dataset, Images, Labels
from nkat_ray.data.splits import split_validation

VALIDATION_ONE_IN = 5  # of a small training split at most one image in so many is for validation


@dataclass(frozen=True)
class Selection:
    """Images uint8 (N, C, H, W) and labels (N,), with the positions of training and validation images among them."""

    images: Images
    labels: Labels
    train_index: Labels
    val_index: Labels


@dataclass(frozen=True)
class Limits:
    """How many images of a training split are used; train_images None takes all that validation leaves."""

    val_images: int
    train_images: int | None


def training_limits(dataset: Dataset, run: RunConfig) -> Limits:
    """What a run uses of a dataset. Stage 1's is as typed; those of the transfer may be smaller than CIFAR-10, so that
    validation takes at most a fifth of their training split, and training at most what is left."""
    if dataset.name == STAGE1_DATASET:
        return Limits(run.val_images, run.train_images)
    size = dataset.sizes["train"]
    val_images = min(run.val_images, size // VALIDATION_ONE_IN)
    return Limits(val_images, None if run.transfer_images is None else min(run.transfer_images, size - val_images))


def select_images(dataset: Dataset, limits: Limits) -> Selection:
    """Decode what a training uses of a dataset; both parts are stratified and fixed, and the validation images are the
    same whatever the number of training images is.

    Raises:
        DataError: the training split is too small, or damaged.
    """
    train, val = split_validation(
        dataset.labels("train"), val_images=limits.val_images, train_images=limits.train_images
    )
    rows = np.sort(np.concatenate([train, val]))
    split = dataset.load("train", rows)
    return Selection(split.images, split.labels, np.searchsorted(rows, train), np.searchsorted(rows, val))
