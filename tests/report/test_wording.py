"""Phrases that the terminal and TensorBoard share."""

import pytest

from nkat_ray.report.wording import design_label


@pytest.mark.parametrize(("stem", "label"), [("tiny", "tiny p2 384x7"), ("off", "no stem p2 384x7")])
def test_a_network_is_named_by_what_sets_its_size(stem: str, label: str) -> None:
    assert design_label({"conv_stem": stem, "patch_size": 2, "embed_dim": 384, "depth": 7, "lr": 1e-3}) == label
