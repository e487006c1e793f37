from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nkat_ray.train.images import ImageSet, normalise, to_network_size

CPU = torch.device("cpu")


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "top", "left"),
    [((3, 32, 32), 0, 0), ((1, 28, 28), 2, 2), ((1, 31, 30), 0, 1), ((3, 1, 5), 15, 13), ((1, 8, 32), 12, 0)],
)
def test_images_are_padded_evenly_to_32_and_grey_is_repeated(shape: tuple[int, int, int], top: int, left: int) -> None:
    _, height, width = shape
    images = torch.randint(1, 256, (2, *shape), dtype=torch.uint8)
    expected = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    expected[:, :, top : top + height, left : left + width] = images
    assert torch.equal(to_network_size(images), expected)
    assert to_network_size(images).is_contiguous()


def test_normalise() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.0, 100.0, 255.0], [1.0, 14.0, 2.0]))
    assert normalise(images, mean, std).flatten().tolist() == [0.0, 2.0, 0.0]
    assert normalise(images, mean, std).dtype == torch.float32


@pytest.mark.parametrize(("channels", "size", "n"), [(3, 32, 50), (1, 28, 50), (3, 5, 1), (1, 32, 5003)])
def test_statistics_equal_numpys(tinted: Callable[..., Any], channels: int, size: int, n: int) -> None:
    images, labels = tinted(n + 20, channels=channels, size=size)
    index = np.sort(np.random.default_rng(0).permutation(n + 20)[:n])
    mean, std = ImageSet(images, labels, index, CPU).statistics()
    chosen = images[index].astype(np.float64) / 255
    assert mean == pytest.approx(np.broadcast_to(chosen.mean((0, 2, 3)), 3), abs=1e-9)
    assert std == pytest.approx(np.broadcast_to(chosen.std((0, 2, 3)), 3), abs=1e-6)


def test_statistics_of_constant_images_divide_by_no_zero() -> None:
    images = np.full((4, 3, 32, 32), 255, np.uint8)
    mean, std = ImageSet(images, np.zeros(4, np.int64), None, CPU).statistics()
    assert mean == pytest.approx((1.0, 1.0, 1.0))
    assert all(value > 0 for value in std)


def test_a_batch_holds_the_indexed_images_and_labels(tinted: Callable[..., Any]) -> None:
    images, labels = tinted(30, channels=1, size=28)
    chosen = ImageSet(images, labels, np.array([4, 9, 17, 20]), CPU)
    assert len(chosen) == 4
    batch, targets = chosen.batch(torch.tensor([2, 0]))
    assert torch.equal(batch, to_network_size(torch.from_numpy(images[[17, 4]])))
    assert targets.tolist() == labels[[17, 4]].tolist()
    assert len(ImageSet(images, labels, None, CPU)) == 30


def test_a_read_only_array_is_shared_and_not_copied(tinted: Callable[..., Any], recwarn: Any) -> None:
    """As it comes out of the object store: several trials of a node hold one copy."""
    images, labels = tinted(30)
    images.flags.writeable = labels.flags.writeable = False
    shared = ImageSet(images, labels, np.arange(10), CPU)
    assert shared._images.data_ptr() == images.ctypes.data
    shared.batch(torch.arange(3))
    assert list(recwarn) == []
