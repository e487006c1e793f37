"""The recipe's augmentation against torchvision image by image, timm, numpy and plain arithmetic."""

import copy
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.mixup import rand_bbox
from torch import Generator, Tensor
from torchvision.transforms import v2

from nkat_ray.config import TrialConfig
from nkat_ray.train import augment as augment_module
from nkat_ray.train.augment import (
    apply,
    apply_mixing,
    augment,
    cutmix_box,
    cutout,
    draw,
    draw_mixing,
    mix,
    rand_augment,
    sample_beta,
)
from nkat_ray.train.randaugment import OPERATIONS, apply_operation, draw_operations, strength

TORCHVISION = v2.RandAugment()
EVERY: tuple[tuple[Callable[..., Tensor], dict[str, Any]], ...] = (
    (augment, {"config": TrialConfig(channel_shuffle=0.5), "flip": True}),
    (rand_augment, {"num_ops": 2, "magnitude": 9}),
    (cutout, {"size": 8}),
)
CROP = TrialConfig(randaugment=None, cutout=None)  # the crop alone


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, *, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=generator(seed))


def awkward_images(*, height: int = 32, width: int = 32) -> Tensor:
    """Noise, narrow ranges, one colour, black, white, two values, a gradient: where contrast and histograms differ."""
    images = noise(8, height=height, width=width)
    images[1] //= 8
    images[2] = 7
    images[3] = 0
    images[4] = 255
    images[5] = (images[5] > 127) * torch.tensor(200, dtype=torch.uint8)
    images[6] = torch.arange(width, dtype=torch.uint8) * 3
    images[7, 1] = 90
    return images


def as_torchvision(image: Tensor, name: str, value: float) -> Tensor:
    """Apply what torchvision's RandAugment applies to one image."""
    result: Tensor = TORCHVISION._apply_image_or_video_transform(
        image, name, value, interpolation=TORCHVISION.interpolation, fill=TORCHVISION._fill
    )
    return result


def torchvision_strength(name: str, magnitude: int, *, height: int, width: int) -> float:
    table, _ = TORCHVISION._AUGMENTATION_SPACE[name]
    values = table(TORCHVISION.num_magnitude_bins, height, width)
    return 0.0 if values is None else float(values[magnitude])


