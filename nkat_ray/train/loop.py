"""One training, epoch by epoch: plain PyTorch without Ray. Batches are cut, augmented and normalised on the device."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from nkat_ray.config import IMAGE_SIZE, TrialConfig
from nkat_ray.metrics import ATTENTION_ENTROPY, NKAT_PREFIX, NKAT_SCALARS
from nkat_ray.model.capture import capture_attention, nkat_scalars
from nkat_ray.train.augment import Mixing, apply, apply_mixing, draw, draw_mixing
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.compiled import compiled
from nkat_ray.train.device import autocast, float32_notice, is_out_of_memory
from nkat_ray.train.graph import StepGraph, release_memory
from nkat_ray.train.images import ImageSet, TrainingData, in_pixels, normalise
from nkat_ray.train.optim import (
    Average,
    create_optimizer,
    load_optimizer_state,
    lr_at,
    optimizer_state,
    set_rate,
)

AUGMENTED_IMAGES = 2048  # at a time: twice as fast as 128, and it still fits into a CPU's cache
EVAL_BATCH, GPU_EVAL_BATCH = 250, 500  # images
ENTROPY_IMAGES, ENTROPY_BATCH = 16, 4  # 256 tokens, 9 blocks, 8 heads: 75 MB of weights per batch
LOSS_CHECK_STEPS = 50  # steps between checks of the loss on a GPU, since each check waits for the device


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """The results of one epoch. `train_loss` and the accuracies are NaN if a loss was not finite."""

    epoch: int  # from 1
    train_loss: float
    train_accuracy: float  # fraction of the images as they were trained on: augmented, the larger part of a mixed one
    val_accuracy: float  # fraction of the validation images, 0..1, of the averaged weights
    lr: float  # of the last update
    images_per_s: float  # training images over training time
    epoch_s: float  # training and validation
    started_s: float  # seconds since 1970


class Batch(NamedTuple):
    """One step's images uint8 (B, 3, 32, 32), augmented, their targets float (B, K), and how they are mixed."""

    images: Tensor
    targets: Tensor
    mixing: Mixing | None


