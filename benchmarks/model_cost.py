"""Measure a training step of NKAT-ViT against timm's plain VisionTransformer of the same stem, width, depth and tokens.

A step is forward, loss and backward. The models take turns, and the medians of their times are compared (on a CPU, the
process's own CPU time). Targets: at most 1.2 times plain at 16 tokens, 1.35 at 64 and 256. The plain network has the
same dropout; the last column compares with plain without dropout on attention, which SDPA computes several times faster
on a CPU. The second table is the extra cost of Split-Head Attention (the notes claim 5 %), in time and in FLOPs. The
defaults take about three minutes on two cores.

    python benchmarks/model_cost.py --threads 1
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nkat_ray.config import IMAGE_SIZE, ModelConfig
from nkat_ray.model import ConvStem, create_nkat_vit

LAYOUTS: dict[int, dict[str, Any]] = {  # the search space's own ways to so many tokens
    16: {"conv_stem": "tiny", "stem_stride": 4, "patch_size": 2},
    64: {"conv_stem": "tiny", "stem_stride": 2, "patch_size": 2},
    256: {"conv_stem": "off", "patch_size": 2},
}
TARGETS = {16: 1.2, 64: 1.35, 256: 1.35}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often."""

    tokens: tuple[int, ...] = (16, 64, 256)
    """Tokens per image: any of 16, 64, 256."""
    embed_dim: int = 384
    """Width of a token, a multiple of num_heads."""
    depth: int = 7
    """Blocks, >= 1; split heads are in the first alone, so they cost less the more blocks there are."""
    num_heads: int = 8
    """Attention heads; split heads are measured at 8 only."""
    batch_tokens: int = 512
    """Tokens per batch: the batch size is this divided by the tokens per image."""
    repeats: int = 11
    """Timed steps per model."""
    threads: int = 1
    """CPU threads, >= 1."""
    device: str = "cpu"
    """cpu or cuda."""
    bf16: bool = False
    """Compute under bfloat16 autocast."""


class StemPatchEmbed(nn.Module):
    """Embed images for the plain network: the same stem, then a patch convolution as timm has it."""

    def __init__(self, *, config: ModelConfig, embed_dim: int, patch_size: int, **_timm: Any) -> None:
        super().__init__()
        self.stem = ConvStem(config.conv_stem, stride=config.stem_stride)
        self.proj = nn.Conv2d(self.stem.out_channels, embed_dim, patch_size, stride=patch_size)
        self.num_patches = config.tokens

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, N, D)."""
        tokens: Tensor = self.proj(self.stem(x)).flatten(2).transpose(1, 2)
        return tokens


def plain_vit(config: ModelConfig) -> nn.Module:
    """Build timm's own VisionTransformer of the same shape, with the same dropout."""
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=config.patch_size,
        num_classes=10,
        global_pool="avg",
        class_token=False,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        pos_drop_rate=config.dropout_embed,
        attn_drop_rate=config.dropout_attn,
        embed_layer=partial(StemPatchEmbed, config=config),
    )


def training_step(model: nn.Module, options: Options, batch: int) -> Callable[[], None]:
    """Return a function that does one forward and backward pass on fixed random images."""
    device = torch.device(options.device)
    model = model.to(device).train()
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(10, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """Time one step in seconds: the process's CPU time, which other work hardly changes; wall time on CUDA."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(steps: dict[str, Callable[[], None]], options: Options) -> dict[str, list[float]]:
    """Time the models in turn, so that a busy machine slows all alike; two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats + 2):
        for name, step in steps.items():
            times[name].append(seconds(step, options.device))
    return {name: values[2:] for name, values in times.items()}


def flops(model: nn.Module) -> int:
    """Count the FLOPs of one image's forward pass: matrix products and convolutions only."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.cpu().eval()(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    return int(counter.get_total_flops())


def models_to_time(config: ModelConfig) -> dict[str, nn.Module]:
    """Build the models that take turns; split heads only where there are eight."""
    models: dict[str, nn.Module] = {
        "plain": plain_vit(config),
        "no dropout": plain_vit(replace(config, dropout_attn=0.0)),
        "nkat": create_nkat_vit(config, num_classes=10),
    }
    if config.num_heads == 8:
        models["split"] = create_nkat_vit(replace(config, split_heads=True), num_classes=10)
    return models


def measure(options: Options, console: Console) -> None:
    """Measure and print both tables."""
    cost = Table(
        "tokens", "batch", "plain ms", "nkat ms", "ratio", "quartiles", "target", "", "no dropout", title="Step"
    )
    split = Table(
        "tokens", "nkat ms", "split ms", "time", "quartiles", "FLOPs", "claimed", title="Split-Head Attention"
    )
    for tokens in options.tokens:
        config = ModelConfig(
            embed_dim=options.embed_dim, depth=options.depth, num_heads=options.num_heads, **LAYOUTS[tokens]
        )
        models, batch = models_to_time(config), max(1, options.batch_tokens // tokens)
        times = interleaved({name: training_step(m, options, batch) for name, m in models.items()}, options)
        ms = {name: statistics.median(values) * 1000 for name, values in times.items()}
        ratio = ms["nkat"] / ms["plain"]
        cost.add_row(
            str(tokens), str(batch), f"{ms['plain']:.1f}", f"{ms['nkat']:.1f}", f"{ratio:.3f}",
            quartiles(times["nkat"], times["plain"]), f"<= {TARGETS[tokens]}",
            "met" if ratio <= TARGETS[tokens] else "MISSED", f"{ms['nkat'] / ms['no dropout']:.3f}",
        )  # fmt: skip
        if "split" in models:
            split.add_row(
                str(tokens), f"{ms['nkat']:.1f}", f"{ms['split']:.1f}", f"{ms['split'] / ms['nkat']:.3f}",
                quartiles(times["split"], times["nkat"]), f"{flops(models['split']) / flops(models['nkat']):.3f}",
                "1.05",
            )  # fmt: skip
    console.print(cost, split)


def quartiles(times: list[float], reference: list[float]) -> str:
    """Format the quartiles of the ratios between runs of the same round."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(times, reference, strict=True)], n=4)
    return f"{low:.2f}..{high:.2f}"


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measure(options, Console(width=110))
