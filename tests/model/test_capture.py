"""The weights that hooks see are those of the prediction: every filter, every path, and nothing is left changed."""

import pytest
import torch

from nkat_ray.config import ModelConfig
from nkat_ray.model import create_nkat_vit, filtered_softmax
from nkat_ray.model.capture import capture_attention, nkat_scalars, plain_difference, row_error

CASES = {
    "filter": {},
    "off": {"top_k": None, "top_p": None},
    "top_k alone": {"top_p": None, "top_k": 3},
    "256 tokens": {"conv_stem": "off", "patch_size": 2},
    "256 tokens, off": {"conv_stem": "off", "patch_size": 2, "top_k": None, "top_p": None},
    "split heads": {"split_heads": True, "num_heads": 8},
}


def sharp_model(**fields):
    """Two blocks whose queries and keys matter: a fresh network attends almost evenly."""
    torch.manual_seed(0)
    model = create_nkat_vit(
        ModelConfig(**{"embed_dim": 16, "num_heads": 2, "depth": 2, "dropout_attn": 0.5, **fields}), num_classes=10
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
    return model.eval()


def images(batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_the_pass_that_is_seen_is_the_prediction(fields):
    model = sharp_model(**fields)
    config = model.config
    with torch.no_grad():
        plain = model(images())
    seen = capture_attention(model, images())
    torch.testing.assert_close(seen.logits, plain, rtol=1e-4, atol=1e-5)
    assert plain_difference(model, images(), seen) < 1e-4
    assert seen.weights.shape == (2, 3, config.num_heads, config.tokens, config.tokens)
    assert row_error(seen) < 1e-5
    assert (seen.weights > 0).sum(-1).max() <= min(config.top_k or config.tokens, config.tokens)
    if config.top_k or config.top_p:
        assert (seen.weights == 0).any()


def test_the_first_blocks_weights_are_the_filters():
    model = sharp_model()
    seen = capture_attention(model, images())
    tokens = model.norm_pre(model.pos_drop(model.patch_embed(images()) + model.pos_embed))
    block = model.blocks[0]
    q, k, _ = block.attn._qkv(block.norm1(tokens))
    config = model.config
    expected = filtered_softmax(
        (q @ k.mT) * q.shape[-1] ** -0.5, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    torch.testing.assert_close(seen.weights[0], expected)


@pytest.mark.parametrize("fused", [True, False])
def test_the_model_is_left_as_it_was(fused):
    model = sharp_model(top_k=None, top_p=None)
    for block in model.blocks:
        block.attn.fused_attn = fused
    capture_attention(model, images())
    with pytest.raises(ValueError, match="images are"):
        capture_attention(model, torch.zeros(1, 3, 8, 8))
    assert [block.attn.fused_attn for block in model.blocks] == [fused, fused]
    assert not any(block.attn.attn_drop._forward_hooks for block in model.blocks)
    assert not any("_scores" in vars(block.attn) for block in model.blocks)


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match="eval"):
        capture_attention(sharp_model().train(), images())


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES.keys())
def test_kept_tokens_are_the_filters_own_choice(fields):
    """Counted again from the scores of the first block by sorting; deeper blocks within the filter's bounds."""
    model = sharp_model(**fields)
    config = model.config
    seen = capture_attention(model, images())
    assert seen.kept.shape == seen.weights.shape[:-1]
    assert (seen.kept >= (seen.weights > 0).sum(-1)).all()
    assert seen.kept.min() >= 1
    assert seen.kept.max() <= min(config.top_k or config.tokens, config.tokens)
    if config.split_heads:
        return
    tokens = model.norm_pre(model.pos_drop(model.patch_embed(images()) + model.pos_embed))
    attn = model.blocks[0].attn
    q, k, _ = attn._qkv(model.blocks[0].norm1(tokens))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5 / config.temperature
    for row, kept in zip(scores.flatten(0, 2).tolist(), seen.kept[0].flatten().tolist(), strict=True):
        best = torch.tensor(sorted(row, reverse=True)[: config.top_k]).double().softmax(0).tolist()
        mass, wanted = 0.0, 0
        while wanted < len(best) and (config.top_p is None or mass < config.top_p - 1e-6):
            mass, wanted = mass + best[wanted], wanted + 1
        assert kept == wanted


def test_a_kept_token_counts_where_its_weight_underflows():
    model = sharp_model(top_k=3, top_p=None)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(1000)
    seen = capture_attention(model, images())
    assert (seen.kept == 3).all()
    assert ((seen.weights > 0).sum(-1) < 3).any()


def test_weights_that_do_not_sum_to_one_and_weights_on_dropped_keys_are_noticed(monkeypatch):
    monkeypatch.setattr("nkat_ray.model.attention.filtered_softmax", lambda scores, **_: scores.softmax(-1))
    with pytest.raises(RuntimeError, match="dropped"):
        capture_attention(sharp_model(), images())
    monkeypatch.setattr(
        "nkat_ray.model.attention.filtered_softmax", lambda scores, **kw: 0.9 * filtered_softmax(scores, **kw)
    )
    with pytest.raises(RuntimeError, match="sum to 1"):
        capture_attention(sharp_model(), images())
    monkeypatch.setattr(
        "nkat_ray.model.attention.filtered_softmax", lambda scores, **kw: torch.nan * filtered_softmax(scores, **kw)
    )
    with pytest.raises(RuntimeError, match="dropped"):
        capture_attention(sharp_model(), images())


def test_a_block_that_shows_nothing_is_noticed():
    model = sharp_model()
    model.blocks[1].attn.forward = lambda x: x
    with pytest.raises(RuntimeError, match="1 of 2 blocks"):
        capture_attention(model, images())


def test_another_prediction_is_noticed():
    model = sharp_model()
    seen = capture_attention(model, images())
    with torch.no_grad():
        model.head.bias.add_(1)
    with pytest.raises(RuntimeError, match="differ"):
        plain_difference(model, images(), seen)


def test_scalars_come_block_by_block():
    model = sharp_model(nkat_strength=0.5, nkat_decay=0.5)
    with torch.no_grad():
        model.blocks[1].attn.modulation.beta.fill_(7.0)
        model.blocks[0].ls2.gain.fill_(3.0)
    assert nkat_scalars(model) == {
        "alpha": pytest.approx([0.1, 0.1]),
        "beta": pytest.approx([0.05, 7.0]),
        "attention_gain": [1.0, 1.0],
        "mlp_gain": [3.0, 1.0],
        "strength": [0.5, 0.25],
    }
