"""The images that a training uses, decoded once: its training and validation images, both from the training split."""

from dataclasses import dataclass

import numpy as np

from nkat_ray.data.dataset import Dataset, Images, Labels
from nkat_ray.data.splits import split_validation


@dataclass(frozen=True)
class Selection:
    """Images uint8 (N, C, H, W) and labels (N,), with the positions of training and validation images among them."""

    images: Images
    labels: Labels
    train_index: Labels
    val_index: Labels


def select_images(dataset: Dataset, *, val_images: int, train_images: int | None) -> Selection:
    """Decode what a training uses of a dataset; the validation images are the same whatever `train_images` is.

    Args:
        val_images: validation images, stratified and fixed.
        train_images: training images, stratified and fixed; None takes all that validation leaves.

    Raises:
        DataError: the training split is too small, or damaged.
    """
    train, val = split_validation(dataset.labels("train"), val_images=val_images, train_images=train_images)
    rows = np.sort(np.concatenate([train, val]))
    split = dataset.load("train", rows)
    return Selection(split.images, split.labels, np.searchsorted(rows, train), np.searchsorted(rows, val))
