"""NKAT-ViT: timm's VisionTransformer with this package's stem, attention and residual scalars (docs/spec.md section 3).

Registered with timm as `nkat_vit`; the options are `ModelConfig`'s fields. A saved folder (`model.safetensors` and
`config.json`) is read back by `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.layers.mlp import Mlp
from timm.models import build_model_with_cfg, register_model
from timm.models._hub import save_config_for_hf
from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn

from nkat_ray.config import IMAGE_SIZE, ModelConfig, field_names
from nkat_ray.model.attention import NKATAttention, NKATModulation
from nkat_ray.model.stem import NKATEmbed

ARCHITECTURE = "nkat_vit"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
Pool = Literal["", "avg", "avgmax", "max"]  # timm's poolings that need no class token
HALF = (0.5, 0.5, 0.5)  # a neutral mean and std; training passes its split's own

default_cfgs = {
    ARCHITECTURE: {
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "mean": HALF,
        "std": HALF,
        "num_classes": 10,
        "classifier": "head",
    }
}


class ResidualScalar(nn.Module):
    """A learned scalar, 1 at the start, on a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, unchanged."""
        return x * self.gain


class NKATBlock(nn.Module):
    """A pre-norm transformer block: x + gain * attention(LN(x)), then x + gain * MLP(LN(x)).

    Args:
        dim: embedding width D.
        config: the model's configuration.
        depth: index of the block, from 0: nkat_strength decays with it, and block 0 may have split heads.
        norm_layer: constructor of a LayerNorm.
        _timm: what else timm hands to a block; the configuration decides it here.
    """

    def __init__(
        self, dim: int, *, config: ModelConfig, depth: int, norm_layer: Callable[[int], nn.Module], **_timm: Any
    ) -> None:
        super().__init__()
        self.split_heads = config.split_heads and depth == 0
        self.norm1 = norm_layer(dim)
        self.attn = NKATAttention(
            dim,
            num_heads=config.num_heads,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            nkat_strength=config.nkat_strength * config.nkat_decay**depth,
            dropout=config.dropout_attn,
            split_heads=self.split_heads,
        )
        self.ls1 = ResidualScalar()  # timm's name for what scales a branch
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_features=int(dim * config.mlp_ratio))
        self.ls2 = ResidualScalar()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D), or (4, B, N, D) into split heads -> (B, N, D)."""
        fused = x[-1] if self.split_heads else x
        x = fused + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class NKATVisionTransformer(VisionTransformer):
    """NKAT-ViT: mean pooling, no class token, learned positions.

    `forward` takes normalised images (B, 3, 32, 32) and returns logits (B, num_classes). Mean and std of the
    normalisation (0..1 units) are in `pretrained_cfg`.

    Args:
        config: the model's configuration.
        num_classes: classes, >= 0; 0 leaves the head out.
        grey: the model is for grey images: Color-wise LayerNorm is bypassed. Saved with the model.
        global_pool: avg, or one of timm's other poolings without a class token.
    """

    def __init__(
        self, *, config: ModelConfig, num_classes: int = 10, grey: bool = False, global_pool: Pool = "avg"
    ) -> None:
        super().__init__(
            img_size=IMAGE_SIZE,
            patch_size=config.patch_size,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=config.embed_dim,
            depth=config.depth,
            class_token=False,
            pos_drop_rate=config.dropout_embed,
            embed_layer=partial(NKATEmbed, config=config, grey=grey),
            block_fn=partial(NKATBlock, config=config),
        )
        self.config = config
        self._model_args = {**asdict(config), "grey": grey}  # what timm writes into config.json

    @property
    def grey(self) -> bool:
        """Whether the model is for grey images: then Color-wise LayerNorm is bypassed."""
        return bool(self.patch_embed.color_norm.bypass)

    @grey.setter
    def grey(self, grey: bool) -> None:
        self.patch_embed.color_norm.bypass = grey
        self._model_args = {**self._model_args, "grey": grey}


