"""A GPU computes what a CPU computes, within bfloat16's rounding: augmentation, losses, updates, evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cards import CPU, STILL, Card, config_for, data_on, losses_of, trainer_on
from pretend_cuda import CUDA
from torch import Tensor

from nkat_ray.config import TrialConfig
from nkat_ray.train.augment import augment, cutout, rand_augment
from nkat_ray.train.device import has_native_bfloat16
from nkat_ray.train.images import normalise
from nkat_ray.train.session import create_network
from nkat_ray.train.transfer import count_correct_of, transfer

SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "small stem": {"conv_stem": "small"},
    "stride 2": {"stem_stride": 2},
    "no stem, 64 tokens": {"conv_stem": "off", "patch_size": 4},
    "no stem, 256 tokens": {"conv_stem": "off", "patch_size": 2, "depth": 1},
    "no filter": {"top_k": None, "top_p": None},
    "split heads": {"split_heads": True},
    "colour norm": {"color_norm": "residual", "channel_shuffle": 0.5},
    "muon": {"optimizer": "muon"},
    "mixed": {"mixup": 0.5, "cutmix": 0.5},
    "bare": {"ema": None, "clip_grad": None, "randaugment": None, "cutout": None, "label_smoothing": 0.1},
}
EVERY: tuple[tuple[Callable[..., Tensor], dict[str, Any]], ...] = (
    (augment, {"config": TrialConfig(channel_shuffle=0.5), "flip": True}),
    (rand_augment, {"num_ops": 2, "magnitude": 9}),
    (cutout, {"size": 8}),
)
TOLERANCE = {"bfloat16": 5e-3, "float32": 1e-3}  # relative, of an epoch's mean loss; cuDNN convolves float32 in TF32
RATES = (1e-5, 1e-4, 5e-4, 2e-3, 5e-3)


@pytest.fixture
def sizes(card: Card) -> dict[str, int]:
    return {"train": 192, "val": 64} if card.real else {"train": 24, "val": 8}


@pytest.fixture(params=["bfloat16", "float32"])
def precision(request: pytest.FixtureRequest, card: Card, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the card computes in: without native bfloat16, as before Ampere, in float32."""
    if request.param == "float32":
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
        has_native_bfloat16.cache_clear()
    elif not has_native_bfloat16(CUDA):
        pytest.skip("this GPU does not compute in bfloat16 itself")
    yield request.param
    has_native_bfloat16.cache_clear()


