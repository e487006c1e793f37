"""AdamW without decay on norms and scalars, the learning-rate schedule, and the averaged weights that are scored."""

import math

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from nkat_ray.config import TrialConfig

EMA_WARMUP_POWER = 3 / 4  # reaches .956 after 64 steps, .9993 after 15,600; timm's default of 2/3 would stop at .9984


def create_optimizer(model: nn.Module, config: TrialConfig) -> torch.optim.Optimizer:
    """AdamW; one-dimensional parameters, biases and what the model names in `no_weight_decay` are not decayed."""
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay, filter_bias_and_bn=True, fused=True
    )
    return optimizer


def lr_at(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of one update: a linear warm-up to `peak`, then a cosine towards 0 (docs/spec.md section 4).

    Args:
        step: the update, 0..total_steps - 1. No update has a rate of 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def create_ema(model: nn.Module, decay: float) -> ModelEmaV3:
    """Exponential moving average of weights and buffers, warmed up.

    A constant .9995 would still hold over half of the random initial weights after three epochs, so that the first
    rungs of a search would be judged on noise. With the warm-up the average reaches back over about the last quarter of
    the steps, from the first epoch on, until `decay` caps it.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_power=EMA_WARMUP_POWER)
