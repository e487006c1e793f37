"""NKAT-ViT. Importing this package registers `nkat_vit` with timm."""

from nkat_ray.model.attention import NKATAttention, filtered_softmax
from nkat_ray.model.stem import ColorWiseLayerNorm, ConvStem
from nkat_ray.model.vit import (
    NKATVisionTransformer,
    count_nkat_parameters,
    count_parameters,
    create_nkat_vit,
    lambdas,
    save_pretrained,
)

__all__ = [
    "ColorWiseLayerNorm",
    "ConvStem",
    "NKATAttention",
    "NKATVisionTransformer",
    "count_nkat_parameters",
    "count_parameters",
    "create_nkat_vit",
    "filtered_softmax",
    "lambdas",
    "save_pretrained",
]
