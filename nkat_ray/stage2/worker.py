"""Stage 2's functions on workers: transfer, test, and the training of a design with another seed.

Networks are passed as bytes (`train.checkpoint.Weights`).
"""

import socket
import time
from typing import Any

from nkat_ray.cluster.resources import Share
from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data import Split
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Selection
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.device import device_for
from nkat_ray.train.images import ImageSet
from nkat_ray.train.session import training_data
from nkat_ray.train.transfer import count_correct_of, transfer


def transfer_weights(
    payload: bytes, selection: Selection, traits: Traits, run: RunConfig, seed: int, share: Share
) -> tuple[bytes, dict[str, Any], list[str]]:
    """Transfer a network to a dataset and validate it (docs/spec.md section 6.3).

    On CIFAR-10 the network is validated without training.

    Returns:
        The transferred network, columns of stage2.parquet, and notices.

    Raises:
        ValueError: the loss was not finite.
    """
    clock = time.perf_counter()
    source, notices = Weights.from_bytes(payload), list[str]()
    data = training_data(selection, traits, device_for(share.gpus, share.cpus))
    if traits.name == STAGE1_DATASET:
        accuracy = count_correct_of(source, data.val) / len(data.val)
    else:
        moved = transfer(
            source, data, mode=run.transfer, epochs=run.epochs_on(len(data.train)), lr=run.transfer_lr, seed=seed,
            notice=notices.append,
        )  # fmt: skip
        payload, accuracy = moved.to_bytes(), moved.val_accuracy
    figures = {"val_accuracy": accuracy, "n_val": len(data.val)}
    return payload, {**figures, "node": socket.gethostname(), "seconds": time.perf_counter() - clock}, notices


def count_on_test(payload: bytes, split: Split, share: Share) -> tuple[int, int]:
    """Return the number of test images that a network classifies correctly, and that of all."""
    images = ImageSet(split.images, split.labels, None, device_for(share.gpus, share.cpus))
    return count_correct_of(Weights.from_bytes(payload), images), len(images)


def retrain_weights(
    payload: bytes, selection: Selection, traits: Traits, seed: int, compile: bool, share: Share
) -> tuple[bytes, list[str]]:
    """Train a network's design from scratch with its own recipe (docs/spec.md section 6.4).

    Args:
        compile: see `Trainer`.

    Returns:
        The network after the last epoch, and notices.

    Raises:
        ValueError: the loss was not finite.
    """
    source, notices = Weights.from_bytes(payload), list[str]()
    data, recipe = training_data(selection, traits, device_for(share.gpus, share.cpus)), source.config
    trained = transfer(
        source, data, mode="scratch", epochs=recipe.epochs, lr=recipe.lr, seed=seed, notice=notices.append,
        compile=compile,
    )  # fmt: skip
    return trained.to_bytes(), notices
