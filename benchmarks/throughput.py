"""Measure training from end to end in images per second: ours against common training loops.

All train the same shape (stem, width, depth, tokens) with all of the recipe's augmentation (crop with reflection, flip,
RandAugment 2/9, Cutout 8, Mixup or CutMix), AdamW, clipping and an averaged model, on real CIFAR-10 images:

- ours: `nkat_ray.train.loop.Trainer`, NKAT-ViT with its filter and modulation, with 1 and 2 threads;
- torchvision: timm's VisionTransformer in a plain PyTorch loop, torchvision's transforms image by image in a DataLoader
  with 0 and 2 worker processes, timm's Mixup and averaged model;
- timm: the same loop with timm's own transforms (rand-m9-n2, random erasing for Cutout).

Their loops compute with one thread; two additional workers keep two cores busy, as ours does with two threads. A ratio
compares with ours on as many cores.

Rounds are interleaved; a ratio is the median of the rounds' ratios. A round is one warm epoch per loop: DataLoader's
processes are started before the clock, as in the second epoch of a training.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --device cuda --workers 12 --images 25600

On a GPU all compute in bfloat16 where it is native; ours needs no worker processes there.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from augment import Cutout
from model_cost import plain_vit
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from nkat_ray.config import STAGE1_DATASET, DataConfig, TrialConfig
from nkat_ray.data import Dataset as Images
from nkat_ray.data import open_dataset
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Limits, select_images
from nkat_ray.train.device import autocast
from nkat_ray.train.session import create_trainer, training_data

SHAPES = {"384 x 7, the notes' baseline": {}, "128 x 4": {"embed_dim": 128, "depth": 4}}
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


@dataclass(frozen=True, kw_only=True)
class Args(DataConfig):
    """Set what is measured, and how often."""

    rounds: int = 5
    """Interleaved rounds, after one that is not counted."""
    images: int = 1280
    """Images per round and loop; a multiple of 128."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where all loops compute."""
    workers: int = 2
    """Processes of their DataLoader, beside none."""


def main(args: Args) -> None:
    found = open_dataset(STAGE1_DATASET, args, notice=print)
    assert isinstance(found, Images), found
    selection = select_images(found, Limits(100, args.images))
    for title, shape in SHAPES.items():
        config = replace(TrialConfig(), epochs=10_000, **shape)  # the schedule never ends
        epochs = loops(config, selection, args)
        speeds: dict[str, list[float]] = {name: [] for name in epochs}
        for number in range(args.rounds + 1):
            for name, epoch in epochs.items():
                seconds = next(epoch)
                if number:
                    speeds[name].append(args.images / seconds)
        show(title, speeds, args)


def loops(config: TrialConfig, selection: Any, args: Args) -> dict[str, Iterator[float]]:
    """Return the loops by name; each yields the seconds of one epoch after another."""
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in selection.images[selection.train_index]]
    labels = selection.labels[selection.train_index].tolist()
    num_ops, magnitude = config.randaugment or (0, 0)
    per_image = transforms.Compose([
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"), transforms.RandomHorizontalFlip(),
        transforms.RandAugment(num_ops, magnitude), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
        Cutout(config.cutout or 0),
    ])  # fmt: skip
    timms = create_transform(
        input_size=32, is_training=True, auto_augment="rand-m9-n2", re_prob=1.0, re_count=1, mean=MEAN, std=STD,
        interpolation="bilinear", scale=(0.8, 1.0),
    )  # fmt: skip
    device, workers = torch.device(args.device), args.workers
    sets = {name: Pictures(pictures, labels, way) for name, way in (("torchvision", per_image), ("timm", timms))}
    theirs = {
        f"{name}, {number} workers": plain(config, images, workers=number, device=device)
        for name, images in sets.items()
        for number in (0, workers)
    }
    if args.device == "cuda":
        return {"ours": ours(config, selection, threads=1, device=device), **theirs}
    mine = {f"ours, {n} thread{'s' * (n > 1)}": ours(config, selection, threads=n, device=device) for n in (1, 2)}
    return {**mine, **theirs}


def ours(config: TrialConfig, selection: Any, *, threads: int, device: torch.device) -> Iterator[float]:
    traits = Traits(name=STAGE1_DATASET, num_classes=10, grey=False, flip=True)
    data = training_data(selection, traits, device)
    trainer = create_trainer(config, data, seed=0, notice=print)
    epochs = trainer.epochs()
    while True:
        torch.set_num_threads(threads)
        result = next(epochs)
        yield len(data.train) / result.images_per_s  # training alone, without validation


class Pictures(Dataset[Any]):
    """Serve decoded images, so that no loop pays for decoding."""

    def __init__(self, pictures: list[Image.Image], labels: list[int], transform: Callable[..., Tensor]) -> None:
        self._pictures, self._labels, self._transform = pictures, labels, transform

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._pictures[index]), self._labels[index]


def plain(config: TrialConfig, pictures: Pictures, *, workers: int, device: torch.device) -> Iterator[float]:
    """Train as common scripts do; yields the seconds of each epoch."""
    model: nn.Module = plain_vit(config).to(device)
    average = ModelEmaV3(model, decay=config.ema or 0.0, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay)
    mixing = Mixup(
        mixup_alpha=0.2, cutmix_alpha=1.0, prob=config.mixup + config.cutmix, num_classes=10,
        switch_prob=config.cutmix / (config.mixup + config.cutmix), label_smoothing=config.label_smoothing,
    )  # fmt: skip
    loader = DataLoader(
        pictures, batch_size=config.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    if workers:
        next(iter(loader))  # starts the processes
    step = 0
    while True:
        torch.set_num_threads(1)
        model.train()
        start = time.perf_counter()
        for images, labels in loader:
            inputs, targets = mixing(images.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            with autocast(device):
                logits = model(inputs)
            loss = F.cross_entropy(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or np.inf)
            optimizer.step()
            average.update(model, step=step)
            step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def show(title: str, speeds: dict[str, list[float]], args: Args) -> None:
    table = Table(
        "loop", "images/s", "smallest to largest", "ours on as many cores is so many times as fast",
        "smallest to largest", title=f"{title}, batch 128, {args.rounds} rounds of {args.images} images",
    )  # fmt: skip
    for name, values in speeds.items():
        alone = name.endswith(("0 workers", "1 thread"))
        alike = "ours" if "ours" in speeds else "ours, 1 thread" if alone else "ours, 2 threads"
        ratios = [a / b for a, b in zip(speeds[alike], values, strict=True)]
        table.add_row(
            name, f"{statistics.median(values):.0f}", f"{min(values):.0f} to {max(values):.0f}",
            f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
