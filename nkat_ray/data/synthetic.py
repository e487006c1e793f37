"""A generated suite under the names of the four datasets, for tests and for machines without data.

Each image is a template (a glyph, a garment's silhouette, a shape or a texture) under a random affine map, with random
brightness or colours, uneven light and noise. It can be learned, but not by a linear classifier alone. The same seed
gives the same images on the same Pillow (which draws the glyphs); they are generated afresh at each load.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from string import ascii_lowercase
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nkat_ray.data.dataset import SPLITS, Dataset, Images, Labels, Split, SplitName
from nkat_ray.data.digests import content_sha256, dataset_digest
from nkat_ray.data.spec import KNOWN

VERSION: Final = 1  # of the generator: raise it when the images change
SIZES: Final[dict[SplitName, int]] = {"train": 10_000, "test": 2_000}
CANVAS: Final = 64  # pixels a side of a template
_BLOCK: Final = 500  # images warped at a time, so that intermediate arrays stay small

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Motion:
    """Ranges of the random affine map of each image: all uniform and symmetric except `scale`."""

    rotation: float
    """Degrees."""
    scale: tuple[float, float]
    """Size of the canvas relative to the image."""
    shift: float
    """Share of the image's side."""
    shear: float
    aspect: float = 0.1
    """Width is multiplied by 1 +- aspect."""


@dataclass(frozen=True)
class Style:
    """How one dataset is made."""

    class_names: tuple[str, ...]
    templates: Callable[[], Floats]
    """(classes, variants, CANVAS, CANVAS) in 0..1."""
    motion: Motion
    noise: float
    """Standard deviation, in 0..1 units."""


@dataclass(frozen=True)
class SyntheticReader:
    """Generates the splits of one dataset."""

    name: str
    seed: int = 0

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Generate the split; `rows` picks from it (all when None)."""
        whole = generate(self.name, split, seed=self.seed)
        return whole if rows is None else Split(whole.images[rows], whole.labels[rows])

    def labels(self, split: SplitName) -> Labels:
        """All labels of the split."""
        return _labels(self.name, split, self.seed)


def open_synthetic(name: str, *, seed: int = 0) -> Dataset:
    """The generated dataset under a known name; its digest is of the generated images."""
    reader = SyntheticReader(name, seed)
    contents = _contents(name, seed)
    return Dataset(
        name=name,
        class_names=STYLES[name].class_names,
        grey=KNOWN[name].grey,
        flip=KNOWN[name].flip,
        source=f"synthetic suite {VERSION}, seed {seed} (generated, not the real {name})",
        digest=dataset_digest(*contents),
        verified=True,
        sizes={"train": SIZES["train"], "test": SIZES["test"]},
        reader=reader,
    )


@lru_cache
def _contents(name: str, seed: int) -> tuple[str, str]:
    train, test = (content_sha256(generate(name, split, seed=seed)) for split in SPLITS)
    return train, test


def generate(name: str, split: SplitName, *, seed: int = 0, n: int | None = None) -> Split:
    """`n` images of one dataset (SIZES[split] when None), classes balanced and in random order.

    Train and test come from streams of their own.
    """
    style = STYLES[name]
    labels = _labels(name, split, seed, n)
    generator = _generator(name, split, seed, stream=1)
    templates = style.templates()
    variant = generator.integers(templates.shape[1], size=len(labels))
    index = labels * templates.shape[1] + variant
    maps = _affine(style.motion, len(labels), generator)
    masks = _warp(templates.reshape(-1, CANVAS, CANVAS), index, maps, KNOWN[name].size)
    paint = _paint_grey if KNOWN[name].grey else _paint_colour
    return Split(paint(masks, labels, len(style.class_names), style.noise, generator), labels)


def _generator(name: str, split: SplitName, seed: int, *, stream: int) -> np.random.Generator:
    return np.random.default_rng([VERSION, seed, list(STYLES).index(name), SPLITS.index(split), stream])


def _labels(name: str, split: SplitName, seed: int, n: int | None = None) -> Labels:
    n = SIZES[split] if n is None else n
    labels = np.arange(n, dtype=np.int64) % len(STYLES[name].class_names)
    return _generator(name, split, seed, stream=0).permutation(labels)


def _affine(motion: Motion, n: int, generator: np.random.Generator) -> Floats:
    """(n, 2, 3) maps from image coordinates in -1..1 to canvas coordinates in -1..1."""

    def spread(limit: float) -> NDArray[np.float64]:
        return generator.uniform(-limit, limit, n)

    angle, shear = np.deg2rad(spread(motion.rotation)), spread(motion.shear)
    height = generator.uniform(*motion.scale, n)
    width = height * (1 + spread(motion.aspect))
    cos, sin, zero = np.cos(angle), np.sin(angle), np.zeros(n)
    rotation = np.array([[cos, -sin], [sin, cos]])
    stretch = np.array([[1 / width, shear / width], [zero, 1 / height]])
    linear = np.einsum("ijn,jkn->nik", stretch, rotation)
    shift = np.stack([spread(2 * motion.shift), spread(2 * motion.shift)], axis=1)
    offset = -np.einsum("nij,nj->ni", linear, shift)
    return np.concatenate([linear, offset[:, :, None]], axis=2).astype(np.float32)


def _warp(templates: Floats, index: Labels, maps: Floats, size: int) -> Floats:
    """Bilinear samples of `templates[index]` under `maps`: (N, size, size). Beyond the canvas its border repeats."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    points = np.stack([np.tile(axis, size), np.repeat(axis, size), np.ones(size * size, np.float32)])
    flat, canvas = templates.reshape(-1), templates.shape[1]
    out = np.empty((len(index), size * size), np.float32)
    for start in range(0, len(index), _BLOCK):
        block = slice(start, start + _BLOCK)
        where = np.clip((maps[block] @ points + 1) * (canvas / 2) - 0.5, 0, canvas - 1.001)
        corner = where.astype(np.int32)
        (fx, fy), (x, y) = (where - corner).transpose(1, 0, 2), corner.transpose(1, 0, 2)
        at = index[block, None] * canvas**2 + y * canvas + x
        top = flat[at] * (1 - fx) + flat[at + 1] * fx
        bottom = flat[at + canvas] * (1 - fx) + flat[at + canvas + 1] * fx
        out[block] = top * (1 - fy) + bottom * fy
    return out.reshape(-1, size, size)


