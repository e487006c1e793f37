"""Draw pictures for TensorBoard that need the network or the augmentation: a training batch, the attention."""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from nkat_ray.config import TrialConfig
from nkat_ray.data import Dataset, split_validation
from nkat_ray.data.selection import Limits, Selection
from nkat_ray.explain import attention
from nkat_ray.model.capture import capture_attention
from nkat_ray.train.augment import augment, mix
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.images import ImageSet, in_pixels, normalise, to_network_size

SIDE, ZOOM = 8, 2  # images along one edge of the batch's picture, and its pixels per pixel of an image
GAP = 4  # white pixels between its two halves, before the zoom
SHOWN = 3  # images whose attention is drawn


def augmented_batch(config: TrialConfig, images: Selection, *, num_classes: int, flip: bool, seed: int) -> Image.Image:
    """Draw the first training images as they are (left) and as this recipe augments them once (right)."""
    train = ImageSet(images.images, images.labels, images.train_index, torch.device("cpu"))
    red, green, blue = (round(255 * value) for value in train.statistics()[0])
    plain, labels = train.batch(torch.arange(min(SIDE**2, len(train))))
    generator = torch.Generator().manual_seed(seed)
    seen = augment(plain, config, flip=flip, generator=generator, cutout_fill=(red, green, blue))
    targets = F.one_hot(labels, num_classes).float()
    mixed, _ = mix(seen.float(), targets, mixup=config.mixup, cutmix=config.cutmix, generator=generator)
    left, right = _grid(plain), _grid(mixed.round().to(torch.uint8))
    gap = np.full((len(left), GAP, 3), 255, np.uint8)
    return attention.enlarged(np.concatenate([left, gap, right], axis=1), ZOOM)


def _grid(images: torch.Tensor) -> NDArray[np.uint8]:
    """Arrange images uint8 (B, 3, 32, 32), B at most SIDE^2, as (32 SIDE, 32 SIDE, 3); fill the rest with black."""
    blank = images.new_zeros((SIDE**2 - len(images), *images.shape[1:]))
    tiled: NDArray[np.uint8] = rearrange(torch.cat([images, blank]), "(r c) k h w -> (r h) (c w) k", c=SIDE).numpy()
    return tiled


def winner_attention(weights: Weights, dataset: Dataset, limits: Limits) -> dict[str, Image.Image]:
    """Draw the attention that each token receives, per head and block, over the first validation images.

    Args:
        limits: the numbers of images that the training used, which fix its validation images.

    Returns:
        Tags with one picture per image.
    """
    labels = dataset.labels("train")
    _, val = split_validation(labels, val_images=limits.val_images, train_images=limits.train_images)
    images = dataset.load("train", val[:SHOWN])
    pixels = to_network_size(torch.from_numpy(images.images))
    mean, std = in_pixels(weights.mean), in_pixels(weights.std)
    capture = capture_attention(weights.build(), normalise(pixels, mean, std))
    shares = attention.received(capture.weights.double().numpy())  # (L, B, H, N)
    predicted = capture.logits.argmax(1).tolist()
    names = [dataset.class_names[label] for label in images.labels]
    return {
        f"attention/{n}_{_tag(names[n])}_predicted_{_tag(dataset.class_names[predicted[n]])}": attention.sheet(
            pixels[n].permute(1, 2, 0).numpy(), shares[:, n], split_heads=weights.config.split_heads
        )
        for n in range(len(names))
    }


def _tag(name: Any) -> str:
    return "".join(char if char.isalnum() else "-" for char in str(name))
