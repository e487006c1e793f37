"""Record a replay table: learning curves of small NKAT-ViTs on real CIFAR-10, for the simulator.

Draws configurations at random from the recording's space (curve n always has the same one, and n as its seed), trains
each with the product's own loop on one thread, and rewrites the table after every curve, so that it can be stopped at
any time and grows over several sittings. Usage:

    OMP_NUM_THREADS=1 python benchmarks/search/curves.py --curves 200
    python benchmarks/search/curves.py laptop --device cuda --first 0 --curves 30 --table part0.parquet

The images are cut from the training split as in a run, validation included; the test images are not touched.
"""

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nkat_ray.config import PRESETS, STAGE1_DATASET, DataConfig, TrialConfig, field_names
from nkat_ray.metrics import EPOCH, LOCAL_TPE, TRAIN_LOSS, VAL_ACCURACY, lambda_notes, tpe_score
from nkat_ray.space import Choice, Domain, Span

DRAW_SEED = 2026


@dataclass(frozen=True)
class Recording:
    """What a table's curves have in common, and what is drawn for each."""

    file: str
    space: Mapping[str, Domain]
    structure: tuple[str, ...]  # parameters that decide what an epoch costs
    fixed: Mapping[str, Any]  # fields of every trial

    @property
    def table(self) -> Path:
        """Where the curves are kept."""
        return Path(__file__).parent / self.file

    def params_of(self, curve: int) -> dict[str, Any]:
        """Draw the configuration of a curve, which depends on its number alone."""
        generator = np.random.default_rng([DRAW_SEED, curve])
        return {name: draw(domain, generator) for name, domain in self.space.items()}

    def config_of(self, params: Mapping[str, Any]) -> TrialConfig:
        """Build the trial from the drawn values."""
        values = {**self.fixed, **params}
        if "tokens" in values:  # decides the patches
            side = int(values.pop("tokens") ** 0.5)
            values["patch_size"] = (32 if values["conv_stem"] == "off" else 8) // side
        return TrialConfig(**values)


RECORDINGS: Mapping[str, Recording] = {
    # The recipe that `quick` had with AdamW. 64 and 256 tokens cost too much for two hundred curves.
    "small": Recording(
        file="curves.parquet",
        space={
            "conv_stem": Choice(("off", "tiny")),
            "tokens": Choice((4, 16)),
            "embed_dim": Span(32, 64, step=16),
            "depth": Span(1, 2, step=1),
            "temperature": Span(0.4, 1.6),
            "top_k": Choice((2, 4, 8, None)),
            "top_p": Span(0.5, 1.0),
            "lr": Span(2e-4, 1e-2, log=True),
            "weight_decay": Span(1e-3, 2e-1, log=True),
            "label_smoothing": Span(0.0, 0.2),
            "dropout_attn": Span(0.0, 0.3),
            "dropout_embed": Span(0.0, 0.3),
            "cutmix": Span(0.0, 0.5),
            "cutout": Choice((None, 8)),
        },
        structure=("conv_stem", "tokens", "embed_dim", "depth"),
        fixed=dict(
            num_heads=4, epochs=10, warmup=1, batch_size=50, ema=0.99, mixup=0.0, randaugment=None, train_images=1200,
            val_images=1000,
        ),
    ),
    # The preset `laptop` on fewer images, and around its space: sizes whose epochs differ fifteenfold in operations.
    "laptop": Recording(
        file="curves_laptop.parquet",
        space={
            "embed_dim": Span(96, 192, step=32),
            "depth": Span(3, 6, step=1),
            "mlp_ratio": Choice((1.0, 2.0, 4.0)),
            "top_k": Choice((6, 16, None)),
            "lr": Span(5e-4, 1e-2, log=True),
            "weight_decay": Span(1e-2, 2e-1, log=True),
            "label_smoothing": Span(0.0, 0.2),
            "drop_path": Span(0.0, 0.1),
        },
        structure=("embed_dim", "depth", "mlp_ratio", "top_k"),
        fixed={
            **{name: value for name, value in PRESETS["laptop"].items() if name in field_names(TrialConfig)},
            "train_images": 5000,
            "val_images": 2000,
        },
    ),
}  # fmt: skip


