"""The recipe's augmentation (docs/spec.md section 4): pure functions of a batch and a generator.

Images stay where they are, as uint8 (B, 3, H, W), and every image draws for itself. No function modifies its input or
touches the global random state. A generator on the CPU gives the same draws for images on any device, without waiting
for the device; one on the device works too.
"""

import itertools
import math
from typing import Final

import torch
from torch import Generator, Tensor

from nkat_ray.config import TrialConfig
from nkat_ray.train.randaugment import check_images, rand_augment

__all__ = ["augment", "channel_shuffle", "cutout", "mix", "rand_augment", "random_crop", "random_flip"]

CROP_PADDING: Final = 4
MIXUP_ALPHA: Final = 0.2
CUTMIX_ALPHA: Final = 1.0
_PERMUTATIONS: Final = tuple(itertools.permutations(range(3)))  # the first leaves the channels as they are

Fill = int | tuple[int, int, int]


def augment(images: Tensor, config: TrialConfig, *, flip: bool, generator: Generator, cutout_fill: Fill = 0) -> Tensor:
    """Apply the whole pack in the recipe's order: crop, flip, RandAugment, Channel-Shuffle, Cutout.

    Args:
        images: uint8 (B, 3, H, W); not modified.
        config: `randaugment`, `channel_shuffle` and `cutout`, each skipped when off; the crop is always made.
        flip: whether the dataset may be mirrored: never digits or letters.
        generator: source of all draws.
        cutout_fill: see `cutout`.

    Returns:
        uint8 (B, 3, H, W).
    """
    images = random_crop(images, padding=CROP_PADDING, generator=generator)
    if flip:
        images = random_flip(images, generator=generator)
    if config.randaugment is not None:
        num_ops, magnitude = config.randaugment
        images = rand_augment(images, num_ops=num_ops, magnitude=magnitude, generator=generator)
    if config.channel_shuffle > 0:
        images = channel_shuffle(images, p=config.channel_shuffle, generator=generator)
    if config.cutout is not None:
        images = cutout(images, size=config.cutout, generator=generator, fill=cutout_fill)
    return images


def random_crop(images: Tensor, *, padding: int = CROP_PADDING, generator: Generator) -> Tensor:
    """Pad by reflection (the edge itself is not repeated), then cut the old size out at a random place for each image.

    Args:
        images: uint8 (B, 3, H, W); not modified.
        padding: pixels on each side, 0..min(H, W) - 1; the offset is uniform over 0..2 * padding on both axes.
        generator: source of the offsets.

    Returns:
        uint8 (B, 3, H, W).

    Raises:
        ValueError: wrong images, or padding outside its range.
    """
    check_images(images)
    n, channels, height, width = images.shape
    if not 0 <= padding < min(height, width):
        raise ValueError(f"padding is {padding}; allowed for images of {height}x{width}: 0..{min(height, width) - 1}")
    offsets = _randint(2 * padding + 1, (2, n, 1), generator).to(images.device) - padding
    rows = _reflect(offsets[0] + torch.arange(height, device=images.device), height)
    columns = _reflect(offsets[1] + torch.arange(width, device=images.device), width)
    source = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1)
    return images.flatten(2).gather(2, source.expand(-1, channels, -1)).view_as(images)


