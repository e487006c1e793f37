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
from nkat_ray.model import create_nkat_vit
from nkat_ray.model.capture import capture_attention
from nkat_ray.report.attention import entropy
from nkat_ray.train import loop as loop_module
from nkat_ray.train.checkpoint import load_state, save_state
from nkat_ray.train.loop import EpochResult, ImageSet, Trainer, count_correct, normalise, to_network_size

CPU = torch.device("cpu")
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
    images, labels = tinted(200)
    sets = ImageSet(images, labels, np.arange(160), CPU), ImageSet(images, labels, np.arange(160, 200), CPU)

    def make(config: TrialConfig = TINY, *, seed: int = 5, model: nn.Module | None = None, **options: Any) -> Trainer:
        fields = {k: options.pop(k) for k in list(options) if hasattr(config, k)}
        config = dataclasses.replace(config, **fields)
        torch.manual_seed(seed)
        mean, std = sets[0].statistics()
        given: dict[str, Any] = dict(train=sets[0], val=sets[1], notice=print) | options
        network = create_nkat_vit(config, num_classes=10, mean=mean, std=std) if model is None else model
        return Trainer(network, config, num_classes=10, flip=True, mean=mean, std=std, seed=seed, device=CPU, **given)

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


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "top", "left"),
    [((3, 32, 32), 0, 0), ((1, 28, 28), 2, 2), ((1, 31, 30), 0, 1), ((3, 1, 5), 15, 13), ((1, 8, 32), 12, 0)],
)
def test_images_are_padded_evenly_to_32_and_grey_is_repeated(shape: tuple[int, int, int], top: int, left: int) -> None:
    _, height, width = shape
    images = torch.randint(1, 256, (2, *shape), dtype=torch.uint8)
    expected = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    expected[:, :, top : top + height, left : left + width] = images
    assert torch.equal(to_network_size(images), expected)
    assert to_network_size(images).is_contiguous()


def test_normalise() -> None:
    images = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.0, 100.0, 255.0], [1.0, 14.0, 2.0]))
    assert normalise(images, mean, std).flatten().tolist() == [0.0, 2.0, 0.0]
    assert normalise(images, mean, std).dtype == torch.float32


@pytest.mark.parametrize(("channels", "size", "n"), [(3, 32, 50), (1, 28, 50), (3, 5, 1), (1, 32, 5003)])
def test_statistics_equal_numpys(tinted: Callable[..., Any], channels: int, size: int, n: int) -> None:
    images, labels = tinted(n + 20, channels=channels, size=size)
    index = np.sort(np.random.default_rng(0).permutation(n + 20)[:n])
    mean, std = ImageSet(images, labels, index, CPU).statistics()
    chosen = images[index].astype(np.float64) / 255
    assert mean == pytest.approx(np.broadcast_to(chosen.mean((0, 2, 3)), 3), abs=1e-9)
    assert std == pytest.approx(np.broadcast_to(chosen.std((0, 2, 3)), 3), abs=1e-6)


def test_statistics_of_constant_images_divide_by_no_zero() -> None:
    images = np.full((4, 3, 32, 32), 255, np.uint8)
    mean, std = ImageSet(images, np.zeros(4, np.int64), None, CPU).statistics()
    assert mean == pytest.approx((1.0, 1.0, 1.0))
    assert all(value > 0 for value in std)


def test_a_batch_holds_the_indexed_images_and_labels(tinted: Callable[..., Any]) -> None:
    images, labels = tinted(30, channels=1, size=28)
    chosen = ImageSet(images, labels, np.array([4, 9, 17, 20]), CPU)
    assert len(chosen) == 4
    batch, targets = chosen.batch(torch.tensor([2, 0]))
    assert torch.equal(batch, to_network_size(torch.from_numpy(images[[17, 4]])))
    assert targets.tolist() == labels[[17, 4]].tolist()
    assert len(ImageSet(images, labels, None, CPU)) == 30


def test_a_read_only_array_is_shared_and_not_copied(tinted: Callable[..., Any], recwarn: Any) -> None:
    """As it comes out of the object store: several trials of a node hold one copy."""
    images, labels = tinted(30)
    images.flags.writeable = labels.flags.writeable = False
    shared = ImageSet(images, labels, np.arange(10), CPU)
    assert shared._images.data_ptr() == images.ctypes.data
    shared.batch(torch.arange(3))
    assert list(recwarn) == []


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


def test_it_learns(trainer: Callable[..., Trainer]) -> None:
    results = list(trainer(PLAIN, epochs=12, lr=1e-2).epochs())
    assert results[-1].train_loss < 0.5 * results[0].train_loss
    assert results[-1].val_accuracy > 0.8


