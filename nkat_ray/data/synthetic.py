"""Generate images under the names of the four datasets, for tests and for machines without data.

Each image shows its class's character in Pillow's font under a random affine map, in random brightness or colours, with
uneven light and noise. A network can learn the classes; a linear classifier cannot. The same seed gives the same images
with the same version of Pillow. They are generated at each load.
"""

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

VERSION: Final = 2  # increase it when the images change
SIZES: Final[dict[SplitName, int]] = {"train": 10_000, "test": 2_000}
CANVAS: Final = 64  # pixels per side of a drawn character

Floats = NDArray[np.float64]

CLASSES: Final[dict[str, tuple[str, ...]]] = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": tuple("#*+=^8&$@%"),
    "emnist_letters": tuple(ascii_lowercase),  # small and capital letters are one class, as in EMNIST
    "cifar10": tuple("AHMOTUVWXY"),  # the same in a mirror
}


@dataclass(frozen=True)
class SyntheticReader:
    """Generate the splits of one dataset."""

    name: str
    seed: int = 0

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Generate a split, or the images at `rows` of it."""
        whole = generate(self.name, split, seed=self.seed)
        return whole if rows is None else Split(whole.images[rows], whole.labels[rows])

    def labels(self, split: SplitName) -> Labels:
        """Generate the labels of a split."""
        return _labels(self.name, SIZES[split], _generator(self.name, split, self.seed))


def open_synthetic(name: str, *, seed: int = 0) -> Dataset:
    """Describe the generated dataset under a known name; the digest is that of the generated images."""
    return Dataset(
        name=name,
        class_names=CLASSES[name],
        grey=KNOWN[name].grey,
        flip=KNOWN[name].flip,
        source=f"synthetic suite {VERSION}, seed {seed} (generated, not the real {name})",
        digest=_digest(name, seed),
        verified=True,
        sizes=dict(SIZES),
        reader=SyntheticReader(name, seed),
    )


@lru_cache
def _digest(name: str, seed: int) -> str:
    train, test = (content_sha256(generate(name, split, seed=seed)) for split in SPLITS)
    return dataset_digest(train, test)


def generate(name: str, split: SplitName, *, seed: int = 0, n: int | None = None) -> Split:
    """Generate `n` images of one dataset (SIZES[split] when None), with balanced classes in random order."""
    generator = _generator(name, split, seed)
    n = SIZES[split] if n is None else n
    labels = _labels(name, n, generator)
    masks = _masks(name, labels, generator)
    if KNOWN[name].grey:
        front, back = generator.uniform(0.55, 1, (n, 1)), np.zeros((n, 1))
    else:  # the colour of a character leans to that of its class
        palette = np.random.default_rng(VERSION).uniform(0.2, 1, (len(CLASSES[name]), 3))
        front, back = (palette[labels] + generator.uniform(0.2, 1, (n, 3))) / 2, generator.uniform(0, 0.5, (n, 3))
    return Split(_paint(masks, front, back, generator), labels)


def _generator(name: str, split: SplitName, seed: int) -> np.random.Generator:
    return np.random.default_rng([VERSION, seed, list(CLASSES).index(name), SPLITS.index(split)])


def _labels(name: str, n: int, generator: np.random.Generator) -> Labels:
    return generator.permutation(np.arange(n, dtype=np.int64) % len(CLASSES[name]))


@lru_cache
def _glyph(text: str, stroke: int) -> Image.Image:
    image = Image.new("L", (CANVAS, CANVAS))
    middle = (CANVAS / 2, CANVAS / 2)
    ImageDraw.Draw(image).text(middle, text, 255, ImageFont.load_default(46), anchor="mm", stroke_width=stroke)
    return image


def _masks(name: str, labels: Labels, generator: np.random.Generator) -> Images:
    """Draw the character of each label under its own map: (N, size, size), 255 inside the character."""
    n, size = len(labels), KNOWN[name].size
    angle, shear = np.deg2rad(generator.uniform(-20, 20, n)), generator.uniform(-0.2, 0.2, n)
    scale = CANVAS / size / generator.uniform(0.9, 1.5, (2, n))  # pixels of the canvas per pixel of the image
    a, b = scale[0] * np.cos(angle), scale[0] * (shear - np.sin(angle))
    d, e = scale[1] * np.sin(angle), scale[1] * np.cos(angle)
    x, y = generator.uniform(0.4, 0.6, (2, n)) * size  # the centre of the canvas goes here
    maps = np.stack([a, b, CANVAS / 2 - a * x - b * y, d, e, CANVAS / 2 - d * x - e * y], axis=1)
    heavy, capital = generator.integers(2, size=(2, n))
    masks = np.empty((n, size, size), np.uint8)
    for row, label in enumerate(labels):
        text = CLASSES[name][label].upper() if capital[row] else CLASSES[name][label]
        drawn, how = _glyph(text, 2 * heavy[row]), (Image.Transform.AFFINE, tuple(maps[row]))
        masks[row] = np.asarray(drawn.transform((size, size), *how, Image.Resampling.BILINEAR))
    return masks


def _paint(masks: Images, front: Floats, back: Floats, generator: np.random.Generator) -> Images:
    """Colour (N, size, size) masks with (N, C) colours in 0..1, in light that falls off linearly, with noise."""
    n, size, _ = masks.shape
    axis = np.linspace(-0.2, 0.2, size, dtype=np.float32)
    slope_y, slope_x = generator.uniform(-1, 1, (2, n, 1, 1)).astype(np.float32)
    light = 1 + slope_y * axis[:, None] + slope_x * axis
    images = np.empty((n, front.shape[1], size, size), np.uint8)
    for channel in range(front.shape[1]):  # one at a time: a third of the memory
        ours, theirs = (colour[:, channel, None, None].astype(np.float32) for colour in (front, back))
        values = (theirs + (ours - theirs) * (masks / np.float32(255))) * light
        values += 0.1 * generator.standard_normal(values.shape, np.float32)
        images[:, channel] = np.clip(values, 0, 1) * 255
    return images