@register_model
def nkat_vit(pretrained: bool = False, **kwargs: Any) -> NKATVisionTransformer:
    """Entry point of timm: `timm.create_model("nkat_vit", num_classes=10, conv_stem="tiny", patch_size=2, ...)`.

    Options are `ModelConfig`'s fields with its defaults, `grey`, and timm's `num_classes` and `global_pool`. One
    difference: timm drops options that are None, so a `top_k` or `top_p` that is not given is off here.

    Raises:
        ValueError: a value out of range, or an input size that is not (3, 32, 32).
    """
    fields: dict[str, Any] = {"top_k": None, "top_p": None}
    fields |= {name: kwargs.pop(name) for name in field_names(ModelConfig) if name in kwargs}
    size, channels = kwargs.pop("img_size", IMAGE_SIZE), kwargs.pop("in_chans", 3)
    if size not in (IMAGE_SIZE, (IMAGE_SIZE, IMAGE_SIZE), [IMAGE_SIZE, IMAGE_SIZE]) or channels != 3:
        raise ValueError(f"img_size is {size}, in_chans {channels}; NKAT-ViT takes ({IMAGE_SIZE}, {IMAGE_SIZE}) and 3")
    model = build_model_with_cfg(
        partial(_build, config=ModelConfig(**fields)),
        ARCHITECTURE,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )
    return cast(NKATVisionTransformer, model)


def _build(*, config: ModelConfig, in_chans: int = 3, img_size: Any = None, **kwargs: Any) -> NKATVisionTransformer:
    return NKATVisionTransformer(config=config, **kwargs)  # timm repeats the checked input size


def create_nkat_vit(
    config: ModelConfig,
    *,
    num_classes: int,
    grey: bool = False,
    mean: Sequence[float] = HALF,
    std: Sequence[float] = HALF,
) -> NKATVisionTransformer:
    """A new NKAT-ViT, with the same weights as timm.create_model gives at the same random state.

    Args:
        config: the configuration (of a subclass such as TrialConfig only ModelConfig's fields count).
        num_classes: classes, >= 1.
        grey: whether the dataset is grey.
        mean: of each channel over the training split, 0..1.
        std: of each channel over the training split, 0..1 units.
    """
    model = timm.create_model(
        ARCHITECTURE,
        num_classes=num_classes,
        grey=grey,
        pretrained_cfg_overlay={"mean": tuple(mean), "std": tuple(std), "num_classes": num_classes},
        **{name: getattr(config, name) for name in field_names(ModelConfig)},
    )
    return cast(NKATVisionTransformer, model)


def count_parameters(model: nn.Module) -> int:
    """Learned numbers in the model."""
    return sum(p.numel() for p in model.parameters())


def count_nkat_parameters(model: nn.Module) -> int:
    """Learned NKAT scalars in the model: alpha, beta and two residual scalars, 4 a block."""
    return sum(count_parameters(m) for m in model.modules() if isinstance(m, NKATModulation | ResidualScalar))


def replace_head(model: NKATVisionTransformer, num_classes: int) -> None:
    """Puts a fresh head for `num_classes` on the model, in place: the start of a transfer."""
    model.reset_classifier(num_classes)
    model.head.apply(init_weights_vit_timm)  # as every Linear of a new model starts


def set_grey(model: NKATVisionTransformer, grey: bool) -> None:
    """Sets the model's field `grey`, in place."""
    model.grey = grey


def save_pretrained(model: NKATVisionTransformer, folder: str | Path) -> None:
    """Writes `model.safetensors` and `config.json` into `folder` (made if needed), each file atomically."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, Path(scratch, WEIGHTS_FILE))
        save_config_for_hf(model, str(Path(scratch, CONFIG_FILE)))
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(scratch, name), folder / name)


def load_pretrained(folder: str | Path) -> NKATVisionTransformer:
    """The model saved in `folder`, bit-equal, in evaluation mode on the CPU. Nothing is unpickled.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds something else, or a damaged file.
    """
    folder = Path(folder)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; expected a folder that save_pretrained wrote")
    try:
        architecture = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("architecture")
        if architecture != ARCHITECTURE:
            raise ValueError(f"its architecture is {architecture!r}, not {ARCHITECTURE!r}")
        return cast(NKATVisionTransformer, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} does not hold a readable NKAT-ViT: {error}") from error
