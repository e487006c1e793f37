"""`nkat explain`: write a page about the attention of a trained network."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from nkat_ray.config import DataConfig
from nkat_ray.data import Dataset, split_validation, stratified_subset
from nkat_ray.data.pictures import common_shape, decode, kinds
from nkat_ray.data.selection import validation_size
from nkat_ray.data.spec import KNOWN
from nkat_ray.data.suite import need_dataset
from nkat_ray.errors import UserError
from nkat_ray.explain.network import Batch, Network
from nkat_ray.explain.page import PAGE_FILE, Explanation, explanation_page
from nkat_ray.fields import Positional
from nkat_ray.files import BEST_FOLDER, CURVES_FILE, WEIGHTS_FILE
from nkat_ray.flags import Program
from nkat_ray.metrics import EPOCH, NKAT_SCALARS
from nkat_ray.record.scoring import setting
from nkat_ray.record.tables import Row, read_rows
from nkat_ray.report.terminal import Screen

SHOWN_MOST = 64
SCANNED = 200  # validation images from which examples are taken and heads are averaged
FOLDERS_ABOVE = 5  # RUN/tune/ATTEMPT/TRIAL/CHECKPOINT/weights.safetensors: how far above a model its curves may lie


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(DataConfig):
    """Show attention maps, rollout, entropy and kept tokens per head, and the NKAT parameters of a trained model."""

    model: Annotated[Path, Positional()]
    """Folder of a run (its best/), or of one model (best/, a checkpoint); or a file of weights (.safetensors)."""
    images: tuple[str, ...] = ("8",)
    """How many validation images to show, right and wrong ones, 1..64; or image files."""
    dataset: str | None = None
    """Dataset whose validation images are shown. Default: the one that the model was trained on."""
    out: Path | None = None
    """Folder for explain.html. Default: explain/ in MODEL; for a file, a folder of its name beside it."""


PROGRAM = Program(
    name="nkat explain",
    config=ExplainConfig,
    summary="Show what a trained network attends to: maps, rollout, heads and NKAT parameters on one page.",
    examples=("nkat explain runs/quick-20260101-120000", "nkat explain runs/quick-20260101-120000 --images cat.png"),
)


def main(argv: Sequence[str]) -> int:
    """Explain the model that the command line names; return the exit code."""
    return explain(PROGRAM.configured(argv), Screen())


def explain(config: ExplainConfig, console: Console) -> int:
    """Write the page, and print where it is.

    Raises:
        UserError: there is no model, the number of images is out of range, or an image or the data cannot be read.
    """
    source = weights_file(config.model)
    count, files = _requested_images(config.images)
    out = config.out or (config.model.with_suffix("") if config.model.is_file() else config.model) / "explain"
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {str(out)!r}; it is not a folder; choose another")
    from nkat_ray.train.checkpoint import read_weights  # loads torch: only once nothing typed is wrong

    weights = read_weights(source)
    network = Network(weights)
    named = config.dataset is None and weights.dataset in KNOWN  # then the classes' names need no data
    dataset = None
    if not (files and named):
        name = config.dataset or weights.dataset
        dataset = need_dataset(name, config, console, advice="name its folder with --data_dir")
    names = class_names(dataset, weights)
    if files:
        batch, what = _from_files(files, names, grey=weights.grey), "images given"
    else:
        assert dataset is not None
        batch, what = _validation(dataset, weights.config.val_images, max(count, SCANNED)), "validation images"
    scan = network.scan(batch)
    chosen = list(range(count)) if files else choose([int(label or 0) for label in batch.labels], scan.right, count)
    examples, checks = network.examples(batch, chosen, names)
    scalars = network.scalars()
    curves, history = training_curve(source, scalars, weights.epoch)
    explained = Explanation(
        name=_name(config.model), examples=examples, entropy=scan.entropy, kept=scan.kept, averaged=len(batch.images),
        right=None if None in batch.labels else sum(scan.right), what=what, tokens=weights.config.tokens,
        top_k=weights.config.top_k, split_heads=weights.config.split_heads, scalars=scalars, history=history,
        epoch=weights.epoch,
        facts={
            **_facts(weights, dataset, len(batch.images), from_files=bool(files)),
            **checks,
            "curves": f"{curves}, whose epoch {weights.epoch} has exactly these values" if curves else "none known",
        },
    )  # fmt: skip
    page = explanation_page(explained).save(_make_folder(out) / PAGE_FILE)
    console.print(f"page: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


# --- the model --------------------------------------------------------------------------------------------------------


def weights_file(model: Path) -> Path:
    """Return the file of weights that `model` means: itself, the one in the folder, or the one in a run's best/.

    Raises:
        UserError: there is none.
    """
    for path in (model, model / WEIGHTS_FILE, model / BEST_FOLDER / WEIGHTS_FILE):
        if path.is_file():
            return path
    if not model.exists():
        raise UserError(f"model is {str(model)!r}; it does not exist; name a run's folder, best/ or a checkpoint")
    raise UserError(f"model is {str(model)!r}; neither it nor its {BEST_FOLDER}/ holds {WEIGHTS_FILE}")


def training_curve(source: Path, scalars: Mapping[str, Sequence[float]], epoch: int) -> tuple[Path | None, list[Row]]:
    """Return the epochs of the training that a model comes from, and the table that has them: the nearest one above it.

    A trial is recognised by its NKAT scalars: those of its epoch `epoch` are the model's, bit for bit.
    """
    for folder in source.resolve().parents[:FOLDERS_ABOVE]:
        if (folder / CURVES_FILE).is_file():
            rows = read_rows(folder / CURVES_FILE)
            for row in rows:
                if row[EPOCH] == epoch and all(row.get(name) == list(scalars[name]) for name in NKAT_SCALARS):
                    return folder / CURVES_FILE, [other for other in rows if other["trial"] == row["trial"]]
            return None, []
    return None, []


def _name(model: Path) -> str:
    path = model.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == BEST_FOLDER or path.is_file() else path.name


def class_names(dataset: Dataset | None, weights: Any) -> tuple[str, ...]:
    """Return the names of the model's classes, from its dataset.

    Raises:
        UserError: the dataset has another number of classes.
    """
    names = dataset.class_names if dataset else KNOWN[weights.dataset].class_names
    if len(names) != weights.num_classes:
        name = dataset.name if dataset else weights.dataset
        raise UserError(f"dataset {name!r} has {len(names)} classes; the model knows {weights.num_classes}")
    return names


# --- the images -------------------------------------------------------------------------------------------------------


def _requested_images(images: Sequence[str]) -> tuple[int, list[Path]]:
    """Return how many images to show, and the files where files were named."""
    if len(images) == 1 and images[0].lstrip("-").isdecimal():
        count = int(images[0])
        if not 1 <= count <= SHOWN_MOST:
            raise UserError(f"images is {count}; allowed: 1..{SHOWN_MOST}, or image files")
        return count, []
    if not 1 <= len(images) <= SHOWN_MOST:
        raise UserError(f"images are {len(images)} files; allowed: 1..{SHOWN_MOST}")
    files = [Path(name) for name in images]
    for file in files:
        if not file.is_file():
            raise UserError(f"images holds {str(file)!r}; there is no such file; give a number or image files")
    return len(files), files


def _validation(dataset: Dataset, val_images: int, most: int) -> Batch:
    """Choose from the validation images of the model's training; the choice is fixed and stratified."""
    labels = dataset.labels("train")
    size = validation_size(dataset.sizes["train"], val_images)
    _, val = split_validation(labels, val_images=size, train_images=None)
    rows = val[stratified_subset(labels[val], min(most, len(val)))]
    split = dataset.load("train", rows)
    captions = [f"training file, image {row} (validation)" for row in rows]
    return Batch(captions, list(split.images), split.labels.tolist())