def random_flip(images: Tensor, *, generator: Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: uint8 (B, 3, H, W); not modified.
        generator: source of the draws.

    Returns:
        uint8 (B, 3, H, W).
    """
    check_images(images)
    n = len(images)
    source = torch.arange(n, device=generator.device) + n * _chosen(n, 0.5, generator)
    return torch.cat([images, images.flip(3)]).index_select(0, source.to(images.device))


def channel_shuffle(images: Tensor, *, p: float, generator: Generator) -> Tensor:
    """Channel-Shuffle (docs/spec.md section 3): permute each image's colour channels with probability p.

    Args:
        images: uint8 (B, 3, H, W); not modified.
        p: probability an image, 0..1; the permutation is uniform over all six, the identity among them.
        generator: source of the draws.

    Returns:
        uint8 (B, 3, H, W).

    Raises:
        ValueError: wrong images, or p outside 0..1.
    """
    check_images(images)
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; allowed: 0..1")
    n = len(images)
    drawn = _randint(len(_PERMUTATIONS), (n,), generator) * _chosen(n, p, generator)
    order = torch.tensor(_PERMUTATIONS, device=drawn.device)[drawn]
    planes = (3 * torch.arange(n, device=drawn.device)[:, None] + order).flatten()
    return images.flatten(0, 1).index_select(0, planes.to(images.device)).view_as(images)


def cutout(images: Tensor, *, size: int, generator: Generator, fill: Fill = 0) -> Tensor:
    """Cutout (DeVries and Taylor 2017): one square an image, centred on a pixel drawn uniformly.

    The square may leave the image, so near the border less is covered. An even size reaches one pixel further up and
    left than down and right. The authors' zero after normalisation is, before it, the training images' channel means:
    pass them as `fill`.

    Args:
        images: uint8 (B, 3, H, W); not modified.
        size: side of the square in pixels, >= 1.
        generator: source of the centres.
        fill: value of the covered pixels, 0..255, one for all channels or one for each; 0 (black), as RandAugment's.

    Returns:
        uint8 (B, 3, H, W).

    Raises:
        ValueError: wrong images, size below 1, or a fill that is no uint8.
    """
    check_images(images)
    if size < 1:
        raise ValueError(f"size is {size}; it must be >= 1")
    colour = (fill,) if isinstance(fill, int) else fill
    if len(colour) not in (1, 3) or not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"fill is {fill!r}; pass one number or three, each 0..255")
    n, _, height, width = images.shape
    rows = _covered(_randint(height, (n, 1), generator), size, height)
    columns = _covered(_randint(width, (n, 1), generator), size, width)
    square = (rows[:, None, :, None] & columns[:, None, None, :]).to(images.device, torch.uint8)
    return images * (1 - square) + square * torch.tensor(colour, dtype=torch.uint8, device=images.device).view(-1, 1, 1)


def mix(images: Tensor, targets: Tensor, *, mixup: float, cutmix: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) or neither, drawn once for the batch.

    Each image is mixed with its mirror in the batch's order, as timm does: share lambda of it, 1 - lambda of the other.
    Mixup draws lambda from Beta(0.2, 0.2); CutMix from Beta(1, 1), then corrects it to the area that the clipped
    box leaves.

    Args:
        images: (B, ..., H, W), float or uint8, whose Mixup is rounded; not modified.
        targets: float (B, K), each row a distribution over classes; not modified.
        mixup: probability of Mixup, 0..1.
        cutmix: probability of CutMix, 0..1; mixup + cutmix <= 1.
        generator: source of all draws.

    Returns:
        Images and targets of the same shapes and types; the inputs themselves when the batch is left alone.

    Raises:
        ValueError: a probability out of range, or not as many targets as images.
    """
    if not (mixup >= 0 and cutmix >= 0 and mixup + cutmix <= 1):
        raise ValueError(f"mixup is {mixup} and cutmix {cutmix}; each must be >= 0 and their sum <= 1")
    if len(images) != len(targets) or not targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype} {tuple(targets.shape)}; pass float ({len(images)}, classes)")
    if mixup + cutmix == 0:
        return images, targets
    drawn = float(torch.rand((), generator=generator, device=generator.device))
    if drawn < mixup:
        lam = sample_beta(MIXUP_ALPHA, generator=generator)
        return _mixup(images, lam), _blend(targets, lam)
    if drawn < mixup + cutmix:
        height, width = images.shape[-2:]
        top, bottom, left, right = cutmix_box(height, width, sample_beta(CUTMIX_ALPHA, generator=generator), generator)
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        return mixed, _blend(targets, 1 - (bottom - top) * (right - left) / (height * width))
    return images, targets


def cutmix_box(height: int, width: int, lam: float, generator: Generator) -> tuple[int, int, int, int]:
    """Box of area 1 - lam around a uniform centre, clipped to the image, as timm: top, bottom, left, right."""
    side = math.sqrt(1 - lam)
    box_height, box_width = int(height * side), int(width * side)
    y = int(_randint(height, (), generator))
    x = int(_randint(width, (), generator))
    return (
        max(y - box_height // 2, 0),
        min(y + (box_height + 1) // 2, height),
        max(x - box_width // 2, 0),
        min(x + (box_width + 1) // 2, width),
    )


def sample_beta(alpha: float, *, generator: Generator) -> float:
    """Draw from Beta(alpha, alpha), exact (Jöhnk 1964), since torch.distributions takes no generator.

    Args:
        alpha: > 0; quick up to about 2, where one pair in six is accepted.
        generator: source of the draws.
    """
    while True:
        x, y = torch.rand(2, dtype=torch.float64, generator=generator, device=generator.device).pow(1 / alpha).tolist()
        if 0 < x + y <= 1:
            return float(x / (x + y))


def _mixup(images: Tensor, lam: float) -> Tensor:
    if images.is_floating_point():
        return _blend(images, lam)
    return _blend(images.float(), lam).round().to(images.dtype)


def _blend(values: Tensor, lam: float) -> Tensor:
    return values * lam + values.flip(0) * (1 - lam)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Positions -size + 1 .. 2 * size - 2 folded back into 0..size - 1 at the first and the last pixel."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _covered(centre: Tensor, size: int, length: int) -> Tensor:
    """Which of `length` positions lie in the `size` around each centre: (B, 1) to bool (B, length)."""
    distance = torch.arange(length, device=centre.device) - (centre - size // 2)
    return (distance >= 0) & (distance < size)


def _chosen(n: int, p: float, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device) < p


def _randint(high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)
