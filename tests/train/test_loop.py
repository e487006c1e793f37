import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nkat_ray.config import TrialConfig
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Selection
from nkat_ray.explain.attention import entropy
from nkat_ray.model import create_nkat_vit
from nkat_ray.model.capture import capture_attention
from nkat_ray.train import loop as loop_module
from nkat_ray.train.checkpoint import load_state, save_state
from nkat_ray.train.images import normalise
from nkat_ray.train.loop import EpochResult, Trainer, count_correct
from nkat_ray.train.session import create_trainer, training_data

CPU = torch.device("cpu")
TRAITS = Traits(name="cifar10", num_classes=10, grey=False, flip=True)
TINY = TrialConfig(
    embed_dim=16, num_heads=2, depth=1, batch_size=32, epochs=4, warmup=1, lr=2e-3, ema=0.9, dropout_attn=0.1,
    dropout_embed=0.1, mixup=0.3, cutmix=0.3, channel_shuffle=0.5, val_images=40,
)  # fmt: skip
PLAIN = dataclasses.replace(
    TINY, conv_stem="off", patch_size=8, dropout_attn=0.0, dropout_embed=0.0, mixup=0.0, cutmix=0.0, randaugment=None,
    cutout=None, channel_shuffle=0.0,
)  # fmt: skip  # without BatchNorm, dropout and augmentation: a batch may be split without any difference


@pytest.fixture
def trainer(tinted: Callable[..., Any]) -> Callable[..., Trainer]:
    """Makes a Trainer on 160 tinted images, validated on 40 others; options of Trainer and fields of TrialConfig."""
    data = training_data(Selection(*tinted(200), np.arange(160), np.arange(160, 200)), TRAITS, CPU)

    def make(config: TrialConfig = TINY, *, seed: int = 5, model: nn.Module | None = None, **options: Any) -> Trainer:
        fields = {k: options.pop(k) for k in list(options) if hasattr(config, k)}
        config = dataclasses.replace(config, **fields)
        return create_trainer(config, data, seed=seed, model=model, **{"notice": print, **options})

    return make


def timeless(result: EpochResult) -> dict[str, Any]:
    times = ("epoch_s", "images_per_s", "started_s")
    return {key: value for key, value in vars(result).items() if key not in times}


def equal_states(one: Any, other: Any) -> bool:
    """Bitwise, through dictionaries and lists."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_states(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal_states(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_epochs_are_reported_one_by_one(trainer: Callable[..., Trainer]) -> None:
    trained = trainer()
    begun = time.time()
    results = list(trained.epochs())
    assert [result.epoch for result in results] == [1, 2, 3, 4]
    for result in results:
        assert math.isfinite(result.train_loss)
        assert 0 <= result.val_accuracy <= 1
        assert result.val_accuracy * 40 == pytest.approx(round(result.val_accuracy * 40))
        assert result.images_per_s > 160 / result.epoch_s
        assert begun <= result.started_s <= time.time()
    assert results[0].lr == pytest.approx(2e-3)  # the last update of the warm-up
    assert list(trained.epochs()) == []  # nothing is left


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("muon", 4e-2)])
def test_it_learns(trainer: Callable[..., Trainer], optimizer: str, lr: float) -> None:
    results = list(trainer(PLAIN, epochs=12, lr=lr, optimizer=optimizer).epochs())
    assert results[-1].train_loss < 0.5 * results[0].train_loss
    assert results[-1].val_accuracy > 0.8
    assert results[0].train_accuracy < 0.8 < results[-1].train_accuracy


@pytest.mark.parametrize("fields", [{}, {"mixup": 1.0}, {"batch_size": 7}])
def test_training_accuracy_is_a_fraction_of_all_training_images(
    trainer: Callable[..., Trainer], fields: dict[str, Any]
) -> None:
    """A network that always says class 3 is right about its share of them: whole or mixed, in a last batch of six."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    with torch.no_grad():
        model[1].weight.zero_()  # type: ignore[union-attr, operator]
        model[1].bias.copy_(20 * F.one_hot(torch.tensor(3), 10))  # type: ignore[union-attr, operator]
    (result, *_) = trainer(PLAIN, model=model, lr=1e-9, **fields).epochs()
    assert result.train_accuracy == pytest.approx(0.1)


