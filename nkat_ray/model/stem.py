"""Layers from image to tokens: Color-wise LayerNorm, ConvStem, patches, and the colour streams of split heads.

docs/spec.md section 3. Legend of shapes: B images, C channels, N tokens, D embedding width.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from nkat_ray.config import IMAGE_SIZE, ColorNorm, ModelConfig, Stem

STEM_WIDTHS = {"tiny": (32, 64), "small": (64, 128)}
COLOURS = 3


class ColorWiseLayerNorm(nn.Module):
    """LayerNorm over the colour channels at each pixel: `off`, `layernorm` (literal) or `residual` (x + LN(x)).

    Over three values it leaves one degree of freedom: brightness and saturation are lost, and a grey pixel becomes
    exactly 0 (before the learned shift). A model for grey images therefore bypasses it: `bypass` is set from the
    model's field `grey`, never guessed from pixels.
    """

    def __init__(self, mode: ColorNorm, *, bypass: bool = False) -> None:
        super().__init__()
        self.mode = mode
        self.bypass = bypass
        self.norm = nn.Identity() if mode == "off" else nn.LayerNorm(COLOURS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise: (B, 3, H, W) -> (B, 3, H, W)."""
        if self.bypass or self.mode == "off":
            return x
        normed: Tensor = rearrange(self.norm(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
        return x + normed if self.mode == "residual" else normed

    def extra_repr(self) -> str:
        """Return the settings for print(model)."""
        return f"mode={self.mode}, bypass={self.bypass}"


class ConvStem(nn.Sequential):
    """Convolution, BatchNorm and GELU, two times (`tiny`) or three times (`small`); `off` passes the image on.

    tiny: 3 -> 32 -> 64 channels, 19,584 parameters. small: 3 -> 64 -> 128 -> 128, the last at stride 1.

    Args:
        stride: 4 (both first convolutions halve the map: 32 -> 8) or 2 (only the first: 32 -> 16).
    """

    def __init__(self, kind: Stem, *, stride: int = 4) -> None:
        layers: list[nn.Module] = []
        if kind != "off":
            narrow, wide = STEM_WIDTHS[kind]
            layers += [*_conv(COLOURS, narrow, stride=2), *_conv(narrow, wide, stride=stride // 2)]
        if kind == "small":
            layers += _conv(wide, wide, stride=1)
        super().__init__(*layers)
        self.out_channels = COLOURS if kind == "off" else wide
        self.stride = 1 if kind == "off" else stride


def _conv(inputs: int, outputs: int, *, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.BatchNorm2d(outputs), nn.GELU()]


class ColourEmbed(nn.Module):
    """One embedding per colour and token, from that colour alone: the streams of Split-Head Attention.

    A grouped convolution on the image, one group per channel, whose kernel and stride are one token's cell (computed as
    one matrix product per colour).

    Args:
        cell: side of a token's cell on the image, in pixels (patch_size x stem stride).
    """

    def __init__(self, dim: int, *, cell: int) -> None:
        super().__init__()
        self.cell = cell
        self.proj = nn.Conv2d(COLOURS, COLOURS * dim, cell, stride=cell, groups=COLOURS)

    def forward(self, image: Tensor) -> Tensor:
        """Embed each colour: (B, 3, H, W) -> (3, B, N, D)."""
        side, weight = self.cell, rearrange(self.proj.weight, "(c d) 1 p q -> c (p q) d", c=COLOURS)
        cells = rearrange(image, "b c (h p) (w q) -> c (b h w) (p q)", p=side, q=side)
        bias = rearrange(cast(Tensor, self.proj.bias), "(c d) -> c 1 d", c=COLOURS)
        return rearrange(torch.baddbmm(bias, cells, weight), "c (b n) d -> c b n d", b=len(image))


class NKATEmbed(PatchEmbed):
    """Embed an image as tokens: Color-wise LayerNorm, ConvStem, then timm's patch embedding on the stem's map.

    With split heads the three colour streams are stacked before the fused tokens, so that everything between here
    and block 0 (positions, dropout) treats all four alike. The stream is the first axis, so that each is contiguous.
    """

    def __init__(
        self, *, config: ModelConfig, grey: bool, embed_dim: int, patch_size: int, bias: bool = True, **_timm: Any
    ) -> None:
        stem = ConvStem(config.conv_stem, stride=config.stem_stride)
        super().__init__(config.map_size, patch_size, stem.out_channels, embed_dim, bias=bias)
        self.color_norm = ColorWiseLayerNorm(config.color_norm, bypass=grey)
        self.stem = stem
        self.colours = ColourEmbed(embed_dim, cell=self.feat_ratio()) if config.split_heads else None

    def feat_ratio(self, as_scalar: bool = True) -> Any:
        """Return the side of a token's cell on the image, in pixels."""
        cell = self.patch_size[0] * self.stem.stride
        return cell if as_scalar else (cell, cell)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the grid of tokens (timm calls this)."""
        height, width = self.grid_size
        return height, width

    def forward(self, image: Tensor) -> Tensor:
        """Embed: (B, 3, 32, 32) -> (B, N, D), or (4, B, N, D) with split heads (red, green, blue, fused)."""
        if image.shape[1:] != (COLOURS, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"images are {tuple(image.shape)}; expected (B, {COLOURS}, {IMAGE_SIZE}, {IMAGE_SIZE})")
        fused = self._patches(self.stem(self.color_norm(image)))
        if self.colours is None:
            return fused
        return torch.cat([self.colours(image), fused.unsqueeze(0)])

    def _patches(self, x: Tensor) -> Tensor:
        """Apply the patch convolution as one matrix product: tokens come out contiguous, not as a transposed map."""
        side, _ = self.patch_size
        cells = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
        return F.linear(cells, self.proj.weight.flatten(1), self.proj.bias)
