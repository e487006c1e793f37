"""NKAT-ViT as timm and as the package create it: counts, saving, the search space, stochastic depth."""

import itertools
import json
import math
import os
import random
import re
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract

import nkat_ray.model as nkat
from nkat_ray.config import ModelConfig, TrialConfig, field_names
from nkat_ray.model.vit import ResidualScalar
from nkat_ray.space import SPACES, Choice

SMALL = {"embed_dim": 32, "depth": 2}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def images(batch=2, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def small_model(*, num_classes=10, grey=False, **fields):
    torch.manual_seed(0)
    return nkat.create_nkat_vit(
        ModelConfig(**{**SMALL, **fields}), num_classes=num_classes, grey=grey, mean=MEAN, std=STD
    )


def saved(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def assert_same_model(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(a.eval()(images()), b.eval()(images()))


def test_baseline_has_the_stated_size():
    model = nkat.create_nkat_vit(ModelConfig(), num_classes=10)
    assert nkat.count_parameters(model) == pytest.approx(12.6e6, rel=0.005)
    assert nkat.count_parameters(model.patch_embed.stem) == 19_584
    assert nkat.count_nkat_parameters(model) == 4 * 7
    assert model(images()).shape == (2, 10)


def test_four_scalars_a_block_start_where_the_specification_says():
    scalars = {name: p.item() for name, p in small_model(depth=3).named_parameters() if p.ndim == 0}
    assert nkat.count_nkat_parameters(small_model(depth=3)) == len(scalars) == 12
    assert sorted(set(scalars.values())) == pytest.approx([0.05, 0.1, 1.0])


def test_timm_makes_the_same_model():
    ours = small_model(conv_stem="small", top_k=4)
    torch.manual_seed(0)
    fields = {name: getattr(ours.config, name) for name in field_names(ModelConfig)}
    theirs = timm.create_model("nkat_vit", num_classes=10, **fields)
    assert theirs.config == ours.config
    assert_same_model(ours, theirs)


def test_through_timm_a_filter_that_is_not_given_or_none_is_off():
    for options in ({}, {"top_k": None, "top_p": None}):  # timm drops None: the two cannot be told apart
        config = timm.create_model("nkat_vit", **SMALL, **options).config
        assert config == replace(ModelConfig(**SMALL), top_k=None, top_p=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch_size is 3"),
        ({"embed_dim": 33}, "embed_dim is 33"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"in_chans": 1}, "in_chans 1"),
        ({"img_size": 64}, "img_size is 64"),
    ],
)
def test_timm_gets_a_clear_error_for_a_value_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("nkat_vit", **{**SMALL, **options})


def test_modulation_decays_from_block_to_block():
    model = small_model(depth=4, nkat_strength=0.5, nkat_decay=0.9)
    strengths = [block.attn.modulation.strength for block in model.blocks]
    assert strengths == pytest.approx([0.5, 0.45, 0.405, 0.3645])


def test_each_residual_branch_has_its_scalar():
    block = small_model().blocks[1].eval()
    x = torch.randn(2, 16, 32)
    assert torch.equal(ResidualScalar()(x), x)
    attention, scaled = block.attn(block.norm1(x)), x.clone()
    block.ls1.gain.data.fill_(0.3)
    block.ls2.gain.data.fill_(-2.0)
    scaled = x + 0.3 * attention
    scaled = scaled - 2.0 * block.mlp(block.norm2(scaled))
    torch.testing.assert_close(block(x), scaled)


def test_tokens_have_learned_positions_no_class_token_and_are_averaged():
    model = small_model().eval()
    assert model.cls_token is None
    assert model.pos_embed.shape == (1, 16, 32)
    features = model.forward_features(images())
    torch.testing.assert_close(model(images()), model.head(model.fc_norm(features.mean(1))))


# --- the search space -------------------------------------------------------------------------------------------------


SEARCHED = {name: domain for name, domain in SPACES["extended"].items() if name in field_names(ModelConfig)}
CHOICES = {name: domain.values for name, domain in SEARCHED.items() if isinstance(domain, Choice)}


def draw(random):
    fields = {
        name: random.choice(domain.values) if isinstance(domain, Choice) else random.uniform(domain.low, domain.high)
        for name, domain in SEARCHED.items()
    }
    return {**fields, **SMALL}


RANDOM = random.Random(0)
SAMPLE = [draw(RANDOM) for _ in range(120)]
CORNERS = [
    {**SMALL, "conv_stem": stem, "stem_stride": stride, "patch_size": patch, "split_heads": split, "color_norm": norm}
    for stem in ("off", "tiny", "small")
    for stride in (4, 2)
    for patch in (2, 4)
    for split in (False, True)
    for norm in ("off", "layernorm", "residual")
]


def test_the_sample_covers_every_pair_of_choices():
    for one, two in itertools.combinations(CHOICES, 2):
        pairs = {(fields[one], fields[two]) for fields in SAMPLE}
        assert pairs == set(itertools.product(CHOICES[one], CHOICES[two])), (one, two)


def assert_trains(fields):
    model = small_model(num_classes=7, **fields).train()
    logits = model(images())
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_every_combination_of_the_extended_space_trains():
    for fields in SAMPLE:
        assert_trains(fields)


def test_every_layout_trains():
    for fields in CORNERS:
        assert_trains(fields)


def test_repeated_grey_images_train_with_split_heads():
    model = small_model(split_heads=True, color_norm="layernorm", grey=True).train()
    loss = model(images()[:, :1].repeat(1, 3, 1, 1)).square().sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- stochastic depth -------------------------------------------------------------------------------------------------


def test_branches_are_skipped_more_often_towards_the_last_block():
    model = small_model(depth=5, drop_path=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_each_image_skips_whole_branches_in_training_only_and_what_stays_is_scaled_up():
    model, plain = (small_model(drop_path=rate, dropout_attn=0.0, dropout_embed=0.0) for rate in (0.5, 0.0))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images()), plain.eval()(images()))
    block, tokens = model.train().blocks[-1], torch.randn(64, 16, 32)
    attention = block.ls1(block.attn(block.norm1(tokens)))
    block.mlp.fc2.weight.data.zero_()
    block.mlp.fc2.bias.data.zero_()  # the other branch adds nothing
    share = ((block(tokens) - tokens) / attention).detach().flatten(1)
    assert set(share.median(1).values.round().tolist()) == {0.0, 2.0}
    assert share.median(1).values == pytest.approx(share.mean(1), abs=0.05)  # all tokens of an image alike


