"""Draw fixed, stratified, seeded sets of images: the validation images, and subsets of the rest."""

import numpy as np

from nkat_ray.data.dataset import DataError, Labels

_VALIDATION, _SUBSET = 1, 2  # separate random streams, so that the two draws are independent


def _quotas(counts: Labels, n: int) -> Labels:
    """Distribute `n` in proportion to `counts` by largest remainder; each quota is within one of the exact share."""
    quotas: Labels
    quotas, rest = np.divmod(counts * n, counts.sum())
    quotas[np.argsort(-rest, kind="stable")[: n - quotas.sum()]] += 1
    return quotas


def _stratified(labels: Labels, n: int, *, seed: int, stream: int) -> Labels:
    """Draw sorted indices of `n` images, each class by its share, from a separate random stream."""
    classes, counts = np.unique(labels, return_counts=True)
    quotas = _quotas(counts.astype(np.int64), n)
    generator = np.random.default_rng([stream, seed])
    chosen = [
        generator.permutation(np.flatnonzero(labels == label))[:quota]
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def stratified_subset(labels: Labels, n: int | None, seed: int = 0) -> Labels:
    """Draw sorted indices of `n` images (all when None), each class within one of its proportional share.

    Raises:
        DataError: n is not in 1..len(labels).
    """
    if n is None:
        return np.arange(len(labels), dtype=np.int64)
    if not 1 <= n <= len(labels):
        raise DataError(f"{n} images are wanted; allowed: 1..{len(labels)}, as the split has {len(labels)}")
    return _stratified(labels, n, seed=seed, stream=_SUBSET)


def split_validation(
    labels: Labels, *, val_images: int, train_images: int | None, seed: int = 0
) -> tuple[Labels, Labels]:
    """Draw training and validation indices into a training split: disjoint, stratified, sorted, int64.

    The validation images depend only on the labels, `val_images` and `seed`, not on `train_images` (None: all others).

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
