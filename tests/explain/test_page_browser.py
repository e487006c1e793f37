"""The page of `nkat explain` in a real browser: every picture and chart is drawn, nothing is asked of the network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nkat_ray.explain.page import PAGE_FILE, Example, Explanation, explanation_page
from nkat_ray.metrics import NKAT_SCALARS

pytestmark = pytest.mark.browser

BLOCKS, HEADS, TOKENS = 3, 8, 16


def explained(folder: Path) -> Path:
    """A page with three examples (right, wrong, unknown), split heads, and curves over six epochs."""
    draw = np.random.default_rng(0)
    weights = draw.random((3, BLOCKS, HEADS, TOKENS, TOKENS)) ** 4
    weights /= weights.sum(-1, keepdims=True)
    hostile = "<img src=x onerror=alert(1)>"
    examples = [
        Example("image 1", draw.integers(0, 256, (32, 32, 3), np.uint8), truth, [("cat", 0.7), (hostile, 0.2)], part)
        for truth, part in zip(("cat", hostile, None), weights, strict=True)
    ]
    scalars = {name: [1.0, 0.9, 0.8] for name in (*NKAT_SCALARS, "strength")}
    history = [
        {"epoch": epoch, "val_accuracy": 0.1 * epoch} | {name: [1.0, 0.9, 0.8] for name in NKAT_SCALARS}
        for epoch in range(1, 7)
    ]
    found = Explanation(
        name=hostile, examples=examples, entropy=np.full((BLOCKS, HEADS), 1.5), kept=np.full((BLOCKS, HEADS), 4.0),
        averaged=3, right=1, what="images", tokens=TOKENS, top_k=6, split_heads=True, scalars=scalars, history=history,
        epoch=6, facts={"data": hostile},
    )  # fmt: skip
    return explanation_page(found).save(folder / PAGE_FILE)


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_drawn_without_error_or_request(tmp_path: Path, browser: Any, width: int) -> None:
    page = explained(tmp_path)
    browser.open(page, width=width, height=900)
    assert browser.errors == browser.warnings == []
    assert {address for address in browser.requests if not address.startswith("data:")} == {page.as_uri()}
    assert browser.eval("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.eval("document.images.length") == 3 * (2 + BLOCKS)
    assert browser.eval("[...document.querySelectorAll('.chart')].every(chart => !!chart.querySelector('svg'))")
    assert browser.eval("document.querySelectorAll('.chart').length") == 2 + 2 + len(NKAT_SCALARS)
    assert browser.eval("document.documentElement.scrollWidth") <= width