@pytest.mark.parametrize(("function", "options"), EVERY)
def test_an_augmented_image_is_a_cpus(card: Card, function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """A CPU's draws; colours may differ where float arithmetic meets a whole number."""
    images = torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mine, expected = (
        function(images.to(where), generator=torch.Generator().manual_seed(0), **options) for where in (CUDA, CPU)
    )
    assert (mine.device, mine.dtype, mine.shape) == (CUDA, torch.uint8, images.shape)
    assert (mine.to(CPU) == expected).float().mean() > 0.999
    if card.real:  # draws of its own
        again = function(images.to(CUDA), generator=torch.Generator(CUDA).manual_seed(0), **options)
        assert (again.device, again.shape) == (CUDA, images.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_of_every_shape_is_a_cpus(card: Card, precision: str, shape: str, sizes: dict[str, int]) -> None:
    config = config_for(card, **{"epochs": 1, "warmup": 0, **STILL, **SHAPES[shape]})
    mine, expected = (trainer_on(where, config, **sizes) for where in (CUDA, CPU))
    assert all(parameter.device == CUDA for parameter in mine.model.parameters())
    (result,), (wanted,) = mine.epochs(), expected.epochs()
    assert result.train_loss == pytest.approx(wanted.train_loss, rel=TOLERANCE[precision])
    entropy, wanted_entropy = mine.attention_entropy(), expected.attention_entropy()
    assert entropy == pytest.approx(wanted_entropy, rel=1e-2)
    assert mine.nkat_scalars() == pytest.approx(expected.nkat_scalars(), abs=1e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stem", ["off", "tiny"])
def test_replayed_steps_train_as_eager_ones(
    card: Card, optimizer: str, stem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With dropout, whose masks a replay draws anew. A pretend GPU has no graphs: its steps stay eager, and say so."""
    config = config_for(card, optimizer=optimizer, conv_stem=stem, patch_size=4, epochs=1, warmup=0)
    steps = 24 if card.real else 6
    losses, moves = [], []
    for graphed in (True, False):
        trainer = trainer_on(CUDA, config, train=steps * config.batch_size)
        if not graphed:
            trainer._graph = None
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        losses.append(losses_of(trainer, steps))
        assert trainer._graph is None or (trainer._graph.replays, trainer._graph.failed) == (card.real, not card.real)
        pairs = zip(trainer.model.parameters(), before, strict=True)
        moves.append(torch.cat([(now.detach() - then).flatten() for now, then in pairs]).to(CPU))
    assert ("no CUDA graph" in capsys.readouterr().out) != card.real
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if card.real else 1e-6)
    assert torch.cosine_similarity(*moves, dim=0) > 0.95
    assert len(set(losses[0])) == steps  # each replay has its own images


def test_dropout_and_stochastic_depth_train(card: Card, sizes: dict[str, int]) -> None:
    trainer = trainer_on(CUDA, config_for(card, drop_path=0.5, epochs=1, warmup=0), **sizes)
    (result,) = trainer.epochs()
    assert 0 < result.train_loss < 10


def test_the_modulation_keeps_its_effect_under_autocast(card: Card) -> None:
    data = data_on(CUDA)
    inputs = normalise(data.val.batch(torch.arange(8))[0], *(torch.full((3, 1, 1), 100.0).to(CUDA),) * 2)
    logits = []
    for strength in (0.0024, 0.0):
        config = config_for(card, nkat_strength=strength, top_k=None, top_p=None)
        model = create_network(config, data, seed=0).to(CUDA).eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            logits.append(torch.tensor(model(inputs).tolist()))
    assert not torch.equal(*logits)


def test_a_step_of_muon_in_bfloat16_is_a_cpus(card: Card, sizes: dict[str, int]) -> None:
    """Newton-Schulz runs in bfloat16 on a GPU: each matrix still moves in the direction that float32 gives it."""
    config = config_for(card, optimizer="muon", weight_decay=0.0, epochs=1, warmup=0, clip_grad=None, ema=None)
    moves = []
    for where in (CUDA, CPU):
        trainer = trainer_on(where, config, **sizes)
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(where)
        trainer.optimizer.step()
        pairs = {name: (parameter.detach() - before[name]) for name, parameter in trainer.model.named_parameters()}
        moves.append({name: move.to(CPU).flatten() for name, move in pairs.items() if move.dim() == 2})
    mine, expected = moves
    assert len(expected) > 4 * config.depth
    for name, move in expected.items():
        assert torch.cosine_similarity(mine[name], move, dim=0) > 0.99, name
        assert float(mine[name].norm()) == pytest.approx(float(move.norm()), rel=0.05), name


def test_bfloat16_ranks_learning_rates_as_float32_does(
    card: Card, monkeypatch: pytest.MonkeyPatch, measured: Callable[[str, object], None]
) -> None:
    if not has_native_bfloat16(CUDA):
        pytest.skip("this GPU does not compute in bfloat16 itself")
    rankings, rates, images = [], RATES if card.real else RATES[::2], 2048 if card.real else 24
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: native)
        has_native_bfloat16.cache_clear()
        trained = [trainer_on(CUDA, config_for(card, lr=lr, epochs=1, warmup=0, **STILL), train=images) for lr in rates]
        losses = [next(trainer.epochs()).train_loss for trainer in trained]
        measured(f"training loss at each rate, {'bfloat16' if native else 'float32'}", losses)
        rankings.append(sorted(range(len(rates)), key=losses.__getitem__))
    has_native_bfloat16.cache_clear()
    assert rankings[0] == rankings[1]


@pytest.mark.parametrize("mode", ["finetune", "probe"])
def test_a_transfer_and_its_evaluation(card: Card, mode: Any) -> None:
    source = trainer_on(CUDA, config_for(card))
    next(source.epochs())
    digits = data_on(CUDA, channels=1, size=28)
    moved = transfer(source.weights(val_accuracy=0.1), digits, mode=mode, epochs=1, lr=1e-3, seed=0, notice=print)
    assert all(tensor.device.type == "cpu" for tensor in moved.build().state_dict().values())
    assert count_correct_of(moved, digits.val) == round(moved.val_accuracy * len(digits.val))