def test_without_stochastic_depth_nothing_is_drawn():
    model = small_model(dropout_attn=0.0, dropout_embed=0.0).train()
    before = torch.get_rng_state()
    model(images())
    assert torch.equal(torch.get_rng_state(), before)


# --- grey -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["layernorm", "residual"])
def test_grey_bypasses_color_norm_and_only_the_field_decides(mode):
    colour, off = small_model(color_norm=mode).eval(), small_model(color_norm="off").eval()
    grey = small_model(color_norm=mode, grey=True).eval()
    torch.nn.init.constant_(colour.patch_embed.color_norm.norm.bias, 0.5)  # else `residual` leaves grey pixels alone
    grey.load_state_dict(colour.state_dict())
    off.load_state_dict(colour.state_dict(), strict=False)
    repeated = images()[:, :1].repeat(1, 3, 1, 1)
    assert not torch.equal(colour(repeated), off(repeated))  # grey pixels alone change nothing
    assert (colour.grey, grey.grey) == (False, True)
    assert torch.equal(grey(repeated), off(repeated))
    assert torch.equal(grey(images()), off(images()))


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": None, "top_p": None, "color_norm": "residual", "split_heads": True},
        {"conv_stem": "off", "patch_size": 4, "temperature": 0.1 + 0.2, "dropout_attn": 0.0},
        {"conv_stem": "small", "stem_stride": 2, "nkat_decay": 0.9923},
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_a_saved_folder_reloads_bit_equal_through_timm(tmp_path, fields, grey):
    model = small_model(grey=grey, **fields).train()
    model(images())  # moves BatchNorm's statistics
    nkat.save_pretrained(model, tmp_path / "best")
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = saved(tmp_path / "best")
    assert (again.config, again.grey) == (model.config, grey)
    assert tuple(again.pretrained_cfg["mean"]) == MEAN
    assert tuple(again.pretrained_cfg["std"]) == STD
    assert_same_model(model, again)


