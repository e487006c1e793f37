"""Apply RandAugment to a whole batch, with other operations for each image; each operation equals torchvision's.

torchvision, kornia and timm draw one operation per batch, or work image by image. Here each image draws its own; the
images that drew the same operation form a group, and torchvision's own function is applied to each group.
"""

import functools
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as F

MAGNITUDE_BINS: Final = 31  # torchvision's num_magnitude_bins: magnitudes 0..30

# torchvision.transforms.RandAugment's operations in its order, and whether their strength takes a random sign.
OPERATIONS: Final = {
    "Identity": False,
    "ShearX": True,
    "ShearY": True,
    "TranslateX": True,
    "TranslateY": True,
    "Rotate": True,
    "Brightness": True,
    "Color": True,
    "Contrast": True,
    "Sharpness": True,
    "Posterize": False,
    "Solarize": False,
    "AutoContrast": False,
    "Equalize": False,
}
_NAMES: Final = tuple(OPERATIONS)
_AFFINE: Final = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})


def check_images(images: Tensor) -> None:
    """Refuse (ValueError) anything but uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; pass torch.uint8 (B, 3, H, W)")


def rand_augment(images: Tensor, *, num_ops: int, magnitude: int, generator: Generator) -> Tensor:
    """Apply RandAugment (Cubuk et al. 2020) with torchvision's operations, strengths and sampling, drawn per image.

    Each image gets `num_ops` operations, one after another, each uniform among the 14 (with repetition), with a fair
    random sign where the operation has one. Sampling is nearest, and pixels from outside the image are black, as by
    default in torchvision. On the CPU the result equals torchvision's tensor functions bit for bit.

    Args:
        images: uint8 (B, 3, H, W); not modified.
        num_ops: operations per image, >= 0.
        magnitude: row of torchvision's table of 31 strengths, 0..30.
        generator: source of all draws; on the CPU it gives the same draws for images on any device.

    Returns:
        uint8 (B, 3, H, W).

    Raises:
        ValueError: wrong images, num_ops below 0 or magnitude outside 0..30.
    """
    check_images(images)
    if num_ops < 0:
        raise ValueError(f"num_ops is {num_ops}; it must be >= 0")
    if not 0 <= magnitude < MAGNITUDE_BINS:
        raise ValueError(f"magnitude is {magnitude}; allowed: 0..{MAGNITUDE_BINS - 1}")
    if len(images) == 0:
        return images
    for _ in range(num_ops):
        code = draw_codes(len(images), generator=generator)
        order = code.argsort()
        places = torch.stack([order, order.argsort()]).to(images.device)
        images = apply_sorted(images, places[0], places[1], group_sizes(code), magnitude)
    return images


def draw_operations(n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw one operation and one sign for each of n images, independent and uniform.

    Returns:
        operation, int64 (n,): position in `OPERATIONS`; negative, bool (n,): negate the strength where it has a sign.
    """
    operation = torch.randint(len(OPERATIONS), (n,), generator=generator, device=generator.device)
    negative = torch.randint(2, (n,), generator=generator, device=generator.device).bool()
    return operation, negative


def draw_codes(n: int, *, generator: Generator) -> Tensor:
    """Draw operation and sign for each of n images as one number, int64 (n,).

    Returns:
        2 * position in `OPERATIONS`, plus 1 where the strength is negated; 0..27.
    """
    operation, negative = draw_operations(n, generator=generator)
    signed = torch.tensor(list(OPERATIONS.values()), device=operation.device)
    return 2 * operation + (negative & signed[operation])


def group_sizes(code: Tensor) -> list[int]:
    """Count the images with each of the codes, 0..27."""
    sizes: list[int] = torch.bincount(code, minlength=2 * len(OPERATIONS)).tolist()
    return sizes


def apply_sorted(images: Tensor, order: Tensor, back: Tensor, sizes: Sequence[int], magnitude: int) -> Tensor:
    """Apply one round of RandAugment: sort images by code, apply each operation to its group, sort back.

    Args:
        images: uint8 (n, 3, H, W); not modified.
        order: int64 (n,), places of the images in ascending order of their codes.
        back: int64 (n,), the inverse of `order`.
        sizes: images with each code (`group_sizes`).
        magnitude: row of torchvision's table of 31 strengths, 0..30.

    Returns:
        uint8 (n, 3, H, W).
    """
    parts = images.index_select(0, order).split(list(sizes))  # whole images, some twenty times as fast as images[order]
    changed = torch.cat([_apply_code(part, code, magnitude) for code, part in enumerate(parts) if len(part)])
    return changed.index_select(0, back)


