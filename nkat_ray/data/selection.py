"""Choose the training and validation images of a training, both from the training split."""

from dataclasses import dataclass

import numpy as np

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data.dataset import Dataset, Images, Labels
from nkat_ray.data.splits import split_validation

VALIDATION_ONE_IN = 5  # of a small training split, at most one image in this many is for validation


def validation_size(size: int, wanted: int) -> int:
    """Return the number of validation images of a training split of `size` images: `wanted`, at most a fifth."""
    return min(wanted, size // VALIDATION_ONE_IN)


@dataclass(frozen=True)
class Selection:
    """Images uint8 (N, C, H, W) and labels (N,), with the positions of training and validation images among them."""

    images: Images
    labels: Labels
    train_index: Labels
    val_index: Labels


@dataclass(frozen=True)
class Limits:
    """The numbers of images of a training split that are used; train_images None uses all but validation."""

    val_images: int
    train_images: int | None


def training_limits(dataset: Dataset, run: RunConfig) -> Limits:
    """Return the numbers of images that a run uses of a dataset.

    For Stage 1's dataset they are those of the configuration. The datasets of the transfer may be smaller than
    CIFAR-10: validation uses at most a fifth of their training split, and training at most the rest.
    """
    if dataset.name == STAGE1_DATASET:
        return Limits(run.val_images, run.train_images)
    size = dataset.sizes["train"]
    val_images = validation_size(size, run.val_images)
    return Limits(val_images, None if run.transfer_images is None else min(run.transfer_images, size - val_images))


def select_images(dataset: Dataset, limits: Limits) -> Selection:
    """Decode the training and validation images of a training.

    Both sets are stratified and fixed; the validation images do not depend on the number of training images.

    Raises:
        DataError: the training split is too small, or damaged.
    """
    train, val = split_validation(
        dataset.labels("train"), val_images=limits.val_images, train_images=limits.train_images
    )
    rows = np.sort(np.concatenate([train, val]))
    split = dataset.load("train", rows)
    return Selection(split.images, split.labels, np.searchsorted(rows, train), np.searchsorted(rows, val))
