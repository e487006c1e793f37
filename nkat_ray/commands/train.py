"""`nkat train`: train one configuration on one dataset, without Ray."""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nkat_ray import __version__
from nkat_ray.config import (
    STAGE1_DATASET,
    CompileConfig,
    DataConfig,
    LambdaModel,
    ScreenConfig,
    Seed,
    TrialConfig,
    config_of_json,
    default_storage_path,
    field_names,
)
from nkat_ray.data import Dataset
from nkat_ray.data.selection import Limits, Selection, select_images, validation_size
from nkat_ray.data.suite import need_dataset
from nkat_ray.errors import DONE, FAULT, NO_GO, UserError
from nkat_ray.files import CURVES_FILE, WEIGHTS_FILE, write_atomically
from nkat_ray.flags import Program, continued, more_of_trial
from nkat_ray.metrics import (
    EPOCH,
    LOCAL_TPE,
    SMOKE_ACCURACY,
    SMOKE_EPOCH,
    tpe_score,
    wilson_interval,
)
from nkat_ray.record.rows import curve_row
from nkat_ray.record.storage import is_uri
from nkat_ray.record.tables import read_rows, read_summary, write_json, write_rows
from nkat_ray.report.tensorboard import TensorBoardLog
from nkat_ray.report.terminal import Screen, is_live, screen_of

if TYPE_CHECKING:
    import torch

    from nkat_ray.train.loop import EpochResult, Trainer

FREE_ON_RESUME = ("compile", "data_dir", "json", "quiet", "resume")  # flags that may change with --resume
CHECKPOINTS_FOLDER, CHECKPOINTS_KEPT = "checkpoints", 2
TRAINING_FILE = "training.json"  # the configuration, for --resume


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrialConfig, DataConfig, CompileConfig, ScreenConfig):
    """The configuration of `nkat train`: one training on one dataset."""

    dataset: str = STAGE1_DATASET
    """Dataset to train on. cifar10, mnist, fashion_mnist, emnist_letters, or the name of a Parquet pair in data_dir."""
    seed: Seed = 0
    """Seed of weights, order and augmentation."""
    out: Path | None = None
    """Folder for checkpoints and the model. Default: train-<dataset>-<UTC time> in $NKAT_STORAGE_PATH, else ./runs."""
    resume: bool = False
    """Continue the training in --out from its last intact checkpoint. Without --out, the newest training continues."""
    smoke: bool = False
    """Apply the ten-epoch rule. Train 10 epochs; print GO above 45 % validation accuracy, else NO-GO (exit code 4)."""
    lambda_model: LambdaModel = "notes"
    """Lambda in the TPE score. The score under all three is printed."""


PROGRAM = Program(
    name="nkat train",
    config=TrainConfig,
    summary="Train one configuration on one dataset, without Ray.",
    groups={
        "Start here": ("dataset", "data_dir", "data", "out", "resume", "smoke", "seed", "lambda_model"),
        "Training": ("epochs", "batch_size", "lr", "warmup", "train_images", "val_images", "compile"),
        "Output": ("quiet", "json"),
    },
    more=more_of_trial("epochs", "batch_size", "lr", "warmup", "train_images", "val_images"),
    examples=(
        "nkat train --epochs 10 --smoke",
        "nkat train --dataset mnist --conv_stem off --patch_size 4 --depth 4",
        "nkat train --resume",
    ),
)


def main(argv: Sequence[str]) -> int:
    """Train as the command line specifies; return the exit code."""
    config = read(argv)
    with screen_of(config) as screen:
        return train(config, screen)


def read(argv: Sequence[str]) -> TrainConfig:
    """Read the configuration from the command line; see `configured`."""
    return configured(PROGRAM.read(argv))


def configured(typed: Mapping[str, Any]) -> TrainConfig:
    """Return the training that these flags mean; with `resume` it is the saved one.

    Raises:
        UserError: a value that is not allowed, or a flag that a training which goes on cannot change.
    """
    if not typed.get("resume"):
        return TrainConfig(**typed)
    saved = dataclasses.replace(saved_training(typed.get("out")), quiet=False, json=False)
    return continued(saved, typed, FREE_ON_RESUME)


def train(config: TrainConfig, console: Screen) -> int:
    """Train, test once at the end, and print the result; return the exit code.

    Raises:
        UserError: the dataset is missing, the folder contains another training, or PyTorch cannot use the GPU.
    """
    from nkat_ray.train.device import own_device

    if config.smoke and config.epochs < SMOKE_EPOCH:
        raise UserError(f"epochs is {config.epochs}; --smoke needs at least {SMOKE_EPOCH}")
    out = config.out or _default_folder() / f"train-{config.dataset}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not config.resume and (out / TRAINING_FILE).exists():
        raise UserError(
            f"out is {str(out)!r}; it contains a training; continue it with --resume, or choose another folder"
        )
    dataset = need_dataset(config.dataset, config, console, advice="`nkat data list` shows what there is")
    limits = Limits(validation_size(dataset.sizes["train"], config.val_images), config.train_images)
    images = select_images(dataset, limits)  # refuses too many before anything is written
    device = own_device()
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / TRAINING_FILE, dataclasses.asdict(config))
    return _train(config, dataset, images, device, out, console)


