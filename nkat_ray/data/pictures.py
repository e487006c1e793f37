"""Image files of any size and colour, on disk or in memory, as uint8 arrays of one shape.

Images are turned upright by their EXIF tag; transparency becomes black. A set of images is grey only if every image is.
Images of one size of at most 32x32 are kept as they are; otherwise each is resized to fit into 32x32 with its aspect
kept, and padded with black.
"""

import io
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nkat_ray.data.dataset import SPLITS, DataError, Images, Labels, Layout, Shape, Split, SplitName, first_line
from nkat_ray.data.spec import MAX_SIZE

# Without EPS, PDF and WMF, for which Pillow starts other programs.
FORMATS: Final = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
BLOCK: Final = 1000  # images per decoding task: large enough to hide the cost of a task
_GREY_MODES: Final = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I", "F")

Picture = tuple[Path | bytes, str]  # a file or its content, and its name in messages
Kind = tuple[bool, int, int]  # whether it is grey, width and height of the upright image


@dataclass(frozen=True, kw_only=True)
class PictureLayout(Layout):
    """A dataset of image files, which are decoded to a common shape."""

    @abstractmethod
    def pictures(self, split: SplitName, rows: Labels | None = None) -> list[Picture]:
        """Return the images at `rows` (all when None), still encoded."""

    def shape(self) -> Shape:
        """Return the common shape of all images."""
        return common_shape([kind for split in SPLITS for kind in kinds(self.pictures(split))])

    def load(self, split: SplitName, shape: Shape, rows: Labels | None = None) -> Split:
        """Decode the images at `rows` (all when None) to `shape`."""
        labels = self.labels(split)
        return Split(decode(self.pictures(split, rows), shape), labels if rows is None else labels[rows])


def suffixes() -> set[str]:
    """Return the suffixes of image files that can be read, in small letters."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


@contextmanager
def opened(picture: Picture, formats: Sequence[str] = FORMATS) -> Iterator[Image.Image]:
    """Open an image file; any error in reading it becomes a DataError."""
    data, name = picture
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=list(formats)) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        what = formats[0] if len(formats) == 1 else "image"
        reason = "not in a known format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise DataError(f"{name} is no readable {what} ({reason}); remove or replace it") from error


def kinds(pictures: Iterable[Picture]) -> list[Kind]:
    """Read colour and size of images without decoding them.

    Raises:
        DataError: some cannot be read; the message names all of them.
    """

    def kind(picture: Picture) -> Kind:
        with opened(picture) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5..8 swap the sides
            width, height = (image.height, image.width) if turned else image.size
            return image.mode in _GREY_MODES, width, height

    found, faults = [], []
    with _no_bombs():
        for picture in pictures:
            try:
                found.append(kind(picture))
            except DataError as error:
                faults.append(str(error))
    _refuse(faults)
    return found


def common_shape(found: Sequence[Kind]) -> Shape:
    """Return the common shape of images of these kinds."""
    channels = 1 if all(grey for grey, _, _ in found) else 3
    sizes = {(width, height) for _, width, height in found}
    (width, height), *others = sizes
    if others or max(width, height) > MAX_SIZE:
        width = height = MAX_SIZE
    return channels, height, width


def decode(
    pictures: Sequence[Picture], shape: Shape, *, formats: Sequence[str] = FORMATS, exact: bool = False
) -> Images:
    """Decode images to `shape`, uint8 (N, C, H, W), in threads: Pillow's decoders release the GIL.

    Args:
        exact: whether the images must have this shape already, with 8 bits per channel.

    Raises:
        DataError: some cannot be read, or have another shape; the message names all of them.
    """
    images, faults = np.empty((len(pictures), *shape), np.uint8), dict[int, str]()
    convert = _as_it_is if exact else _fitted

    def decode_block(start: int) -> None:
        for row, picture in enumerate(pictures[start : start + BLOCK], start):
            try:
                with opened(picture, formats) as image:
                    images[row] = convert(image, shape)
            except DataError as error:
                faults[row] = str(error)

    with _no_bombs(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(decode_block, range(0, len(pictures), BLOCK)))
    _refuse([faults[row] for row in sorted(faults)])
    return images


def _no_bombs() -> AbstractContextManager[None]:
    """Let Pillow refuse what it only warns about: more than 89 million pixels, which few bytes can promise."""
    return warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        others = [fault.partition(" is no readable ")[0] for fault in faults[1:]]
        more = f"; the same is true of {len(others)} more: {', '.join(others[:10])}" if others else ""
        raise DataError(faults[0] + more + ("" if len(others) <= 10 else ", ..."))


def _as_it_is(image: Image.Image, shape: Shape) -> Images:
    channels, height, width = shape
    modes = ("RGB",) if channels == 3 else ("L", "RGB") if image.format == "WEBP" else ("L",)
    if image.size != (width, height) or image.mode not in modes:  # nothing of an unexpected size is decoded
        found = f"it is {image.width}x{image.height} {image.mode}"
        raise ValueError(f"{found}; allowed: {width}x{height} {' or '.join(modes)} as `shape` says")
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)[:channels]  # a grey WebP has three


def _fitted(image: Image.Image, shape: Shape) -> Images:
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    image.draft(mode, (2 * MAX_SIZE, 2 * MAX_SIZE))  # large JPEGs are decoded at a fraction of their size
    upright = _to_mode(ImageOps.exif_transpose(image), mode)
    fits = upright.size == (width, height)
    pixels = np.asarray(upright if fits else ImageOps.pad(upright, (width, height), Image.Resampling.LANCZOS))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to 8 bits per channel, transparency over black."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert(mode)
    return image.convert(mode)
