from typing import Any

import numpy as np
import pytest

from nkat_ray.cluster.resources import Share
from nkat_ray.data.selection import Limits, Selection, select_images
from nkat_ray.stage2.retrain import retrained
from nkat_ray.stage2.worker import retrain_weights
from nkat_ray.train.checkpoint import Weights

SHARE = Share(cpus=1, gpus=0.0)


@pytest.fixture
def images(datasets: Any) -> Selection:
    return select_images(datasets["cifar10"], Limits(val_images=20, train_images=60))


def test_a_design_is_retrained_once_per_seed(ray_local: Any, datasets: Any, images: Selection, payload: bytes) -> None:
    trained = dict(retrained(payload, datasets["cifar10"], images, {0: 11, 4: 12}, SHARE, print))
    networks = {number: Weights.from_bytes(data) for number, data in trained.items()}
    assert {number: weights.seed for number, weights in networks.items()} == {0: 11, 4: 12}
    source = Weights.from_bytes(payload)
    for weights in networks.values():
        assert (weights.config, weights.epoch) == (source.config, source.config.epochs)
    assert not np.array_equal(*(weights.tensors["head.weight"].numpy() for weights in networks.values()))


@pytest.mark.parametrize("compiles", [False, True])
def test_compile_reaches_the_training_on_the_worker(
    compiles: bool, datasets: Any, images: Selection, payload: bytes, no_compiler: None
) -> None:
    _, notices = retrain_weights(payload, images, datasets["cifar10"].traits, 11, compiles, SHARE)
    assert any("compile: trained without it" in text for text in notices) == compiles


def test_a_training_that_breaks_off_is_an_error_that_names_the_seed(
    ray_local: Any, datasets: Any, images: Selection
) -> None:
    with pytest.raises(RuntimeError, match=r"the training with seed 11 failed: .*not NKAT weights"):
        list(retrained(b"no weights at all", datasets["cifar10"], images, {0: 11}, SHARE, print))
