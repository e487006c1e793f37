"""The recipe's augmentation (docs/spec.md section 4): random draws, and pure functions of images and their draws.

Images stay on their device, as uint8 (B, 3, H, W), and each image has random draws of its own. Draws are made apart
from the pixels (`draw`, `apply`), so that several batches, each with its own draws, can be augmented at once, which is
twice as fast. No function modifies its input or touches the global random state. A generator on the CPU gives the same
draws for images on any device, without waiting for the device; one on the device works too.
"""

import itertools
import math
from typing import Final, NamedTuple

import torch
from torch import Generator, Tensor

from nkat_ray.config import TrialConfig
from nkat_ray.train.randaugment import apply_sorted, check_images, draw_codes, group_sizes, rand_augment

__all__ = ["Mixing", "apply", "apply_mixing", "augment", "cutout", "draw", "draw_mixing", "mix", "rand_augment"]

CROP_PADDING: Final = 4
MIXUP_ALPHA: Final = 0.2
CUTMIX_ALPHA: Final = 1.0
_PERMUTATIONS: Final = tuple(itertools.permutations(range(3)))  # the first leaves the channels as they are

Fill = int | tuple[int, int, int]


def augment(images: Tensor, config: TrialConfig, *, flip: bool, generator: Generator, cutout_fill: Fill = 0) -> Tensor:
    """Apply all augmentations in the recipe's order: crop, flip, RandAugment, Channel-Shuffle, Cutout.

    Args:
        images: uint8 (B, 3, H, W), H and W above 4; not modified.
        config: `randaugment`, `channel_shuffle` and `cutout`, each skipped when off; the crop is always made.
        flip: whether a mirrored image still belongs to its class; False for digits and letters.

    Returns:
        uint8 (B, 3, H, W).

    Raises:
        ValueError: wrong images.
    """
    check_images(images)
    n, _, height, width = images.shape
    draws = draw(n, height, width, config, flip=flip, generator=generator)
    return apply(images, draws, config, flip=flip, cutout_fill=cutout_fill)


def draw(n: int, height: int, width: int, config: TrialConfig, *, flip: bool, generator: Generator) -> Tensor:
    """Draw what `apply` does to n images of height x width pixels, independently for each image.

    Returns:
        int64 (K, n), one row per choice, on the generator's device: top and left edge of the crop; 1 for a mirrored
        image (if `flip`); one code per round of RandAugment; the permutation of the channels; row and column of the
        centre of Cutout's square. The draws of several batches are joined along the second axis.
    """
    rows = [*_randint(2 * CROP_PADDING + 1, (2, n), generator)]
    if flip:
        rows.append(_chosen(n, 0.5, generator).long())
    if config.randaugment is not None:
        rows += [draw_codes(n, generator=generator) for _ in range(config.randaugment[0])]
    if config.channel_shuffle > 0:
        rows.append(_randint(len(_PERMUTATIONS), (n,), generator) * _chosen(n, config.channel_shuffle, generator))
    if config.cutout is not None:
        rows += [_randint(height, (n,), generator), _randint(width, (n,), generator)]
    return torch.stack(rows)


def apply(images: Tensor, draws: Tensor, config: TrialConfig, *, flip: bool, cutout_fill: Fill = 0) -> Tensor:
    """Augment images as drawn. The draws travel to the images' device in one copy.

    Args:
        images: uint8 (n, 3, H, W); not modified.
        draws: what `draw` returned for `config` and `flip`.

    Returns:
        uint8 (n, 3, H, W).
    """
    rounds, magnitude = config.randaugment or (0, 0)
    codes = draws[2 + flip : 2 + flip + rounds]
    order = codes.argsort(dim=1)  # RandAugment handles images with the same operation together
    sizes = [group_sizes(code) for code in codes]
    moved = torch.cat([draws, order, order.argsort(dim=1)]).to(images.device)
    choices = iter(moved[: len(draws)])
    top, left = next(choices), next(choices)
    images = crop(images, top, left, mirrored=next(choices) if flip else None)
    for number in range(rounds):
        next(choices)  # the codes themselves: `order` and `sizes` say it all
        place, back = moved[len(draws) + number], moved[len(draws) + rounds + number]
        images = apply_sorted(images, place, back, sizes[number], magnitude)
    if config.channel_shuffle > 0:
        images = permute_channels(images, next(choices))
    if config.cutout is not None:
        images = cover(images, next(choices), next(choices), size=config.cutout, fill=cutout_fill)
    return images


def crop(images: Tensor, top: Tensor, left: Tensor, *, mirrored: Tensor | None = None) -> Tensor:
    """Pad by reflection (the edge itself is not repeated), crop each image to its old size, and mirror some.

    Args:
        images: uint8 (n, 3, H, W), H and W above CROP_PADDING; not modified.
        top: int64 (n,), upper edge of the crop in the padded image, 0..2 * CROP_PADDING.
        left: int64 (n,), left edge, likewise.
        mirrored: int64 (n,), 1 where the image is mirrored left to right, else 0; None mirrors none.

    Returns:
        uint8 (n, 3, H, W).
    """
    n, channels, height, width = images.shape
    rows = _reflect(top[:, None] - CROP_PADDING + torch.arange(height, device=images.device), height)
    columns = _reflect(left[:, None] - CROP_PADDING + torch.arange(width, device=images.device), width)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None] > 0, columns.flip(1), columns)
    source = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1)
    return images.flatten(2).gather(2, source.expand(-1, channels, -1)).view_as(images)