def saved_training(out: Path | None) -> TrainConfig:
    """Read the configuration of the training that --resume continues.

    Args:
        out: its folder; None for the newest training in $NKAT_STORAGE_PATH, else ./runs.

    Raises:
        UserError: there is none, or another version wrote it.
    """
    if out is None:
        folder = _default_folder()
        found = sorted(folder.glob(f"train-*/{TRAINING_FILE}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"there is no training to resume in {folder}/; give its folder with --out")
        out = found[-1].parent
    path = out / TRAINING_FILE
    if not path.exists():
        raise UserError(f"out is {str(out)!r}; it contains no training to resume")
    saved = read_summary(path)
    unknown = sorted(saved.keys() - set(field_names(TrainConfig)))
    if unknown:
        raise UserError(
            f"{path} has settings that NKAT-Ray {__version__} does not know: {', '.join(unknown)}; "
            "resume with the version that wrote it"
        )
    return config_of_json(TrainConfig, saved, out=out)


def _default_folder() -> Path:
    """Return the folder of trainings without --out: $NKAT_STORAGE_PATH, else ./runs; raise a UserError for a bucket."""
    storage_path = default_storage_path()
    if is_uri(storage_path):
        raise UserError(f"NKAT_STORAGE_PATH is {storage_path!r}; `nkat train` writes to a folder; give one with --out")
    return Path(storage_path).expanduser()


@dataclasses.dataclass
class _Best:
    """The epoch with the highest validation accuracy so far, and the newest epoch's accuracy."""

    best: float = -math.inf
    val_accuracy: float = math.nan
    weights: bytes | None = None

    def update(self, trainer: "Trainer", accuracy: float) -> None:
        """Update with the result of one more epoch."""
        self.val_accuracy = accuracy
        if accuracy > self.best:
            self.best, self.weights = accuracy, trainer.weights(val_accuracy=accuracy).to_bytes()


def _train(
    config: TrainConfig, dataset: Dataset, images: Selection, device: "torch.device", out: Path, console: Screen
) -> int:
    from nkat_ray.model import lambdas
    from nkat_ray.train.session import create_trainer, training_data

    with _progress_bar(console) as bar:
        task = bar.add_task(dataset.name, total=config.epochs)
        trainer = create_trainer(
            TrialConfig(**{name: getattr(config, name) for name in field_names(TrialConfig)}),
            training_data(images, dataset.traits, device),
            seed=config.seed,
            notice=bar.console.print,
            on_step=lambda done: bar.update(task, completed=done),
            compile=config.compile,
        )
        best = _continue(trainer, out) if config.resume else _Best()
        if trainer.epoch:
            console.print(f"continued after epoch {trainer.epoch}")
        found = lambdas(trainer.model, trainer.config)
        finite = _run_epochs(config, trainer, best, found[config.lambda_model], out, console)
    if not finite:
        return _report_divergence(trainer.epoch, out, console)
    if config.smoke:
        return _smoke_verdict(best.val_accuracy, console)
    assert best.weights is not None
    _conclude(config, dataset, device, best.weights, found, out, console)
    return DONE


def _progress_bar(console: Screen) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, disable=not is_live(console),
    )  # fmt: skip


def _continue(trainer: "Trainer", out: Path) -> _Best:
    """Load the newest intact checkpoint; without one the training starts again."""
    from nkat_ray.train.checkpoint import first_whole_state

    found = first_whole_state(sorted((out / CHECKPOINTS_FOLDER).glob("epoch_*"), reverse=True))
    if found is None:
        return _Best()
    folder, state = found
    trainer.load_state(state["trainer"])
    return _Best(state["best"], state["val_accuracy"], (folder / WEIGHTS_FILE).read_bytes())


def _run_epochs(config: TrainConfig, trainer: "Trainer", best: _Best, lam: float, out: Path, console: Screen) -> bool:
    """Train and write curve, TensorBoard and checkpoint after every epoch; return False if a loss was not finite."""
    curve = _Curve(out / CURVES_FILE, trainer.epoch)
    with TensorBoardLog(out / "tensorboard", base=config) as board:
        for result in _until_smoke(config, trainer):
            finite = math.isfinite(result.val_accuracy)
            score = tpe_score(result.val_accuracy, lam) if finite else math.nan
            blocks = {**trainer.attention_entropy(), **trainer.nkat_scalars()} if finite else {}
            row = {**dataclasses.asdict(result), LOCAL_TPE: score, **blocks}
            board.on_epoch(0, row)
            curve.add(row)
            console.print(_epoch_line(result, score, config.epochs), markup=False, highlight=False)
            if not finite:
                return False
            best.update(trainer, result.val_accuracy)
            state = {"trainer": trainer.state(), "best": best.best, "val_accuracy": best.val_accuracy}
            _checkpoint(out, state, best.weights)
    return True


class _Curve:
    """curves.parquet of a training (as trial 0), written after every epoch; a resumed one continues after `epoch`."""

    def __init__(self, path: Path, epoch: int) -> None:
        self._path = path
        self._rows = [row for row in read_rows(path) if row[EPOCH] <= epoch] if epoch and path.exists() else []
        trained_s = self._rows[-1]["started_s"] + self._rows[-1]["epoch_s"] if self._rows else 0.0
        self._start = time.time() - trained_s

    def add(self, row: Mapping[str, Any]) -> None:
        """Add an epoch that the trainer reported, and write the file."""
        self._rows.append({"trial": 0, **curve_row(row), "started_s": row["started_s"] - self._start})
        write_rows(self._path, self._rows)


def _until_smoke(config: TrainConfig, trainer: "Trainer") -> Iterator["EpochResult"]:
    """Yield the trainer's epochs; with --smoke only the first ten."""
    if config.smoke and trainer.epoch >= SMOKE_EPOCH:
        return
    for result in trainer.epochs():
        yield result
        if config.smoke and result.epoch >= SMOKE_EPOCH:
            return


def _epoch_line(result: "EpochResult", score: float, epochs: int) -> str:
    return (
        f"epoch {result.epoch}/{epochs}: loss {result.train_loss:.4f}, validation accuracy {result.val_accuracy:.4f}, "
        f"TPE {score:.3f}, lr {result.lr:.2e}, {result.images_per_s:.0f} images/s"
    )


def _checkpoint(out: Path, state: dict[str, Any], weights: bytes | None) -> None:
    from nkat_ray.train.checkpoint import save_state

    folder = out / CHECKPOINTS_FOLDER / f"epoch_{state['trainer']['epoch']:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        write_atomically(folder / WEIGHTS_FILE, weights)
    save_state(folder, state)
    for old in sorted((out / CHECKPOINTS_FOLDER).glob("epoch_*"))[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old)


def _report_divergence(epoch: int, out: Path, console: Screen) -> int:
    text = (
        f"the loss was not finite in epoch {epoch}: stopped; the last finite state is kept in "
        f"{out}/{CHECKPOINTS_FOLDER}; a lower --lr or a smaller --clip_grad may help"
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.conclude({"error": text, "folder": out.absolute(), "exit_code": FAULT}, [text])
    return FAULT


def _smoke_verdict(accuracy: float, console: Screen) -> int:
    """Print the verdict on the accuracy of the tenth epoch itself, as the gate does (docs/spec.md section 6.1)."""
    go = accuracy > SMOKE_ACCURACY
    code = DONE if go else NO_GO
    text = (
        f"{'GO' if go else 'NO-GO'}: validation accuracy {accuracy:.4f} in epoch {SMOKE_EPOCH}; "
        f"the rule needs more than {SMOKE_ACCURACY}"
    )
    console.print(text, style="bold green" if go else "bold red", markup=False, highlight=False)
    console.conclude({"go": go, "val_accuracy": accuracy, "exit_code": code}, [text])
    return code


def _conclude(
    config: TrainConfig,
    dataset: Dataset,
    device: "torch.device",
    payload: bytes,
    lambdas: dict[str, float],
    out: Path,
    console: Screen,
) -> None:
    """Test the best weights on validation, once, and write and print the result."""
    from nkat_ray.train.checkpoint import Weights
    from nkat_ray.train.images import ImageSet
    from nkat_ray.train.transfer import count_correct_of, save_weights

    weights = Weights.from_bytes(payload)
    save_weights(weights, payload, out / "best", class_names=dataset.class_names)
    test = dataset.load("test")
    n = len(test.labels)
    correct = count_correct_of(weights, ImageSet(test.images, test.labels, None, device))
    accuracy, (low, high) = correct / n, wilson_interval(correct, n)
    scores = {name: tpe_score(accuracy, lam) for name, lam in lambdas.items()}
    result = {
        "dataset": dataset.name, "source": dataset.source, "digest": dataset.digest, "seed": config.seed, "n_test": n,
        "test_accuracy": accuracy, "ci_low": low, "ci_high": high, "best_epoch": weights.epoch,
        "val_accuracy": weights.val_accuracy, "lambda": lambdas, "tpe": scores,
    }  # fmt: skip
    write_json(out / "result.json", result)
    tpes = ", ".join(f"{name} {score:.3f} (lambda {lambdas[name]:.4g})" for name, score in scores.items())
    text = (
        f"{dataset.name}: test accuracy {accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {n}, "
        f"seed {config.seed}, epoch {weights.epoch}); TPE {tpes}; model in {out}/best"
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.conclude({**result, "folder": out.absolute(), "exit_code": 0}, [text])
