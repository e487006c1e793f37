"""Attention as numbers and pictures, against loops, closed forms and pixels counted by hand."""

import io
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nkat_ray.explain import attention
from nkat_ray.explain.attention import entropy, overlay, received, rollout, sheet, strip


def random_weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows that sum to 1, of shape (*shape, last of shape)."""
    weights = np.random.default_rng(seed).random((*shape, shape[-1])) ** 3
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_entropy_of_known_rows(n: int) -> None:
    assert entropy(np.full(n, 1 / n)) == pytest.approx(math.log(n))
    assert entropy(np.eye(n)).tolist() == [0.0] * n
    assert not np.signbit(entropy(np.eye(n))).any()


def test_entropy_of_two_tokens_by_hand() -> None:
    assert entropy(np.array([[0.25, 0.75, 0.0]])) == pytest.approx([-0.25 * math.log(0.25) - 0.75 * math.log(0.75)])


def test_received_is_the_mean_over_queries() -> None:
    weights = random_weights(2, 3, 5)
    mine = received(weights)
    for a, b, key in itertools.product(range(2), range(3), range(5)):
        assert mine[a, b, key] == pytest.approx(sum(weights[a, b, query, key] for query in range(5)) / 5)
    assert mine.sum(-1) == pytest.approx(np.ones((2, 3)))


def test_rollout_is_the_product_written_out() -> None:
    blocks, heads, tokens = 3, 2, 4
    weights = random_weights(blocks, heads, tokens)
    flow = [[float(i == j) for j in range(tokens)] for i in range(tokens)]
    for block in range(blocks):
        mixed = [
            [sum(weights[block, h, i, j] for h in range(heads)) / heads / 2 + (i == j) / 2 for j in range(tokens)]
            for i in range(tokens)
        ]
        flow = [[sum(mixed[i][k] * flow[k][j] for k in range(tokens)) for j in range(tokens)] for i in range(tokens)]
    assert rollout(weights) == pytest.approx(np.array(flow))
    assert rollout(weights).sum(-1) == pytest.approx(np.ones(tokens))


def test_rollout_goes_image_by_image_and_its_order_matters() -> None:
    weights = random_weights(3, 5, 2, 4)
    together = rollout(weights)
    assert together.shape == (5, 4, 4)
    for image in range(5):
        assert together[image] == pytest.approx(rollout(weights[:, image]))
    assert np.abs(rollout(weights[::-1]) - together).max() > 1e-3


def test_rollout_of_heads_that_look_at_themselves_is_the_identity() -> None:
    assert rollout(np.broadcast_to(np.eye(4), (6, 2, 4, 4))) == pytest.approx(np.eye(4))


def test_overlay_colours_the_tokens_cell_and_no_other() -> None:
    image = np.full((32, 32, 3), 100, np.uint8)
    plain = overlay(image, np.zeros(16), top=1.0)
    lit = overlay(image, np.eye(16)[6], top=1.0)  # row 1, column 2 of a 4x4 grid
    changed = (plain != lit).any(-1)
    assert changed[8:16, 16:24].all()
    assert changed.sum() == 64
    bright, dark = lit[8, 16].astype(int), lit[0, 0].astype(int)
    assert bright[0] > dark[0] + 80  # yellow against violet
    assert bright[1] > dark[1] + 80
    assert (overlay(image, np.full(16, 9.0), top=1.0) == overlay(image, np.ones(16), top=1.0)).all()  # cut off


def test_overlay_keeps_the_image_visible() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    over = overlay(image, np.full(4, 0.25), top=0.25).astype(int)
    assert (over[:, 16:] > over[:, :16]).all()


@pytest.mark.parametrize("tokens", [3, 9])
def test_tokens_that_make_no_grid_over_the_image_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens"):
        overlay(np.zeros((32, 32, 3), np.uint8), np.ones(tokens), top=1.0)


def test_a_strip_is_the_overlays_side_by_side() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shares = random_weights(3, 16)[:, 0]
    pixels = strip(image, shares, top=0.5)
    assert pixels.shape == (34, 3 * 34, 4)
    for head in range(3):
        tile = pixels[1:33, 34 * head + 1 : 34 * head + 33]
        assert (tile[..., :3] == overlay(image, shares[head], top=0.5)).all()
        assert (tile[..., 3] == 255).all()
    assert (pixels[:, [0, 33, 34, 67, 68, 101], 3] == 0).all()


@pytest.mark.parametrize("split_heads", [False, True])
def test_a_sheet_shows_every_head_of_every_block(split_heads: bool) -> None:
    image = np.full((32, 32, 3), 128, np.uint8)
    shares = random_weights(2, 8, 16)[:, :, 0]
    picture = Image.open(io.BytesIO(attention.png(sheet(image, shares, split_heads=split_heads))))
    assert picture.format == "PNG"
    pixels = np.asarray(picture).astype(int)
    for block, head in itertools.product(range(2), range(8)):  # a tile's middle, counted from the right and below
        y = picture.height - 4 - 102 * (1 - block) - 51
        x = picture.width - 4 - 102 * (7 - head) - 51
        wanted = overlay(image, shares[block, head], top=float(shares.max()))[16, 16]
        assert (pixels[y, x] == wanted).all()
    red = (pixels[..., 0] > pixels[..., 2] + 80) & (pixels[..., 0] > pixels[..., 1] + 80)
    assert red[:60].any() == split_heads  # the word `red` in red


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, nkat_ray.explain.attention, nkat_ray.explain.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
