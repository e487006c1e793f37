"""Create a training: images on the device, the network, and the `Trainer`.

`nkat train`, a trial of a search and a transfer of Stage 2 all call these functions, with different arguments.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from nkat_ray.config import TrialConfig
from nkat_ray.cost import recomputes
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Selection
from nkat_ray.model import NKATVisionTransformer, create_nkat_vit
from nkat_ray.train.images import ImageSet, TrainingData
from nkat_ray.train.loop import Trainer


def training_data(selection: Selection, traits: Traits, device: torch.device) -> TrainingData:
    """Move selected images to a device and compute the statistics of the training images."""
    train, val = (
        ImageSet(selection.images, selection.labels, index, device)
        for index in (selection.train_index, selection.val_index)
    )
    mean, std = train.statistics()
    return TrainingData(train=train, val=val, traits=traits, mean=mean, std=std)


def create_network(config: TrialConfig, data: TrainingData, *, seed: int) -> NKATVisionTransformer:
    """Create a new network for the data, on the CPU. The seed alone determines its weights.

    The global random state is seeded: neither PyTorch's initialisers nor timm's take a generator.
    """
    torch.manual_seed(seed)
    return create_nkat_vit(
        config, num_classes=data.traits.num_classes, grey=data.traits.grey, mean=data.mean, std=data.std
    )


def create_trainer(
    config: TrialConfig,
    data: TrainingData,
    *,
    seed: int,
    notice: Callable[[str], None],
    model: nn.Module | None = None,
    deadline_s: float = math.inf,
    on_step: Callable[[float], None] | None = None,
    compile: bool = False,
) -> Trainer:
    """Create the training of a network.

    Args:
        config: the network and its recipe.
        data: its images.
        seed: decides the weights of a new network, the order of images, the augmentation and dropout.
        notice: called with one line about anything the user should know.
        model: the network to train; None creates a new one with `create_network`.
        deadline_s: seconds since 1970 after which no further step is made.
        on_step: see `Trainer`.
        compile: likewise.
    """
    network = create_network(config, data, seed=seed) if model is None else model
    if isinstance(network, NKATVisionTransformer) and data.train.device.type == "cpu" and recomputes(config):
        network.set_grad_checkpointing()
    return Trainer(
        network, config, data, seed=seed, notice=notice, deadline_s=deadline_s, on_step=on_step, compile=compile
    )
