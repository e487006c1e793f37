import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nkat_ray.config import Transfer, TrialConfig
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Selection
from nkat_ray.model import create_nkat_vit
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.images import TrainingData
from nkat_ray.train.loop import Trainer
from nkat_ray.train.session import training_data
from nkat_ray.train.transfer import count_correct_of, transfer, transfer_recipe

CPU = torch.device("cpu")
CONFIG = TrialConfig(
    embed_dim=16, num_heads=2, depth=1, batch_size=32, epochs=3, warmup=2, lr=2e-3, ema=0.9, dropout_attn=0.0,
    dropout_embed=0.0, mixup=0.0, cutmix=0.0, randaugment=None, cutout=None, color_norm="residual", val_images=30,
)  # fmt: skip


def source(config: TrialConfig = CONFIG) -> Weights:
    """A network as if trained on CIFAR-10: random weights, with statistics of their own in its BatchNorms."""
    torch.manual_seed(1)
    model = create_nkat_vit(config, num_classes=10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    return Weights(
        config=config, dataset="cifar10", num_classes=10, grey=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2),
        epoch=3, val_accuracy=0.5, seed=1, tensors=model.state_dict(),
    )  # fmt: skip


@pytest.fixture
def digits(tinted: Callable[..., Any]) -> TrainingData:
    """Grey images of 28x28 in three classes: 120 to train on, 30 to validate."""
    images, labels = tinted(150, channels=1, size=28)
    labels = labels % 3  # a grey tint has three levels
    traits = Traits(name="digits", num_classes=3, grey=True, flip=False)
    return training_data(Selection(images, labels, np.arange(120), np.arange(120, 150)), traits, CPU)


@pytest.fixture
def carry(digits: TrainingData) -> Callable[..., Weights]:
    def go(mode: Transfer, weights: Weights | None = None, **options: Any) -> Weights:
        given: dict[str, Any] = dict(epochs=2, lr=5e-3, seed=7, notice=print)
        return transfer(weights or source(), digits, mode=mode, **{**given, **options})

    return go


def backbone(weights: Weights) -> dict[str, torch.Tensor]:
    """Everything but the head, and but BatchNorm's counter, which nothing depends on."""
    left_out = ("head.", "num_batches_tracked")
    return {n: t for n, t in weights.tensors.items() if not n.startswith(left_out) and not n.endswith(left_out)}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- recipe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["finetune", "probe"])
@pytest.mark.parametrize(("epochs", "warmup"), [(5, 1), (2, 1), (1, 0)])
def test_the_recipe_of_a_transfer_is_a_few_epochs_at_their_own_rate(mode: Transfer, epochs: int, warmup: int) -> None:
    recipe = transfer_recipe(CONFIG, mode, epochs=epochs, lr=5e-4)
    assert recipe == dataclasses.replace(CONFIG, epochs=epochs, lr=5e-4, warmup=warmup)


def test_the_recipe_from_scratch_is_the_trials_own() -> None:
    assert transfer_recipe(CONFIG, "scratch", epochs=5, lr=5e-4) == CONFIG


# --- what is carried over ---------------------------------------------------------------------------------------------


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The network's weights at the moment at which the transfer's training begins."""
    seen: list[Weights] = []
    epochs = Trainer.epochs

    def watched(self: Trainer) -> Any:
        weights = self.weights(val_accuracy=0.0)
        seen.append(dataclasses.replace(weights, tensors={n: t.clone() for n, t in weights.tensors.items()}))
        return epochs(self)

    monkeypatch.setattr(Trainer, "epochs", watched)
    return seen


@pytest.mark.parametrize("mode", ["finetune", "probe"])
def test_the_backbone_is_carried_over_and_the_head_is_new(
    carry: Callable[..., Weights], begun: list[Weights], mode: Transfer
) -> None:
    carry(mode)
    assert equal(backbone(begun[0]), backbone(source()))
    assert begun[0].tensors["head.weight"].shape == (3, 16)


def test_from_scratch_nothing_is_carried_over(carry: Callable[..., Weights], begun: list[Weights]) -> None:
    carry("scratch")
    assert not equal(backbone(begun[0]), backbone(source()))
    assert begun[0].epoch == 0


def test_fine_tuning_changes_the_backbone(carry: Callable[..., Weights]) -> None:
    found = carry("finetune")
    changed = [n for n, t in backbone(found).items() if not torch.equal(t, source().tensors[n])]
    assert "blocks.0.mlp.fc1.weight" in changed
    assert found.epoch == 2


@pytest.mark.parametrize("stem", ["off", "tiny"])
def test_a_probe_changes_the_head_alone(carry: Callable[..., Weights], begun: list[Weights], stem: str) -> None:
    """Neither weights nor BatchNorm's statistics: the features are those that CIFAR-10 has taught."""
    config = dataclasses.replace(CONFIG, conv_stem=stem, patch_size=4)
    found = carry("probe", source(config))
    after = found.build().state_dict()
    before = backbone(source(config))
    assert [n for n in before if not torch.equal(after[n], before[n])] == []
    assert not torch.equal(found.tensors["head.weight"], begun[0].tensors["head.weight"])


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["finetune", "probe", "scratch"])
def test_what_comes_out(carry: Callable[..., Weights], digits: TrainingData, mode: Transfer) -> None:
    weights = carry(mode)
    assert (weights.dataset, weights.num_classes, weights.grey, weights.seed) == ("digits", 3, True, 7)
    assert (weights.mean, weights.std) == (digits.mean, digits.std)
    assert count_correct_of(Weights.from_bytes(weights.to_bytes()), digits.val) == round(30 * weights.val_accuracy)
    assert weights.build().grey


def test_it_learns_the_new_classes(carry: Callable[..., Weights]) -> None:
    assert carry("finetune", epochs=15, lr=1e-2).val_accuracy > 0.6  # chance is a third


def test_the_same_seed_gives_the_same_network(carry: Callable[..., Weights]) -> None:
    one, same, other = (carry("finetune", seed=seed) for seed in (7, 7, 8))
    assert one.to_bytes() == same.to_bytes()
    assert one.to_bytes() != other.to_bytes()


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_dataset(
    carry: Callable[..., Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_backward", lambda *_: (torch.tensor(math.nan), torch.tensor(0)))
    with pytest.raises(ValueError, match="not finite in epoch 1 of the transfer to digits"):
        carry("finetune")


def test_a_backbone_of_another_design_is_refused(carry: Callable[..., Weights]) -> None:
    wrong = dataclasses.replace(source(), tensors={**source().tensors, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="extra"):
        carry("finetune", wrong)
    tensors = {name: tensor for name, tensor in source().tensors.items() if name != "pos_embed"}
    with pytest.raises(ValueError, match="pos_embed"):
        carry("finetune", dataclasses.replace(source(), tensors=tensors))


def test_counting_uses_the_statistics_of_the_weights(digits: TrainingData) -> None:
    """Not those of the images that are counted."""
    weights = dataclasses.replace(source(), mean=(0.9, 0.9, 0.9), std=(0.1, 0.1, 0.1))
    model = weights.build()
    images, labels = digits.val.batch(torch.arange(30))
    inputs = (images.double() / 255 - 0.9) / 0.1
    expected = int((model(inputs.float()).argmax(1) == labels).sum())
    assert count_correct_of(weights, digits.val) == expected
