"""Measure images per second of the recipe's augmentation on one core against torchvision's per-image pipelines.

    python benchmarks/augment.py [--batch_size 128] [--rounds 9] [--images 512]

The augmentations are the recipe's (docs/spec.md section 4): crop with reflection, flip, RandAugment 2/9, Cutout 8. The
pipelines are written as training scripts usually are: a Compose of torchvision's transforms from PIL images or tensors,
Cutout as in its authors' script, one stack per batch. Decoding, loading and normalising are left out on all sides.
Rounds are interleaved, so that a busy machine slows all alike; the ratio is the median of the ratios within a round.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from nkat_ray.config import TrialConfig
from nkat_ray.train.augment import apply, augment, draw
from nkat_ray.train.loop import AUGMENTED_IMAGES

PASSES = 10  # of our augmentation over the images of a round, so that it is timed for about as long as the others


class Cutout:
    """Cut a square out of one uint8 image (3, H, W), as DeVries and Taylor's script does."""

    def __init__(self, size: int) -> None:
        """Take the side of the square in pixels."""
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """Black out one square."""
        height, width = image.shape[1:]
        mask = np.ones((height, width), np.uint8)
        y, x = np.random.randint(height), np.random.randint(width)
        top, bottom = np.clip((y - self.size // 2, y + self.size // 2), 0, height)
        left, right = np.clip((x - self.size // 2, x + self.size // 2), 0, width)
        mask[top:bottom, left:right] = 0
        return image * torch.from_numpy(mask)


def pipelines(config: TrialConfig) -> dict[str, tuple[Callable[..., Tensor], bool]]:
    """Return torchvision's pipelines for one image by name, and whether it starts from a PIL image."""
    num_ops, magnitude = config.randaugment or (0, 0)
    cutout = Cutout(config.cutout or 0)

    def compose(t: object, to_tensor: list[object]) -> Callable[..., Tensor]:
        crop = t.RandomCrop(32, padding=4, padding_mode="reflect")  # type: ignore[attr-defined]
        flip = t.RandomHorizontalFlip()  # type: ignore[attr-defined]
        rand_augment = t.RandAugment(num_ops, magnitude)  # type: ignore[attr-defined]
        return t.Compose([crop, flip, rand_augment, *to_tensor, cutout])  # type: ignore[attr-defined, no-any-return]

    return {
        "torchvision.transforms, PIL": (compose(transforms, [transforms.PILToTensor()]), True),
        "torchvision.transforms.v2, PIL": (compose(v2, [v2.PILToTensor()]), True),
        "torchvision.transforms.v2, tensor": (compose(v2, []), False),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128, help="images per batch (the recipe's: 128)")
    parser.add_argument("--images", type=int, default=512, help="images per round and pipeline")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, after one that is not counted")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = TrialConfig()
    generator = torch.Generator().manual_seed(0)
    images = smooth_images(args.images, generator)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]

    many = images.repeat(-(-AUGMENTED_IMAGES // len(images)), 1, 1, 1)[:AUGMENTED_IMAGES]

    def ours() -> int:
        """Augment as a training does: many batches at once, each with its own draws."""
        sizes = [len(batch) for batch in many.split(args.batch_size)]
        for _ in range(PASSES):
            draws = [draw(size, 32, 32, config, flip=True, generator=generator) for size in sizes]
            apply(many, torch.cat(draws, dim=1), config, flip=True)
        return PASSES * len(many)

    def batch_by_batch() -> int:
        for _ in range(PASSES):
            for batch in torch.split(images, args.batch_size):
                augment(batch, config, flip=True, generator=generator)
        return PASSES * len(images)

    def one_by_one(transform: Callable[..., Tensor], from_pil: bool) -> int:
        source = pil if from_pil else images
        for start in range(0, len(images), args.batch_size):
            torch.stack([transform(image) for image in source[start : start + args.batch_size]])
        return len(images)

    runs: dict[str, Callable[[], int]] = {"ours, as trained": ours, "ours, batch by batch": batch_by_batch}
    for name, (transform, from_pil) in pipelines(config).items():
        runs[name] = lambda transform=transform, from_pil=from_pil: one_by_one(transform, from_pil)  # type: ignore[misc]
    speeds = measure(runs, rounds=args.rounds)
    print_results(speeds, args)


def smooth_images(n: int, generator: torch.Generator) -> Tensor:
    """Generate uint8 images (n, 3, 32, 32) with the histograms of photographs rather than of noise."""
    coarse = torch.randn(n, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    return (128 + 60 * smooth + 5 * torch.randn(n, 3, 32, 32, generator=generator)).clamp(0, 255).to(torch.uint8)


def measure(runs: dict[str, Callable[[], int]], *, rounds: int) -> dict[str, list[float]]:
    """Return images per second of every run in every round; the first round warms up and is dropped."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started_s = time.perf_counter()
            images = run()
            if number:
                speeds[name].append(images / (time.perf_counter() - started_s))
    return speeds


def print_results(speeds: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Print command, versions, n, medians, spread and the ratios."""
    print(f"python {' '.join(sys.argv)}: batch {args.batch_size}, n = {args.rounds} rounds of {args.images} images")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, one thread")
    ours, *others = speeds
    for name, values in speeds.items():
        print(f"{name:34} {statistics.median(values):8.0f} images/s  ({min(values):.0f} .. {max(values):.0f})")
    for name in others:
        ratios = [a / b for a, b in zip(speeds[ours], speeds[name], strict=True)]
        print(f"ratio to {name:34} {statistics.median(ratios):5.1f}  ({min(ratios):.1f} .. {max(ratios):.1f})")


if __name__ == "__main__":
    main()
