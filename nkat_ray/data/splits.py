"""Fixed, stratified, seeded choices of images: the validation slice and subsets of the rest."""

import numpy as np

from nkat_ray.data.dataset import DataError, Labels

_VALIDATION, _SUBSET = 1, 2  # streams of their own, so that the two choices are independent


def _quotas(counts: Labels, n: int) -> Labels:
    """`n` shared out in proportion to `counts` by largest remainder, in integers: never off by one or more."""
    quotas: Labels
    quotas, rest = np.divmod(counts * n, counts.sum())
    quotas[np.argsort(-rest, kind="stable")[: n - quotas.sum()]] += 1
    return quotas


def _stratified(labels: Labels, n: int, *, seed: int, stream: int) -> Labels:
    """Sorted indices of `n` images, each class by its share, drawn by a generator of its own."""
    classes, counts = np.unique(labels, return_counts=True)
    quotas = _quotas(counts.astype(np.int64), n)
    generator = np.random.default_rng([stream, seed])
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def stratified_subset(labels: Labels, n: int | None, seed: int = 0) -> Labels:
    """Sorted indices of `n` images (all when None), each class within one of its proportional share.

    Raises:
        DataError: n is not in 1..len(labels).
    """
    if n is None:
        return np.arange(len(labels), dtype=np.int64)
    if not 1 <= n <= len(labels):
        raise DataError(f"{n} images are asked for; allowed: 1..{len(labels)}, as the split holds {len(labels)}")
    return _stratified(labels, n, seed=seed, stream=_SUBSET)


def split_validation(
    labels: Labels, *, val_images: int, train_images: int | None, seed: int = 0
) -> tuple[Labels, Labels]:
    """Training and validation indices into a training split: disjoint, stratified, sorted, int64.

    The validation slice depends on the labels, `val_images` and `seed` alone, not on `train_images` (None: all that
    validation leaves).

    Raises:
        DataError: not enough images for both.
    """
    n = len(labels)
    if not 1 <= val_images < n:
        allowed = f"allowed: 1..{n - 1}, as there are {n} training images"
        raise DataError(f"val_images is {val_images}; {allowed}: lower --val_images")
    val_index = _stratified(labels, val_images, seed=seed, stream=_VALIDATION)
    rest = np.setdiff1d(np.arange(n, dtype=np.int64), val_index, assume_unique=True)
    if train_images is not None and not 1 <= train_images <= len(rest):
        allowed = f"allowed: 1..{len(rest)}, as validation takes {val_images} of {n} images"
        raise DataError(f"train_images is {train_images}; {allowed}: lower --train_images or --val_images")
    return rest[stratified_subset(labels[rest], train_images, seed)], val_index