def chi_square_bound(degrees: int) -> float:
    """Value that chi-square exceeds once in a thousand (Wilson and Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


def assert_uniform(counts: Tensor) -> None:
    expected = counts.sum() / counts.numel()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < chi_square_bound(counts.numel() - 1)


# --- RandAugment ------------------------------------------------------------------------------------------------------


def test_operations_are_torchvisions() -> None:
    assert {name: signed for name, (_, signed) in TORCHVISION._AUGMENTATION_SPACE.items()} == OPERATIONS
    assert list(OPERATIONS) == list(TORCHVISION._AUGMENTATION_SPACE)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 20)])
def test_strengths_are_torchvisions(name: str, height: int, width: int) -> None:
    for magnitude in range(31):
        expected = torchvision_strength(name, magnitude, height=height, width=width)
        assert strength(name, magnitude, height=height, width=width) == expected


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvisions_at_every_magnitude(name: str) -> None:
    images = awkward_images()
    for magnitude, sign in itertools.product(range(31), (1, -1) if OPERATIONS[name] else (1,)):
        value = sign * torchvision_strength(name, magnitude, height=32, width=32)
        expected = torch.stack([as_torchvision(image, name, value) for image in images])
        assert torch.equal(apply_operation(images, name, value), expected), (magnitude, sign)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("height", "width"), [(20, 28), (2, 5)])
def test_operation_equals_torchvisions_on_other_sizes(name: str, height: int, width: int) -> None:
    images = awkward_images(height=height, width=width)
    value = strength(name, 9, height=height, width=width)
    expected = torch.stack([as_torchvision(image, name, value) for image in images])
    assert torch.equal(apply_operation(images, name, value), expected)


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_rand_augment_is_torchvision_image_by_image(magnitude: int) -> None:
    images = torch.cat([awkward_images(), noise(120)])
    result = rand_augment(images, num_ops=3, magnitude=magnitude, generator=generator(5))
    replay, expected = generator(5), list(images)
    for _ in range(3):
        drawn, negative = draw_operations(len(images), generator=replay)
        for i, (operation, minus) in enumerate(zip(drawn.tolist(), negative.tolist(), strict=True)):
            name, signed = list(OPERATIONS.items())[operation]
            value = torchvision_strength(name, magnitude, height=32, width=32)
            expected[i] = as_torchvision(expected[i], name, -value if signed and minus else value)
    assert torch.equal(result, torch.stack(expected))


def test_operations_and_signs_are_drawn_evenly_and_independently() -> None:
    source = generator(1)
    first, negative = draw_operations(60_000, generator=source)
    second, _ = draw_operations(60_000, generator=source)
    assert_uniform(torch.bincount(2 * first + negative, minlength=28))  # operation and sign
    assert_uniform(torch.bincount(14 * first + second, minlength=196))  # one round and the next
    assert_uniform(torch.bincount(14 * first[:-1] + first[1:], minlength=196))  # an image and its neighbour


def test_rand_augment_draws_for_each_image_and_both_signs() -> None:
    """On images that are all the same, the results are the 23 things that can happen to one (9 signed operations)."""
    image = noise(1)
    results = rand_augment(image.expand(4000, -1, -1, -1), num_ops=1, magnitude=9, generator=generator())
    expected: Counter[bytes] = Counter()
    for name, signed in OPERATIONS.items():
        value = strength(name, 9, height=32, width=32)
        for sign in (1, -1):
            expected[as_torchvision(image[0], name, sign * value if signed else value).numpy().tobytes()] += 1
    found = Counter(result.numpy().tobytes() for result in results)
    assert set(found) == set(expected)
    chi_square = sum((found[key] - 4000 * n / 28) ** 2 / (4000 * n / 28) for key, n in expected.items())
    assert chi_square < chi_square_bound(len(expected) - 1)


def test_rand_augment_of_no_operations_or_no_images() -> None:
    images = noise(3)
    assert torch.equal(rand_augment(images, num_ops=0, magnitude=9, generator=generator()), images)
    assert rand_augment(images[:0], num_ops=2, magnitude=9, generator=generator()).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(("num_ops", "magnitude"), [(-1, 9), (2, -1), (2, 31)])
def test_rand_augment_refuses(num_ops: int, magnitude: int) -> None:
    with pytest.raises(ValueError, match=r"(num_ops|magnitude) is (-1|31)"):
        rand_augment(noise(1), num_ops=num_ops, magnitude=magnitude, generator=generator())


def test_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="Invert"):
        apply_operation(noise(1), "Invert", 0.0)


# --- crop, flip, shuffle, Cutout --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 20), (5, 7)])
def test_the_crop_is_a_window_of_the_reflected_image(height: int, width: int) -> None:
    images = noise(300, height=height, width=width)
    cropped = augment(images, CROP, flip=False, generator=generator())
    rows, columns = torch.randint(9, (2, 300), generator=generator()).numpy()
    for image, result, y, x in zip(images.numpy(), cropped.numpy(), rows, columns, strict=True):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        assert np.array_equal(result, padded[:, y : y + height, x : x + width])


def test_the_crop_draws_every_offset_evenly() -> None:
    """The pixel in the middle says where it came from."""
    places = torch.arange(32 * 32).view(32, 32)
    image = torch.stack([places % 32, places // 32, places * 0]).to(torch.uint8)
    cropped = augment(image.expand(20_000, -1, -1, -1), CROP, flip=False, generator=generator(2))
    middle = cropped[:, :2, 16, 16].long() - 12
    assert_uniform(torch.bincount(9 * middle[:, 1] + middle[:, 0], minlength=81))


def test_half_of_the_images_are_mirrored() -> None:
    images = noise(2000)
    result = augment(images, CROP, flip=True, generator=generator())
    plain = augment(images, CROP, flip=False, generator=generator())
    mirrored = (result == plain.flip(3)).flatten(1).all(1)
    kept = (result == plain).flatten(1).all(1)
    assert bool((mirrored ^ kept).all())
    assert_uniform(torch.stack([mirrored.sum(), kept.sum()]))


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_channels_are_permuted_with_probability_p(p: float) -> None:
    images = noise(6000, height=6, width=6)
    config = dataclasses.replace(CROP, channel_shuffle=p)
    result = augment(images, config, flip=False, generator=generator())
    plain = augment(images, CROP, flip=False, generator=generator())
    orders = list(itertools.permutations(range(3)))
    same = torch.stack([(result == plain[:, list(order)]).flatten(1).all(1) for order in orders])
    assert bool((same.sum(0) == 1).all())
    counts = same.sum(1)
    expected = 6000 * torch.tensor([1 - p + p / 6] + [p / 6] * 5)
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_bound(5)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 8), (28, 20, 7), (6, 6, 1), (6, 6, 12)])
@pytest.mark.parametrize("fill", [0, 255, (125, 123, 114)])
def test_cutout_covers_a_square_that_may_leave_the_image(
    height: int, width: int, size: int, fill: int | tuple[int, int, int]
) -> None:
    images = noise(200, height=height, width=width)
    result = cutout(images, size=size, generator=generator(), fill=fill)
    replay = generator()
    rows = torch.randint(height, (200,), generator=replay).tolist()
    columns = torch.randint(width, (200,), generator=replay).tolist()
    for image, cut, y, x in zip(images.numpy(), result.numpy(), rows, columns, strict=True):
        expected = image.copy()
        top, left = y - size // 2, x - size // 2
        expected[:, max(top, 0) : top + size, max(left, 0) : left + size] = np.reshape(fill, (-1, 1, 1))
        assert np.array_equal(cut, expected)


def test_cutout_centres_are_uniform_over_the_image() -> None:
    covered = cutout(noise(1).fill_(1).expand(40_000, -1, -1, -1), size=1, generator=generator(3))[:, 0] == 0
    assert_uniform(covered.sum(0))
    leaves = cutout(noise(1).fill_(1).expand(4000, -1, -1, -1), size=8, generator=generator())[:, 0] == 0
    assert leaves.flatten(1).sum(1).min() < 64  # clipped at the border
    assert leaves.flatten(1).sum(1).max() == 64


@pytest.mark.parametrize(("size", "fill"), [(0, 0), (8, -1), (8, 256), (8, (1, 2))])
def test_cutout_refuses(size: int, fill: int) -> None:
    with pytest.raises(ValueError, match=r"(size|fill) is"):
        cutout(noise(1), size=size, generator=generator(), fill=fill)


# --- Mixup and CutMix -------------------------------------------------------------------------------------------------


def one_hot(n: int, classes: int = 5) -> Tensor:
    return torch.nn.functional.one_hot(torch.arange(n) % classes, classes).float()


def test_mix_leaves_a_batch_alone_without_a_draw() -> None:
    images, targets, source = torch.randn(4, 3, 32, 32), one_hot(4), generator()
    before = source.get_state()
    mixed, mixed_targets = mix(images, targets, mixup=0.0, cutmix=0.0, generator=source)
    assert mixed is images
    assert mixed_targets is targets
    assert torch.equal(source.get_state(), before)


def test_mix_draws_its_kind_for_the_batch_with_the_given_probabilities() -> None:
    images, targets, source, counts = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 8), one_hot(2), generator(), []
    for _ in range(3000):
        mixed, mixed_targets = mix(images, targets, mixup=0.1, cutmix=0.2, generator=source)
        if mixed is images:
            assert mixed_targets is targets
            counts.append(0)
        else:
            counts.append(1 if ((mixed != 0) & (mixed != 1)).any() or mixed[0].eq(mixed_targets[0, 1]).all() else 2)
    # A box without a pixel (1 in 64, side below 1 of 8) looks like Mixup with lambda 1 and counts as such here.
    found = torch.bincount(torch.tensor(counts), minlength=3)
    expected = 3000 * torch.tensor([0.7, 0.1 + 0.2 / 64, 0.2 * 63 / 64])
    assert float(((found - expected) ** 2 / expected).sum()) < chi_square_bound(2)


def test_mixup_blends_images_and_targets_with_one_lambda() -> None:
    images, targets = torch.randn(6, 3, 8, 8, dtype=torch.float64), one_hot(6)
    mixed, mixed_targets = mix(images, targets, mixup=1.0, cutmix=0.0, generator=generator())
    replay = generator()
    torch.rand((), generator=replay)
    lam = sample_beta(0.2, generator=replay)
    for i in range(6):
        torch.testing.assert_close(mixed[i], lam * images[i] + (1 - lam) * images[5 - i])
        torch.testing.assert_close(mixed_targets[i], lam * targets[i] + (1 - lam) * targets[5 - i])
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(6))


def test_mixup_rounds_whole_numbers_and_keeps_types() -> None:
    images, targets = noise(4), one_hot(4)
    mixed, _ = mix(images, targets, mixup=1.0, cutmix=0.0, generator=generator(1))
    exact, _ = mix(images.double(), targets, mixup=1.0, cutmix=0.0, generator=generator(1))
    assert mixed.dtype == torch.uint8
    assert (mixed.double() - exact).abs().max() <= 0.5001
    half, half_targets = mix(images.bfloat16(), targets, mixup=1.0, cutmix=0.0, generator=generator(1))
    assert (half.dtype, half_targets.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("seed", range(40))
def test_cutmix_pastes_a_box_and_corrects_lambda_to_its_area(seed: int) -> None:
    """Every image is one number, so the pasted pixels can be counted."""
    images, targets = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 12, 10), one_hot(6, 6)
    mixed, mixed_targets = mix(images, targets, mixup=0.0, cutmix=1.0, generator=generator(seed))
    pasted = mixed != images
    assert torch.equal(mixed[pasted], images.flip(0)[pasted])
    share = pasted[0, 0].float().mean()
    for i in range(6):
        assert torch.equal(pasted[i], pasted[0, :1].expand(3, -1, -1))
        torch.testing.assert_close(mixed_targets[i], (1 - share) * targets[i] + share * targets[5 - i])
    rows, columns = pasted[0, 0].any(1), pasted[0, 0].any(0)
    assert torch.equal(pasted[0, 0], rows[:, None] & columns)  # a box
    assert rows.int().diff().abs().sum() <= 2
    assert columns.int().diff().abs().sum() <= 2


def test_cutmix_box_is_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, lam in itertools.product(range(20), (0.0, 0.13, 0.5, 0.87, 1.0)):
        replay = generator(seed)
        centre = iter(int(torch.randint(size, (), generator=replay)) for size in (32, 24))
        monkeypatch.setattr(np.random, "randint", lambda *_, centre=centre, **__: next(centre))
        expected = tuple(int(edge) for edge in rand_bbox((3, 32, 24), lam))  # type: ignore[no-untyped-call]
        assert cutmix_box(32, 24, lam, generator(seed)) == expected


@pytest.mark.parametrize("alpha", [augment_module.MIXUP_ALPHA, augment_module.CUTMIX_ALPHA])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    """Kolmogorov and Smirnov's distance to numpy's own Beta, two samples; for alpha 1 to the uniform law itself."""
    source, n = generator(4), 4000
    drawn = np.sort([sample_beta(alpha, generator=source) for _ in range(n)])
    reference = np.sort(np.random.default_rng(0).beta(alpha, alpha, size=100 * n))
    law = np.searchsorted(reference, drawn) / len(reference) if alpha != 1 else drawn
    distance = max(np.abs(law - np.arange(n) / n).max(), np.abs(law - np.arange(1, n + 1) / n).max())
    assert distance < 1.95 / math.sqrt(n)  # exceeded once in a thousand
    assert np.var(drawn) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


@pytest.mark.parametrize(("mixup", "cutmix"), [(-0.1, 0.2), (0.2, -0.1), (0.6, 0.5), (math.nan, 0.1)])
def test_mix_refuses_probabilities(mixup: float, cutmix: float) -> None:
    with pytest.raises(ValueError, match="mixup is"):
        mix(torch.randn(2, 3, 8, 8), one_hot(2), mixup=mixup, cutmix=cutmix, generator=generator())


@pytest.mark.parametrize("targets", [one_hot(3), torch.tensor([0, 1])])
def test_mix_refuses_targets(targets: Tensor) -> None:
    with pytest.raises(ValueError, match="targets are"):
        mix(torch.randn(2, 3, 8, 8), targets, mixup=0.5, cutmix=0.5, generator=generator())


# --- all of it --------------------------------------------------------------------------------------------------------


def step_by_step(images: Tensor, config: TrialConfig, source: Generator) -> Tensor:
    """The recipe as plain functions, one after another, each drawing for itself."""
    n, _, height, width = images.shape
    rows, columns = torch.randint(9, (2, n), generator=source).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = [p[:, y : y + height, x : x + width] for p, y, x in zip(padded, rows, columns, strict=True)]
    result = torch.from_numpy(np.stack(windows))
    mirrored = torch.rand(n, generator=source) < 0.5
    result[mirrored] = result[mirrored].flip(3)
    result = rand_augment(result, num_ops=2, magnitude=9, generator=source)
    orders = torch.randint(6, (n,), generator=source)
    orders *= torch.rand(n, generator=source) < config.channel_shuffle
    permutations = list(itertools.permutations(range(3)))
    result = torch.stack([image[list(permutations[o])] for image, o in zip(result, orders.tolist(), strict=True)])
    return cutout(result, size=8, generator=source, fill=(1, 2, 3))


def test_augment_is_the_recipe_in_order() -> None:
    images, config = noise(64), TrialConfig(channel_shuffle=0.5)
    result = augment(images, config, flip=True, generator=generator(7), cutout_fill=(1, 2, 3))
    assert torch.equal(result, step_by_step(images, config, generator(7)))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "config", [TrialConfig(channel_shuffle=0.5), TrialConfig(randaugment=(3, 30)), CROP], ids=["all", "most", "crop"]
)
def test_batches_augmented_at_once_are_those_augmented_one_by_one(config: TrialConfig, flip: bool) -> None:
    images, source, replay = torch.cat([awkward_images(), noise(92)]), generator(3), generator(3)
    parts = images.split(32)  # the last has four images
    draws = [draw(len(part), 32, 32, config, flip=flip, generator=source) for part in parts]
    at_once = apply(images, torch.cat(draws, dim=1), config, flip=flip, cutout_fill=(1, 2, 3))
    expected = [augment(part, config, flip=flip, generator=replay, cutout_fill=(1, 2, 3)) for part in parts]
    assert torch.equal(at_once, torch.cat(expected))
    assert torch.equal(source.get_state(), replay.get_state())


@pytest.mark.parametrize("seed", range(20))
def test_mixing_as_drawn_is_mixing(seed: int) -> None:
    images, targets, source, replay = torch.randn(6, 3, 8, 8), one_hot(6), generator(seed), generator(seed)
    mixing = draw_mixing(8, 8, mixup=0.4, cutmix=0.4, generator=source)
    expected = mix(images, targets, mixup=0.4, cutmix=0.4, generator=replay)
    assert all(map(torch.equal, apply_mixing(images, targets, mixing), expected))
    assert torch.equal(source.get_state(), replay.get_state())


def assert_pure(function: Callable[[Generator], Sequence[Tensor] | Tensor], *inputs: Tensor) -> None:
    """Whether a function repeats for a seed, and leaves its inputs and every global random state alone."""
    before = [value.clone() for value in inputs]
    torch_state, numpy_state = torch.get_rng_state(), copy.deepcopy(np.random.get_state())
    results = [list(function(generator(seed))) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state()) == repr(numpy_state)
    assert all(torch.equal(old, new) for old, new in zip(before, inputs, strict=True))
    same = [[torch.equal(a, b) for a, b in zip(results[0], other, strict=True)] for other in results[1:]]
    assert all(same[0])
    assert not all(same[1])


@pytest.mark.parametrize(("function", "options"), EVERY)
def test_every_function_is_pure(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    images = noise(64)
    assert_pure(lambda source: function(images, generator=source, **options), images)


def test_augment_and_mix_are_pure() -> None:
    images, floats, targets = noise(64), torch.randn(8, 3, 32, 32), one_hot(8)
    config = TrialConfig(channel_shuffle=0.5)
    assert_pure(lambda source: augment(images, config, flip=True, generator=source), images)
    assert_pure(lambda source: mix(floats, targets, mixup=0.0, cutmix=1.0, generator=source), floats, targets)
    assert_pure(lambda source: mix(floats, targets, mixup=1.0, cutmix=0.0, generator=source), floats, targets)


@pytest.mark.parametrize(("function", "options"), EVERY)
@pytest.mark.parametrize("images", [torch.rand(2, 3, 8, 8), noise(2)[:, :1], noise(2)[0]])
def test_every_function_refuses_other_images(
    function: Callable[..., Tensor], options: dict[str, Any], images: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"images are torch\.\w+ \(.*\); pass torch\.uint8 \(B, 3, H, W\)"):
        function(images, generator=generator(), **options)