# Reported in safetensors/safetensors#782, huggingface/sentence-transformers#4010
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_every_file_is_readable_by_whom_the_umask_lets_read(tmp_path, mask):
    before = os.umask(mask)
    try:
        nkat.save_pretrained(small_model(depth=1), tmp_path / "best", class_names=["a", "b"])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "best").iterdir()} == {0o666 & ~mask}


# Reported in SHI-Labs/Compact-Transformers#40, huggingface/pytorch-image-models#2419
def test_a_saved_folder_says_what_it_needs_and_what_its_classes_are(tmp_path):
    nkat.save_pretrained(small_model(depth=1), tmp_path, class_names=["cat", "dog"])
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["cat", "dog"]
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    exec(code.replace("FOLDER", str(tmp_path)), {})


def test_saving_twice_and_from_any_memory_layout(tmp_path):
    nkat.save_pretrained(small_model(depth=1), tmp_path)
    model = small_model().to(memory_format=torch.channels_last)
    nkat.save_pretrained(model, tmp_path)
    assert_same_model(model.to(memory_format=torch.contiguous_format), saved(tmp_path))


def test_timm_puts_a_fresh_head_on_saved_weights(tmp_path):
    model = small_model()
    nkat.save_pretrained(model, tmp_path)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4)
    assert other(images()).shape == (2, 4)
    assert torch.equal(other.pos_embed, model.pos_embed)


def test_a_trial_configuration_is_enough():
    model = nkat.create_nkat_vit(TrialConfig(**SMALL, lr=1e-3), num_classes=3)
    assert model.config == ModelConfig(**SMALL)


# --- with the rest of timm and torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"conv_stem": "off"}])
def test_attention_maps_can_be_hooked_when_fused_attention_is_off(fields):
    set_fused_attn(False)
    try:
        model = small_model(**fields)
    finally:
        set_fused_attn(True)
    maps = AttentionExtract(model, method="hook")(images())
    assert len(maps) == 2
    for weights in maps.values():
        kept = (weights > 0).sum(-1)
        entropy = -torch.special.xlogy(weights, weights).sum(-1)
        assert weights.shape == (2, 8, model.config.tokens, model.config.tokens)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
        assert 1 <= kept.min() <= kept.max() <= 6
        assert entropy.max() <= math.log(6) + 1e-6


@pytest.mark.parametrize("fields", [{}, {"stem_stride": 2}, {"conv_stem": "off"}, {"split_heads": True}])
def test_bfloat16_autocast_is_close_and_trains(fields):
    model = small_model(top_k=None, top_p=None, **fields).eval()  # no choice of keys that a rounding could tip
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images())
    torch.testing.assert_close(low.float(), model(images()), rtol=0.05, atol=0.02)
    model = small_model(**fields).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("fields", [{}, {"split_heads": True}])
def test_features_of_each_block_can_be_read(fields):
    model = small_model(**fields).eval()
    last, features = model.forward_intermediates(images())
    assert [f.shape for f in features] == [(2, 32, 4, 4)] * 2
    torch.testing.assert_close(last, model.forward_features(images()))
    model.set_grad_checkpointing()
    model.train()(images()).sum().backward()


def test_the_filter_is_the_same_in_training_and_evaluation():
    model = small_model(dropout_attn=0.0, dropout_embed=0.0, conv_stem="off", patch_size=4)
    torch.testing.assert_close(model.train()(images()), model.eval()(images()))
