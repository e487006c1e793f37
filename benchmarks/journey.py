r"""Walk from the notes' run (Global TPE 0.53) to the way the presets train, one change at a time, on all four datasets.

The start is the published run as far as it is known: every dataset from new weights, 8 epochs of 8,000 training images,
2,000 test images scored after each epoch, CIFAR-10 in grey at 28 x 28, batches of 128, AdamW at 4.7e-4 with weight
decay 0.01, cosine without warm-up, clipping at 1, no averaged weights. Its network had three convolutions of stride 1
before patches of 4 x 4 pixels, 49 tokens, a class token, width 384 and depth 5. A `TrialConfig` has neither a stem of
stride 1 nor a class token nor images of 28 x 28; the nearest is the stem `small` and patches that cover 4 x 4 pixels,
64 tokens with the border. Where nothing is known of it (filter, dropout, heads) the start has the notes' values. Its
27 classes of EMNIST are 12 here. Random crops, which cannot be switched off, and mirrored pictures are in every step.

As in that run test images are scored after each epoch. They only compare the steps: rates and recipe were chosen
before, on validation images, nothing is chosen here, and the score of a step is that of its last epoch. A change that
leaves a dataset's training as it was (colour, for grey images) is not trained again. Every training is appended to a
file at once, so that an interrupted recording continues where it was.

    python benchmarks/journey.py                        # as published; about 70 minutes per training on one core
    python benchmarks/journey.py --embed_dim 64 --depth 2 --epochs 5 --more_images 16000
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from nkat_ray.config import STAGE1_DATASET, DataConfig, TrialConfig
from nkat_ray.data import Dataset, open_dataset, stratified_subset
from nkat_ray.data.dataset import Images, SplitName
from nkat_ray.metrics import (
    BEFORE,
    BEFORE_ACCURACY,
    GLOBAL_TARGETS,
    STAGE2_DATASETS,
    counts,
    lambda_notes,
    stage2_scores,
    tpe_score,
)
from nkat_ray.train.images import ImageSet, TrainingData
from nkat_ray.train.session import create_trainer

GREY_SIDE = 28  # pixels of the published run's CIFAR-10
PUBLISHED_LAMBDA = 20.0  # a count of scalars, whatever the stem
START: dict[str, Any] = dict(
    conv_stem="small", patch_size=1, lr=4.7e-4, weight_decay=0.01, warmup=0, ema=None, mixup=0.0, cutmix=0.0,
    randaugment=None, cutout=None,
)  # fmt: skip
STEPS: dict[str, dict[str, Any]] = {  # what each changes in the one before; "start" and "images" are filled in
    "start": START,
    "colour": {},  # CIFAR-10 as it is, in colour at 32 x 32
    "patches": {"patch_size": 2},  # 8 x 8 pixels: 16 tokens instead of 64
    "stem": {"conv_stem": "tiny"},
    "filter off": {"top_k": None, "top_p": None, "temperature": 1.0},
    "recipe": {
        "lr": 2e-3, "weight_decay": 0.05, "warmup": 1, "label_smoothing": 0.1, "dropout_attn": 0.0,
        "dropout_embed": 0.0, "ema": 0.999,
    },
    "Muon": {"optimizer": "muon", "lr": 4e-3},
    "images": {},
    "no stem": {"conv_stem": "off", "patch_size": 4},  # 64 tokens again
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args(DataConfig):
    """Set what is trained, and where the results are kept. The defaults are the published run's."""

    seeds: tuple[int, ...] = (0, 1)
    """Seeds of weights, order and augmentation."""
    embed_dim: int = 384
    """Width of a token."""
    depth: int = 5
    """Number of blocks."""
    epochs: int = 8
    """Epochs of every training."""
    images: int = 8000
    """Training images before the step `images`; all there are, where there are fewer."""
    more_images: int = 45_000
    """Training images from the step `images` on, likewise."""
    test_images: int = 2000
    """Test images, likewise."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it is trained."""
    results: Path = Path("benchmarks/journey.jsonl")
    """File with one line per training; what is in it is not trained again."""
    chart: Path | None = None
    """File for a chart of the results (.svg)."""


