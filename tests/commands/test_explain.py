"""`nkat explain` on a tiny model: the prediction is the model's, the page stands alone, bad input is one line."""

import base64
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from nkat_ray.cli import run_command
from nkat_ray.commands import explain as command
from nkat_ray.commands.explain import ExplainConfig, choose, explain, read_image, weights_file
from nkat_ray.config import DataConfig, TrialConfig
from nkat_ray.data import Dataset, Split, open_dataset, split_validation
from nkat_ray.data.parquet import pair_path, write_split
from nkat_ray.explain.page import Explanation, heatmap
from nkat_ray.metrics import NKAT_SCALARS
from nkat_ray.model import create_nkat_vit
from nkat_ray.model.capture import nkat_scalars
from nkat_ray.record.tables import write_rows
from nkat_ray.report.page import Page
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.images import normalise, to_network_size
from nkat_ray.train.transfer import save_weights

MEAN, STD = (0.5, 0.48, 0.45), (0.25, 0.24, 0.26)


NAMES = tuple(f"stripe {n}" for n in range(10))


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of its own: 200 training images of ten classes."""
    folder = tmp_path_factory.mktemp("stripes")
    for split, n in (("train", 200), ("test", 20)):
        generator = np.random.default_rng(n)
        images = generator.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(n) % 10
        path = pair_path(folder, "stripes", split)  # type: ignore[arg-type]
        write_split(path, Split(images, labels), class_names=NAMES, source="noise", encoding="png", flip=True)
    return folder


def tiny_weights(*, dataset: str = "stripes", num_classes: int = 10, grey: bool = False, **fields: Any) -> Weights:
    config = TrialConfig(**{"embed_dim": 16, "num_heads": 2, "depth": 2, "val_images": 40, **fields})
    torch.manual_seed(0)
    model = create_nkat_vit(config, num_classes=num_classes, grey=grey, mean=MEAN, std=STD)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)  # a fresh network attends almost evenly
        model.head.weight.mul_(50)
    return Weights(
        config=config, dataset=dataset, num_classes=num_classes, grey=grey, mean=MEAN, std=STD, epoch=3,
        val_accuracy=0.25, seed=0, tensors=model.state_dict(),
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Weights, Path]]:
    """Saves a tiny model as a run's best/ and returns its weights and the run's folder."""

    def save(**fields: Any) -> tuple[Weights, Path]:
        weights = tiny_weights(**fields)
        save_weights(weights, weights.to_bytes(), tmp_path / "run" / "best")
        return weights, tmp_path / "run"

    return save


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def opened(folder: Path) -> Dataset:
    dataset = open_dataset("stripes", DataConfig(data_dir=folder), notice=str)
    assert isinstance(dataset, Dataset)
    return dataset


def run(model: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[Explanation, Path]:
    """Explain, and return what was found beside the page's path."""
    found: list[Explanation] = []
    make = command.explanation_page

    def keep(explanation: Explanation) -> Page:
        found.append(explanation)
        return make(explanation)

    monkeypatch.setattr(command, "explanation_page", keep)
    monkeypatch.setattr(command, "SCANNED", 20)
    config = ExplainConfig(**{"model": model, **fields})
    assert explain(config, quiet()) == 0
    return found[0], (config.out or weights_file(model).parents[1] / "explain") / "explain.html"