def permute_channels(images: Tensor, permutation: Tensor) -> Tensor:
    """Permute each image's colour channels: Channel-Shuffle (docs/spec.md section 3).

    Args:
        images: uint8 (n, 3, H, W); not modified.
        permutation: int64 (n,), the channels' order by its place among itertools.permutations, 0..5; 0 changes nothing.

    Returns:
        uint8 (n, 3, H, W).
    """
    order = torch.tensor(_PERMUTATIONS, device=images.device)[permutation]
    planes = (3 * torch.arange(len(images), device=images.device)[:, None] + order).flatten()
    return images.flatten(0, 1).index_select(0, planes).view_as(images)


def cutout(images: Tensor, *, size: int, generator: Generator, fill: Fill = 0) -> Tensor:
    """Cover one square per image, centred on a pixel drawn uniformly: Cutout (DeVries and Taylor 2017).

    The square may leave the image, so near the border less is covered. An even size reaches one pixel further up and
    left than down and right. The authors' zero after normalisation is, before it, the training images' channel means:
    pass them as `fill`.

    Args:
        images: uint8 (B, 3, H, W); not modified.
        size: side of the square in pixels, >= 1.
        fill: value of the covered pixels, 0..255, one for all channels or one per channel; RandAugment's is 0, black.

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
    centres = torch.stack([_randint(height, (n,), generator), _randint(width, (n,), generator)]).to(images.device)
    return cover(images, centres[0], centres[1], size=size, fill=fill)


def cover(images: Tensor, row: Tensor, column: Tensor, *, size: int, fill: Fill) -> Tensor:
    """Cover one square per image around its centre, int64 (n,) each for row and column; see `cutout`.

    Positions beyond the border are moved onto it, which the square covers anyway, as its centre is inside the image.
    """
    n, channels, height, width = images.shape
    side = torch.arange(size, device=images.device) - size // 2
    rows = (row[:, None] + side).clamp(0, height - 1)
    columns = (column[:, None] + side).clamp(0, width - 1)
    places = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
    colour = torch.tensor((fill,) if isinstance(fill, int) else fill, dtype=torch.uint8, device=images.device)
    return images.flatten(2).scatter(2, places, colour.view(1, -1, 1).expand_as(places)).view_as(images)


class Mixing(NamedTuple):
    """How to mix a batch: the share of the image itself, and CutMix's box (top, bottom, left, right) or None."""

    share: float
    box: tuple[int, int, int, int] | None


def mix(images: Tensor, targets: Tensor, *, mixup: float, cutmix: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Apply Mixup (Zhang et al. 2018), CutMix (Yun et al. 2019) or neither, drawn once per batch.

    The first image is mixed with the last, the second with the last but one and so on, as timm does: a share lambda of
    the image itself, 1 - lambda of the other. Mixup draws lambda from Beta(0.2, 0.2); CutMix from Beta(1, 1), then
    corrects it to the area that the clipped box leaves.

    Args:
        images: (B, ..., H, W), float, or uint8 (Mixup is then rounded); not modified.
        targets: float (B, K), each row a distribution over classes; not modified.
        mixup: probability of Mixup, 0..1.
        cutmix: probability of CutMix, 0..1; mixup + cutmix <= 1.

    Returns:
        Images and targets of the same shapes and types; the inputs themselves when the batch is left alone.

    Raises:
        ValueError: a probability out of range, or not as many targets as images.
    """
    if not (mixup >= 0 and cutmix >= 0 and mixup + cutmix <= 1):
        raise ValueError(f"mixup is {mixup} and cutmix {cutmix}; each must be >= 0 and their sum <= 1")
    if len(images) != len(targets) or not targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype} {tuple(targets.shape)}; pass float ({len(images)}, classes)")
    height, width = images.shape[-2:]
    mixing = draw_mixing(height, width, mixup=mixup, cutmix=cutmix, generator=generator)
    return apply_mixing(images, targets, mixing)


def draw_mixing(height: int, width: int, *, mixup: float, cutmix: float, generator: Generator) -> Mixing | None:
    """Draw how a batch of height x width images is mixed; None leaves it alone. Without either nothing is drawn."""
    if mixup + cutmix == 0:
        return None
    drawn = float(torch.rand((), generator=generator, device=generator.device))
    if drawn < mixup:
        return Mixing(sample_beta(MIXUP_ALPHA, generator=generator), None)
    if drawn < mixup + cutmix:
        box = cutmix_box(height, width, sample_beta(CUTMIX_ALPHA, generator=generator), generator)
        top, bottom, left, right = box
        return Mixing(1 - (bottom - top) * (right - left) / (height * width), box)
    return None


def apply_mixing(images: Tensor, targets: Tensor, mixing: Mixing | None) -> tuple[Tensor, Tensor]:
    """Mix a batch as drawn; see `mix`."""
    if mixing is None:
        return images, targets
    if mixing.box is None:
        return _mixup(images, mixing.share), _blend(targets, mixing.share)
    top, bottom, left, right = mixing.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, _blend(targets, mixing.share)


def cutmix_box(height: int, width: int, lam: float, generator: Generator) -> tuple[int, int, int, int]:
    """Draw a box of area 1 - lam around a uniform centre, clipped to the image, as timm: top, bottom, left, right."""
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
        alpha: > 0; fast up to about 2, where one pair in six is accepted.
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
    """Fold positions -size + 1 .. 2 * size - 2 back into 0..size - 1 at the first and the last pixel."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _chosen(n: int, p: float, generator: Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device) < p


def _randint(high: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)