class Trainer:
    """A training that can be stopped after any epoch and continued, bit for bit on a CPU.

    Args:
        model: the network; moved to the data's device.
        config: the recipe; the network's fields are not read.
        data: images to learn from, images to score after each epoch, and their statistics.
        seed: decides the order of images, the augmentation and dropout.
        notice: called with one line about anything the user should know.
        deadline_s: seconds since 1970 after which no further step is made.
        on_step: called after every step with the number of epochs trained so far, a fraction.
        compile: whether whole batches go through a compiled network.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrialConfig,
        data: TrainingData,
        *,
        seed: int,
        notice: Callable[[str], None],
        deadline_s: float = math.inf,
        on_step: Callable[[float], None] | None = None,
        compile: bool = False,
    ) -> None:
        self.config, self.data, self.seed = config, data, seed
        self.notice, self.deadline_s, self._on_step = notice, deadline_s, on_step
        self.device = data.device
        if (line := float32_notice(self.device)) is not None:
            notice(line)
        self.model = model.to(self.device)
        self._whole = compiled(self.model, self.device, notice) if compile else self.model  # for whole batches
        self.optimizer = create_optimizer(self.model, config)
        self.ema = None if config.ema is None else Average(self.model, config.ema)
        self.order = torch.Generator().manual_seed(seed)
        self.augmentation = torch.Generator().manual_seed(seed + 1)  # on the CPU: the same draws on every device
        red, green, blue = (round(255 * value) for value in data.mean)
        self._fill = (red, green, blue)  # Cutout's grey: nearest to 0 after normalisation
        self.mean, self.std = in_pixels(data.mean, self.device), in_pixels(data.std, self.device)
        self.epoch = 0
        self._right = torch.zeros((), device=self.device)  # images of the last batch that were classified correctly
        self._part_size = self._smallest_part = min(config.batch_size, len(data.train))
        self._graph = self._new_graph()
        self.steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
        torch.manual_seed(seed + 2)  # dropout takes no generator; a trial's process is its own until the next seeds it

    def _new_graph(self) -> StepGraph | None:
        """Return the step as a CUDA graph; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return StepGraph(partial(_state_of_update, self.model, self.optimizer), self.notice)

    @property
    def scored_model(self) -> nn.Module:
        """The network whose accuracy is reported: the average, or the trained network if there is no average."""
        return self.model if self.ema is None else self.ema.module

    def epochs(self) -> Iterator[EpochResult]:
        """Train to the last epoch, and yield one result per epoch.

        Ends early after an epoch whose loss was not finite, or at the deadline; the unfinished epoch is then dropped.
        """
        while self.epoch < self.config.epochs:
            started_s, clock = time.time(), time.perf_counter()
            trained = self._train_epoch()
            if trained is None:
                return
            loss, train_accuracy = trained
            train_s = time.perf_counter() - clock
            accuracy = self.accuracy(self.data.val) if math.isfinite(loss) else math.nan
            self.epoch += 1
            yield EpochResult(
                epoch=self.epoch,
                train_loss=loss,
                train_accuracy=train_accuracy,
                val_accuracy=accuracy,
                lr=self._lr(self.epoch * self.steps_per_epoch - 1),
                images_per_s=len(self.data.train) / train_s,
                epoch_s=time.perf_counter() - clock,
                started_s=started_s,
            )
            if not math.isfinite(loss):
                return

    def _train_epoch(self) -> tuple[float, float] | None:
        """Train one epoch; return mean loss and accuracy, NaN as soon as a loss is not finite, None at the deadline."""
        self.model.train()
        self._part_size = min(self.config.batch_size, len(self.data.train))  # what did not fit is tried whole again
        losses: list[Tensor] = []
        right = torch.zeros((), device=self.device)
        for number, batch in enumerate(self._batches()):
            if time.time() >= self.deadline_s:
                return None
            losses.append(self._step(batch, self.epoch * self.steps_per_epoch + number))
            right += self._right
            if self._on_step is not None:
                self._on_step(self.epoch + (number + 1) / self.steps_per_epoch)
            if (self.device.type == "cpu" or number % LOSS_CHECK_STEPS == 0) and not losses[-1].isfinite():
                return math.nan, math.nan
        mean = float(torch.stack(losses).mean())
        return (mean, float(right) / len(self.data.train)) if math.isfinite(mean) else (math.nan, math.nan)

    def _batches(self) -> Iterator[Batch]:
        """Yield the epoch's batches. Several are augmented at once, which changes no result: each has its own draws."""
        size, train, flip = self.config.batch_size, self.data.train, self.data.traits.flip
        order = torch.randperm(len(train), generator=self.order).to(self.device)
        for positions in order.split(max(1, AUGMENTED_IMAGES // size) * size):
            draws, mixings = [], []
            for part in positions.split(size):
                draws.append(
                    draw(len(part), IMAGE_SIZE, IMAGE_SIZE, self.config, flip=flip, generator=self.augmentation)
                )
                mixings.append(self._draw_mixing())
            images, labels = train.batch(positions)
            images = apply(images, torch.cat(draws, dim=1), self.config, flip=flip, cutout_fill=self._fill)
            targets = F.one_hot(labels, self.data.traits.num_classes).float()
            yield from map(Batch, images.split(size), targets.split(size), mixings)

    def _draw_mixing(self) -> Mixing | None:
        mixup, cutmix = self.config.mixup, self.config.cutmix
        return draw_mixing(IMAGE_SIZE, IMAGE_SIZE, mixup=mixup, cutmix=cutmix, generator=self.augmentation)

    def _lr(self, step: int) -> float:
        return lr_at(
            step,
            peak=self.config.lr,
            warmup_steps=self.config.warmup * self.steps_per_epoch,
            total_steps=self.config.epochs * self.steps_per_epoch,
        )

    def _step(self, batch: Batch, step: int) -> Tensor:
        """Make one update; return the batch's mean loss, on the device."""
        inputs = normalise(batch.images, self.mean, self.std)
        inputs, targets = apply_mixing(inputs, batch.targets, batch.mixing)
        set_rate(self.optimizer, self._lr(step))
        whole = len(inputs) == self.config.batch_size == self._part_size
        if whole and self._graph is not None:
            loss, self._right = self._graph.step(inputs, targets, eager=self._update, whole=self._update_whole)
        else:
            loss, self._right = self._update(inputs, targets)
        if self.ema is not None:
            self.ema.update(step)
        return loss

    def _update(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make one update; return the batch's mean loss and number of correct predictions, on the device."""
        outcome = self._backward_within_memory(inputs, targets)
        self._descend()
        return outcome

    def _update_whole(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make one update with a batch that fits into memory; never waits for the device."""
        outcome = self._backward(inputs, targets, len(inputs))
        self._descend()
        return outcome

    def _descend(self) -> None:
        """Update the weights with the gradients."""
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()

    def _backward_within_memory(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients of the batch's mean loss; halve the batch until a part fits into the GPU's memory.

        Only an out-of-memory error splits a batch, so never on a CPU. The part size lasts until the end of the epoch.
        BatchNorm normalises each part by itself (docs/spec.md section 4).

        Raises:
            torch.OutOfMemoryError: not even one image fits.
        """
        while True:
            try:
                return self._backward(inputs, targets, self._part_size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self._part_size == 1:
                    raise torch.OutOfMemoryError(
                        "one image does not fit into the device's memory; choose a smaller embed_dim or depth, a "
                        "larger patch_size, or give the trial a larger share of the GPU (--gpus_per_trial)"
                    ) from error
            self._halve(len(inputs))  # outside `except`: the traceback holds the tensors

    def _halve(self, batch: int) -> None:
        self._part_size = (self._part_size + 1) // 2
        if self.device.type == "cuda":
            release_memory()
        if self._part_size >= self._smallest_part:
            return  # an earlier epoch's notice has said so
        self._smallest_part = self._part_size
        batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        self.notice(
            f"out of memory: batches of {batch} are computed {self._part_size} images at a time until the end of the "
            f"epoch{'; BatchNorm sees each part alone, so scores differ from those of whole batches' * batch_norm}"
        )

    def _backward(self, inputs: Tensor, targets: Tensor, part_size: int) -> tuple[Tensor, Tensor]:
        """Add up the gradients of the batch's parts; return the batch's mean loss and number of correct predictions."""
        self.optimizer.zero_grad(set_to_none=True)
        total, right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for part, wanted in zip(inputs.split(part_size), targets.split(part_size), strict=True):
            network = self._whole if len(part) == self.config.batch_size else self.model
            with autocast(self.device):
                logits = network(part)
            loss = F.cross_entropy(logits.float(), wanted, label_smoothing=self.config.label_smoothing)
            loss = loss * (len(part) / len(inputs))
            loss.backward()
            total += loss.detach()
            right += (logits.argmax(1) == wanted.argmax(1)).sum()
        return total, right

    def accuracy(self, images: ImageSet) -> float:
        """Return the fraction of images that the scored network classifies correctly, 0..1."""
        return count_correct(self.scored_model, images, mean=self.mean, std=self.std) / len(images)

    def attention_entropy(self) -> dict[str, float]:
        """Return the entropy in nats of each block's attention, `attention/entropy/block_0` and so on.

        Each is the mean over heads, queries and the first few validation images, of the scored network (docs/spec.md
        section 6.4). 0 means that each query attends to one token. No random numbers are drawn. Empty if the weights
        are not finite, which the next epoch's loss will show.
        """
        if not all(bool(weights.isfinite().all()) for weights in self.scored_model.parameters()):
            return {}
        self.scored_model.eval()
        entropies = []
        for positions in torch.arange(min(ENTROPY_IMAGES, len(self.data.val))).split(ENTROPY_BATCH):
            inputs = normalise(self.data.val.batch(positions)[0], self.mean, self.std)
            weights = capture_attention(self.scored_model, inputs).weights  # type: ignore[arg-type]
            entropies.append(reduce(torch.special.entr(weights).sum(-1), "l b h q -> b l", "mean"))
        blocks = torch.cat(entropies).mean(0).tolist()
        return {f"{ATTENTION_ENTROPY}{block}": value for block, value in enumerate(blocks)}

    def nkat_scalars(self) -> dict[str, float]:
        """Return the scored network's NKAT scalars by name, `nkat/alpha/block_0` and so on; for NKAT-ViT only."""
        scalars = nkat_scalars(self.scored_model)  # type: ignore[arg-type]
        return {
            f"{NKAT_PREFIX}{name}/block_{block}": value
            for name in NKAT_SCALARS
            for block, value in enumerate(scalars[name])
        }

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on; `torch.load(weights_only=True)` can read it."""
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "order": self.order.get_state(),
            "augmentation": self.augmentation.get_state(),
            "cpu_random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`, as if the training had never stopped (on a CPU: bit for bit)."""
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self._graph = self._new_graph()  # the optimizer's tensors are others
        self.order.set_state(state["order"])
        if state["cuda_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
        self.augmentation.set_state(state["augmentation"])
        torch.set_rng_state(state["cpu_random"])

    def weights(self, *, val_accuracy: float) -> Weights:
        """Return the scored network's weights with everything that is needed to build it again."""
        return Weights(
            config=self.config,
            dataset=self.data.traits.name,
            num_classes=self.data.traits.num_classes,
            grey=self.data.traits.grey,
            mean=self.data.mean,
            std=self.data.std,
            epoch=self.epoch,
            val_accuracy=val_accuracy,
            seed=self.seed,
            tensors=self.scored_model.state_dict(),
        )


def _state_of_update(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Return the tensors that an update changes, and the learning rates where they are tensors, by kind."""
    kinds: dict[str, list[Tensor]] = {"weights": list(model.parameters()), "buffers": list(model.buffers())}
    kinds["rates"] = [group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], Tensor)]
    for state in optimizer.state.values():
        for kind, value in state.items():
            if isinstance(value, Tensor):
                kinds.setdefault(kind, []).append(value)
    return kinds


@torch.no_grad()
def count_correct(model: nn.Module, images: ImageSet, *, mean: Tensor, std: Tensor) -> int:
    """Count the images that a network, put into evaluation mode, classifies correctly.

    Args:
        model: the network, on the images' device.
        images: what is classified.
        mean: of the normalisation, as `normalise` takes it.
        std: likewise.
    """
    model.eval()
    device = images.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    size = EVAL_BATCH if device.type == "cpu" else GPU_EVAL_BATCH
    for positions in torch.arange(len(images), device=device).split(size):
        batch, labels = images.batch(positions)
        with autocast(device):
            logits = model(normalise(batch, mean, std))
        correct += (logits.argmax(1) == labels).sum()
    return int(correct)
