"""NKAT-ViT: timm's VisionTransformer with this package's stem, attention and residual scalars (docs/spec.md section 3).

Registered with timm as `nkat_vit`; the options are `ModelConfig`'s fields. A saved folder (`model.safetensors` and
`config.json`) is read back by `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import safetensors.torch
import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models import build_model_with_cfg, register_model
from timm.models._hub import save_config_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from nkat_ray.config import IMAGE_SIZE, ModelConfig, field_names
from nkat_ray.files import write_atomically
from nkat_ray.metrics import LAMBDA_MODELS, lambda_theory
from nkat_ray.model.attention import NKATAttention, NKATModulation
from nkat_ray.model.stem import NKATEmbed

ARCHITECTURE = "nkat_vit"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
README_FILE = "README.md"
HOW_TO_LOAD = """\
# An NKAT-ViT

Loading it needs the package `nkat_ray`, which registers the architecture `nkat_vit` with timm:

```python
import timm, torch
import nkat_ray.model

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
logits = model(torch.zeros(1, 3, 32, 32))
```

`FOLDER` is this folder. Images are RGB, padded to 32 x 32 pixels, scaled to 0..1 and normalised with `mean` and `std`
of config.json, where `label_names` are the classes in the order of the logits. `weights.safetensors` holds the same
weights with the recipe of the training; `nkat evaluate` and `nkat explain` read it.
"""
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
        """Scale x, of any shape."""
        return x * self.gain


class NKATBlock(nn.Module):
    """A pre-norm transformer block: x + gain * attention(LN(x)), then x + gain * MLP(LN(x)).

    In training, stochastic depth (Huang et al. 2016, arXiv:1603.09382) skips each branch of an image at random and
    divides the others by the probability of staying, as timm does.

    Args:
        depth: index of the block, from 0: nkat_strength decays with it, and block 0 may have split heads.
        drop_path: probability per image that a branch is skipped in training (stochastic depth), 0..1.
        _timm: timm's other options for a block; the configuration decides them here.
    """

    def __init__(
        self,
        dim: int,
        *,
        config: ModelConfig,
        depth: int,
        norm_layer: Callable[[int], nn.Module],
        drop_path: float = 0.0,
        **_timm: Any,
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
        self.ls1 = ResidualScalar()  # timm's name for the scale of a branch
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, hidden_features=int(dim * config.mlp_ratio))
        self.ls2 = ResidualScalar()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (B, N, D), or (4, B, N, D) with split heads -> (B, N, D)."""
        fused = x[-1] if self.split_heads else x
        x = fused + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        out: Tensor = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return out


class NKATVisionTransformer(VisionTransformer):
    """NKAT-ViT: mean pooling, no class token, learned positions.

    `forward` takes normalised images (B, 3, 32, 32) and returns logits (B, num_classes). Mean and std of the
    normalisation (0..1 units) are in `pretrained_cfg`.

    Args:
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
            drop_path_rate=config.drop_path,
            embed_layer=partial(NKATEmbed, config=config, grey=grey),
            block_fn=partial(NKATBlock, config=config),
        )
        self.config, self.grey = config, grey
        self._model_args = {**asdict(config), "grey": grey}  # what timm writes into config.json


@register_model
def nkat_vit(pretrained: bool = False, **kwargs: Any) -> NKATVisionTransformer:
    """Create the network through timm: `timm.create_model("nkat_vit", num_classes=10, conv_stem="tiny", ...)`.

    Options are `ModelConfig`'s fields with its defaults, `grey`, and timm's `num_classes` and `global_pool`. One
    difference: timm drops options that are None, so an omitted `top_k` or `top_p` is off here.

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
    """Create a new NKAT-ViT; its weights are those of `timm.create_model` at the same random state.

    Args:
        config: the configuration; of a subclass such as TrialConfig only ModelConfig's fields are used.
        num_classes: classes, >= 1.
        grey: whether the dataset is grey.
        mean: mean of each channel over the training split, 0..1.
        std: standard deviation of each channel over the training split, 0..1.
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
    """Count the learned parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def count_nkat_parameters(model: nn.Module) -> int:
    """Count the learned NKAT scalars of a model: alpha, beta and two residual scalars, 4 per block."""
    return sum(count_parameters(m) for m in model.modules() if isinstance(m, NKATModulation | ResidualScalar))


def lambdas(model: nn.Module, config: ModelConfig) -> dict[str, float]:
    """Return a network's lambda_theory under each of the three models (docs/spec.md section 2)."""
    facts = {"nkat_parameters": count_nkat_parameters(model), "parameters": count_parameters(model)}
    stem, width = config.conv_stem, config.embed_dim
    return {name: lambda_theory(name, conv_stem=stem, embed_dim=width, **facts) for name in LAMBDA_MODELS}


def save_pretrained(model: NKATVisionTransformer, folder: str | Path, *, class_names: Sequence[str] = ()) -> None:
    """Write `model.safetensors`, `config.json` and a README into `folder` (made if needed), each file atomically.

    Args:
        class_names: names of the classes, by label; they go into config.json as timm's `label_names`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, CONFIG_FILE)
        save_config_for_hf(model, str(path), {"label_names": list(class_names)})
        config = path.read_bytes()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(tensors))
    write_atomically(folder / CONFIG_FILE, config)
    write_atomically(folder / README_FILE, HOW_TO_LOAD.encode())
