"""The mathematics of NKAT attention: the filter, the modulation and the attention layer (docs/spec.md section 3).

Legend of shapes: B images, H heads, N tokens, D embedding width, E = D / H, G = 4 streams of split heads.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.config import use_fused_attn
from torch import Tensor, nn

SCATTER_TOKENS = 64  # up to here explicit weights are faster, above it a boolean mask + SDPA (benchmarks/model_cost.py)
STREAMS = 4  # split heads: red, green, blue, fused
STREAM_HEADS = 2  # heads that each stream feeds


def filtered_softmax(
    scores: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Compute softmax over the last axis, restricted to the keys that top_k and then top_p keep.

    Scores are divided by the temperature. Of the `top_k` largest the shortest prefix, in descending order, is kept
    whose mass (renormalised over these) reaches `top_p`; the largest is always kept (docs/spec.md section 3).

    Args:
        scores: (..., N) of any floating type.
        temperature: > 0.
        top_k: keys kept per query, >= 1; above N it keeps all; None is off. Of tied scores any may be kept.
        top_p: mass kept, 0 < top_p <= 1; None and 1 keep all.

    Returns:
        Weights (..., N): 0 for what was filtered out; float32, or float64 when scores are.

    Raises:
        ValueError: an argument out of range.
    """
    _check_filter(temperature, top_k, top_p)
    scores = _at_least_float32(scores) / temperature
    if not _filters(scores.shape[-1], top_k, top_p):
        return scores.softmax(-1)
    values, index = _kept(scores, top_k, top_p)
    return _spread(values.softmax(-1), index, scores.shape[-1])


def keep_mask(scores: Tensor, *, top_k: int | None, top_p: float | None) -> Tensor:
    """Mark the keys that `filtered_softmax` keeps: bool (..., N).

    Args:
        scores: (..., N), already divided by the temperature.
    """
    with torch.no_grad():
        values, index = _kept(scores, top_k, top_p)
        return _spread(values > -torch.inf, index, scores.shape[-1])


