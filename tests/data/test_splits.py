from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nkat_ray.data import DataError, split_validation, stratified_subset

labels_of = st.lists(st.integers(0, 6), min_size=2, max_size=300).map(lambda values: np.array(values, np.int64))


def assert_proportional(chosen, labels):
    """Each class is within one of its share."""
    for label in np.unique(labels):
        share = np.mean(labels == label) * len(chosen)
        assert abs(np.sum(labels[chosen] == label) - share) < 1 + 1e-9


def assert_sorted(index):
    assert index.dtype == np.int64
    assert all(a < b for a, b in pairwise(index))


@settings(deadline=None)
@given(labels=labels_of, seed=st.integers(0, 2**32 - 1), data=st.data())
def test_validation_is_disjoint_stratified_sorted_and_fixed(labels, seed, data):
    val_images = data.draw(st.integers(1, len(labels) - 1))
    train_images = data.draw(st.none() | st.integers(1, len(labels) - val_images))
    train, val = split_validation(labels, val_images=val_images, train_images=train_images, seed=seed)
    assert len(val) == val_images
    assert len(train) == (len(labels) - val_images if train_images is None else train_images)
    assert not set(train) & set(val)
    assert_sorted(train)
    assert_sorted(val)
    assert_proportional(val, labels)
    rest = np.setdiff1d(np.arange(len(labels)), val)
    assert_proportional(np.searchsorted(rest, train), labels[rest])
    again = split_validation(labels, val_images=val_images, train_images=None, seed=seed)[1]
    np.testing.assert_array_equal(val, again)  # whatever train_images is


@settings(deadline=None)
@given(labels=labels_of, seed=st.integers(0, 99), data=st.data())
def test_subset_is_stratified_and_sorted(labels, seed, data):
    n = data.draw(st.integers(1, len(labels)))
    chosen = stratified_subset(labels, n, seed)
    assert len(chosen) == n
    assert_sorted(chosen)
    assert_proportional(chosen, labels)
    np.testing.assert_array_equal(chosen, stratified_subset(labels, n, seed))


def test_subset_of_all():
    np.testing.assert_array_equal(stratified_subset(np.array([1, 0, 1]), None), [0, 1, 2])
    np.testing.assert_array_equal(stratified_subset(np.array([1, 0, 1]), 3), [0, 1, 2])


def test_seeds_differ_and_the_choice_stays_what_it_was():
    labels = np.arange(1000) % 10
    first = split_validation(labels, val_images=100, train_images=200, seed=0)
    other = split_validation(labels, val_images=100, train_images=200, seed=1)
    assert not np.array_equal(first[1], other[1])
    assert not np.array_equal(first[0], other[0])
    assert (np.bincount(labels[first[1]]) == 10).all()
    assert first[1][:5].tolist() == PINNED  # a run that is resumed must find the same validation images


PINNED = [6, 7, 11, 13, 18]


@pytest.mark.parametrize(
    ("val_images", "train_images", "message"),
    [
        (100, None, r"val_images is 100; allowed: 1\.\.99"),
        (0, None, "val_images is 0"),
        (90, 11, r"train_images is 11; allowed: 1\.\.10"),
        (90, 0, "train_images is 0"),
    ],
)
def test_too_few_images(val_images, train_images, message):
    with pytest.raises(DataError, match=message):
        split_validation(np.zeros(100, np.int64), val_images=val_images, train_images=train_images)


@pytest.mark.parametrize("n", [0, -1, 4])
def test_subset_out_of_range(n):
    with pytest.raises(DataError, match=r"allowed: 1\.\.3"):
        stratified_subset(np.array([0, 1, 1]), n)