@dataclass(frozen=True)
class Training:
    """One training of a step."""

    dataset: str
    grey: bool  # CIFAR-10 in grey at 28 x 28
    seed: int
    config: TrialConfig

    def row(self) -> dict[str, Any]:
        """Return what tells it from other trainings, as it is in the file."""
        changed = {name: value for name, value in vars(self.config).items() if value != getattr(TrialConfig, name)}
        return {"dataset": self.dataset, "grey": self.grey, "seed": self.seed, "config": changed}


def main(args: Args) -> None:
    torch.set_num_threads(1)
    datasets = {name: opened(name, args) for name in STAGE2_DATASETS}
    for seed in args.seeds:
        for step in STEPS:
            for training in trainings(step, seed, datasets, args):
                if found(training, rows(args.results)) is None:
                    result = {**training.row(), **trained(training, args)}
                    with args.results.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                    print(step, result, flush=True)
    scores = list(scored(datasets, args))
    Console(width=130).print(table(scores))
    if args.chart is not None:
        args.chart.write_text(chart(scores))


@cache
def opened(name: str, args: Args) -> Dataset:
    dataset = open_dataset(name, args, notice=print)
    assert isinstance(dataset, Dataset), dataset
    return dataset


def trainings(step: str, seed: int, datasets: dict[str, Dataset], args: Args) -> list[Training]:
    """Return the trainings of a step, one per dataset, with all changes up to it."""
    names = list(STEPS)[: list(STEPS).index(step) + 1]
    fields = dict(embed_dim=args.embed_dim, depth=args.depth, epochs=args.epochs)
    for name in names:
        fields |= STEPS[name]
    wanted = args.more_images if "images" in names else args.images
    return [
        Training(
            dataset=name,
            grey=name == STAGE1_DATASET and step == "start",
            seed=seed,
            config=TrialConfig(**fields, train_images=min(wanted, dataset.sizes["train"])),
        )
        for name, dataset in datasets.items()
    ]


def rows(path: Path) -> list[dict[str, Any]]:
    """Read the results so far; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def found(training: Training, results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the result of a training, None if it has none yet."""
    wanted = json.loads(json.dumps(training.row()))
    return next((row for row in results if {name: row[name] for name in wanted} == wanted), None)


def trained(training: Training, args: Args) -> dict[str, Any]:
    """Train, and return the test accuracy of each epoch and the CPU seconds, those of the test images included."""
    images = data(training.dataset, training.config.train_images or 0, training.grey, args)
    trainer = create_trainer(training.config, images, seed=training.seed, notice=print)
    clock = time.process_time()  # other work on the machine hardly moves it
    accuracy = [epoch.val_accuracy for epoch in trainer.epochs()]
    return {"test_accuracy": accuracy, "n_test": len(images.val), "cpu_s": round(time.process_time() - clock, 1)}


@lru_cache(4)
def data(name: str, train_images: int, grey: bool, args: Args) -> TrainingData:
    """Return training images, and test images in the place of validation images: the published protocol."""
    dataset = opened(name, args)

    def chosen(split: SplitName, wanted: int) -> ImageSet:
        rows = stratified_subset(dataset.labels(split), min(wanted, dataset.sizes[split]))
        part = dataset.load(split, rows)
        images = in_grey(part.images) if grey else part.images
        return ImageSet(images, part.labels, None, torch.device(args.device))

    train, test = chosen("train", train_images), chosen("test", args.test_images)
    mean, std = train.statistics()
    traits = replace(dataset.traits, grey=grey or dataset.grey)
    return TrainingData(train=train, val=test, traits=traits, mean=mean, std=std)


def in_grey(images: Images) -> Images:
    """Convert images uint8 (N, 3, H, W) to grey ones of the published run's size, (N, 1, 28, 28)."""
    size = (GREY_SIDE, GREY_SIDE)
    pictures = (Image.fromarray(image.transpose(1, 2, 0)).convert("L") for image in images)
    return np.stack([np.asarray(picture.resize(size, Image.Resampling.BILINEAR))[None] for picture in pictures])


@dataclass(frozen=True)
class Score:
    """One seed of a step, on all four datasets, after the last epoch."""

    step: str
    seed: int
    accuracy: dict[str, float]
    cpu_s: float
    global_tpe: float  # under the notes' lambda, which grows with the stem
    published: float  # the same at the published run's lambda


