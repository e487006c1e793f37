"""Images of one dataset for a training: stored as uint8, cut into batches on the device.

On a CPU images stay in shared memory, on a GPU they are copied to the device once. There are no loader processes.

Legend of shapes: N images of the array, n of them in a set, B in a batch, C channels (1 or 3), H and W pixels.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import reduce
from torch import Tensor
from torch.nn import functional as F

from nkat_ray.config import IMAGE_SIZE
from nkat_ray.data.dataset import Traits

STATISTICS_CHUNK = 5000  # images whose float64 copies are in memory at a time
SMALLEST_VARIANCE = 1e-6  # constant images must not divide by zero

Channels = tuple[float, float, float]  # one value per channel, red, green, blue, as a fraction 0..1


class ImageSet:
    """Some images of an array, ready to be cut into batches on a device.

    Args:
        images: uint8 (N, C, H, W), C 1 or 3, H and W at most 32. On a CPU the array is shared, never copied: several
            trials on one node may use the same read-only array.
        index: int64 (n,), positions of the images in the set; None takes all.
        device: where batches are made.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, index: np.ndarray | None, device: torch.device) -> None:
        self.index = torch.arange(len(labels)) if index is None else torch.from_numpy(index.copy())
        self._images = _shared_tensor(images)
        self._on_device = device.type != "cpu"
        if self._on_device:
            self._images = self._images[self.index].to(device)
        self.labels = _shared_tensor(labels)[self.index].to(device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Device on which batches are made."""
        return self.labels.device

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cut out a batch.

        Args:
            positions: int64 (B,), places within the set, 0..n - 1.

        Returns:
            Images uint8 (B, 3, 32, 32), padded and in three channels, and their labels int64 (B,).
        """
        return to_network_size(self._rows(positions)), self.labels[positions.to(self.device)]

    def statistics(self) -> tuple[Channels, Channels]:
        """Compute mean and standard deviation, 0..1, of each channel before padding; a grey channel gives three."""
        total, square, count = torch.zeros(()), torch.zeros(()), 0
        for positions in torch.arange(len(self)).split(STATISTICS_CHUNK):
            part = self._rows(positions).double() / 255
            total = total.to(part) + reduce(part, "b c h w -> c", "sum")
            square = square.to(part) + reduce(part**2, "b c h w -> c", "sum")
            count += part.shape[0] * part.shape[2] * part.shape[3]
        mean = total / count
        std = (square / count - mean**2).clamp(min=SMALLEST_VARIANCE).sqrt()
        return _channels(mean), _channels(std)

    def _rows(self, positions: Tensor) -> Tensor:
        """Return images uint8 (B, C, H, W) at positions of the set, as stored in the array."""
        return self._images[positions.to(self.device) if self._on_device else self.index[positions]]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data of a training: both image sets, the dataset's traits, and the statistics of the training images.

    `mean` and `std` are those of `train` before padding (docs/spec.md section 3).
    """

    train: ImageSet
    val: ImageSet
    traits: Traits
    mean: Channels
    std: Channels

    @property
    def device(self) -> torch.device:
        """Device of the images, on which the training computes."""
        return self.train.device


def to_network_size(images: Tensor) -> Tensor:
    """Pad images to the network's size and repeat a grey channel three times (docs/spec.md section 3).

    Args:
        images: uint8 (B, C, H, W), C 1 or 3, H and W at most 32.

    Returns:
        uint8 (B, 3, 32, 32); the black border is even on both sides.
    """
    height, width = images.shape[-2:]
    top, left = (IMAGE_SIZE - height) // 2, (IMAGE_SIZE - width) // 2
    padded = F.pad(images, (left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top))
    return padded.expand(-1, 3, -1, -1).contiguous()


def in_pixels(fractions: Sequence[float], device: torch.device | None = None) -> Tensor:
    """Convert one value per channel, 0..1, to float32 (3, 1, 1) in units of 0..255, as `normalise` takes it."""
    return torch.tensor(fractions, device=device).view(3, 1, 1) * 255


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise uint8 (B, 3, H, W) to float32 with statistics of shape (3, 1, 1) in units of 0..255."""
    return (images.float() - mean) / std


def _channels(values: Tensor) -> Channels:
    red, green, blue = values.expand(3).tolist()
    return red, green, blue


def _shared_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only ever read
        return torch.from_numpy(array)