@functools.lru_cache(maxsize=1024)
def strength(name: str, magnitude: int, *, height: int, width: int) -> float:
    """Return row `magnitude` of torchvision's table of 31 for images of height x width pixels; without a sign.

    Units: slope for shears, pixels for translations, degrees for Rotate, the distance of the factor from 1 for
    Brightness to Sharpness, bits kept for Posterize, a fraction of 255 for Solarize; 0 for an operation without one.
    """
    if name in ("Identity", "AutoContrast", "Equalize"):
        return 0.0
    if name == "Posterize":
        return float(round(8 - magnitude / ((MAGNITUDE_BINS - 1) / 4)))
    first, last = {
        "ShearX": (0.0, 0.3),
        "ShearY": (0.0, 0.3),
        "TranslateX": (0.0, 150.0 / 331.0 * width),
        "TranslateY": (0.0, 150.0 / 331.0 * height),
        "Rotate": (0.0, 30.0),
        "Solarize": (1.0, 0.0),
    }.get(name, (0.0, 0.9))
    return float(torch.linspace(first, last, MAGNITUDE_BINS)[magnitude])  # torchvision's own float32 rounding


def apply_operation(images: Tensor, name: str, value: float) -> Tensor:
    """Apply one operation at one signed strength to all images, by torchvision's own function.

    Args:
        images: uint8 (B, 3, H, W); not modified.
        value: the result of `strength`, with its sign.

    Returns:
        uint8 (B, 3, H, W); `images` itself for Identity.

    Raises:
        ValueError: an unknown name.
    """
    if name in _AFFINE:
        return _move(images, name, value)
    result: Tensor
    match name:
        case "Identity":
            result = images
        case "Brightness":
            result = F.adjust_brightness(images, 1.0 + value)
        case "Color":
            result = F.adjust_saturation(images, 1.0 + value)
        case "Contrast":
            result = F.adjust_contrast(images, 1.0 + value)
        case "Sharpness":
            result = _sharpen(images, 1.0 + value)
        case "Posterize":
            result = F.posterize(images, int(value))
        case "Solarize":
            result = _solarize(images, 255.0 * value)
        case "AutoContrast":
            result = F.autocontrast(images)
        case "Equalize":
            result = F.equalize(images)
        case _:
            raise ValueError(f"operation is {name!r}; it must be one of {', '.join(OPERATIONS)}")
    return result


def _apply_code(images: Tensor, code: int, magnitude: int) -> Tensor:
    """Apply operation code // 2, with a negated strength if the code is odd."""
    name = _NAMES[code // 2]
    value = strength(name, magnitude, height=images.shape[2], width=images.shape[3])
    return apply_operation(images, name, -value if code % 2 else value)


def _solarize(images: Tensor, threshold: float) -> Tensor:
    """Apply `F.solarize` without `torch.where`, which takes three times as long on uint8: invert by exclusive or."""
    whole = math.ceil(torch.tensor(threshold, dtype=torch.float32).item())  # torchvision compares in float32
    return images ^ (images >= whole).to(torch.uint8).mul_(255)


def _sharpen(images: Tensor, factor: float) -> Tensor:
    """Apply `F.adjust_sharpness` without its convolution, which costs nearly three times as much on small groups.

    The blur is (8 neighbours + 5 times the pixel) / 13, rounded. Sums of whole numbers are exact, and no thirteenth
    lies nearer than 1/26 to a rounding boundary, so any order of the additions gives torchvision's pixels.
    """
    if min(images.shape[2:]) <= 2:
        return images
    sharp = images.float()
    inner = sharp[:, :, 1:-1, 1:-1]
    rows = sharp[:, :, :-2] + sharp[:, :, 1:-1] + sharp[:, :, 2:]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).add_(inner, alpha=4).div_(13).round_()
    inner.add_(blurred.sub_(inner), alpha=1.0 - factor)
    return sharp.clamp_(0, 255).to(torch.uint8)


def _move(images: Tensor, name: str, value: float) -> Tensor:
    """Shear, translate or rotate: all images take their pixels from the same places."""
    n, channels, height, width = images.shape
    source = _source_pixels(name, value, height, width, images.device)
    with_black = pad(images.flatten(2), (1, 0))  # pixel 0 stands for the outside of the image
    return with_black.gather(2, source.expand(n, channels, -1)).view_as(images)


@functools.lru_cache(maxsize=1024)
def _source_pixels(name: str, value: float, height: int, width: int, device: torch.device) -> Tensor:
    """Find where each pixel comes from: torchvision's own nearest sampling of an image whose values are pixel numbers.

    Computed on the CPU for every device, so that rounding at half a pixel is the same everywhere.

    Returns:
        int64 (H * W,): 1 + the source pixel's number in row order, 0 for outside.
    """
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, height, width)
    match name:
        case "ShearX":
            moved = _affine(numbers, shear=[math.degrees(math.atan(value)), 0.0], center=[0.0, 0.0])
        case "ShearY":
            moved = _affine(numbers, shear=[0.0, math.degrees(math.atan(value))], center=[0.0, 0.0])
        case "TranslateX":
            moved = _affine(numbers, translate=[int(value), 0])
        case "TranslateY":
            moved = _affine(numbers, translate=[0, int(value)])
        case _:
            moved = F.rotate(numbers, value)
    return moved.long().flatten().to(device)


def _affine(
    image: Tensor,
    *,
    shear: list[float] | None = None,
    translate: list[float] | None = None,
    center: list[float] | None = None,
) -> Tensor:
    moved: Tensor = F.affine(
        image, angle=0.0, translate=translate or [0, 0], scale=1.0, shear=shear or [0.0, 0.0], center=center
    )
    return moved
