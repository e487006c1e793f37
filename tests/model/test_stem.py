"""Stem, Color-wise LayerNorm and patches: shapes, counts, and the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from nkat_ray.config import ModelConfig
from nkat_ray.model import ColorWiseLayerNorm, ConvStem
from nkat_ray.model.stem import ColourEmbed, NKATEmbed


def images(batch=2, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def grey_images():
    return images()[:, :1].repeat(1, 3, 1, 1)


@pytest.mark.parametrize(("kind", "parameters"), [("off", 0), ("tiny", 19_584), ("small", 223_872)])
@pytest.mark.parametrize("stride", [4, 2])
def test_stem_has_the_counted_parameters_and_map(kind, parameters, stride):
    stem = ConvStem(kind, stride=stride)
    side = 32 if kind == "off" else 32 // stride
    assert sum(p.numel() for p in stem.parameters()) == parameters
    assert stem(images()).shape == (2, stem.out_channels, side, side)
    assert stem.stride * side == 32


def test_color_norm_is_layer_norm_over_the_three_channels():
    x = images()
    centred = x - x.mean(1, keepdim=True)
    literal = centred / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(ColorWiseLayerNorm("layernorm")(x), literal, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ColorWiseLayerNorm("residual")(x), x + literal, rtol=1e-4, atol=1e-5)
    assert torch.equal(ColorWiseLayerNorm("off")(x), x)


def test_color_norm_loses_brightness_and_turns_grey_pixels_to_zero():
    norm = ColorWiseLayerNorm("layernorm")
    torch.testing.assert_close(norm(images() + 2), norm(images()), rtol=1e-3, atol=1e-3)
    assert norm(grey_images()).abs().max() < 1e-3


@pytest.mark.parametrize("mode", ["layernorm", "residual"])
def test_bypass_is_a_switch_and_never_guessed_from_pixels(mode):
    x = grey_images()
    assert torch.equal(ColorWiseLayerNorm(mode, bypass=True)(images()), images())
    torch.nn.init.constant_((norm := ColorWiseLayerNorm(mode)).norm.bias, 0.5)
    assert not torch.equal(norm(x), x)


def embed(**options):
    config = ModelConfig(embed_dim=16, **options)
    return NKATEmbed(config=config, grey=False, embed_dim=16, patch_size=config.patch_size)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"patch_size": 2}, 16),
        ({"patch_size": 4}, 4),
        ({"patch_size": 2, "stem_stride": 2}, 64),
        ({"patch_size": 4, "stem_stride": 2}, 16),
        ({"conv_stem": "off", "patch_size": 2}, 256),
        ({"conv_stem": "off", "patch_size": 4}, 64),
    ],
)
def test_tokens_are_the_patch_convolution(options, tokens):
    layer = embed(**options)
    x = images()
    expected = F.conv2d(layer.stem.train()(x), layer.proj.weight, layer.proj.bias, stride=layer.proj.stride)
    assert (layer.num_patches, layer(x).shape) == (tokens, (2, tokens, 16))
    torch.testing.assert_close(layer(x), expected.flatten(2).mT, rtol=1e-4, atol=1e-5)
    assert layer.feat_ratio() ** 2 * tokens == 32 * 32


def test_colour_streams_are_a_grouped_convolution_on_the_tokens_grid():
    layer = ColourEmbed(16, cell=8)
    expected = layer.proj(images()).view(2, 3, 16, 16).mT.transpose(0, 1)  # (colour, B, N, D)
    torch.testing.assert_close(layer(images()), expected, rtol=1e-4, atol=1e-5)


def test_split_heads_stack_red_green_blue_and_fused_tokens():
    layer = embed(split_heads=True, color_norm="layernorm").eval()
    red, other = images(), images(seed=1)
    red[:, 0] = other[:, 0]
    before, after = layer(images()), layer(red)
    same = [torch.equal(before[stream], after[stream]) for stream in range(4)]
    assert before.shape == (4, 2, 16, 16)
    assert same == [False, True, True, False]  # the colours are read before Color-wise LayerNorm mixes them


def test_other_image_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images are \(1, 3, 28, 28\); expected \(B, 3, 32, 32\)"):
        embed()(torch.zeros(1, 3, 28, 28))
