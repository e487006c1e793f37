r"""Measure the CPU seconds to 50, 60 and 70 % validation accuracy on CIFAR-10: ours against plain training loops.

All train the same shape (stem `tiny`, 16 tokens, width, depth and MLP ratio) on the same images, in batches of 128,
with crop and flip, label smoothing, weight decay 0.05, clipping at 1, and one epoch of warm-up before a cosine:

- ours: `nkat_ray.train.loop.Trainer` with the recipe of the preset `laptop`: NKAT-ViT, Muon, an averaged model;
- AdamW: timm's VisionTransformer in a plain PyTorch loop, at each of three rates on the first seed and, on the other
  seeds, at the rate that was fastest to 60 % there;
- Muon: the same loop with timm's own Muon at our rate, with timm's defaults otherwise.

The plain loops get what makes them fast: pictures decoded beforehand, torchvision's crop and flip one by one on tensors
(three times as fast as on Pillow's images), normalisation of whole batches, no DataLoader with its copies. Validation,
by the same function on the same 5,000 images after every epoch, counts for all; preparing data and networks for none.
A training ends at the highest target or after `epochs`. Seconds to a target are interpolated linearly between the ends
of two epochs. Trainings are interleaved seed by seed (the slow Muon comes last) and
appended to a file, so that a recording can be interrupted.

    python benchmarks/time_to_accuracy.py
"""

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from model_cost import plain_vit
from rich.console import Console
from rich.table import Table
from scipy import stats
from timm.optim import create_optimizer_v2, muon
from torch import nn
from torchvision import transforms

from nkat_ray.config import PRESETS, STAGE1_DATASET, DataConfig, TrialConfig, field_names
from nkat_ray.data import Dataset, open_dataset
from nkat_ray.data.selection import Limits, select_images
from nkat_ray.train.images import TrainingData, in_pixels, normalise
from nkat_ray.train.loop import count_correct
from nkat_ray.train.optim import lr_at
from nkat_ray.train.session import create_trainer, training_data

TARGETS = (0.5, 0.6, 0.7)
AIM = 0.6  # the target whose ratio decides, and that chooses AdamW's rate
ADAMW_RATES = (1e-3, 2e-3, 4e-3)
OURS, MUON = "ours", "Muon"
LAPTOP = {name: value for name, value in PRESETS["laptop"].items() if name in field_names(TrialConfig)}
# Sixteen tokens behind the tiny stem are the fastest design on a CPU; MLP ratio 2 won the recorded search.
DESIGN = {**LAPTOP, "conv_stem": "tiny", "patch_size": 2, "mlp_ratio": 2.0, "lr": 4e-3}
TIMMS_NEWTON_SCHULZ = muon.zeropower_via_newtonschulz  # creating our optimizer replaces it


@dataclass(frozen=True, kw_only=True)
class Args(DataConfig):
    """Set how often and how long is trained, and where the results are kept."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, order and augmentation; AdamW's rate is chosen on the first."""
    epochs: int = 10
    """Epochs of the schedule; a training that has not reached the highest target by then ends."""
    train_images: int = 20_000
    """Training images (stratified, fixed)."""
    val_images: int = 5000
    """Validation images, from the training split (stratified, fixed)."""
    results: Path = Path("benchmarks/time_to_accuracy.jsonl")
    """File with one line per training; what is in it is not trained again."""


def main(args: Args) -> None:
    torch.set_num_threads(1)
    dataset = open_dataset(STAGE1_DATASET, args, notice=print)
    assert isinstance(dataset, Dataset), dataset
    selection = select_images(dataset, Limits(args.val_images, args.train_images))
    data = training_data(selection, dataset.traits, torch.device("cpu"))
    config = TrialConfig(**{**DESIGN, "epochs": args.epochs, "train_images": args.train_images})
    for loop, seed in plan(args):
        if (loop, seed) not in {(row["loop"], row["seed"]) for row in rows(args.results)}:
            result = {"loop": loop, "seed": seed, **trained(loop, config, data, seed)}
            with args.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(result, flush=True)
    Console(width=120).print(table(rows(args.results)))


def rows(path: Path) -> list[dict[str, Any]]:
    """Read the results so far; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plan(args: Args) -> Iterator[tuple[str, int]]:
    """Yield loops and seeds in order; AdamW's best rate is known as soon as the first seed has been trained."""
    first, *others = args.seeds
    yield OURS, first
    for rate in ADAMW_RATES:
        yield f"AdamW {rate:g}", first
    for seed in others:
        yield OURS, seed
        yield best_adamw(rows(args.results), first), seed
    for seed in args.seeds:
        yield MUON, seed