@pytest.mark.parametrize("at_once", [1, 100, 2048])
def test_every_image_is_seen_once_per_epoch(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(loop_module, "AUGMENTED_IMAGES", at_once)
    trained = trainer(epochs=2, batch_size=50)
    orders: list[list[int]] = [[], []]
    steps: list[tuple[int, int]] = []
    batch, step = trained.data.train.batch, trained._step
    monkeypatch.setattr(trained.data.train, "batch", lambda at: orders[trained.epoch].extend(at.tolist()) or batch(at))
    monkeypatch.setattr(
        trained, "_step", lambda part, number: steps.append((number, len(part[0]))) or step(part, number)
    )
    list(trained.epochs())
    assert steps == list(enumerate([50, 50, 50, 10] * 2))
    assert all(sorted(order) == list(range(160)) for order in orders)
    assert orders[0] != orders[1]


def test_how_many_images_are_augmented_at_once_changes_nothing(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for at_once in (1, 100, 2048):
        monkeypatch.setattr(loop_module, "AUGMENTED_IMAGES", at_once)
        trained = trainer(batch_size=50)
        results.append(([timeless(result) for result in trained.epochs()], trained.state()))
    assert results[0][0] == results[1][0] == results[2][0]
    assert equal_states(results[0][1], results[1][1])
    assert equal_states(results[0][1], results[2][1])


def test_every_update_has_the_rate_of_its_step(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, rates = trainer(), []
    update = trained.optimizer.step
    monkeypatch.setattr(
        trained.optimizer, "step", lambda: rates.append({g["lr"] for g in trained.optimizer.param_groups}) or update()
    )
    results = list(trained.epochs())
    assert all(len(rate) == 1 for rate in rates)
    flat = [rate.pop() for rate in rates]
    assert len(flat) == 4 * 5
    assert flat[:5] == pytest.approx([2e-3 * step / 5 for step in range(1, 6)])
    assert flat[5:] == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 15)) for step in range(15)])
    assert [result.lr for result in results] == [flat[4], flat[9], flat[14], flat[19]]
    assert min(flat) > 0


def test_a_batch_larger_than_the_training_set(trainer: Callable[..., Trainer]) -> None:
    assert [result.epoch for result in trainer(batch_size=1000).epochs()] == [1, 2, 3, 4]


def test_the_seed_decides_everything(trainer: Callable[..., Trainer]) -> None:
    one, same, other = ([timeless(r) for r in trainer(seed=seed).epochs()] for seed in (5, 5, 6))
    assert one == same
    assert one != other


def test_without_an_average_the_weights_themselves_are_scored(trainer: Callable[..., Trainer]) -> None:
    trained = trainer(ema=None, epochs=1, warmup=0)
    assert trained.scored_model is trained.model
    assert [result.epoch for result in trained.epochs()] == [1]
    assert trained.state()["ema"] is None


def test_the_average_is_what_is_scored_and_kept(trainer: Callable[..., Trainer]) -> None:
    trained = trainer()
    (result, *_) = trained.epochs()
    correct = count_correct(trained.scored_model, trained.data.val, mean=trained.mean, std=trained.std)
    weights = trained.weights(val_accuracy=result.val_accuracy)
    assert (weights.dataset, weights.num_classes, weights.grey, weights.seed) == ("cifar10", 10, False, 5)
    assert (weights.mean, weights.std, weights.epoch) == (trained.data.mean, trained.data.std, 4)
    assert all(torch.equal(t, trained.scored_model.state_dict()[n]) for n, t in weights.tensors.items())
    assert not torch.equal(weights.tensors["head.weight"], trained.model.state_dict()["head.weight"])
    assert trained.accuracy(trained.data.val) == correct / 40