def choose(labels: Sequence[int], right: Sequence[bool], count: int) -> list[int]:
    """Return positions of `count` images, half of them predicted wrongly if there are enough of those.

    Images are taken by position, classes in turn: none is picked for its looks.
    """
    good, bad = (_in_turn(labels, [n for n, ok in enumerate(right) if ok is wanted]) for wanted in (True, False))
    wrong = min(len(bad), max(count // 2, count - len(good)))
    return good[: count - wrong] + bad[:wrong]


def _in_turn(labels: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Reorder rows: the first of each class, then the second of each, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for row in rows:
        turns.append((seen[labels[row]], row))
        seen[labels[row]] += 1
    return [row for _, row in sorted(turns)]


def _from_files(files: Sequence[Path], names: Sequence[str], *, grey: bool) -> Batch:
    """Read image files; one that lies in a folder with a class's name is of that class."""
    folders = [path.resolve().parent.name for path in files]
    labels = [names.index(folder) if folder in names else None for folder in folders]
    return Batch([path.name for path in files], [read_image(path, grey=grey) for path in files], labels)


def read_image(file: Path, *, grey: bool) -> NDArray[np.uint8]:
    """Read an image file as uint8 (1 or 3, H, W): upright, over black, and shrunk to fit 32x32 if it is larger.

    Raises:
        DataError: the file is not a readable image.
    """
    picture = (file, str(file))
    _, height, width = common_shape(kinds([picture]))
    pixels: NDArray[np.uint8] = decode([picture], (1 if grey else 3, height, width))[0]
    return pixels


# --- what the page says of it ----------------------------------------------------------------------------------------


def _facts(weights: Any, dataset: Dataset | None, images: int, *, from_files: bool) -> dict[str, str]:
    """Return facts about the model and the images."""
    config = weights.config
    chosen = (
        "as given"
        if from_files
        else "the examples are the first of each class in a fixed order, not picked by looks; no test image among them"
    )
    facts = {
        "network": f"conv_stem {config.conv_stem}, patch_size {config.patch_size}, embed_dim {config.embed_dim}, "
        f"depth {config.depth}, num_heads {config.num_heads}, {config.tokens} tokens",
        "filter": f"temperature {config.temperature:.3g}, top_k {setting(config.top_k)}, top_p {setting(config.top_p)}",
        "trained on": f"{weights.dataset}, epoch {weights.epoch}, validation accuracy {weights.val_accuracy:.4f}",
        "images": f"{images}, {chosen}",
    }
    if dataset is not None and not from_files:
        facts["data"] = f"{dataset.source}, {dataset.digest[:19]}"
    return facts


def _make_folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out is {str(out)!r}; the folder cannot be made ({error.strerror})") from error
    return out
