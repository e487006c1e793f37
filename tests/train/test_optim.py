import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import muon
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nkat_ray.config import TrialConfig
from nkat_ray.model import create_nkat_vit
from nkat_ray.train import optim
from nkat_ray.train.optim import MUON_FALLBACK_LR_SCALE, Average, create_optimizer, lr_at

TINY = TrialConfig(embed_dim=16, depth=2, epochs=6)


# --- learning rate ----------------------------------------------------------------------------------------------------

plans = st.integers(1, 400).flatmap(
    lambda total: st.tuples(st.just(total), st.integers(0, total - 1), st.floats(1e-6, 1.0))
)


@given(plans)
def test_no_step_has_a_rate_of_zero_or_above_the_peak(plan: tuple[int, int, float]) -> None:
    total, warmup, peak = plan
    rates = [lr_at(step, peak=peak, warmup_steps=warmup, total_steps=total) for step in range(total)]
    assert all(rate > 0 for rate in rates)
    assert max(rates) == pytest.approx(peak, rel=1e-12)


@given(plans)
def test_the_rate_rises_linearly_then_falls(plan: tuple[int, int, float]) -> None:
    total, warmup, peak = plan
    rates = [lr_at(step, peak=peak, warmup_steps=warmup, total_steps=total) for step in range(total)]
    rises = [b - a for a, b in pairwise(rates[:warmup])]
    assert rises == pytest.approx([peak / warmup] * len(rises)) if warmup else rises == []
    assert all(b < a for a, b in pairwise(rates[warmup:]))