def test_every_image_is_seen_once_an_epoch(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    trained, seen = trainer(epochs=2, batch_size=50), []
    step = trained._step
    monkeypatch.setattr(
        trained, "_step", lambda positions, number: seen.append((number, positions)) or step(positions, number)
    )
    list(trained.epochs())
    assert [number for number, _ in seen] == list(range(8))
    assert [len(positions) for _, positions in seen[:4]] == [50, 50, 50, 10]
    orders = [torch.cat([positions for _, positions in part]).tolist() for part in (seen[:4], seen[4:])]
    assert all(sorted(order) == list(range(160)) for order in orders)
    assert orders[0] != orders[1]


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
    correct = count_correct(trained.scored_model, trained.val, mean=trained.mean, std=trained.std, device=CPU)
    weights = trained.weights(dataset="cifar10", grey=False, val_accuracy=result.val_accuracy, seed=5)
    assert all(torch.equal(t, trained.scored_model.state_dict()[n]) for n, t in weights.tensors.items())
    assert not torch.equal(weights.tensors["head.weight"], trained.model.state_dict()["head.weight"])
    assert trained.accuracy(trained.val) == correct / 40


def test_accuracy_equals_a_loop_over_single_images(trainer: Callable[..., Trainer]) -> None:
    trained = trainer(PLAIN, epochs=1, warmup=0)
    list(trained.epochs())
    trained.scored_model.eval()
    hits = 0
    for position in range(40):
        image, label = trained.val.batch(torch.tensor([position]))
        hits += int(trained.scored_model(normalise(image, trained.mean, trained.std)).argmax() == label)
    assert trained.accuracy(trained.val) == hits / 40


def test_scoring_leaves_the_training_as_it_is(trainer: Callable[..., Trainer]) -> None:
    """No BatchNorm statistics, no random numbers: an epoch is the same whether or not it was scored before."""
    expected = timeless(next(trainer().epochs()))
    scored = trainer()
    before = copy.deepcopy(scored.state())
    scored.accuracy(scored.val)
    assert equal_states(before, scored.state())
    assert timeless(next(scored.epochs())) == expected


# --- stopped and continued --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"ema": None, "clip_grad": None}])
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

    def wrapped(*arguments: Any) -> Tensor:
        calls[0] += 1
        return backward(*arguments) if calls[0] <= step else torch.tensor(value)

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
    assert math.isnan(results[1].val_accuracy)
    assert math.isfinite(results[0].val_accuracy)
    assert kept is not None
    assert kept["epoch"] == 1
    assert all(t.isfinite().all() for t in kept["model"].values())


def test_weights_that_diverge_for_real_end_the_training(trainer: Callable[..., Trainer]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    with torch.no_grad():
        model[1].weight.mul_(1e30)  # type: ignore[union-attr, operator]
        model[2].weight.mul_(1e30)  # type: ignore[union-attr, operator]
    (result,) = trainer(PLAIN, model=model).epochs()
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
    """A device whose memory holds the activations of so many images: a training pass of more raises as CUDA does."""

    def __init__(self, inner: nn.Module, room: int) -> None:
        super().__init__()
        self.inner, self.room = inner, room

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        out: Tensor = self.inner(images)
        return out


def gradients(trained: Trainer, inputs: Tensor, targets: Tensor) -> tuple[float, list[Tensor]]:
    loss = trained._backward_within_memory(inputs, targets)
    return float(loss), [p.grad.clone() for p in trained.model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("room", "parts"), [(31, 16), (9, 8), (3, 2), (1, 1), (32, 32)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_out_of_memory_the_batch_is_split_with_the_same_mathematics(
    trainer: Callable[..., Trainer], room: int, parts: int, label_smoothing: float
) -> None:
    said: list[str] = []
    inputs = torch.randn(32, 3, 32, 32)
    targets = torch.rand(32, 10).softmax(1)
    model = create_nkat_vit(PLAIN, num_classes=10)
    whole = trainer(PLAIN, model=copy.deepcopy(model), label_smoothing=label_smoothing)
    split = trainer(PLAIN, model=Small(model, room), notice=said.append, label_smoothing=label_smoothing)
    loss, expected = gradients(whole, inputs, targets)
    found_loss, found = gradients(split, inputs, targets)
    assert split.micro_batch == parts
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(found, expected, strict=True))
    halvings = round(math.log2(32 / parts))
    assert len(said) == halvings
    assert all("\n" not in line and "out of memory" in line for line in said)


def test_an_uneven_last_part_counts_by_its_images(trainer: Callable[..., Trainer]) -> None:
    inputs, targets = torch.randn(13, 3, 32, 32), F.one_hot(torch.arange(13) % 10, 10).float()
    model = create_nkat_vit(PLAIN, num_classes=10)
    whole, split = trainer(PLAIN, model=copy.deepcopy(model)), trainer(PLAIN, model=model)
    split.micro_batch = 5  # 5 + 5 + 3
    (loss, expected), (found_loss, found) = (gradients(t, inputs, targets) for t in (whole, split))
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(found, expected, strict=True))


def test_the_smaller_parts_are_kept_for_the_next_steps_and_in_the_state(trainer: Callable[..., Trainer]) -> None:
    model = Small(create_nkat_vit(PLAIN, num_classes=10), 10)
    said: list[str] = []
    trained = trainer(PLAIN, model=model, notice=said.append, epochs=2)
    list(trained.epochs())
    assert len(said) == 2  # 32 -> 16 -> 8, once
    assert trained.state()["micro_batch"] == 8
    again = trainer(PLAIN, model=Small(create_nkat_vit(PLAIN, num_classes=10), 10), epochs=2)
    again.load_state(copy.deepcopy(trained.state()))
    assert again.micro_batch == 8


def test_a_whole_training_in_parts_is_the_same_training(trainer: Callable[..., Trainer]) -> None:
    whole, split = trainer(PLAIN), trainer(PLAIN)
    split.micro_batch = 7
    for one, other in zip(whole.epochs(), split.epochs(), strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, abs=1e-4)


def test_one_image_that_does_not_fit_says_what_to_change(trainer: Callable[..., Trainer]) -> None:
    trained = trainer(PLAIN, model=Small(create_nkat_vit(PLAIN, num_classes=10), 0))
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
    inputs = normalise(mine.val.batch(torch.arange(16))[0], mine.mean, mine.std)
    rows = capture_attention(mine.scored_model, inputs).weights.double().numpy()  # type: ignore[arg-type]
    expected = entropy(rows).mean(axis=(1, 2, 3))
    assert list(found) == ["attention/entropy/block_0", "attention/entropy/block_1"]
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert 0 < min(found.values()) <= max(found.values()) <= math.log(4)  # top_k keeps four
    assert equal_states(mine.state(), before)  # nothing is drawn, nothing is changed
