"""What a network looked at while it predicted: the attention weights of one forward pass, and the NKAT scalars."""

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

    logits: Tensor
    """(B, classes): the prediction."""
    weights: Tensor
    """(L, B, H, N, N), query then key: the attention weights that made it; each row sums to 1."""
    kept: Tensor
    """(L, B, H, N), int64: keys that the filter kept for each query. A kept key's weight may still underflow to 0."""


def capture_attention(model: NKATVisionTransformer, images: Tensor) -> Capture:
    """Predict, and keep the attention weights and the filter's choices of that same pass.

    The layers take their explicit path for the time of the call: fused attention (no filter, or more than 64 tokens)
    never has the weights in hand. The module is left as it was.

    Args:
        model: in evaluation mode.
        images: normalised, (B, 3, 32, 32).

    Raises:
        ValueError: the model is in training mode, where dropout would change the weights.
        RuntimeError: a block's weights were not seen, do not sum to 1, or lie where the filter keeps nothing.
    """
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    layers = [block.attn for block in model.blocks]
    fused = [layer.fused_attn for layer in layers]
    seen: list[Tensor] = []
    masks: list[Tensor] = []

    def keep(_layer: nn.Module, _inputs: tuple[Tensor, ...], weights: Tensor) -> None:
        seen.append(weights.detach())

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
    if not len(seen) == len(masks) == len(layers):
        raise RuntimeError(f"{len(seen)} of {len(layers)} blocks showed their attention weights")
    weights, mask = torch.stack(seen), torch.stack(masks)
    if (weights[~mask] != 0).any():
        raise RuntimeError("attention weights lie on keys that the filter dropped")
    found = Capture(logits, weights, mask.sum(-1))
    if not row_error(found) <= ROW_TOLERANCE:
        raise RuntimeError(f"attention weights sum to 1 only within {row_error(found):.2g}")
    return found


def _watched(layer: NKATAttention, masks: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer's scores as they are; what the filter keeps of them goes into `masks`."""
    scores_of = layer._scores

    def scores(q: Tensor, k: Tensor) -> Tensor:
        found = scores_of(q, k)
        masks.append(keep_mask(found, top_k=layer.top_k, top_p=layer.top_p))
        return found

    return scores


def row_error(capture: Capture) -> float:
    """The largest distance of a row's sum from 1."""
    return float((capture.weights.sum(-1) - 1).abs().max())


def plain_difference(model: NKATVisionTransformer, images: Tensor, capture: Capture) -> float:
    """The largest distance of the captured logits from those of a pass without hooks, over the largest logit.

    Raises:
        RuntimeError: they are not the same prediction.
    """
    with torch.no_grad():
        plain = model(images)
    difference = float((plain - capture.logits).abs().max() / plain.abs().max().clamp(min=1))
    if not difference <= ROW_TOLERANCE:
        raise RuntimeError(f"logits with and without hooks differ by {difference:.2g}")
    return difference


def nkat_scalars(model: NKATVisionTransformer) -> dict[str, list[float]]:
    """Block by block: the learned `alpha`, `beta`, `attention_gain` and `mlp_gain`, and the fixed `strength`."""
    blocks = list(model.blocks)
    return {
        "alpha": [block.attn.modulation.alpha.item() for block in blocks],
        "beta": [block.attn.modulation.beta.item() for block in blocks],
        "attention_gain": [block.ls1.gain.item() for block in blocks],
        "mlp_gain": [block.ls2.gain.item() for block in blocks],
        "strength": [float(block.attn.modulation.strength) for block in blocks],
    }