def test_accuracy_equals_a_loop_over_single_images(trainer: Callable[..., Trainer]) -> None:
    trained = trainer(PLAIN, epochs=1, warmup=0)
    list(trained.epochs())
    trained.scored_model.eval()
    hits = 0
    for position in range(40):
        image, label = trained.data.val.batch(torch.tensor([position]))
        hits += int(trained.scored_model(normalise(image, trained.mean, trained.std)).argmax() == label)
    assert trained.accuracy(trained.data.val) == hits / 40


def test_scoring_leaves_the_training_as_it_is(trainer: Callable[..., Trainer]) -> None:
    """No BatchNorm statistics, no random numbers: an epoch is the same whether or not it was scored before."""
    expected = timeless(next(trainer().epochs()))
    scored = trainer()
    before = copy.deepcopy(scored.state())
    scored.accuracy(scored.data.val)
    assert equal_states(before, scored.state())
    assert timeless(next(scored.epochs())) == expected


# --- stopped and continued --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"ema": None, "clip_grad": None}, {"optimizer": "muon"}, {"depth": 3, "drop_path": 0.5}]
)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_training_continued_after_any_epoch_is_bitwise_the_one_that_was_not_stopped(
    trainer: Callable[..., Trainer], tmp_path: Path, stop: int, fields: dict[str, Any]
) -> None:
    whole = trainer(**fields)
    expected = [timeless(result) for result in whole.epochs()]
    first = trainer(**fields)
    for result in first.epochs():
        if result.epoch == stop:
            save_state(tmp_path, first.state())
            break
    torch.manual_seed(999)  # another process, whatever ran in it
    second = trainer(seed=5, **fields)
    second.load_state(load_state(tmp_path))
    assert [timeless(result) for result in second.epochs()] == expected[stop:]
    assert equal_states(second.state(), whole.state())


def test_a_state_from_a_gpu_goes_on_on_a_cpu(trainer: Callable[..., Trainer]) -> None:
    """The order of images and the augmentation draw on the CPU on every device: they go on where they were."""
    expected = [timeless(result) for result in trainer().epochs()]
    first = trainer()
    next(first.epochs())
    state = {**copy.deepcopy(first.state()), "cuda_random": torch.zeros(16, dtype=torch.uint8)}
    second = trainer()
    second.load_state(state)
    assert [timeless(result) for result in second.epochs()] == expected[1:]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def breaks_at(trained: Trainer, step: int, value: float) -> None:
    """From this step on the loss is what it is given."""
    backward, calls = trained._backward, [0]

    def wrapped(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        return backward(*arguments) if calls[0] <= step else (torch.tensor(value), torch.tensor(0))

    trained._backward = wrapped  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [5, 7, 9])
