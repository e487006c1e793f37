"""The memory that a training takes of a GPU, and what happens where there is too little."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cards import STILL, Card, config_for, context_bytes, losses_of, trainer_on
from pretend_cuda import CUDA

from nkat_ray.config import TrialConfig
from nkat_ray.cost import GPU_CONTEXT_BYTES, peak_bytes

MIB, GIB = 2**20, 2**30
ROUNDING_BYTES = 128 * MIB  # PyTorch's allocator takes whole segments, cuBLAS a workspace
NETWORKS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "64 tokens": {"conv_stem": "off", "patch_size": 4},
    "256 tokens": {"conv_stem": "off", "patch_size": 2},
    "256 tokens, 512 x 9": {"conv_stem": "off", "patch_size": 2, "embed_dim": 512, "depth": 9},
}


def test_a_processs_context_takes_no_more_than_planned(card: Card, measured: Callable[[str, object], None]) -> None:
    """Holds only where no other process uses the GPU."""
    losses_of(trainer_on(CUDA, config_for(card)), 1)  # kernels are loaded when they are first used
    measured("memory of the process outside of PyTorch's allocator, MiB", context_bytes() / MIB)
    assert context_bytes() <= GPU_CONTEXT_BYTES


@pytest.mark.parametrize("network", NETWORKS)
def test_a_training_takes_no_more_memory_than_estimated(
    card: Card, network: str, measured: Callable[[str, object], None]
) -> None:
    fields = NETWORKS[network] if card.real else {**NETWORKS[network], "embed_dim": 16, "depth": 1, "batch_size": 8}
    config = TrialConfig(**fields)
    if card.real and peak_bytes(config) > torch.cuda.mem_get_info()[0]:
        pytest.skip("this network does not fit into the memory that is free")

    def train() -> None:
        trainer = trainer_on(CUDA, config, train=8 * config.batch_size, val=4 * config.batch_size)
        losses_of(trainer, 8)  # the last ones are replayed as a CUDA graph
        trainer.accuracy(trainer.data.val)

    used = card.most_bytes(train)
    measured(f"{network}: GiB estimated", peak_bytes(config) / GIB)
    measured(f"{network}: GiB used", used / GIB)
    assert 0 < used <= peak_bytes(config) + ROUNDING_BYTES


def test_a_batch_that_does_not_fit_is_computed_in_parts(
    card: Card, capsys: pytest.CaptureFixture[str], measured: Callable[[str, object], None]
) -> None:
    """The loss is the whole batch's: without a stem there is no BatchNorm, which would see each part alone."""
    size = {"batch_size": 2048, "depth": 4} if card.real else {"batch_size": 16}
    config = config_for(card, conv_stem="off", patch_size=4, **size, **STILL)
    (whole,) = losses_of(trainer_on(CUDA, config, train=config.batch_size), 1)
    trainer = trainer_on(CUDA, config, train=config.batch_size)
    with card.short_of_memory(trainer, room=config.batch_size // 5):
        (loss,) = losses_of(trainer, 1)
        assert trainer._part_size < config.batch_size
        assert loss == pytest.approx(whole, rel=1e-3)
    measured("images at a time", trainer._part_size)
    assert "out of memory: batches of" in capsys.readouterr().out


def test_a_training_that_has_ended_leaves_no_memory_behind(card: Card) -> None:
    def train() -> int:
        losses_of(trainer_on(CUDA, config_for(card)), 2)
        return card.held_bytes()

    first = train()
    assert train() <= first + (MIB if card.real else 0)
