"""One training, epoch by epoch: plain PyTorch, knows nothing of Ray.

Images stay where they are, as uint8: in shared memory on the CPU, on the device once on a GPU. Batches are cut,
augmented and normalised there; there are no loader processes.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from nkat_ray.config import IMAGE_SIZE, TrialConfig
from nkat_ray.metrics import ATTENTION_ENTROPY, NKAT_PREFIX, NKAT_SCALARS
from nkat_ray.model.capture import capture_attention, nkat_scalars
from nkat_ray.train.augment import augment, mix
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.optim import create_ema, create_optimizer, lr_at

EVAL_BATCH = 250
ENTROPY_IMAGES, ENTROPY_BATCH = 16, 4  # 256 tokens, 9 blocks, 8 heads: 75 MB of weights a batch
LOSS_CHECK_STEPS = 50  # steps between looks at the loss on a GPU, where each look waits for the device


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """One epoch. train_loss, val_accuracy are NaN when the loss was not finite; lr is the last update's."""

    epoch: int  # from 1
    train_loss: float
    val_accuracy: float  # fraction of the validation images, 0..1, of the averaged weights
    lr: float
    images_per_s: float  # training images over training time
    epoch_s: float  # training and validation
    started_s: float  # seconds since 1970


class ImageSet:
    """Some images of an array, ready to be cut into batches on a device.

    Args:
        images: uint8 (N, C, H, W), C 1 or 3, H and W at most 32. On a CPU it is shared, never copied: several trials
            on a node may hold the same (read-only) array.
        labels: int64 (N,).
        index: which of them, int64 (n,); None for all.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, index: np.ndarray | None, device: torch.device) -> None:
        self.index = torch.arange(len(labels)) if index is None else torch.from_numpy(index.copy())
        self._images = _shared_tensor(images)
        self._on_device = device.type != "cpu"
        if self._on_device:
            self._images = self._images[self.index].to(device)
        self.labels = _shared_tensor(labels)[self.index].to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B, 3, 32, 32), padded and in three channels, and their labels (B,)."""
        rows = positions.to(self.labels.device) if self._on_device else self.index[positions]
        return to_network_size(self._images[rows]), self.labels[positions.to(self.labels.device)]

    def statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation of each channel, 0..1, repeated for grey images."""
        total, square, count = torch.zeros(()), torch.zeros(()), 0
        for rows in torch.arange(len(self)).split(5000):
            part = self._images[rows.to(self.labels.device) if self._on_device else self.index[rows]].double() / 255
            total = total.to(part) + reduce(part, "b c h w -> c", "sum")
            square = square.to(part) + reduce(part**2, "b c h w -> c", "sum")
            count += part.shape[0] * part.shape[2] * part.shape[3]
        mean = total / count
        std = (square / count - mean**2).clamp(min=1e-6).sqrt()  # constant images must not divide by zero
        return _three(mean), _three(std)


def _three(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = values.expand(3).tolist()
    return red, green, blue


def _shared_tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only ever read
        return torch.from_numpy(array)


def to_network_size(images: Tensor) -> Tensor:
    """Pad (B, C, H, W) to 32x32, evenly on both sides, and repeat a grey channel three times (docs/spec.md section
    3)."""
    height, width = images.shape[-2:]
    top, left = (IMAGE_SIZE - height) // 2, (IMAGE_SIZE - width) // 2
    padded = F.pad(images, (left, IMAGE_SIZE - width - left, top, IMAGE_SIZE - height - top))
    return padded.expand(-1, 3, -1, -1).contiguous()


def in_pixels(fractions: Sequence[float], device: torch.device | None = None) -> Tensor:
    """A value a channel, 0..1, as (3, 1, 1) in units of 0..255: what `normalise` takes."""
    return torch.tensor(fractions, device=device).view(3, 1, 1) * 255


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float32 with the given statistics, (3, 1, 1) each in units of 0..255."""
    return (images.float() - mean) / std