def _paint_grey(masks: Floats, _: Labels, __: int, noise: float, generator: np.random.Generator) -> Images:
    """Bright on black, with uneven light and noise: (N, 1, H, W)."""
    light = _light(masks.shape, generator)
    masks *= generator.uniform(0.55, 1.0, (len(masks), 1, 1)).astype(np.float32) * light
    masks += noise * generator.standard_normal(masks.shape, np.float32)
    return _to_uint8(masks)[:, None]


def _paint_colour(masks: Floats, labels: Labels, classes: int, noise: float, generator: np.random.Generator) -> Images:
    """Two colours a picture, the first one's hue leaning to the class: (N, 3, H, W)."""
    n = len(masks)
    hue = labels / classes + generator.normal(0, 0.18, n)
    front = _hue_to_rgb(hue) * generator.uniform(0.5, 1.0, (n, 1))
    back = _hue_to_rgb(generator.uniform(0, 1, n)) * generator.uniform(0.1, 0.9, (n, 1))
    light = _light(masks.shape, generator)
    images = np.empty((n, 3, *masks.shape[1:]), np.uint8)
    for channel in range(3):  # one at a time: a third of the memory
        ours, theirs = (colour[:, channel, None, None].astype(np.float32) for colour in (front, back))
        values = (theirs + (ours - theirs) * masks) * light
        values += noise * generator.standard_normal(masks.shape, np.float32)
        images[:, channel] = _to_uint8(values)
    return images


def _light(shape: tuple[int, ...], generator: np.random.Generator) -> Floats:
    """A linear fall-off in a random direction: factors 0.6..1.4."""
    axis = np.linspace(-0.2, 0.2, shape[-1], dtype=np.float32)
    slope_y, slope_x = generator.uniform(-1, 1, (2, shape[0], 1, 1)).astype(np.float32)
    light: Floats = 1 + slope_y * axis[None, :, None] + slope_x * axis[None, None, :]
    return light


