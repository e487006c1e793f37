"""`nkat explain`: what a trained network looks at, as PNG files and one page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console

from nkat_ray.config import IMAGE_SIZE, DataConfig
from nkat_ray.data import Dataset, Missing, open_dataset, split_validation, stratified_subset
from nkat_ray.data.selection import VALIDATION_ONE_IN
from nkat_ray.data.spec import KNOWN
from nkat_ray.files import BEST_FOLDER, CURVES_FILE, WEIGHTS_FILE
from nkat_ray.metrics import EPOCH, NKAT_SCALARS
from nkat_ray.report import attention
from nkat_ray.report.explain import Example, Explanation, write_explanation
from nkat_ray.report.tables import Row, read_curves

SHOWN_MOST = 64
SCANNED = 200  # validation images from which examples are taken and heads are averaged
BATCH = 16  # images a pass: the weights of 256 tokens, 9 blocks and 8 heads take 300 MB
RANKED = 3  # classes named for an image
FOLDERS_ABOVE = 5  # RUN/tune/ATTEMPT/TRIAL/CHECKPOINT/weights.safetensors: how far above a model its curves may lie


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(DataConfig):
    """Attention maps, rollout, entropy and kept tokens a head, and the NKAT parameters of a trained model."""

    model: tyro.conf.Positional[Path]
    """Folder of a run (its best/), or of one model (best/, a checkpoint); or a file of weights (.safetensors)."""
    images: tuple[str, ...] = ("8",)
    """How many validation images to show, right and wrong ones, 1..64; or image files."""
    dataset: str | None = None
    """Dataset whose validation images are shown. Default: the one that the model was trained on."""
    out: Path | None = None
    """Folder for explain.html and the PNG files. Default: explain/ in MODEL, beside a file in a folder of its name."""


@dataclass(frozen=True)
class _Batch:
    """Images as read: a caption each, uint8 (C, H, W) each, and true classes where they are known."""

    captions: Sequence[str]
    images: Sequence[NDArray[np.uint8]]
    labels: Sequence[int | None]


def explain(config: ExplainConfig, console: Console) -> int:
    """Write the page and the pictures, and say where they are.

    Raises:
        ValueError: no model, a bad number of images, an unreadable image, or data that cannot be had.
    """
    source = weights_file(config.model)
    count, files = _images_asked(config.images)
    out = config.out or (config.model.with_suffix("") if config.model.is_file() else config.model) / "explain"
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {str(out)!r}; it is no folder; choose another")
    weights = _read(source)
    network = _Network(weights)
    named = config.dataset is None and weights.dataset in KNOWN  # then the classes' names need no data
    dataset = None if files and named else _open(config, weights, console)
    names = class_names(dataset, weights)
    if files:
        batch = _from_files(files, names, grey=weights.grey)
        what, scan = "images given", network.scan(batch)
        chosen = list(range(len(files)))
    else:
        assert dataset is not None
        batch = _validation(dataset, weights.config.val_images, max(count, SCANNED))
        what, scan = "validation images", network.scan(batch)
        chosen = choose([int(label or 0) for label in batch.labels], scan.right, count)
    known = None not in batch.labels
    examples, checks = network.examples(batch, chosen, names)
    scalars = network.scalars()
    curves, history = training_curve(source, scalars, weights.epoch)
    found = Explanation(
        name=_name(config.model), examples=examples, entropy=scan.entropy, kept=scan.kept, averaged=len(batch.images),
        right=int(sum(scan.right)) if known else None, what=what, tokens=weights.config.tokens,
        top_k=weights.config.top_k, split_heads=weights.config.split_heads, scalars=scalars,
        history=history, epoch=weights.epoch,
        facts={
            **_facts(weights, dataset, batch, files, checks),
            "curves": f"{curves}, whose epoch {weights.epoch} has these very values" if curves else "none found",
        },
    )  # fmt: skip
    page = write_explanation(found, _made(out))
    console.print(f"pictures: {out}\npage: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


# --- the model --------------------------------------------------------------------------------------------------------


def weights_file(model: Path) -> Path:
    """The file of weights that `model` means: itself, the one in the folder, or the one in a run's best/.

    Raises:
        ValueError: there is none.
    """
    for path in (model, model / WEIGHTS_FILE, model / BEST_FOLDER / WEIGHTS_FILE):
        if path.is_file():
            return path
    if not model.exists():
        raise ValueError(f"model is {str(model)!r}; it does not exist; name a run's folder, best/ or a checkpoint")
    raise ValueError(f"model is {str(model)!r}; neither it nor its {BEST_FOLDER}/ holds {WEIGHTS_FILE}")


def training_curve(source: Path, scalars: Mapping[str, Sequence[float]], epoch: int) -> tuple[Path | None, list[Row]]:
    """The epochs of the training that a model comes from, and the table that has them: the nearest one above it.

    A trial is known by its NKAT scalars: those of its epoch `epoch` are the model's, bit for bit.
    """
    for folder in source.resolve().parents[:FOLDERS_ABOVE]:
        if (folder / CURVES_FILE).is_file():
            rows = read_curves(folder / CURVES_FILE)
            for row in rows:
                if row[EPOCH] == epoch and all(row.get(name) == list(scalars[name]) for name in NKAT_SCALARS):
                    return folder / CURVES_FILE, [other for other in rows if other["trial"] == row["trial"]]
            return None, []
    return None, []


def _name(model: Path) -> str:
    path = model.resolve()
    return f"{path.parent.name}/{path.name}" if path.name == BEST_FOLDER or path.is_file() else path.name


def _read(path: Path) -> Any:
    from nkat_ray.train.checkpoint import CheckpointError, Weights

    try:
        return Weights.from_bytes(path.read_bytes())
    except (CheckpointError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no readable model: {error}") from error


def class_names(dataset: Dataset | None, weights: Any) -> tuple[str, ...]:
    """Names of the model's classes, from its dataset.

    Raises:
        ValueError: the dataset has another number of classes.
    """
    names = dataset.class_names if dataset else KNOWN[weights.dataset].class_names
    if len(names) != weights.num_classes:
        name = dataset.name if dataset else weights.dataset
        raise ValueError(f"dataset {name!r} has {len(names)} classes; the model knows {weights.num_classes}")
    return names


@dataclass(frozen=True)
class _Scan:
    """Averages over images: entropy and kept tokens (L, H); and whether each image is right."""

    entropy: NDArray[np.float64]
    kept: NDArray[np.float64]
    right: Sequence[bool]


class _Network:
    """A model on the CPU, with the normalisation that it was trained with."""

    def __init__(self, weights: Any) -> None:
        try:
            self._model = weights.build()
        except RuntimeError as error:  # tensors that do not fit the configuration
            raise ValueError(f"the model's weights do not fit its configuration: {error}") from error
        self._mean, self._std = weights.mean, weights.std

    def scalars(self) -> dict[str, list[float]]:
        """The NKAT scalars, block by block."""
        from nkat_ray.model.capture import nkat_scalars

        return nkat_scalars(self._model)

    def scan(self, batch: _Batch) -> _Scan:
        """Averages over a batch of any size, a few images at a time."""
        entropy: list[NDArray[np.float64]] = []
        kept: list[NDArray[np.float64]] = []
        predicted: list[int] = []
        for start in range(0, len(batch.images), BATCH):
            logits, weights, (_, _, capture) = self._capture(batch.images[start : start + BATCH])
            entropy += list(attention.entropy(weights).mean(-1).swapaxes(0, 1))  # (L, B, H) -> B of (L, H)
            kept += list(capture.kept.double().mean(-1).numpy().swapaxes(0, 1))
            predicted += logits.argmax(1).tolist()
        right = [truth == said for truth, said in zip(batch.labels, predicted, strict=True)]
        return _Scan(np.mean(entropy, 0), np.mean(kept, 0), right)

    def examples(
        self, batch: _Batch, chosen: Sequence[int], names: Sequence[str]
    ) -> tuple[list[Example], dict[str, str]]:
        """The chosen images with their predictions and weights, each from one pass, and the checks of those passes."""
        from nkat_ray.model.capture import plain_difference, row_error

        found, rows, differences = [], 0.0, 0.0
        for row in chosen:
            logits, weights, (inputs, pixels, capture) = self._capture([batch.images[row]])
            rows = max(rows, row_error(capture))
            differences = max(differences, plain_difference(self._model, inputs, capture))
            label = batch.labels[row]
            found.append(
                Example(
                    caption=batch.captions[row], image=pixels[0], truth=None if label is None else names[label],
                    ranked=_ranked(logits[0], names), weights=weights[:, 0],
                )
            )  # fmt: skip
        checks = {
            "attention rows": f"sum to 1 within {rows:.1g}",
            "logits": "those of a pass without hooks"
            + (f", within {differences:.1g} of the largest" * (differences > 0)),
        }
        return found, checks

    def _capture(self, images: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[Any], NDArray[Any], Any]:
        """Logits (B, K), weights (L, B, H, N, N) and (inputs, pixels (B, H, W, 3), the capture)."""
        import torch

        from nkat_ray.model.capture import capture_attention
        from nkat_ray.train.loop import in_pixels, normalise, to_network_size

        pixels = torch.cat([to_network_size(torch.from_numpy(image[None].copy())) for image in images])
        inputs = normalise(pixels, in_pixels(self._mean), in_pixels(self._std))
        capture = capture_attention(self._model, inputs)
        shown = pixels.permute(0, 2, 3, 1).numpy()
        return capture.logits.double().numpy(), capture.weights.double().numpy(), (inputs, shown, capture)


def _ranked(logits: NDArray[np.float64], names: Sequence[str]) -> list[tuple[str, float]]:
    """The most probable classes; the first is the prediction."""
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-logits, kind="stable")[:RANKED]
    return [(names[index], float(shares[index])) for index in best]


# --- the images -------------------------------------------------------------------------------------------------------


def _images_asked(images: Sequence[str]) -> tuple[int, list[Path]]:
    """A number of validation images, or files."""
    if len(images) == 1 and images[0].lstrip("-").isdigit():
        count = int(images[0])
        if not 1 <= count <= SHOWN_MOST:
            raise ValueError(f"images is {count}; allowed: 1..{SHOWN_MOST}, or image files")
        return count, []
    if not 1 <= len(images) <= SHOWN_MOST:
        raise ValueError(f"images are {len(images)} files; allowed: 1..{SHOWN_MOST}")
    files = [Path(name) for name in images]
    for file in files:
        if not file.is_file():
            raise ValueError(f"images holds {str(file)!r}; there is no such file; give a number or image files")
    return len(files), files


def _open(config: ExplainConfig, weights: Any, console: Console) -> Dataset:
    name = config.dataset or weights.dataset
    found = open_dataset(name, config, notice=lambda text: console.print(f"note: {text}", markup=False))
    if isinstance(found, Missing):
        raise ValueError(f"dataset {name!r} cannot be had: {found.reason}; name its folder with --data_dir")
    return found


def _validation(dataset: Dataset, val_images: int, most: int) -> _Batch:
    """A fixed, stratified choice from the validation images of the model's training."""
    labels = dataset.labels("train")
    size = min(val_images, dataset.sizes["train"] // VALIDATION_ONE_IN)
    _, val = split_validation(labels, val_images=size, train_images=None)
    rows = val[stratified_subset(labels[val], min(most, len(val)))]
    split = dataset.load("train", rows)
    captions = [f"training file, image {row} (validation)" for row in rows]
    return _Batch(captions, list(split.images), split.labels.tolist())


def choose(labels: Sequence[int], right: Sequence[bool], count: int) -> list[int]:
    """Positions of `count` images, half of them wrong as far as there are any: by position, classes in turn.

    Nothing is picked for its looks.
    """
    good, bad = (_in_turn(labels, [n for n, ok in enumerate(right) if ok is wanted]) for wanted in (True, False))
    wrong = min(len(bad), max(count // 2, count - len(good)))
    return good[: count - wrong] + bad[:wrong]


def _in_turn(labels: Sequence[int], rows: Sequence[int]) -> list[int]:
    """The first of each class, then the second of each, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for row in rows:
        turns.append((seen[labels[row]], row))
        seen[labels[row]] += 1
    return [row for _, row in sorted(turns)]


def _from_files(files: Sequence[Path], names: Sequence[str], *, grey: bool) -> _Batch:
    """Image files; one that lies in a folder with a class's name is of that class."""
    folders = [path.resolve().parent.name for path in files]
    labels = [names.index(folder) if folder in names else None for folder in folders]
    return _Batch([path.name for path in files], [read_image(path, grey=grey) for path in files], labels)


def read_image(file: Path, *, grey: bool) -> NDArray[np.uint8]:
    """An image file as uint8 (1 or 3, H, W): upright, over black, and shrunk to fit 32x32 where it is larger.

    Raises:
        ValueError: it is no readable image.
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no readable image ({type(error).__name__}); leave it out or replace it") from error
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("L" if grey else "RGB")
    if max(flat.size) > IMAGE_SIZE:
        flat = ImageOps.pad(flat, size, Image.Resampling.LANCZOS)
    pixels = np.asarray(flat, np.uint8)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


# --- the words --------------------------------------------------------------------------------------------------------


def _facts(
    weights: Any, dataset: Dataset | None, batch: _Batch, files: Sequence[Path], checks: dict[str, str]
) -> dict[str, str]:
    config = weights.config
    design = (
        f"conv_stem {config.conv_stem}, patch_size {config.patch_size}, embed_dim {config.embed_dim}, "
        f"depth {config.depth}, num_heads {config.num_heads}, {config.tokens} tokens"
    )
    off = {None: "off"}
    top_k, top_p = off.get(config.top_k, config.top_k), off.get(config.top_p, config.top_p)
    chosen = "as given" if files else "the examples are the first of each class in a fixed order, not picked by looks"
    return {
        "network": design,
        "filter": f"temperature {config.temperature:.3g}, top_k {top_k}, top_p {top_p}",
        "trained on": f"{weights.dataset}, epoch {weights.epoch}, validation accuracy {weights.val_accuracy:.4f}",
        "images": f"{len(batch.images)}, {chosen}" + ("" if files else "; no test image among them"),
        **({} if files or dataset is None else {"data": f"{dataset.source}, {dataset.digest[:19]}"}),
        **checks,
    }


def _made(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out is {str(out)!r}; it cannot be made a folder ({error.strerror})") from error
    return out