def _kept(scores: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """Return the top_k scores (..., K) in descending order, -inf if top_p drops them, and their positions (..., K)."""
    tokens = scores.shape[-1]
    values, index = scores.topk(min(top_k or tokens, tokens), dim=-1)
    if top_p is None or top_p == 1:
        return values, index
    with torch.no_grad():  # the choice of keys has no gradient
        mass_before = values.softmax(-1)[..., :-1].cumsum(-1)  # of the second key and those after it
        drop = F.pad(mass_before >= top_p, (1, 0))  # the first is always kept
    return values.masked_fill(drop, -torch.inf), index


def _spread(values: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Put values (..., K) at their positions among N zeros: (..., N)."""
    return values.new_zeros(*values.shape[:-1], tokens).scatter(-1, index, values)


def _filters(tokens: int, top_k: int | None, top_p: float | None) -> bool:
    """Return whether the filter can drop anything among `tokens` keys."""
    return (top_k is not None and top_k < tokens) or (top_p is not None and top_p < 1)


def _check_filter(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be > 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be >= 1, or None to keep all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in 0 < top_p <= 1, or None to keep all")


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class NKATModulation(nn.Module):
    """One factor per query token: 1 + strength * (alpha * tanh(mean(x)) + beta * sigmoid(var(x))).

    Mean and population variance run over the embedding axis; alpha (0.1) and beta (0.05) are learned.

    Args:
        strength: nkat_strength * nkat_decay^l at block l.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.alpha = nn.Parameter(torch.tensor(0.1))
        self.beta = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        """Return the factors: (B, N, D), the block's normalised input -> (B, N, 1)."""
        variance, mean = torch.var_mean(_at_least_float32(x), dim=-1, correction=0, keepdim=True)
        return 1 + self.strength * (self.alpha * mean.tanh() + self.beta * variance.sigmoid())

    def extra_repr(self) -> str:
        """Return the settings for print(model)."""
        return f"strength={self.strength:g}"


class NKATAttention(nn.Module):
    """Multi-head self-attention with the filter, then the modulation, then the output projection.

    Under autocast the output is float32, so that the modulation keeps its effect.

    With `split_heads` the input is four streams (red, green, blue, fused): each feeds the queries, keys and values
    of two heads, and the modulation reads the fused one.

    Up to 64 tokens the weights are explicit; above, the filter becomes a boolean mask for scaled dot-product attention
    (SDPA), except with dropout on a CPU, where SDPA has no fused kernel. All paths give the same output. In evaluation
    up to 64 tokens the weights pass through the module `attn_drop`, where a hook sees them
    (timm.utils.AttentionExtract); always, if timm's `set_fused_attn(False)` was called before the model was built.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        nkat_strength: float = 0.0,
        dropout: float = 0.0,
        split_heads: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.scale = (dim // num_heads) ** -0.5 / temperature
        self.split_heads = split_heads
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(dropout)
        self.modulation = NKATModulation(nkat_strength)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: (B, N, D), or (4, B, N, D) with split heads -> (B, N, D)."""
        q, k, v = self._split_qkv(x) if self.split_heads else self._qkv(x)
        out = rearrange(self._attend(q, k, v), "b h n e -> b n (h e)")
        factor = self.modulation(x[-1] if self.split_heads else x)
        # proj(out * factor), multiplied after the projection in float32: in bfloat16 the factor would be exactly 1
        projected = torch.addcmul(self.proj.bias, F.linear(out, self.proj.weight), factor)
        return projected.to(self.proj.bias.dtype)

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (c h e) -> c b h n e", c=3, h=self.num_heads)
        return q, k, v

    def _split_qkv(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project each stream with its own rows of the weight: (stream, q k v, head of the stream, E)."""
        weight = rearrange(self.qkv.weight, "(g o) d -> g d o", g=STREAMS)
        bias = rearrange(self.qkv.bias, "(g o) -> g 1 o", g=STREAMS)
        out = torch.baddbmm(bias, rearrange(streams, "g b n d -> g (b n) d"), weight)
        q, k, v = rearrange(out, "g (b n) (c h e) -> c b (g h) n e", b=streams.shape[1], c=3, h=STREAM_HEADS)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Choose a path and attend: queries, keys and values (B, H, N, E) -> (B, H, N, E)."""
        filters = _filters(q.shape[-2], self.top_k, self.top_p)
        if self.fused_attn and (not filters or self._prefers_mask(q)):
            return self._masked_attention(q, k, v, filters)
        if self.fused_attn and self.training:
            return self._sparse_attention(q, k, v)
        weights = filtered_softmax(self._scores(q, k), top_k=self.top_k, top_p=self.top_p)
        dropped: Tensor = self.attn_drop(weights)
        return dropped.to(v.dtype) @ v

    def _prefers_mask(self, q: Tensor) -> bool:
        drops = self.training and self.attn_drop.p > 0  # for which SDPA has no fused kernel on the CPU
        return q.shape[-2] > SCATTER_TOKENS and not (drops and q.device.type == "cpu")

    def _masked_attention(self, q: Tensor, k: Tensor, v: Tensor, filters: bool) -> Tensor:
        mask = None
        if filters:
            with torch.no_grad():
                mask = keep_mask(self._scores(q, k), top_k=self.top_k, top_p=self.top_p)
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)

    def _sparse_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with explicit weights, dropping out only among those that were kept: the others are 0 anyway."""
        values, index = _kept(self._scores(q, k), self.top_k, self.top_p)
        weights = F.dropout(values.softmax(-1), self.attn_drop.p).to(v.dtype)  # this path is used in training only
        return _spread(weights, index, q.shape[-2]) @ v

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return scores (B, H, N, N) over the temperature, at least in float32: in bfloat16 up to 7 % tie at rank k."""
        with torch.autocast(q.device.type, enabled=False):
            return torch.matmul(_at_least_float32(q) * self.scale, _at_least_float32(k).mT)

    def extra_repr(self) -> str:
        """Return the settings for print(model)."""
        return (
            f"num_heads={self.num_heads}, temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}, "
            f"split_heads={self.split_heads}"
        )
