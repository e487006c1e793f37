import numpy as np
import pytest

from nkat_ray.data import spec, synthetic
from nkat_ray.data.digests import content_sha256, dataset_digest
from nkat_ray.data.synthetic import CLASSES, generate, open_synthetic

COUNTS = {"mnist": 10, "fashion_mnist": 10, "emnist_letters": 26, "cifar10": 10}


@pytest.mark.parametrize("name", COUNTS)
def test_shape_balance_and_range(name):
    made = generate(name, "train", n=520)
    channels, size = (3, 32) if name == "cifar10" else (1, 28)
    assert made.images.shape == (520, channels, size, size)
    assert made.images.dtype == np.uint8
    assert made.images.flags.c_contiguous
    assert made.labels.dtype == np.int64
    counts = np.bincount(made.labels, minlength=COUNTS[name])
    assert counts.max() - counts.min() <= 1
    assert made.labels[:20].tolist() != sorted(made.labels[:20])
    assert made.images.std() > 20
    assert (made.images.reshape(520, -1).std(axis=1) > 5).all()  # no empty image


@pytest.mark.parametrize("name", COUNTS)
def test_seeded(name):
    first = generate(name, "train", n=60)
    again = generate(name, "train", n=60)
    assert content_sha256(first) == content_sha256(again)
    assert content_sha256(first) != content_sha256(generate(name, "train", n=60, seed=1))
    assert content_sha256(first) != content_sha256(generate(name, "test", n=60))


def ridge_accuracy(name, n=3000, test=1000):
    """A linear classifier on the pixels."""
    train, held = generate(name, "train", n=n), generate(name, "test", n=test)

    def features(split):
        pixels = split.images.reshape(len(split), -1) / 255
        return np.concatenate([pixels, np.ones((len(split), 1))], axis=1)

    x, targets = features(train), np.eye(COUNTS[name])[train.labels]
    weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ targets)
    return np.mean((features(held) @ weights).argmax(axis=1) == held.labels)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_learnable_but_not_by_a_line(name):
    assert 0.25 < ridge_accuracy(name) < 0.9


def test_letters_are_learnable():
    assert 0.1 < ridge_accuracy("emnist_letters") < 0.9  # chance is 0.04


def test_dataset(monkeypatch):
    monkeypatch.setattr(synthetic, "SIZES", {"train": 50, "test": 30})
    synthetic._digest.cache_clear()
    found = open_synthetic("cifar10")
    assert (found.classes, found.grey, found.flip) == (10, spec.KNOWN["cifar10"].grey, spec.KNOWN["cifar10"].flip)
    assert found.sizes == {"train": 50, "test": 30}
    assert found.source.startswith("synthetic suite")
    assert "not the real cifar10" in found.source
    train, test = found.load("train"), found.load("test")
    assert found.digest == dataset_digest(content_sha256(train), content_sha256(test))
    np.testing.assert_array_equal(found.labels("train"), train.labels)
    np.testing.assert_array_equal(found.load("train", np.array([7, 3])).images, train.images[[7, 3]])
    synthetic._digest.cache_clear()


def test_the_suite_has_the_four_names():
    assert set(CLASSES) == set(spec.KNOWN)
    assert {name: len(set(classes)) for name, classes in CLASSES.items()} == COUNTS
