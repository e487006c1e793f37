"""From a network trained on CIFAR-10 to another dataset: fine-tuning, a probe, or the same design from scratch."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import freeze_batch_norm_2d
from torch import nn

from nkat_ray.config import Transfer, TrialConfig
from nkat_ray.files import WEIGHTS_FILE, write_atomically
from nkat_ray.model import create_nkat_vit, save_pretrained
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.loop import ImageSet, Trainer, count_correct, in_pixels


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """A network on its new dataset; val_accuracy is a fraction of n_val validation images, 0..1."""

    weights: Weights
    val_accuracy: float
    n_val: int
    seconds: float


def transfer_recipe(config: TrialConfig, mode: Transfer, *, epochs: int, lr: float) -> TrialConfig:
    """The trial's recipe for the transfer: a few epochs at their own rate; from scratch, the trial's own."""
    if mode == "scratch":
        return config
    return dataclasses.replace(config, epochs=epochs, lr=lr, warmup=min(1, epochs - 1))


def transfer(
    source: Weights,
    *,
    mode: Transfer,
    epochs: int,
    lr: float,
    dataset: str,
    train: ImageSet,
    val: ImageSet,
    num_classes: int,
    grey: bool,
    flip: bool,
    seed: int,
    device: torch.device,
    notice: Callable[[str], None],
) -> Transferred:
    """Carry a network over to another dataset and score it on that one's validation images (docs/spec.md section 6.3).

    Args:
        mode: `finetune` trains everything behind a fresh head, `probe` the head alone, `scratch` new weights.
        epochs, lr: of `finetune` and `probe`; `scratch` keeps the trial's own.

    Raises:
        ValueError: the training ended on a loss that is not finite.
    """
    clock = time.perf_counter()
    config = transfer_recipe(source.config, mode, epochs=epochs, lr=lr)
    mean, std = train.statistics()
    torch.manual_seed(seed)
    model = create_nkat_vit(config, num_classes=num_classes, grey=grey, mean=mean, std=std)
    if mode != "scratch":
        _take_backbone(model, source)
    if mode == "probe":
        _freeze_backbone(model)
    trainer = Trainer(
        model, config, train=train, val=val, num_classes=num_classes, flip=flip, mean=mean, std=std, seed=seed,
        device=device, notice=notice,
    )  # fmt: skip
    results = list(trainer.epochs())
    accuracy = results[-1].val_accuracy
    if accuracy != accuracy:
        raise ValueError(f"the loss was not finite in epoch {results[-1].epoch} of the transfer to {dataset}")
    weights = trainer.weights(dataset=dataset, grey=grey, val_accuracy=accuracy, seed=seed)
    return Transferred(weights=weights, val_accuracy=accuracy, n_val=len(val), seconds=time.perf_counter() - clock)


def _take_backbone(model: nn.Module, source: Weights) -> None:
    """Load everything but the head."""
    tensors = {name: tensor for name, tensor in source.tensors.items() if not name.startswith("head.")}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise ValueError(f"the backbone does not fit: missing {missing}, unexpected {unexpected}")


def _freeze_backbone(model: nn.Module) -> None:
    """Leave the head alone to be trained; BatchNorm keeps its statistics too, which training mode would move."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    freeze_batch_norm_2d(model)


def save_weights(weights: Weights, payload: bytes, folder: Path) -> None:
    """Write a network as timm reads it (`local-dir:`: model.safetensors, config.json), its recipe beside it."""
    save_pretrained(weights.build(), folder)
    write_atomically(folder / WEIGHTS_FILE, payload)


def count_correct_of(weights: Weights, images: ImageSet, device: torch.device) -> int:
    """How many images the network classifies correctly."""
    mean, std = (in_pixels(values, device) for values in (weights.mean, weights.std))
    return count_correct(weights.build().to(device), images, mean=mean, std=std, device=device)
