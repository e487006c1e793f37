"""Optimizers without weight decay on norms and scalars, the learning-rate schedule, and the averaged weights."""

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, muon
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nkat_ray.config import TrialConfig
from nkat_ray.train.device import has_native_bfloat16

# AdamW's rate for vectors and positions, as a share of Muon's for matrices: small networks trained best at Muon's rates
# of 3e-3 to 4e-3, and beside them AdamW's own best rate, 1.5e-3, is a share of 0.5 to 0.375.
MUON_FALLBACK_LR_SCALE = 0.375
EMA_WARMUP_POWER = 3 / 4  # reaches .956 after 64 steps, .9993 after 15,600; timm's default of 2/3 would stop at .9984


def create_optimizer(model: nn.Module, config: TrialConfig) -> torch.optim.Optimizer:
    """Create timm's AdamW or Muon (docs/spec.md section 4).

    Vectors, biases and parameters that the model names in `no_weight_decay` have no weight decay. Muon (Jordan et al.
    2024) updates matrices of at least 4 x 4 (convolution kernels as out x (in * height * width)) and leaves the rest to
    AdamW. On a GPU the learning rates are tensors and a CUDA graph can capture a step.
    """
    on_gpu = any(parameter.device.type == "cuda" for parameter in model.parameters())
    options: dict[str, Any] = {"fused": True}
    if config.optimizer == "muon":
        options = {"fallback_lr_scale": MUON_FALLBACK_LR_SCALE}
        muon.zeropower_via_newtonschulz = _orthogonalise  # timm has no option for the precision
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model,
        opt=config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        filter_bias_and_bn=True,
        capturable=on_gpu,
        **options,
    )
    if on_gpu:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(config.lr, device=group["params"][0].device)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups; on a GPU in place, where a CUDA graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state in a form that both CPUs and GPUs can continue from."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from what `optimizer_state` returned, on this optimizer's device."""
    own = optimizer.param_groups
    groups = [
        {**group, "lr": mine["lr"], "capturable": mine["capturable"]}
        for group, mine in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})


_timm_orthogonalise = muon.zeropower_via_newtonschulz


def _orthogonalise(matrix: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Run timm's Newton-Schulz iteration in bfloat16, or in float32 if the device only emulates bfloat16.

    Emulated bfloat16 triples the time of a training epoch on a CPU.
    """
    dtype = torch.bfloat16 if has_native_bfloat16(matrix.device) else torch.float32
    result: Tensor = _timm_orthogonalise(matrix, *arguments, dtype=dtype, **options)
    return result


def lr_at(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of one update: a linear warm-up to `peak`, then a cosine towards 0.

    No update has a rate of 0 (docs/spec.md section 4).

    Args:
        step: the update, 0..total_steps - 1.
        warmup_steps: updates of the warm-up, 0..total_steps - 1.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class Average(ModelEmaV3):  # type: ignore[misc]  # timm is hardly annotated
    """Exponential moving average of weights and buffers, warmed up (docs/spec.md section 4).

    With a constant 0.9995 over half of the average would still be random initial weights after three epochs, and the
    first rungs of a search would judge noise. With the warm-up the average covers about the last quarter of the steps,
    from the first epoch on, until `decay` caps it.

    The computation is timm's. The lists of tensors are kept, since on a GPU collecting them costs more than the update.

    Args:
        model: the network, on its device; a copy of it is averaged. Its tensors must stay the same objects.
        decay: largest weight of the old average per step, 0..1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True, warmup_power=EMA_WARMUP_POWER)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged, self._weights = zip(*((old, new) for old, new in pairs if old.is_floating_point()), strict=True)
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]  # BatchNorm's counters

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the network's weights after the update number `step`, counted from 0."""
        torch._foreach_lerp_(self._averaged, self._weights, weight=1.0 - self.get_decay(step))
        for old, new in self._copied:
            old.copy_(new)