def test_a_loss_that_is_not_finite_ends_the_training_with_nan(
    trainer: Callable[..., Trainer], value: float, step: int
) -> None:
    trained = trainer()
    breaks_at(trained, step, value)
    results, kept = [], None
    for result in trained.epochs():
        results.append(result)
        if math.isfinite(result.train_loss):
            kept = copy.deepcopy(trained.state())
    assert [result.epoch for result in results] == [1, 2]
    assert math.isnan(results[1].train_loss)
    assert math.isnan(results[1].train_accuracy)
    assert math.isnan(results[1].val_accuracy)
    assert math.isfinite(results[0].val_accuracy)
    assert kept is not None
    assert kept["epoch"] == 1
    assert all(t.isfinite().all() for t in kept["model"].values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_that_diverge_for_real_end_the_training(trainer: Callable[..., Trainer], optimizer: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[1].weight.mul_(1e30)  # type: ignore[union-attr, operator]
        model[2].weight.mul_(1e30)  # type: ignore[union-attr, operator]
    (result,) = trainer(PLAIN, model=model, optimizer=optimizer).epochs()
    assert math.isnan(result.train_loss)
    assert math.isnan(result.val_accuracy)


def test_no_step_is_made_after_the_deadline(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    late = trainer(deadline_s=time.time() - 1)
    before = copy.deepcopy(late.model.state_dict())
    assert list(late.epochs()) == []
    assert equal_states(before, late.model.state_dict())


def test_a_deadline_within_an_epoch_leaves_it_without_a_result(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, now = trainer(deadline_s=1000.0), [0.0]
    step = trained._step
    monkeypatch.setattr(loop_module.time, "time", lambda: now[0])
    monkeypatch.setattr(trained, "_step", lambda *a: now.__setitem__(0, now[0] + 130) or step(*a))
    assert [result.epoch for result in trained.epochs()] == [1]  # 5 steps take 650, the 8th begins at 910, none at 1040


# --- memory -----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A device whose memory holds the activations of `room` images: a training pass of more raises what it is given."""

    def __init__(self, inner: nn.Module, room: int, error: Exception | None = None) -> None:
        super().__init__()
        self.inner, self.room = inner, room
        self.error = torch.OutOfMemoryError("CUDA out of memory.") if error is None else error
        self.sizes: list[int] = []  # images of each pass that fitted

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self.room:
            raise self.error
        if self.training:
            self.sizes.append(len(images))
        out: Tensor = self.inner(images)
        return out


STILL = dict(dropout_attn=0.0, dropout_embed=0.0)  # two passes over the same images draw nothing
STEMLESS = dict(conv_stem="off", patch_size=8)  # no BatchNorm: each image is computed by itself


def network(**fields: Any) -> nn.Module:
    return create_nkat_vit(dataclasses.replace(TINY, **STILL, **fields), num_classes=10)


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 32, 32), torch.rand(n, 10).softmax(1)


def gradients(trained: Trainer, inputs: Tensor, targets: Tensor) -> tuple[float, list[Tensor]]:
    loss, _ = trained._backward_within_memory(inputs, targets)
    return float(loss), [p.grad.clone() for p in trained.model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("room", "parts"), [(31, [16, 16]), (9, [8] * 4), (3, [2] * 16), (1, [1] * 32), (32, [32])])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_batch_norm_a_split_batch_gives_the_same_gradients(
    trainer: Callable[..., Trainer], room: int, parts: list[int], label_smoothing: float
) -> None:
    said: list[str] = []
    model = network(**STEMLESS)
    small = Small(copy.deepcopy(model), room)
    inputs, targets = batch(32)
    loss, expected = gradients(trainer(model=model, label_smoothing=label_smoothing), inputs, targets)
    split = trainer(model=small, notice=said.append, label_smoothing=label_smoothing)
    found_loss, found = gradients(split, inputs, targets)
    assert small.sizes == parts
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(found, expected, strict=True))
    assert len(said) == round(math.log2(len(parts)))
    assert all("\n" not in line and "out of memory" in line and "BatchNorm" not in line for line in said)


@pytest.mark.parametrize(("images", "room", "parts"), [(32, 10, [8, 8, 8, 8]), (13, 5, [4, 4, 4, 1])])
def test_with_the_default_stem_a_split_batch_gives_the_gradients_of_its_parts(
    trainer: Callable[..., Trainer], images: int, room: int, parts: list[int]
) -> None:
    """BatchNorm normalises each part by itself: the gradients are the parts' own, weighted by their images."""
    said: list[str] = []
    model = network()
    small = Small(copy.deepcopy(model), room)
    inputs, targets = batch(images)
    split = trainer(model=small, notice=said.append, batch_size=images)
    found_loss, found = gradients(split, inputs, targets)
    assert small.sizes == parts
    assert all("BatchNorm sees each part alone" in line for line in said)
    alone = [gradients(trainer(model=copy.deepcopy(model)), *part) for part in zip(
        inputs.split(parts), targets.split(parts), strict=True
    )]  # fmt: skip
    weights = [part / images for part in parts]
    assert found_loss == pytest.approx(sum(w * loss for w, (loss, _) in zip(weights, alone, strict=True)), abs=1e-6)
    for place, gradient in enumerate(found):
        expected = sum(w * part[place] for w, (_, part) in zip(weights, alone, strict=True))
        assert (gradient - expected).abs().max() < 1e-6
    _, whole = gradients(trainer(model=copy.deepcopy(model), batch_size=images), inputs, targets)
    one, other = (torch.cat([gradient.flatten() for gradient in each]) for each in (found, whole))
    assert (one - other).norm() > 0.01 * other.norm()  # not those of the whole batch, which is why the user is told


def test_a_cpu_splits_no_batch_whatever_the_memory(trainer: Callable[..., Trainer]) -> None:
    full = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        list(trainer(model=Small(network(), 10, full)).epochs())


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_the_drivers_and_the_libraries_lack_of_memory_counts_as_torchs(
    trainer: Callable[..., Trainer], message: str
) -> None:
    model = Small(network(), 16, RuntimeError(message))
    next(trainer(model=model).epochs())
    assert set(model.sizes) == {16}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_whole_training_in_parts_is_the_same_training(trainer: Callable[..., Trainer], optimizer: str) -> None:
    still = dict(**STEMLESS, **STILL, mixup=0.0, cutmix=0.0, optimizer=optimizer)
    small = Small(network(**STEMLESS), 10)
    whole, split = trainer(model=copy.deepcopy(small.inner), **still), trainer(model=small, **still)
    for one, other in zip(whole.epochs(), split.epochs(), strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-3)
    assert set(small.sizes) == {8}


def test_a_split_batch_is_tried_whole_again_in_the_next_epoch(trainer: Callable[..., Trainer]) -> None:
    said: list[str] = []
    model = Small(network(), 10)
    epochs = trainer(model=model, notice=said.append).epochs()
    next(epochs)
    assert model.sizes == [8] * 20  # 160 images: 32 -> 16 -> 8 in the first step, once
    next(epochs)
    assert len(said) == 2  # and said once
    model.room = 32
    model.sizes.clear()
    next(epochs)
    assert model.sizes == [32] * 5


def test_the_size_of_the_parts_is_no_part_of_a_checkpoint(trainer: Callable[..., Trainer]) -> None:
    split = trainer(model=Small(network(), 10), epochs=2)
    next(split.epochs())
    state = copy.deepcopy(split.state())
    assert "micro_batch" not in state
    roomy = Small(network(), 32)
    again = trainer(model=roomy, epochs=2)
    again.load_state({**state, "micro_batch": 8})  # as earlier versions wrote it
    next(again.epochs())
    assert roomy.sizes == [32] * 5


def test_one_image_that_does_not_fit_says_what_to_change(trainer: Callable[..., Trainer]) -> None:
    trained = trainer(model=Small(network(), 0))
    with pytest.raises(torch.OutOfMemoryError, match=r"one image .* embed_dim or depth.*patch_size.*--gpus_per_trial"):
        list(trained.epochs())


def test_another_error_is_not_taken_for_a_lack_of_memory(trainer: Callable[..., Trainer]) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(trainer(PLAIN, model=Broken()).epochs())


# --- attention --------------------------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_captured_weights_of_the_scored_network(trainer: Callable[..., Trainer]) -> None:
    mine = trainer(depth=2, top_k=4, top_p=None)
    next(mine.epochs())
    before = copy.deepcopy(mine.state())
    found = mine.attention_entropy()
    inputs = normalise(mine.data.val.batch(torch.arange(16))[0], mine.mean, mine.std)
    rows = capture_attention(mine.scored_model, inputs).weights.double().numpy()  # type: ignore[arg-type]
    expected = entropy(rows).mean(axis=(1, 2, 3))
    assert list(found) == ["attention/entropy/block_0", "attention/entropy/block_1"]
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert 0 < min(found.values()) <= max(found.values()) <= math.log(4)  # top_k keeps four
    assert equal_states(mine.state(), before)  # nothing is drawn, nothing is changed
