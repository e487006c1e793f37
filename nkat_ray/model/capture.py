"""Capture the attention weights of a forward pass while the network predicts, and read the NKAT scalars."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nkat_ray.model.attention import NKATAttention, keep_mask
from nkat_ray.model.vit import NKATVisionTransformer

ROW_TOLERANCE = 1e-3  # of a row's sum from 1, and of a logit from the plain pass


@dataclass(frozen=True)
class Capture:
    """One forward pass of B images through L blocks of H heads over N tokens."""

    logits: Tensor  # (B, classes): scores of the prediction
    weights: Tensor  # (L, B, H, N, N), query then key: the attention weights of this prediction; each row sums to 1
    kept: Tensor
    """(L, B, H, N), int64: number of keys that the filter kept per query. A kept key's weight may underflow to 0."""


def capture_attention(model: NKATVisionTransformer, images: Tensor) -> Capture:
    """Predict, and capture the attention weights and the filter's choices of that same pass.

    During the call the layers take their explicit path: fused attention (no filter, or more than 64 tokens) never
    computes the weights as a tensor. The module is left as it was.

    Args:
        model: in evaluation mode.
        images: normalised, (B, 3, 32, 32).

    Raises:
        ValueError: the model is in training mode, where dropout would change the weights.
        RuntimeError: a block's weights were not captured, do not sum to 1, or lie on keys that the filter dropped.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    layers = [block.attn for block in model.blocks]
    fused = [layer.fused_attn for layer in layers]
    captured: list[Tensor] = []
    masks: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: tuple[Tensor, ...], weights: Tensor) -> None:
        captured.append(weights.detach())

    hooks = [layer.attn_drop.register_forward_hook(keep) for layer in layers]
    try:
        for layer in layers:
            layer.fused_attn = False
            layer._scores = _watched(layer, masks)
        with torch.no_grad():
            logits = model(images)
    finally:
        for hook, layer, before in zip(hooks, layers, fused, strict=True):
            hook.remove()
            layer.fused_attn = before
            layer.__dict__.pop("_scores", None)  # the class's own again
    if not len(captured) == len(masks) == len(layers):
        raise RuntimeError(f"{len(captured)} of {len(layers)} blocks passed their attention weights on")
    weights, mask = torch.stack(captured), torch.stack(masks)
    if (weights[~mask] != 0).any():
        raise RuntimeError("attention weights lie on keys that the filter dropped")
    capture = Capture(logits, weights, mask.sum(-1))
    if not row_error(capture) <= ROW_TOLERANCE:
        raise RuntimeError(f"attention weights sum to 1 only within {row_error(capture):.2g}")
    return capture


def _watched(layer: NKATAttention, masks: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Wrap a layer's scores function so that it also appends the filter's choice to `masks`."""
    scores_of = layer._scores

    def scores(q: Tensor, k: Tensor) -> Tensor:
        computed = scores_of(q, k)
        masks.append(keep_mask(computed, top_k=layer.top_k, top_p=layer.top_p))
        return computed

    return scores


def row_error(capture: Capture) -> float:
    """Return the largest difference between the sum of a row of weights and 1."""
    return float((capture.weights.sum(-1) - 1).abs().max())


def plain_difference(model: NKATVisionTransformer, images: Tensor, capture: Capture) -> float:
    """Return the largest difference between captured logits and those of a pass without hooks, over the largest logit.

    Raises:
        RuntimeError: the difference is above the tolerance, so the predictions are not the same.
    """
    with torch.no_grad():
        plain = model(images)
    difference = float((plain - capture.logits).abs().max() / plain.abs().max().clamp(min=1))
    if not difference <= ROW_TOLERANCE:
        raise RuntimeError(f"logits with and without hooks differ by {difference:.2g}")
    return difference


def nkat_scalars(model: NKATVisionTransformer) -> dict[str, list[float]]:
    """Return per block the learned `alpha`, `beta`, `attention_gain` and `mlp_gain`, and the fixed `strength`."""
    blocks = list(model.blocks)
    return {
        "alpha": [block.attn.modulation.alpha.item() for block in blocks],
        "beta": [block.attn.modulation.beta.item() for block in blocks],
        "attention_gain": [block.ls1.gain.item() for block in blocks],
        "mlp_gain": [block.ls2.gain.item() for block in blocks],
        "strength": [float(block.attn.modulation.strength) for block in blocks],
    }
