"""`nkat train`: one training of one configuration on one dataset, without Ray."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nkat_ray.config import RunConfig, TrainConfig, TrialConfig, field_names
from nkat_ray.data import Dataset, Missing, open_dataset
from nkat_ray.data.selection import VALIDATION_ONE_IN, Limits, Selection, select_images
from nkat_ray.exit_codes import DONE, FAULT, NO_GO
from nkat_ray.files import CURVES_FILE, WEIGHTS_FILE, write_atomically
from nkat_ray.metrics import EPOCH, LAMBDA_MODELS, LOCAL_TPE, lambda_theory, tpe_score, wilson_interval
from nkat_ray.report.tables import plain, read_curves, read_summary, write_curves
from nkat_ray.report.tensorboard import TensorBoardLog
from nkat_ray.report.terminal import Screen
from nkat_ray.search.rows import curve_row

SMOKE_EPOCHS, SMOKE_ACCURACY = RunConfig.smoke_epoch, RunConfig.smoke_accuracy  # docs/spec.md section 4
CHECKPOINTS_KEPT = 2
TRAINING_FILE = "training.json"  # the configuration, for --resume


def train(config: TrainConfig, console: Screen) -> int:
    """Train, score on the test images once at the end, and say what came out. Returns the exit code.

    Raises:
        ValueError: the dataset cannot be had, or the folder holds another training.
    """
    if config.smoke and config.epochs < SMOKE_EPOCHS:
        raise ValueError(f"epochs is {config.epochs}; --smoke needs at least {SMOKE_EPOCHS}")
    out = config.out or Path("runs") / f"train-{config.dataset}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if not config.resume and (out / TRAINING_FILE).exists():
        raise ValueError(
            f"out is {str(out)!r}; it holds a training; continue it with --resume, or choose another folder"
        )
    dataset = _open(config, console)
    images = select_images(dataset, _limits(config, dataset))  # refuses too many before anything is written
    out.mkdir(parents=True, exist_ok=True)
    (out / TRAINING_FILE).write_text(json.dumps(plain(dataclasses.asdict(config)), indent=2) + "\n")
    return _train(config, dataset, images, out, console)


def saved_training(out: Path | None) -> TrainConfig:
    """Configuration of the training that --resume continues; the newest below `runs/` without a folder.

    Raises:
        ValueError: there is none.
    """
    if out is None:
        found = sorted(Path("runs").glob(f"train-*/{TRAINING_FILE}"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError("there is no training to resume in runs/; give its folder with --out")
        out = found[-1].parent
    if not (out / TRAINING_FILE).exists():
        raise ValueError(f"out is {str(out)!r}; it holds no training to resume")
    saved = read_summary(out / TRAINING_FILE)
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in saved.items()}
    values = {key: value for key, value in values.items() if key in field_names(TrainConfig)}
    folder = values.get("data_dir")
    values["data_dir"] = Path(folder) if isinstance(folder, str) else folder
    return TrainConfig(**{**values, "out": out})


def _open(config: TrainConfig, console: Screen) -> Dataset:
    found = open_dataset(config.dataset, config, notice=lambda text: console.print(f"note: {text}", markup=False))
    if isinstance(found, Missing):
        raise ValueError(
            f"dataset {config.dataset!r} cannot be had: {found.reason}; `nkat data list` shows what there is"
        )
    return found


def _train(config: TrainConfig, dataset: Dataset, images: Selection, out: Path, console: Screen) -> int:
    import torch

    from nkat_ray.train.checkpoint import first_whole_state

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(config.dataset, total=config.epochs)
        trainer, lambdas = _trainer(config, dataset, images, device, bar, task)
        best, accuracy, weights = -math.inf, math.nan, None
        folders = sorted((out / "checkpoints").glob("epoch_*"), reverse=True)
        if config.resume and (found := first_whole_state(folders)) is not None:
            trainer.load_state(found[1]["trainer"])
            best, accuracy = found[1]["best"], found[1]["val_accuracy"]
            weights = (found[0] / WEIGHTS_FILE).read_bytes()
            console.print(f"continued after epoch {trainer.epoch}")
        diverged, curve = False, _Curve(out / CURVES_FILE, trainer.epoch)
        with TensorBoardLog(out / "tensorboard") as board:
            for result in _until_smoke(config, trainer):
                score = tpe_score(result.val_accuracy, lambdas[config.lambda_model]) if _finite(result) else math.nan
                seen = {**trainer.attention_entropy(), **trainer.nkat_scalars()} if _finite(result) else {}
                row = {**dataclasses.asdict(result), LOCAL_TPE: score, **seen}
                board.on_result(0, row)
                curve.add(row)
                bar.update(task, completed=trainer.epoch)
                console.print(_epoch_line(result, score, config.epochs), markup=False, highlight=False)
                if not _finite(result):
                    diverged = True
                    break
                accuracy = result.val_accuracy
                if accuracy > best:
                    best = accuracy
                    weights = trainer.weights(
                        dataset=dataset.name, grey=dataset.grey, val_accuracy=best, seed=config.seed
                    ).to_bytes()
                _checkpoint(out, {"trainer": trainer.state(), "best": best, "val_accuracy": accuracy}, weights)
    if diverged:
        text = (
            f"the loss was not finite in epoch {trainer.epoch}: stopped; the last finite state is kept in "
            f"{out}/checkpoints; a lower --lr or a smaller --clip_grad may help"
        )
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        console.conclude({"error": text, "folder": out.absolute(), "exit_code": FAULT}, [text])
        return FAULT
    assert weights is not None
    if config.smoke:
        return _smoke_verdict(accuracy, console)
    _conclude(config, dataset, device, weights, lambdas, out, console)
    return 0


def _trainer(
    config: TrainConfig, dataset: Dataset, images: Selection, device: Any, bar: Progress, task: TaskID
) -> tuple[Any, dict[str, float]]:
    import torch

    from nkat_ray.model import count_nkat_parameters, count_parameters, create_nkat_vit
    from nkat_ray.train.loop import ImageSet, Trainer

    trial = TrialConfig(**{name: getattr(config, name) for name in field_names(TrialConfig)})
    train = ImageSet(images.images, images.labels, images.train_index, device)
    mean, std = train.statistics()
    torch.manual_seed(config.seed)
    model = create_nkat_vit(trial, num_classes=dataset.classes, grey=dataset.grey, mean=mean, std=std)
    trainer = Trainer(
        model, trial, train=train, val=ImageSet(images.images, images.labels, images.val_index, device),
        num_classes=dataset.classes, flip=dataset.flip, mean=mean, std=std, seed=config.seed, device=device,
        notice=bar.console.print, on_step=lambda done: bar.update(task, completed=done),
    )  # fmt: skip
    counts = {"nkat_parameters": count_nkat_parameters(model), "parameters": count_parameters(model)}
    stem, width = trial.conv_stem, trial.embed_dim
    return trainer, {name: lambda_theory(name, conv_stem=stem, embed_dim=width, **counts) for name in LAMBDA_MODELS}


class _Curve:
    """curves.parquet of a training, as trial 0, written after every epoch; a resumed one goes on after `epoch`."""

    def __init__(self, path: Path, epoch: int) -> None:
        self._path = path
        self._rows = [row for row in read_curves(path) if row[EPOCH] <= epoch] if epoch and path.exists() else []
        trained_s = self._rows[-1]["started_s"] + self._rows[-1]["epoch_s"] if self._rows else 0.0
        self._start = time.time() - trained_s

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one more epoch, as the trainer reported it."""
        self._rows.append({"trial": 0, **curve_row(row), "started_s": row["started_s"] - self._start})
        write_curves(self._path, self._rows)