class Trainer:
    """A training that can be stopped after any epoch and continued, bit for bit on a CPU.

    Args:
        model: the network; moved to `device`.
        config: the recipe.
        train, val: images to learn from, and to score after each epoch.
        flip: whether a mirrored image is still the same class.
        seed: of the order of images, the augmentation and dropout.
        notice: told, in one line, of anything the user should know.
        deadline_s: time (since 1970) after which no further step is made.
        on_step: told the epochs done so far, with a fraction, after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrialConfig,
        *,
        train: ImageSet,
        val: ImageSet,
        num_classes: int,
        flip: bool,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int,
        device: torch.device,
        notice: Callable[[str], None],
        deadline_s: float = math.inf,
        on_step: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.config, self.train, self.val, self.flip, self.num_classes = config, train, val, flip, num_classes
        self.device, self.notice, self.deadline_s = device, notice, deadline_s
        self._on_step = on_step
        self.model = model.to(device)
        self.optimizer = create_optimizer(self.model, config)
        self.ema = None if config.ema is None else create_ema(self.model, config.ema)
        self.order = torch.Generator().manual_seed(seed)
        self.augmentation = torch.Generator().manual_seed(seed + 1)  # on the CPU: the same draws on every device
        red, green, blue = (round(255 * value) for value in mean)
        self._fill = (red, green, blue)  # Cutout's grey: nearest to 0 after normalisation
        self.mean, self.std = in_pixels(mean, device), in_pixels(std, device)
        self.epoch = 0
        self.micro_batch = min(config.batch_size, len(train))
        self.steps_an_epoch = math.ceil(len(train) / config.batch_size)
        torch.manual_seed(seed + 2)  # dropout takes no generator; a trial's process is its own until the next seeds it

    @property
    def scored_model(self) -> nn.Module:
        """The network whose accuracy is reported: the average, or the weights themselves without one."""
        return self.model if self.ema is None else self.ema.module

    def epochs(self) -> Iterator[EpochResult]:
        """Train to the last epoch. Ends early after a loss that is not finite, or at the deadline (without a
        result)."""
        while self.epoch < self.config.epochs:
            started_s, clock = time.time(), time.perf_counter()
            loss = self._train_epoch()
            if loss is None:
                return
            train_s = time.perf_counter() - clock
            accuracy = self.accuracy(self.val) if math.isfinite(loss) else math.nan
            self.epoch += 1
            yield EpochResult(
                epoch=self.epoch,
                train_loss=loss,
                val_accuracy=accuracy,
                lr=self._lr(self.epoch * self.steps_an_epoch - 1),
                images_per_s=len(self.train) / train_s,
                epoch_s=time.perf_counter() - clock,
                started_s=started_s,
            )
            if not math.isfinite(loss):
                return

    def _train_epoch(self) -> float | None:
        """Mean loss of the epoch, NaN as soon as one is not finite, None at the deadline."""
        self.model.train()
        losses: list[Tensor] = []
        batches = torch.randperm(len(self.train), generator=self.order).split(self.config.batch_size)
        for number, positions in enumerate(batches):
            if time.time() >= self.deadline_s:
                return None
            losses.append(self._step(positions, self.epoch * self.steps_an_epoch + number))
            self._on_step(self.epoch + (number + 1) / self.steps_an_epoch)
            if (self.device.type == "cpu" or number % LOSS_CHECK_STEPS == 0) and not losses[-1].isfinite():
                return math.nan
        mean = float(torch.stack(losses).mean())
        return mean if math.isfinite(mean) else math.nan

    def _lr(self, step: int) -> float:
        return lr_at(
            step,
            peak=self.config.lr,
            warmup_steps=self.config.warmup * self.steps_an_epoch,
            total_steps=self.config.epochs * self.steps_an_epoch,
        )

    def _step(self, positions: Tensor, step: int) -> Tensor:
        """One update; returns the batch's mean loss, on the device."""
        images, labels = self.train.batch(positions)
        images = augment(images, self.config, flip=self.flip, generator=self.augmentation, cutout_fill=self._fill)
        inputs = normalise(images, self.mean, self.std)
        targets = F.one_hot(labels, self.num_classes).float()
        inputs, targets = mix(
            inputs, targets, mixup=self.config.mixup, cutmix=self.config.cutmix, generator=self.augmentation
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step)
        loss = self._backward_within_memory(inputs, targets)
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step=step)
        return loss

    def _backward_within_memory(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Gradients of the batch's mean loss; the batch is halved until a part of it fits into the device's memory.

        Raises:
            torch.OutOfMemoryError: not even one image fits.
        """
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._backward(inputs, targets)
            except torch.OutOfMemoryError as error:
                if self.micro_batch == 1:
                    raise torch.OutOfMemoryError(
                        "one image does not fit into the device's memory; choose a smaller embed_dim or depth, a "
                        "larger patch_size, or give the trial a larger share of the GPU (--gpus_per_trial)"
                    ) from error
            self.micro_batch = (self.micro_batch + 1) // 2  # outside `except`: the traceback holds the tensors
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.notice(f"out of memory: the batch of {len(inputs)} is now computed {self.micro_batch} at a time")

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        for part, wanted in zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = self.model(part)
            loss = F.cross_entropy(logits.float(), wanted, label_smoothing=self.config.label_smoothing)
            loss = loss * (len(part) / len(inputs))
            loss.backward()
            total += loss.detach()
        return total

    def accuracy(self, images: ImageSet) -> float:
        """Fraction of the images that the scored network classifies correctly, 0..1."""
        correct = count_correct(self.scored_model, images, mean=self.mean, std=self.std, device=self.device)
        return correct / len(images)

    def attention_entropy(self) -> dict[str, float]:
        """Entropy in nats of each block's attention, `attention/entropy/block_0` and so on: 0 looks at one token.

        Of the scored network, as the mean over heads, queries and the first few validation images. Nothing is drawn.
        None of weights that are not finite any more: the next epoch's loss says so.
        """
        if not all(bool(weights.isfinite().all()) for weights in self.scored_model.parameters()):
            return {}
        self.scored_model.eval()
        found = []
        for positions in torch.arange(min(ENTROPY_IMAGES, len(self.val))).split(ENTROPY_BATCH):
            inputs = normalise(self.val.batch(positions)[0], self.mean, self.std)
            weights = capture_attention(self.scored_model, inputs).weights  # type: ignore[arg-type]
            found.append(reduce(torch.special.entr(weights).sum(-1), "l b h q -> b l", "mean"))
        blocks = torch.cat(found).mean(0).tolist()
        return {f"{ATTENTION_ENTROPY}{block}": value for block, value in enumerate(blocks)}

    def nkat_scalars(self) -> dict[str, float]:
        """The scored network's NKAT scalars, `nkat/alpha/block_0` and so on; of NKAT-ViT alone."""
        found = nkat_scalars(self.scored_model)  # type: ignore[arg-type]
        return {
            f"{NKAT_PREFIX}{name}/block_{block}": value
            for name in NKAT_SCALARS
            for block, value in enumerate(found[name])
        }

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on; `torch.load(weights_only=True)` reads it."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "augmentation": self.augmentation.get_state(),
            "cpu_random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "micro_batch": self.micro_batch,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`, as if the training had never stopped (on a CPU: bit for bit)."""
        self.epoch, self.micro_batch = state["epoch"], state["micro_batch"]
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.order.set_state(state["order"])
        if state["cuda_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
        self.augmentation.set_state(state["augmentation"])
        torch.set_rng_state(state["cpu_random"])

    def weights(self, *, dataset: str, grey: bool, val_accuracy: float, seed: int) -> Weights:
        """The scored network's weights, and what rebuilds them."""
        return Weights(
            config=self.config,
            dataset=dataset,
            num_classes=self.num_classes,
            grey=grey,
            mean=_three(self.mean.flatten() / 255),
            std=_three(self.std.flatten() / 255),
            epoch=self.epoch,
            val_accuracy=val_accuracy,
            seed=seed,
            tensors=self.scored_model.state_dict(),
        )


@torch.no_grad()
def count_correct(model: nn.Module, images: ImageSet, *, mean: Tensor, std: Tensor, device: torch.device) -> int:
    """How many images the network (put into evaluation mode) classifies correctly."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for positions in torch.arange(len(images)).split(EVAL_BATCH):
        batch, labels = images.batch(positions)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(normalise(batch, mean, std))
        correct += (logits.argmax(1) == labels).sum()
    return int(correct)