@pytest.mark.parametrize(("warmup", "total"), [(0, 40), (5, 40), (7, 30)])
def test_the_cosine_equals_timms(warmup: int, total: int) -> None:
    """timm's schedule after its own warm-up, without the prefix shift: one cycle over what the warm-up leaves."""
    peak = 2e-4
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=peak)
    timms = CosineLRScheduler(optimizer, t_initial=total - warmup, lr_min=0.0, t_in_epochs=False)
    for step in range(warmup, total):
        timms.step_update(step - warmup)
        rate = lr_at(step, peak=peak, warmup_steps=warmup, total_steps=total)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_the_rate_at_known_places() -> None:
    def rate(step: int) -> float:
        return lr_at(step, peak=1.0, warmup_steps=10, total_steps=110)

    assert [rate(0), rate(4), rate(9), rate(10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rate(60) == pytest.approx(0.5)  # the middle of the cosine
    assert rate(109) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


# --- decay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"color_norm": "residual"},
        {"split_heads": True},
        {"conv_stem": "off", "patch_size": 4},
        {"optimizer": "muon"},
    ],
)
def test_norms_biases_scalars_and_positions_are_not_decayed(fields: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **fields)
    model = create_nkat_vit(config, num_classes=10)
    optimizer = create_optimizer(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[float, set[str]] = {}
    for group in optimizer.param_groups:
        groups.setdefault(group["weight_decay"], set()).update(names[id(p)] for p in group["params"])
    assert set(groups) == {0.0, config.weight_decay}
    assert groups[0.0] | groups[config.weight_decay] == set(names.values())
    assert not groups[0.0] & groups[config.weight_decay]
    decayed = groups[config.weight_decay]
    assert decayed == {n for n, p in model.named_parameters() if p.ndim >= 2 and "pos_embed" not in n}
    assert not any(word in name for name in decayed for word in ("bias", "norm", "alpha", "beta", "gain"))
    assert "blocks.0.mlp.fc1.weight" in decayed


def test_it_is_adamw_at_the_configured_rate() -> None:
    config = dataclasses.replace(TINY, lr=3e-3, weight_decay=0.07)
    optimizer = create_optimizer(create_nkat_vit(config, num_classes=10), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_frozen_parameters_are_left_out() -> None:
    model = create_nkat_vit(TINY, num_classes=10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    optimizer = create_optimizer(model, TINY)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


# --- Muon -------------------------------------------------------------------------------------------------------------

MUON = dataclasses.replace(TINY, optimizer="muon", lr=3e-3)


@pytest.fixture(autouse=True)
def timms_own() -> Iterator[None]:
    """Leave timm's function as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "zeropower_via_newtonschulz", muon.zeropower_via_newtonschulz)
        yield


def stepped(config: TrialConfig) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    """A network after one step on a loss of every parameter, its optimizer, and the parameters before."""
    torch.manual_seed(0)
    model = create_nkat_vit(config, num_classes=10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = create_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer, before


@pytest.mark.parametrize("fields", [{}, {"split_heads": True}, {"conv_stem": "off", "patch_size": 4}])
def test_muon_updates_matrices_and_adamw_vectors_and_positions(fields: dict[str, Any]) -> None:
    model, optimizer, _ = stepped(dataclasses.replace(MUON, **fields))
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[parameter] for parameter, state in optimizer.state.items() if state["use_muon"]}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert by_muon == {name for name in matrices if name not in ("pos_embed", "patch_embed.colours.proj.weight")}
    assert {"blocks.0.attn.qkv.weight", "head.weight", "patch_embed.proj.weight"} <= by_muon


def test_muons_update_has_equal_singular_values_and_adamws_its_share_of_the_rate() -> None:
    model, _, before = stepped(dataclasses.replace(MUON, weight_decay=0.0))
    change = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    values = torch.linalg.svdvals(change["blocks.0.attn.proj.weight"])
    assert values / (3e-3 * 0.2 * math.sqrt(16)) == pytest.approx(1, abs=0.35)  # the iteration's own spread around 1
    assert change["fc_norm.weight"].abs().mean().item() == pytest.approx(3e-3 * MUON_FALLBACK_LR_SCALE, rel=1e-3)


@pytest.mark.parametrize("native", [False, True])
def test_the_iteration_runs_in_float32_where_bfloat16_is_emulated(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """timm's function has no option for it: this fails when timm no longer calls what is replaced, or passes a type."""
    types: list[torch.dtype] = []
    original = optim._timm_orthogonalise

    def watched(*arguments: Any, **options: Any) -> Tensor:
        types.append(options["dtype"])
        found: Tensor = original(*arguments, **options)
        return found

    monkeypatch.setattr(optim, "_timm_orthogonalise", watched)
    monkeypatch.setattr(optim, "has_native_bfloat16", lambda _: native)
    stepped(MUON)
    assert set(types) == {torch.bfloat16 if native else torch.float32}


def test_both_precisions_give_nearly_the_same_direction() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(64, 16)
    one, other = (
        optim._timm_orthogonalise(gradient, 5, muon._COEFFICIENTS["quintic"], dtype=dtype).float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999


# --- average ----------------------------------------------------------------------------------------------------------


def average_of(steps: int, decay: float) -> list[float]:
    """The weight that the average keeps of what it was, step by step, measured: 1 before, 0 from then on."""
    model = nn.Linear(1, 1, bias=False)
    measured = []
    ema = Average(model, decay)
    with torch.no_grad():
        for step in range(steps):
            ema.module.weight.fill_(1.0)  # type: ignore[union-attr, operator]
            model.weight.fill_(0.0)
            ema.update(step)
            measured.append(float(ema.module.weight))  # type: ignore[arg-type]
    return measured


def test_the_averages_decay_warms_up() -> None:
    """1 - (1 + step) ** -3/4: about the last quarter of the steps counts, from the first epoch on."""
    decays = average_of(1000, 0.9995)
    assert decays[65] == pytest.approx(0.956, abs=5e-4)  # after 64 steps
    assert decays[0] == 0.0  # the first update takes the weights as they are
    assert decays == sorted(decays)
    assert decays[2:] == pytest.approx([1 - step**-0.75 for step in range(2, 1000)], abs=1e-6)


def test_the_averages_decay_is_capped() -> None:
    assert max(average_of(300, 0.95)) == pytest.approx(0.95)


def test_the_average_takes_buffers_along() -> None:
    model = nn.BatchNorm1d(2)
    ema = Average(model, 0.5)
    model.running_mean.fill_(4.0)  # type: ignore[union-attr]
    ema.update(0)
    assert ema.module.running_mean.tolist() == [4.0, 4.0]  # type: ignore[union-attr, operator]


def test_the_average_is_timms_bit_for_bit_also_after_weights_were_loaded() -> None:
    model = create_nkat_vit(TINY, num_classes=10)
    other = create_nkat_vit(TINY, num_classes=10).state_dict()
    ours, timms = Average(model, 0.9), ModelEmaV3(model, decay=0.9, use_warmup=True, warmup_power=3 / 4)
    for step in range(30):
        if step == 20:
            model.load_state_dict(other)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(torch.ones_like(tensor))
        ours.update(step)
        timms.update(model, step=step)
    found, expected = ours.state_dict(), timms.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