def _limits(config: TrainConfig, dataset: Dataset) -> Limits:
    """As typed; a small dataset of one's own gives at most a fifth to validation."""
    return Limits(min(config.val_images, dataset.sizes["train"] // VALIDATION_ONE_IN), config.train_images)


def _until_smoke(config: TrainConfig, trainer: Any) -> Iterator[Any]:
    """The epochs; with --smoke only the first ten."""
    if config.smoke and trainer.epoch >= SMOKE_EPOCHS:
        return
    for result in trainer.epochs():
        yield result
        if config.smoke and result.epoch >= SMOKE_EPOCHS:
            return


def _finite(result: Any) -> bool:
    return math.isfinite(result.val_accuracy)


def _epoch_line(result: Any, score: float, epochs: int) -> str:
    return (
        f"epoch {result.epoch}/{epochs}: loss {result.train_loss:.4f}, validation accuracy {result.val_accuracy:.4f}, "
        f"TPE {score:.3f}, lr {result.lr:.2e}, {result.images_per_s:.0f} images/s"
    )


def _checkpoint(out: Path, state: dict[str, Any], weights: bytes | None) -> None:
    from nkat_ray.train.checkpoint import save_state

    folder = out / "checkpoints" / f"epoch_{state['trainer']['epoch']:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    if weights is not None:
        write_atomically(folder / WEIGHTS_FILE, weights)
    save_state(folder, state)
    for old in sorted((out / "checkpoints").glob("epoch_*"))[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old)


def _smoke_verdict(accuracy: float, console: Screen) -> int:
    """As the gate judges: the tenth epoch's own accuracy, not the best so far (docs/spec.md section 6.1)."""
    go = accuracy > SMOKE_ACCURACY
    code = DONE if go else NO_GO
    text = (
        f"{'GO' if go else 'NO-GO'}: validation accuracy {accuracy:.4f} in epoch {SMOKE_EPOCHS}; "
        f"the rule asks for more than {SMOKE_ACCURACY}"
    )
    console.print(text, style="bold green" if go else "bold red", markup=False, highlight=False)
    console.conclude({"go": go, "val_accuracy": accuracy, "exit_code": code}, [text])
    return code


def _conclude(
    config: TrainConfig,
    dataset: Dataset,
    device: Any,
    payload: bytes,
    lambdas: dict[str, float],
    out: Path,
    console: Screen,
) -> None:
    """Read the test images, once, with the weights that were best on validation."""
    from nkat_ray.train.checkpoint import Weights
    from nkat_ray.train.loop import ImageSet
    from nkat_ray.train.transfer import count_correct_of, save_weights

    weights = Weights.from_bytes(payload)
    save_weights(weights, payload, out / "best")
    test = dataset.load("test")
    n = len(test.labels)
    correct = count_correct_of(weights, ImageSet(test.images, test.labels, None, device), device)
    accuracy, (low, high) = correct / n, wilson_interval(correct, n)
    scores = {name: tpe_score(accuracy, lam) for name, lam in lambdas.items()}
    result = {
        "dataset": dataset.name, "source": dataset.source, "digest": dataset.digest, "seed": config.seed, "n_test": n,
        "test_accuracy": accuracy, "ci_low": low, "ci_high": high, "best_epoch": weights.epoch,
        "val_accuracy": weights.val_accuracy, "lambda": lambdas, "tpe": scores,
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(plain(result), indent=2) + "\n")
    tpes = ", ".join(f"{name} {score:.3f} (lambda {lambdas[name]:.4g})" for name, score in scores.items())
    text = (
        f"{dataset.name}: test accuracy {accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {n}, "
        f"seed {config.seed}, epoch {weights.epoch}); TPE {tpes}; model in {out}/best"
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.conclude({**result, "folder": out.absolute(), "exit_code": 0}, [text])
