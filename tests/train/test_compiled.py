import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nkat_ray.config import PRESETS, TrialConfig, field_names
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Selection
from nkat_ray.model import create_nkat_vit
from nkat_ray.train.session import create_trainer, training_data

CPU = torch.device("cpu")
TRAITS = Traits(name="cifar10", num_classes=10, grey=False, flip=True)
QUICK = TrialConfig(**{name: value for name, value in PRESETS["quick"].items() if name in field_names(TrialConfig)})
SMALL = dataclasses.replace(
    QUICK, embed_dim=32, depth=1, epochs=2, lr=1e-3, batch_size=32, dropout_attn=0.1, dropout_embed=0.1, drop_path=0.1,
    val_images=40,
)  # fmt: skip


@pytest.fixture
def losses(tinted: Callable[..., Any]) -> Callable[..., tuple[list[float], list[str]]]:
    """Trains SMALL on 80 images, 32 per step and 16 in the last; returns the losses of its epochs, and the notices."""
    data = training_data(Selection(*tinted(120), np.arange(80), np.arange(80, 120)), TRAITS, CPU)

    def train(**options: Any) -> tuple[list[float], list[str]]:
        notices: list[str] = []
        trainer = create_trainer(SMALL, data, seed=0, notice=notices.append, **options)
        return [result.train_loss for result in trainer.epochs()], notices

    return train


@pytest.mark.parametrize(
    "fields",
    [{}, {"conv_stem": "small"}, {"conv_stem": "off", "top_k": None, "top_p": None}, {"color_norm": "residual"},
     {"num_heads": 8, "split_heads": True}],
)  # fmt: skip
def test_the_network_is_one_graph_without_breaks(fields: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **fields)
    model = create_nkat_vit(config, num_classes=10, grey=False, mean=(0.5,) * 3, std=(0.2,) * 3).train()
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(torch.rand(4, 3, 32, 32))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.slow
def test_losses_equal_those_without_compiling(losses: Callable[..., tuple[list[float], list[str]]]) -> None:
    """Dropout draws the same numbers; the last batch of an epoch, which is smaller, goes through the network itself."""
    plain, through_compiler = losses(), losses(compile=True)
    assert through_compiler == (pytest.approx(plain[0], rel=1e-5), [])


def test_without_a_compiler_a_notice_says_so_and_the_training_is_the_same(
    losses: Callable[..., tuple[list[float], list[str]]], no_compiler: None
) -> None:
    found, (notice,) = losses(compile=True)
    assert found == losses()[0]
    assert notice.startswith("compile: trained without it, since PyTorch cannot compile here: ")
    assert "/nowhere/g++" in notice
