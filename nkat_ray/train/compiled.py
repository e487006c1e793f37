"""Compile a network with `torch.compile`, for long trainings of one design."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nkat_ray.errors import first_line

# Dropout draws the numbers that it draws without compiling, so that both ways train the same network.
OPTIONS: dict[str, Any] = {"fallback_random": True}


def compiled(model: nn.Module, device: torch.device, notice: Callable[[str], None]) -> Callable[[Tensor], Tensor]:
    """Return a function that computes what the network computes, with kernels compiled for one batch size.

    It shares the network's weights. The first call in training mode takes up to a minute.

    Args:
        model: the network, on the device.
        device: where it computes.
        notice: called with one line where PyTorch cannot compile a small function (there is no C++ compiler, or on a
            GPU no Triton); the network itself is returned then.
    """
    try:
        torch.compile(torch.sin, options={"force_disable_caches": True})(torch.ones(1, device=device))
    except RuntimeError as error:  # the base of Dynamo's, which wrap those of Inductor and the compiler
        cause = getattr(error, "inner_exception", error)  # without Dynamo's advice to its developers
        notice(f"compile: trained without it, since PyTorch cannot compile here: {first_line(cause)}")
        return model
    function: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False, options=OPTIONS)
    return function