def draw(domain: Domain, generator: np.random.Generator) -> Any:
    """Draw a value of the domain, uniformly (log-uniformly for log domains)."""
    if isinstance(domain, Choice):
        return domain.values[generator.integers(len(domain.values))]
    if domain.step is not None:
        return int(domain.low) + domain.step * int(
            generator.integers(1 + (int(domain.high) - int(domain.low)) // domain.step)
        )
    if domain.log:
        return float(np.exp(generator.uniform(np.log(domain.low), np.log(domain.high))))
    return float(generator.uniform(domain.low, domain.high))


def load(path: Path) -> list[dict[str, Any]]:
    """Read the table's rows, one per curve and epoch; none if there is no table yet."""
    return pq.read_table(path).to_pylist() if path.exists() else []


def save(rows: list[dict[str, Any]], path: Path) -> None:
    """Replace the table atomically: a reader, or a kill, sees the old one or the new one."""
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows), part, compression="zstd")
    os.replace(part, path)


def train(recording: Recording, curve: int, selection: Any, device: str) -> list[dict[str, Any]]:
    """Train one curve and return one row per epoch."""
    import torch

    from nkat_ray.data.dataset import Traits
    from nkat_ray.train.session import create_trainer, training_data

    params = recording.params_of(curve)
    config = recording.config_of(params)
    traits = Traits(name=STAGE1_DATASET, num_classes=10, grey=False, flip=True)
    data = training_data(selection, traits, torch.device(device))
    trainer = create_trainer(config, data, seed=curve, notice=print)
    lam = lambda_notes(config.conv_stem, config.embed_dim)
    rows: list[dict[str, Any]] = []
    before = time.process_time()
    for result in trainer.epochs():
        now = time.process_time()
        # One thread's CPU seconds: what the epoch takes on a core of its own, whatever else the machine does.
        epoch_s = now - before if device == "cpu" else result.epoch_s
        before = now
        finite = np.isfinite(result.val_accuracy)
        rows.append({
            "curve": curve, "seed": curve, **params, "patch_size": config.patch_size, "lambda_notes": lam,
            EPOCH: result.epoch, TRAIN_LOSS: result.train_loss, VAL_ACCURACY: result.val_accuracy,
            LOCAL_TPE: tpe_score(result.val_accuracy, lam) if finite else float("nan"), "epoch_s": epoch_s,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", choices=RECORDINGS, nargs="?", default="small")
    parser.add_argument("--first", type=int, default=0, help="number of the first curve")
    parser.add_argument("--curves", type=int, default=200, help="number of curves from there on")
    parser.add_argument("--table", type=Path, help="default: the recording's own, beside this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    import torch

    from nkat_ray.data import Missing, open_dataset
    from nkat_ray.data.selection import Limits, select_images

    torch.set_num_threads(1)
    recording = RECORDINGS[arguments.recording]
    path = arguments.table or recording.table
    dataset = open_dataset("cifar10", DataConfig(), notice=print)
    if isinstance(dataset, Missing):
        raise SystemExit(f"cifar10 is missing: {dataset.reason}")
    selection = select_images(dataset, Limits(recording.fixed["val_images"], recording.fixed["train_images"]))
    rows = load(path)
    done = {row["curve"] for row in rows}
    for curve in range(arguments.first, arguments.first + arguments.curves):
        if curve in done:
            continue
        clock, cpu = time.perf_counter(), time.process_time()
        rows += train(recording, curve, selection, arguments.device)
        save(rows, path)
        last = rows[-1]
        print(
            f"curve {curve}: accuracy {last[VAL_ACCURACY]:.3f} after {last[EPOCH]} epochs, "
            f"{time.perf_counter() - clock:.1f} s, cpu {time.process_time() - cpu:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
