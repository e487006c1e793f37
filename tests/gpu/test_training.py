"""What a training asks of a GPU, and how it goes on from a checkpoint."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import CPU, STILL, Card, config_for, losses_of, trainer_on
from pretend_cuda import CUDA

from nkat_ray.config import TrialConfig
from nkat_ray.train.checkpoint import load_state, save_state
from nkat_ray.train.device import gpu_fault, own_device

LAUNCHES = 1050  # of a step at the baseline's depth and tokens, augmentation included; some operations take several


def test_pytorch_computes_on_it(card: Card, measured: Callable[[str, object], None]) -> None:
    properties = torch.cuda.get_device_properties(0)
    measured("card", card.describe())
    measured("multiprocessors", properties.multi_processor_count)
    measured("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    assert gpu_fault() is None
    assert own_device() == torch.device("cuda")


def test_a_step_waits_nowhere_and_launches_at_most_1050_kernels(
    card: Card, measured: Callable[[str, object], None]
) -> None:
    """The baseline's depth and tokens; before batches were augmented together it was 1,246 launches and 10 waits."""
    size = {"batch_size": 128} if card.real else {"embed_dim": 64, "batch_size": 8}
    trainer = trainer_on(CUDA, TrialConfig(**size), train=16 * size["batch_size"])
    trainer.model.train()
    batches = list(trainer._batches())
    steps = len(batches)
    assert steps == 16
    trainer._graph = None  # which launches everything at once
    trainer._step(batches[0], 0)  # the optimizer's state is made
    step = card.count(lambda: trainer._step(batches[1], 1))
    augmentation = card.count(lambda: list(trainer._batches()))
    launches = step.launches + augmentation.launches / steps
    measured("launches per step", launches)
    measured("waits of a step", dict(step.waits))
    measured("waits of the augmentation, per step", sum(augmentation.waits.values()) / steps)
    measured("waits of the augmentation, by place", dict(augmentation.waits))
    for name, microseconds in step.kernels_us.most_common(12):
        measured(f"kernel {name[:70]}, us per step", microseconds)
    measured("kernels, us per step", step.kernels_us.total())
    assert step.waits.total() == 0
    assert augmentation.waits.total() <= steps
    assert launches <= (1.5 * LAUNCHES if card.real else LAUNCHES)


def test_an_epoch_waits_once_per_step_at_most(card: Card, measured: Callable[[str, object], None]) -> None:
    trainer = trainer_on(CUDA, config_for(card, epochs=8, warmup=0), train=8 * config_for(card).batch_size)
    next(trainer.epochs())
    waits = card.count(lambda: next(trainer.epochs())).waits
    measured("waits of an epoch of 8 steps", dict(waits))
    assert waits.total() <= 8 + 4  # the loss is looked at, and the accuracy read


def test_a_step_that_waits_is_not_captured(card: Card, capsys: pytest.CaptureFixture[str]) -> None:
    """The training continues as if there had been no graph, and one line says why it is slower."""
    config = config_for(card, **STILL)

    def losses(*, graph: bool) -> list[float]:
        trainer = trainer_on(CUDA, config, train=10 * config.batch_size)
        trainer.model.register_forward_hook(lambda module, inputs, logits: logits + 0 * logits.sum().item())
        if not graph:
            trainer._graph = None
        return losses_of(trainer, 10)

    assert losses(graph=True) == pytest.approx(losses(graph=False), rel=1e-3 if card.real else 0)
    assert capsys.readouterr().out.count("no CUDA graph") == 1


def test_a_training_that_nobody_needs_frees_its_memory_at_once(card: Card) -> None:
    """The graph's memory would wait in a cycle of references for the garbage collector."""
    trainer = trainer_on(CUDA, config_for(card), train=10 * config_for(card).batch_size)
    losses_of(trainer, 10)
    reference = weakref.ref(trainer)
    gc.collect()
    gc.disable()
    try:
        del trainer
        assert reference() is None
    finally:
        gc.enable()


def copy_of(value: Any) -> Any:
    """A deep copy: a state's tensors are the training's own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copy_of(inner) for key, inner in value.items()}
    return [copy_of(inner) for inner in value] if isinstance(value, list) else copy.copy(value)


def test_a_training_is_continued_as_if_it_had_never_stopped(card: Card) -> None:
    """With dropout, whose masks are drawn on the GPU. A real GPU adds up in another order each time."""
    config = config_for(card, epochs=3)
    whole = trainer_on(CUDA, config)
    results = [(result.train_loss, result.val_accuracy) for result in whole.epochs()]
    first = trainer_on(CUDA, config)
    next(first.epochs())
    state = copy_of(first.state())
    second = trainer_on(CUDA, config, seed=9)
    second.load_state(state)
    assert torch.equal(torch.cuda.get_rng_state(), state["cuda_random"])
    continued = [(result.train_loss, result.val_accuracy) for result in second.epochs()]
    if card.real:
        wanted = [loss for loss, _ in results[1:]]
        assert [loss for loss, _ in continued] == pytest.approx(wanted, rel=1e-3)
    else:
        assert continued == results[1:]


def test_a_state_in_a_file_goes_on_on_the_gpu_and_on_a_cpu(card: Card, tmp_path: Path) -> None:
    config = config_for(card, epochs=2, **STILL)
    first = trainer_on(CUDA, config)
    epochs = first.epochs()
    next(epochs)
    save_state(tmp_path, first.state())
    wanted = next(epochs).train_loss
    for where in (CUDA, CPU):
        second = trainer_on(where, config, seed=9)
        second.load_state(load_state(tmp_path))
        assert next(second.epochs()).train_loss == pytest.approx(wanted, rel=5e-3)