def best_adamw(results: list[dict[str, Any]], seed: int) -> str:
    """Return the AdamW loop that was fastest to the aim with a seed; of those that missed it the most accurate."""
    known = [row for row in results if row["seed"] == seed and row["loop"].startswith("AdamW")]
    return str(min(known, key=lambda row: (seconds_to(AIM, row), -max(row["val_accuracy"])))["loop"])


def trained(loop: str, config: TrialConfig, data: TrainingData, seed: int) -> dict[str, Any]:
    """Train until the highest target or the last epoch; return accuracy and CPU seconds at the end of each epoch."""
    if loop == OURS:
        trainer = create_trainer(config, data, seed=seed, notice=print)
        accuracies: Iterator[float] = (epoch.val_accuracy for epoch in trainer.epochs())
    else:
        accuracies = plain(loop, config, data, seed)
    clock, accuracy, cpu_s = time.process_time(), [], []  # other work on the machine hardly moves it
    for value in accuracies:
        accuracy.append(value)
        cpu_s.append(round(time.process_time() - clock, 1))
        if value >= max(TARGETS):
            break
    return {"val_accuracy": accuracy, "cpu_s": cpu_s}


def plain(loop: str, config: TrialConfig, data: TrainingData, seed: int) -> Iterator[float]:
    """Train as common scripts do; yields the validation accuracy of each epoch."""
    torch.manual_seed(seed)
    model = plain_vit(config)
    muon.zeropower_via_newtonschulz = TIMMS_NEWTON_SCHULZ
    opt, peak = ("muon", config.lr) if loop == MUON else ("adamw", float(loop.split()[1]))
    optimizer = create_optimizer_v2(model, opt=opt, lr=peak, weight_decay=config.weight_decay)
    transform = transforms.Compose(
        [transforms.RandomCrop(32, padding=4, padding_mode="reflect"), transforms.RandomHorizontalFlip()]
    )
    mean, std = in_pixels(data.mean), in_pixels(data.std)
    pictures, labels = data.train.batch(torch.arange(len(data.train)))  # as they are
    steps = math.ceil(len(labels) / config.batch_size)
    for epoch in range(config.epochs):
        model.train()
        for number, rows in enumerate(torch.randperm(len(labels)).split(config.batch_size)):
            inputs = normalise(torch.stack([transform(pictures[row]) for row in rows]), mean, std)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(
                    epoch * steps + number,
                    peak=peak,
                    warmup_steps=config.warmup * steps,
                    total_steps=config.epochs * steps,
                )
            loss = F.cross_entropy(model(inputs), labels[rows], label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
            optimizer.step()
        yield count_correct(model, data.val, mean=mean, std=std) / len(data.val)


def seconds_to(target: float, row: dict[str, Any]) -> float:
    """Return the CPU seconds after which a training reached a target, between epochs by a line; infinite if never."""
    before, start = 0.1, 0.0  # chance
    for accuracy, end in zip(row["val_accuracy"], row["cpu_s"], strict=True):
        if accuracy >= target:
            return float(start + (end - start) * (target - before) / (accuracy - before))
        before, start = accuracy, end
    return math.inf


def table(results: list[dict[str, Any]]) -> Table:
    """Show the seconds of each seed, and how many times as fast ours is with the same seeds (geometric mean)."""
    shown = Table("target", "loop", "seeds", "CPU s to it", "ours is so many times as fast", "95 % interval (t)")
    for target in TARGETS:
        for loop in dict.fromkeys(row["loop"] for row in results):
            seconds = {row["seed"]: seconds_to(target, row) for row in results if row["loop"] == loop}
            ours = {row["seed"]: seconds_to(target, row) for row in results if row["loop"] == OURS}
            mean, low, high = ratio([(ours[seed], seconds[seed]) for seed in seconds if seed in ours])
            shown.add_row(
                f"{target:.0%}", loop, str(len(seconds)),
                " ".join("never" if math.isinf(value) else f"{value:.0f}" for value in seconds.values()),
                "" if loop == OURS else f"{mean:.2f}", "" if loop == OURS else f"{low:.2f} to {high:.2f}",
            )  # fmt: skip
        shown.add_section()
    return shown


def ratio(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the geometric mean of b / a and its 95 % interval; NaN where a target was missed or two are too few."""
    logs = [math.log(b / a) if math.isfinite(a) and math.isfinite(b) else math.nan for a, b in pairs]
    mean = statistics.fmean(logs) if logs else math.nan
    half = math.nan
    if len(logs) > 1 and math.isfinite(mean):
        half = float(stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True, description=__doc__))