def _hue_to_rgb(hue: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pastel colours of a hue in turns: (N, 3) in 0.2..1."""
    phase = hue[:, None] + np.array([0, 1 / 3, 2 / 3])
    colours: NDArray[np.float64] = 0.6 + 0.4 * np.cos(2 * np.pi * phase)
    return colours


def _to_uint8(values: Floats) -> Images:
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def _canvas(draw: Callable[[ImageDraw.ImageDraw], None]) -> Floats:
    """A drawing on a 100 x 100 grid, smoothed to a template."""
    image = Image.new("L", (400, 400))
    draw(ImageDraw.Draw(image))
    return np.asarray(image.resize((CANVAS, CANVAS), Image.Resampling.BOX), np.float32) / np.float32(255)


def _glyph(text: str, weight: int) -> Floats:
    """A character of Pillow's own font, centred, with a stroke that makes it heavier."""
    font = ImageFont.load_default(290)
    return _canvas(lambda pen: pen.text((200, 200), text, 255, font, anchor="mm", stroke_width=weight))


@lru_cache
def _digits() -> Floats:
    return np.array([[_glyph(digit, weight) for weight in (0, 6, 12)] for digit in "0123456789"])


@lru_cache
def _letters() -> Floats:
    """Small and capital letters are one class, as in EMNIST."""
    return np.array([[_glyph(form, weight) for form in (c, c.upper()) for weight in (0, 8)] for c in ascii_lowercase])


def _polygons(*parts: tuple[int, str]) -> Floats:
    """Shades (0..255) with outlines "x,y x,y ..." on a 100 x 100 grid, drawn over one another."""

    def draw(pen: ImageDraw.ImageDraw) -> None:
        for shade, outline in parts:
            corners = [point.split(",") for point in outline.split()]
            pen.polygon([(4 * float(x), 4 * float(y)) for x, y in corners], fill=shade)

    return _canvas(draw)


_GARMENTS: Final = {
    "T-shirt/top": ((220, "30,15 42,20 58,20 70,15 92,32 82,45 72,40 72,88 28,88 28,40 18,45 8,32"),),
    "Trouser": ((210, "34,8 66,8 72,94 56,94 50,35 44,94 28,94"),),
    "Pullover": ((215, "34,14 66,14 82,24 94,82 82,86 72,45 72,88 28,88 28,45 18,86 6,82 18,24"),),
    "Dress": ((220, "38,6 44,14 56,14 62,6 64,36 78,94 22,94 36,36"),),
    "Coat": (
        (200, "34,10 66,10 84,22 94,80 84,84 74,44 76,95 24,95 26,44 16,84 6,80 16,22"),
        (60, "48.5,14 51.5,14 51.5,95 48.5,95"),
    ),
    "Sandal": ((205, "6,72 30,58 34,62 20,72 60,66 74,40 80,42 72,66 94,64 94,76 6,80"),),
    "Shirt": (
        (210, "34,14 50,22 66,14 84,24 92,62 82,66 72,42 72,90 28,90 28,42 18,66 8,62 16,24"),
        (90, "49,22 51,22 51,90 49,90"),
    ),
    "Sneaker": ((215, "6,62 30,56 48,40 60,46 84,42 94,56 94,68 6,72"), (120, "6,68 94,64 94,74 6,76")),
    "Bag": ((200, "12,40 88,40 92,88 8,88"), (230, "30,40 36,16 64,16 70,40 64,40 60,22 40,22 36,40")),
    "Ankle_boot": ((215, "52,10 84,10 86,84 92,84 92,92 8,92 8,76 36,66 52,52"), (110, "8,86 92,86 92,92 8,92")),
}


@lru_cache
def _garments() -> Floats:
    plain = np.array([_polygons(*parts) for parts in _GARMENTS.values()])
    ramp = np.arange(CANVAS, dtype=np.float32)
    stripes = 0.75 + 0.25 * np.sign(np.sin(ramp * 0.9))
    return np.stack([plain, plain * stripes[:, None], plain * stripes[None, :], plain * 0.7], axis=1)


def _star(pen: ImageDraw.ImageDraw) -> None:
    radii, angles = np.tile([95.0, 38.0], 5), np.arange(10) * np.pi / 5
    pen.polygon([(200 + r * np.sin(a), 200 - r * np.cos(a)) for r, a in zip(radii, angles, strict=True)], fill=255)


def _ring(pen: ImageDraw.ImageDraw) -> None:
    pen.ellipse((108, 108, 292, 292), fill=255)
    pen.ellipse((152, 152, 248, 248), fill=0)


def _field(function: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]) -> Floats:
    """A texture over the whole canvas, from a function of x and y in 0..2 pi; above 0 is the front colour."""
    y, x = np.mgrid[:CANVAS, :CANVAS] * (2 * np.pi / CANVAS)
    return np.clip(0.5 + 2 * function(x, y), 0, 1).astype(np.float32)


@lru_cache
def _scenes() -> Floats:
    """Shapes fill the middle half only, and textures the canvas: under any map of the style the view stays on it."""
    shapes = [
        _canvas(lambda pen: pen.ellipse((115, 115, 285, 285), fill=255)),
        _canvas(lambda pen: pen.rectangle((125, 125, 275, 275), fill=255)),
        _polygons((255, "50,26 74,68 26,68")),
        _canvas(_star),
        _canvas(_ring),
        _polygons((255, "44,27 56,27 56,44 73,44 73,56 56,56 56,73 44,73 44,56 27,56 27,44 44,44")),
        _field(lambda x, y: np.sin(8 * x)),
        _field(lambda x, y: np.sin(4 * x) * np.sin(4 * y)),
        _field(lambda x, y: np.cos(6 * x) + np.cos(6 * y) - 1),
        _field(lambda x, y: np.sin(7 * x + 1.5 * np.sin(3 * y))),
    ]
    return np.array(shapes)[:, None]


STYLES: Final[dict[str, Style]] = {
    "mnist": Style(tuple("0123456789"), _digits, Motion(18, (0.75, 1.15), 0.10, 0.2, 0.15), noise=0.08),
    "fashion_mnist": Style(tuple(_GARMENTS), _garments, Motion(12, (0.65, 1.05), 0.12, 0.12, 0.2), noise=0.15),
    "emnist_letters": Style(tuple(ascii_lowercase), _letters, Motion(15, (0.75, 1.15), 0.10, 0.2, 0.15), noise=0.08),
    "cifar10": Style(
        ("disc", "square", "triangle", "star", "ring", "cross", "stripes", "checks", "dots", "waves"),
        _scenes,
        Motion(35, (1.15, 2.0), 0.12, 0.15, 0.15),
        noise=0.10,
    ),
}