def scored(datasets: dict[str, Dataset], args: Args) -> Iterator[Score]:
    """Yield the steps and seeds that have been trained on all four datasets."""
    results = rows(args.results)
    for step in STEPS:
        for seed in args.seeds:
            parts = trainings(step, seed, datasets, args)
            known = [row for row in (found(part, results) for part in parts) if row is not None]
            if len(known) < len(parts):
                continue
            accuracy = {row["dataset"]: row["test_accuracy"][-1] for row in known}
            config, classes = parts[0].config, {name: found.classes for name, found in datasets.items()}
            own, theirs = (
                stage2_scores({
                    name: tpe_score(value, lam) if counts(value, classes[name]) else None
                    for name, value in accuracy.items()
                }).global_tpe
                for lam in (lambda_notes(config.conv_stem, config.embed_dim), PUBLISHED_LAMBDA)
            )  # fmt: skip
            yield Score(step, seed, accuracy, sum(row["cpu_s"] for row in known), own, theirs)


def means(scores: list[Score]) -> Iterator[tuple[str, int, list[float], float, float, float]]:
    """Yield each step's mean over its seeds: seeds, accuracies, Global TPE under both lambdas, CPU seconds."""
    for step, group in itertools.groupby(scores, key=lambda score: score.step):
        seeds = list(group)
        accuracy = [statistics.fmean(seed.accuracy[name] for seed in seeds) for name in STAGE2_DATASETS]
        figures = ([getattr(seed, name) for seed in seeds] for name in ("global_tpe", "published", "cpu_s"))
        yield step, len(seeds), accuracy, *map(statistics.fmean, figures)  # type: ignore[misc]


def table(scores: list[Score]) -> Table:
    """Show each step's mean over its seeds, and each seed's Global TPE."""
    shown = Table("step", "seeds", *STAGE2_DATASETS, "Global TPE", "of each seed", "at lambda 20", "CPU s, 4 trainings")
    published = [f"{BEFORE_ACCURACY[name]:.3f}" for name in STAGE2_DATASETS]
    shown.add_row("as published", "1", *published, "", "", f"{BEFORE['global_tpe']:.3f}", "")
    for step, n, accuracy, own, theirs, cpu_s in means(scores):
        each = " ".join(f"{score.global_tpe:.3f}" for score in scores if score.step == step)
        parts = [f"{value:.3f}" for value in accuracy]
        shown.add_row(step, str(n), *parts, f"{own:.3f}", each, f"{theirs:.3f}", f"{cpu_s:.0f}")
    return shown


def chart(scores: list[Score]) -> str:
    """Draw each step's Global TPE as a bar (a dot per seed) and write its CPU time beside it, as SVG."""
    left, scale, line = 130, 600, 26  # pixels: names, a Global TPE of 1, a step
    parts, top = [], 40
    for step, _, _, own, _, cpu_s in means(scores):
        middle = top + line / 2 + 4
        parts += [
            f'<text x="{left - 8}" y="{middle}" text-anchor="end">{step}</text>',
            f'<rect x="{left}" y="{top + 3}" width="{own * scale:.1f}" height="{line - 6}" fill="#4c78a8"/>',
            f'<text x="{left + 8}" y="{middle}" fill="#fff">{own:.3f}</text>',
            *(
                f'<circle cx="{left + score.global_tpe * scale:.1f}" cy="{top + line / 2}" r="3" fill="#f58518"/>'
                for score in scores
                if score.step == step
            ),
            f'<text x="{left + 0.8 * scale}" y="{middle}">{cpu_s:,.0f} s</text>',
        ]
        top += line
    for value, name in ((BEFORE["global_tpe"], "published"), (GLOBAL_TARGETS["global_tpe"], "target")):
        x = left + value * scale
        parts += [
            f'<path d="M{x} 32V{top}" stroke="#888" stroke-dasharray="4"/>',
            f'<text x="{x}" y="26" text-anchor="middle">{name} {value:.2f}</text>',
        ]
    parts.append(f'<text x="{left + 0.8 * scale}" y="26">CPU time</text>')
    size = f'width="{left + scale}" height="{top + 10}"'
    style = 'font-family="sans-serif" font-size="13" fill="#222"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, description=__doc__))