class Pictures(HTMLParser):
    """The pictures of a page, and every attribute that could lead out of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src":
                assert tag == "img"
                self.sources.append(value or "")
            if name in ("href", "srcset", "action", "data", "poster"):
                self.links.append(value or "")


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_heads": 8, "split_heads": True}, {"conv_stem": "off", "patch_size": 2, "top_k": None, "top_p": None}],
    ids=["plain", "split heads", "256 tokens, no filter"],
)
def test_predictions_are_those_of_the_plain_model(
    saved: Callable[..., Any], stripes: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    weights, folder = saved(**fields)
    found, _ = run(folder, monkeypatch, images=("6",), data_dir=stripes)
    model = weights.build()
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    dataset = opened(stripes)
    assert len(found.examples) == 6
    for example in found.examples:
        row = int(re.findall(r"image (\d+)", example.caption)[0])
        split = dataset.load("train", np.array([row]))
        pixels = to_network_size(torch.from_numpy(split.images))
        assert (example.image == pixels[0].permute(1, 2, 0).numpy()).all()
        assert example.truth == dataset.class_names[split.labels[0]]
        with torch.no_grad():
            shares = model(normalise(pixels, mean, std)).softmax(-1)[0]
        assert example.ranked[0][0] == dataset.class_names[int(shares.argmax())]
        assert [share for _, share in example.ranked] == pytest.approx(shares.topk(3).values.tolist(), abs=1e-5)
        assert example.weights.shape == (2, weights.config.num_heads, found.tokens, found.tokens)
        assert np.abs(example.weights.sum(-1) - 1).max() < 1e-5


def test_averages_stay_within_the_filter(
    saved: Callable[..., Any], stripes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, folder = saved(top_k=3)
    found, _ = run(folder, monkeypatch, images=("20",), data_dir=stripes)
    assert found.averaged == len(found.examples) == 20
    kept = np.mean([(item.weights > 0).sum(-1).mean(-1) for item in found.examples], 0)  # nothing underflows here
    assert found.kept == pytest.approx(kept)
    assert found.kept.max() <= weights.config.top_k
    assert found.kept.min() >= 1
    assert found.entropy.max() <= np.log(3) + 1e-9
    assert found.right == sum(bool(item.right) for item in found.examples)


def test_only_validation_images_of_the_training_are_shown(
    saved: Callable[..., Any], stripes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved()
    found, _ = run(folder, monkeypatch, images=("12",), data_dir=stripes)
    dataset = opened(stripes)
    _, val = split_validation(dataset.labels("train"), val_images=40, train_images=None)
    shown = [int(re.findall(r"image (\d+)", item.caption)[0]) for item in found.examples]
    assert len(set(shown)) == 12
    assert set(shown) <= set(val.tolist())


def test_the_page_stands_alone(saved: Callable[..., Any], stripes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(num_heads=8, split_heads=True)
    found, page = run(folder, monkeypatch, images=("4",), data_dir=stripes)
    text = page.read_text(encoding="utf-8")
    parsed = Pictures(text)
    assert len(parsed.sources) == 4 * (2 + 2)  # image, rollout, and two blocks' heads
    for source in parsed.sources:
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert Image.open(io.BytesIO(data)).format == "PNG"
    assert parsed.links == ["data:,"]
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)  # plotly's own text names addresses
    assert "http" not in outside.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in text
    assert text.count('class="tag red"') == 2 * 4
    assert [path.name for path in page.parent.iterdir()] == ["explain.html"]
    assert f"{found.right} of 20 validation images are predicted correctly" in text
    assert "Images predicted wrongly" in text


def test_a_model_is_found_as_a_run_a_folder_or_a_file(saved: Callable[..., Any], tmp_path: Path) -> None:
    _, folder = saved()
    wanted = folder / "best" / "weights.safetensors"
    for model in (folder, folder / "best", wanted):
        assert weights_file(model) == wanted


def curve_of(weights: Weights, *, trial: int, epochs: int) -> list[dict[str, Any]]:
    """Rows of curves.parquet whose epoch `weights.epoch` has the model's scalars."""
    final = nkat_scalars(weights.build())
    return [
        {"trial": trial, "epoch": epoch, "val_accuracy": epoch / 10}
        | {name: [value + epoch - weights.epoch for value in final[name]] for name in NKAT_SCALARS}
        for epoch in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("place", ["best", "tune/attempt_000/trial_1/checkpoint_000002"])
def test_the_scalars_over_the_epochs_are_those_of_this_models_training(
    saved: Callable[..., Any], stripes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    weights, folder = saved()
    if place != "best":
        shutil.copytree(folder / "best", folder / place)
        shutil.rmtree(folder / "best")
    mine = curve_of(weights, trial=1, epochs=5)
    other = [{**row, "trial": 0, "beta": [0.0, 0.0]} for row in mine]
    diverged = [{"trial": 2, "epoch": 3}]
    write_rows(folder / "curves.parquet", [*other, *mine, *diverged])
    found, page = run(folder / place, monkeypatch, images=("2",), data_dir=stripes, out=tmp_path / "out")
    assert [row["epoch"] for row in found.history] == [1, 2, 3, 4, 5]
    assert {row["trial"] for row in found.history} == {1}
    assert found.history[2]["alpha"] == list(found.scalars["alpha"])
    text = page.read_text(encoding="utf-8")
    assert "epoch 3, whose weights these are (validation accuracy 0.3000)" in text
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', text)[0])
    for name, start in zip(NKAT_SCALARS, (0.1, 0.05, 1.0, 1.0), strict=True):
        chart = figures[name]
        assert [trace["name"] for trace in chart["data"]] == ["block 0", "block 1"]
        for block, trace in enumerate(chart["data"]):
            assert trace["x"] == [0, 1, 2, 3, 4, 5]
            assert trace["y"] == [start, *(row[name][block] for row in mine)]


def test_without_its_own_curves_nothing_is_shown_over_the_epochs(
    saved: Callable[..., Any], stripes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, folder = saved()
    found, page = run(folder, monkeypatch, images=("2",), data_dir=stripes)
    assert found.history == []
    assert "no curves.parquet above the model" in page.read_text(encoding="utf-8")
    other = [{**row, "alpha": [0.0, 0.0]} for row in curve_of(weights, trial=0, epochs=5)]
    write_rows(folder / "curves.parquet", [*other, {"trial": 1, "epoch": 3}])  # of another model, of an older version
    found, page = run(folder, monkeypatch, images=("2",), data_dir=stripes)
    assert found.history == []


def test_image_files_are_explained_without_data(
    saved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder = saved(dataset="cifar10")
    (tmp_path / "horse").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "horse" / "<b>.png")
    Image.new("RGB", (300, 100), "orange").save(tmp_path / "large.jpg")
    files = str(tmp_path / "horse" / "<b>.png"), str(tmp_path / "large.jpg")
    monkeypatch.setattr(command, "need_dataset", None)  # it must not be asked
    found, page = run(folder, monkeypatch, images=files, out=tmp_path / "out")
    first, second = found.examples
    assert (first.image == pixels).all()
    assert (first.truth, second.truth, found.right) == ("horse", None, None)
    assert second.image.shape == (32, 32, 3)
    text = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;.png" in text
    assert "<b>" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


def test_grey_images_are_read_as_the_model_needs_them(tmp_path: Path) -> None:
    file = tmp_path / "digit.png"
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    assert (read_image(file, grey=True) == pixels[None]).all()
    assert (read_image(file, grey=False) == np.stack([pixels] * 3)).all()


def test_a_grey_model_of_another_dataset(saved: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved(dataset="mnist", grey=True)
    found, _ = run(folder, monkeypatch, images=("2",), data_dir=None, data="synthetic")
    image = found.examples[0].image
    assert (image[..., 0] == image[..., 2]).all()
    assert not image[:2].any()  # 28 pixels, padded by two


def test_examples_are_chosen_by_position_and_class() -> None:
    labels = [0, 0, 1, 1, 2, 2, 0, 1]
    right = [True, True, True, False, False, True, False, False]
    assert choose(labels, right, 4) == [0, 2, 3, 4]
    assert choose(labels, right, 6) == [0, 2, 5, 3, 4, 6]
    assert choose(labels, [True] * 8, 3) == [0, 2, 4]
    assert sorted(choose(labels, [False] * 8, 8)) == list(range(8))
    assert choose(labels, right, 1) == [0]


def test_a_heatmap_names_colours_in_block_0_only() -> None:
    (cells,) = heatmap(np.ones((2, 8)), low=0, high=1, unit="nats", split_heads=True).data
    assert cells.text[0][:3] == ["red", "red", "green"]
    assert cells.text[1] == [""] * 8
    assert cells.z[1] == [1.0] * 8


BAD = {
    "no such model": (lambda run: {"model": run / "never"}, "does not exist"),
    "no weights": (lambda run: {"model": run.parent}, "weights.safetensors"),
    "no image": (lambda run: {"images": ("0",)}, "images is 0"),
    "no number": (lambda run: {"images": ("²",)}, "no such file"),
    "too many": (lambda run: {"images": ("65",)}, "images is 65"),
    "no such file": (lambda run: {"images": ("never.png",)}, "never.png"),
    "no picture": (lambda run: {"images": (str(run / "best" / "config.json"),)}, "no readable image"),
    "no such dataset": (lambda run: {"dataset": "never"}, "never"),
    "other classes": (lambda run: {"dataset": "emnist_letters"}, "26 classes; the model knows 10"),
    "out is a file": (lambda run: {"out": run / "best" / "config.json"}, "out is"),
}


@pytest.mark.parametrize(("fields", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_nothing_is_written(
    saved: Callable[..., Any], fields: Callable[[Path], dict[str, Any]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved(dataset="cifar10")
    before = sorted(folder.parent.rglob("*"))
    monkeypatch.setattr(command, "SCANNED", 20)
    with pytest.raises(ValueError, match=said) as caught:
        explain(ExplainConfig(**{"model": folder, "data_dir": None, "data": "synthetic", **fields(folder)}), quiet())
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.rglob("*")) == before


def test_damaged_weights_are_bad_input(saved: Callable[..., Any]) -> None:
    weights, folder = saved()
    file = folder / "best" / "weights.safetensors"
    wrong = dataclasses.replace(weights, config=dataclasses.replace(weights.config, depth=3))
    for data in (file.read_bytes()[:1000], b"", b"no model", wrong.to_bytes()):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="model"):
            explain(ExplainConfig(model=folder, data_dir=None, data="synthetic"), quiet())


def test_the_command_line_takes_a_number_or_files(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[ExplainConfig] = []
    monkeypatch.setattr(command, "explain", lambda config, console: taken.append(config) or 0)
    for argv in (["best", "--images", "3"], ["best", "--images", "a.png", "b.png", "--out", "here"]):
        assert run_command("explain", argv) == 0
    assert [config.images for config in taken] == [("3",), ("a.png", "b.png")]
    assert taken[1].out == Path("here")
