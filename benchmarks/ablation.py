"""Measure what each of the notes' ideas and each choice of the recipe is worth on a small model, one at a time.

Trained on real CIFAR-10; the default is the notes' recipe at a size that a CPU trains in a minute. Every result is
appended to a file at once, so that an interrupted run continues where it was. Scores are validation accuracies of the
last epoch (images of the training split; the test images are not read); a difference is between trainings of the same
seed.

    python benchmarks/ablation.py
    python benchmarks/ablation.py --factors default "muon 4e-3" --results recipe.jsonl
"""

import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

from nkat_ray.config import STAGE1_DATASET, DataConfig, TrialConfig
from nkat_ray.data import Dataset, open_dataset
from nkat_ray.data.selection import Limits, select_images
from nkat_ray.train.images import TrainingData
from nkat_ray.train.session import create_trainer, training_data

DEFAULT = dict(embed_dim=64, depth=2, lr=2e-3, epochs=5, warmup=1)  # the rest is the notes' recipe
FACTORS: dict[str, dict[str, Any]] = {
    "default": {},
    "color_norm layernorm": {"color_norm": "layernorm"},
    "color_norm residual": {"color_norm": "residual"},
    "stem_stride 2": {"stem_stride": 2},
    "top_k off": {"top_k": None},
    "split_heads": {"split_heads": True},
    "channel_shuffle 0.5": {"channel_shuffle": 0.5},
    "ema off": {"ema": None},
    # the recipe
    "adamw 1e-3": {"lr": 1e-3},
    "adamw 4e-3": {"lr": 4e-3},
    "muon 2e-3": {"optimizer": "muon"},
    "muon 4e-3": {"optimizer": "muon", "lr": 4e-3},
    "muon 8e-3": {"optimizer": "muon", "lr": 8e-3},
    "augmentation off": {"randaugment": None, "cutout": None, "mixup": 0.0, "cutmix": 0.0},
    "dropout off": {"dropout_attn": 0.0, "dropout_embed": 0.0},
    "mlp_ratio 2": {"mlp_ratio": 2.0},
    "mlp_ratio 1": {"mlp_ratio": 1.0},
    "label_smoothing 0.1": {"label_smoothing": 0.1},
    "drop_path 0.1": {"drop_path": 0.1},
}


@dataclass(frozen=True, kw_only=True)
class Args(DataConfig):
    """Set what is trained, and where the results are kept."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, order and augmentation."""
    factors: tuple[str, ...] = tuple(FACTORS)
    """What is trained; `default` among it."""
    train_images: int = 10_000
    """Training images (stratified, fixed)."""
    val_images: int = 5000
    """Validation images, from the training split (stratified, fixed)."""
    results: Path = Path("benchmarks/ablation.jsonl")
    """File with one line per training; what is in it is not trained again."""


def main(args: Args) -> None:
    torch.set_num_threads(1)
    dataset = open_dataset(STAGE1_DATASET, args, notice=print)
    assert isinstance(dataset, Dataset), dataset
    selection = select_images(dataset, Limits(args.val_images, args.train_images))
    data = training_data(selection, dataset.traits, torch.device("cpu"))
    done = {(row["factor"], row["seed"]) for row in rows(args.results)}
    for seed in args.seeds:
        for factor in args.factors:
            if (factor, seed) not in done:
                config = TrialConfig(**{**DEFAULT, **FACTORS[factor], "train_images": args.train_images})
                result = {"factor": factor, "seed": seed, **trained(config, data, seed)}
                with args.results.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(result, flush=True)
    Console(width=120).print(table(rows(args.results), len(data.val)))


def rows(path: Path) -> list[dict[str, Any]]:
    """Read the results so far; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained(config: TrialConfig, data: TrainingData, seed: int) -> dict[str, Any]:
    """Train one configuration and return the validation accuracy of each epoch and the CPU seconds."""
    trainer = create_trainer(config, data, seed=seed, notice=print)
    clock = time.process_time()  # other work on the machine hardly moves it
    accuracy = [epoch.val_accuracy for epoch in trainer.epochs()]
    return {"val_accuracy": accuracy, "cpu_s": round(time.process_time() - clock, 1)}


def table(results: list[dict[str, Any]], n_val: int) -> Table:
    """Show the accuracy of each factor and its difference from the default over the seeds that both have."""
    last = {(row["factor"], row["seed"]): row["val_accuracy"][-1] for row in results}
    cpu = {(row["factor"], row["seed"]): row["cpu_s"] for row in results}
    found = Table(title=f"validation accuracy (n = {n_val}) after {DEFAULT['epochs']} epochs; intervals of 95 % (t)")
    for column in ("factor", "seeds", "accuracy", "difference", "interval", "cost"):
        found.add_column(column, justify="left" if column == "factor" else "right")
    for factor in dict.fromkeys(row["factor"] for row in results):
        seeds = sorted(seed for name, seed in last if name == factor and ("default", seed) in last)
        differences = [last[factor, seed] - last["default", seed] for seed in seeds]
        mean = statistics.fmean(differences) if seeds else math.nan
        low, high = interval(differences)
        cost = statistics.median([cpu[factor, s] / cpu["default", s] for s in seeds] or [math.nan])
        found.add_row(
            factor, str(len(seeds)), " ".join(f"{last[factor, seed]:.4f}" for seed in seeds),
            f"{mean:+.4f}", "" if factor == "default" else f"{low:+.4f} to {high:+.4f}", f"{cost:.2f}",
        )  # fmt: skip
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean by Student's t; NaN below two values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
