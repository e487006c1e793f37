"""Train a network of CIFAR-10 on another dataset: fine-tuning, a probe, or the same design from scratch."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from timm.layers import freeze_batch_norm_2d
from torch import nn

from nkat_ray.config import Transfer, TrialConfig
from nkat_ray.files import WEIGHTS_FILE, write_atomically
from nkat_ray.model import save_pretrained
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.images import ImageSet, TrainingData, in_pixels
from nkat_ray.train.loop import count_correct
from nkat_ray.train.session import create_network, create_trainer


def transfer_recipe(config: TrialConfig, mode: Transfer, *, epochs: int, lr: float) -> TrialConfig:
    """Return the recipe of a transfer: the trial's, with the transfer's epochs and rate; from scratch, unchanged."""
    if mode == "scratch":
        return config
    return dataclasses.replace(config, epochs=epochs, lr=lr, warmup=min(1, epochs - 1))


def transfer(
    source: Weights,
    data: TrainingData,
    *,
    mode: Transfer,
    epochs: int,
    lr: float,
    seed: int,
    notice: Callable[[str], None],
    compile: bool = False,
) -> Weights:
    """Train a network on another dataset and score it on that dataset's validation images (docs/spec.md section 6.3).

    Args:
        mode: `finetune` trains everything behind a fresh head, `probe` the head alone, `scratch` new weights.
        epochs: of `finetune` and `probe`; `scratch` keeps the trial's own.
        lr: peak learning rate, likewise.
        seed: decides the new weights, the order of images and the augmentation.
        notice: called with one line about anything the user should know.
        compile: see `Trainer`.

    Returns:
        The network after the last epoch, with its validation accuracy.

    Raises:
        ValueError: the training ended on a loss that is not finite.
    """
    config = transfer_recipe(source.config, mode, epochs=epochs, lr=lr)
    model = create_network(config, data, seed=seed)
    if mode != "scratch":
        _load_backbone(model, source)
    if mode == "probe":
        _freeze_backbone(model)
    trainer = create_trainer(config, data, seed=seed, notice=notice, model=model, compile=compile)
    *_, last = trainer.epochs()
    if last.val_accuracy != last.val_accuracy:
        raise ValueError(f"the loss was not finite in epoch {last.epoch} of the transfer to {data.traits.name}")
    return trainer.weights(val_accuracy=last.val_accuracy)


def _load_backbone(model: nn.Module, source: Weights) -> None:
    """Load everything but the head."""
    tensors = {name: tensor for name, tensor in source.tensors.items() if not name.startswith("head.")}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise ValueError(f"the backbone does not fit: missing {missing}, unexpected {unexpected}")


def _freeze_backbone(model: nn.Module) -> None:
    """Leave only the head trainable; BatchNorm keeps its statistics too, which training mode would move."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    freeze_batch_norm_2d(model)


def save_weights(weights: Weights, payload: bytes, folder: Path, *, class_names: Sequence[str] = ()) -> None:
    """Write a network in timm's format (`local-dir:`: model.safetensors, config.json), with its recipe beside it."""
    save_pretrained(weights.build(), folder, class_names=class_names)
    write_atomically(folder / WEIGHTS_FILE, payload)


def count_correct_of(weights: Weights, images: ImageSet) -> int:
    """Count the images that a network classifies correctly, normalised with the statistics of its training."""
    mean, std = (in_pixels(values, images.device) for values in (weights.mean, weights.std))
    return count_correct(weights.build().to(images.device), images, mean=mean, std=std)
