"""Estimates of what a training costs, against networks that are built and against each other."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nkat_ray.config import TrialConfig
from nkat_ray.cost import (
    CPU_PROCESS_BYTES,
    RECOMPUTE_BYTES,
    cpu_bytes,
    epoch_flops,
    parameter_estimate,
    peak_bytes,
    recomputes,
    stored_parameters,
)


def config(**fields: Any) -> TrialConfig:
    return dataclasses.replace(TrialConfig(), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"embed_dim": 512, "depth": 9, "conv_stem": "off"},
        {"embed_dim": 512, "depth": 5, "conv_stem": "small", "patch_size": 4},
        {"embed_dim": 384, "depth": 5, "conv_stem": "small"},
    ],
)
def test_parameters_are_estimated_within_ten_percent_of_the_built_model(fields: dict[str, Any]) -> None:
    from nkat_ray.model import count_parameters, create_nkat_vit

    built = count_parameters(create_nkat_vit(config(**fields), num_classes=10))
    assert parameter_estimate(config(**fields)) == pytest.approx(built, rel=0.1)


@pytest.mark.parametrize("stem", ["off", "tiny", "small"])
@pytest.mark.parametrize("patch_size", [2, 4])
def test_a_file_holds_the_stem_too_which_is_most_of_a_small_network(stem: str, patch_size: int) -> None:
    from nkat_ray.model import count_parameters, create_nkat_vit

    small = config(embed_dim=64, num_heads=4, depth=2, conv_stem=stem, patch_size=patch_size)
    built = count_parameters(create_nkat_vit(small, num_classes=10))
    assert stored_parameters(small) == pytest.approx(built, rel=0.1)


def test_flops_are_six_per_parameter_token_and_image() -> None:
    assert epoch_flops(TrialConfig(), 45_000) == 6 * parameter_estimate(TrialConfig()) * 16 * 45_000


@given(st.integers(1, 47), st.integers(1, 255), st.sampled_from((1, 32, 128)), st.sampled_from((2, 4, 8)))
def test_peak_memory_grows_with_everything_that_costs_memory(depth: int, width: int, batch: int, patch: int) -> None:
    base = TrialConfig(conv_stem="off", depth=depth, embed_dim=8 * width, batch_size=batch, patch_size=patch)
    for more in ({"batch_size": batch + 1}, {"depth": depth + 1}, {"embed_dim": 8 * width + 8}):
        assert peak_bytes(dataclasses.replace(base, **more)) > peak_bytes(base)


def test_a_step_that_would_need_more_than_four_gibibytes_is_recomputed_on_a_cpu() -> None:
    large = config(conv_stem="off", patch_size=2, embed_dim=512, depth=9)
    assert peak_bytes(large) > 20 * 2**30
    assert recomputes(large)
    assert cpu_bytes(large) < 5 * 2**30
    assert not recomputes(TrialConfig())
    assert cpu_bytes(TrialConfig()) == peak_bytes(TrialConfig()) + CPU_PROCESS_BYTES < RECOMPUTE_BYTES
