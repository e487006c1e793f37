"""The filter against plain Python loops, the modulation against `statistics`, the layer's ways against each other."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn

from nkat_ray.model import NKATAttention, attention, filtered_softmax
from nkat_ray.model.attention import NKATModulation, keep_mask

EXACT = {"rtol": 0, "atol": 1e-12}


def softmax_by_hand(row, *, temperature=1.0, top_k=None, top_p=None):
    """Section 3 of docs/spec.md, word by word."""
    scaled = [score / temperature for score in row]
    order = sorted(range(len(row)), key=lambda i: scaled[i], reverse=True)[:top_k]
    top = scaled[order[0]]
    mass = {i: math.exp(scaled[i] - top) for i in order}
    if top_p is not None and top_p < 1:
        total, reached, prefix = sum(mass.values()), 0.0, []
        for i in order:
            prefix.append(i)
            reached += mass[i] / total
            if reached >= top_p:
                break
        mass = {i: mass[i] for i in prefix}
    total = sum(mass.values())
    return [mass.get(i, 0.0) / total for i in range(len(row))]


def gradient_by_hand(weights, upstream, temperature):
    mean = sum(w * g for w, g in zip(weights, upstream, strict=True))
    return [w * (g - mean) / temperature for w, g in zip(weights, upstream, strict=True)]


def random_rows(rows, tokens, seed=0, spread=2.0):
    return spread * torch.randn(rows, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_like_by_hand(scores, **options):
    scores = scores.clone().requires_grad_()
    upstream = random_rows(*scores.shape, seed=1)
    weights = filtered_softmax(scores, **options)
    weights.backward(upstream)
    expected = [softmax_by_hand(row, **options) for row in scores.tolist()]
    slopes = [
        gradient_by_hand(w, g, options.get("temperature", 1.0))
        for w, g in zip(expected, upstream.tolist(), strict=True)
    ]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(scores.grad, torch.tensor(slopes, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 70])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.5, 0.8, 0.95, 1.0])
def test_filter_equals_the_loops(tokens, top_p):
    for top_k in (None, 1, 2, max(1, tokens - 1), tokens, tokens + 3):
        for temperature in (0.3, 1.0, 4.0):
            assert_like_by_hand(random_rows(6, tokens), temperature=temperature, top_k=top_k, top_p=top_p)


def test_filter_equals_the_loops_on_extreme_scores():
    row = [1e30, 1e30 - 1e15, 5.0, -1e30, -math.inf, 0.0]
    close = [1000.0, 999.5, 998.0, -math.inf, -math.inf, -1e4]
    for top_k in (None, 1, 3, 5, 6):
        for top_p in (None, 0.3, 0.9, 1.0):
            assert_like_by_hand(torch.tensor([row, close], dtype=torch.float64), top_k=top_k, top_p=top_p)


@pytest.mark.parametrize("row", [[1.0] * 8, [2.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 3.0, 3.0, 3.0]])
@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.5, 0.7, 1.0])
def test_among_tied_scores_any_may_stay_but_as_many_as_by_hand(row, top_k, top_p):
    options = {"temperature": 0.7, "top_k": top_k, "top_p": top_p}
    weights = filtered_softmax(torch.tensor(row, dtype=torch.float64), **options).tolist()
    expected = softmax_by_hand(row, **options)
    for score in set(row):  # the weights that each value of the score got, in any order
        got = sorted(w for w, s in zip(weights, row, strict=True) if s == score)
        want = sorted(w for w, s in zip(expected, row, strict=True) if s == score)
        assert got == pytest.approx(want, abs=1e-12)


def test_top_p_counts_the_mass_renormalised_over_what_top_k_kept():
    scores = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
    # top_k 2 leaves 4/7 and 3/7: 4/7 reaches 0.5 alone, which 0.4 of the whole would not.
    assert filtered_softmax(scores, top_k=2, top_p=0.5).tolist() == [1, 0, 0, 0]
    assert filtered_softmax(scores, top_p=0.5).count_nonzero() == 2


def test_temperature_comes_before_top_p():
    scores = torch.log(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    assert filtered_softmax(scores, temperature=0.1, top_p=0.9).count_nonzero() == 1
    assert filtered_softmax(scores, temperature=10.0, top_p=0.9).count_nonzero() == 3


def test_top_p_of_one_keeps_all_even_where_the_mass_rounds_to_one():
    weights = filtered_softmax(torch.tensor([0.0, -40.0, -80.0]), top_k=2, top_p=1.0)
    assert weights.count_nonzero() == 2


def test_second_derivatives_exist():
    scores = random_rows(3, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s: filtered_softmax(s, temperature=0.6, top_k=4, top_p=0.8), scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": -3}, "top_k"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_filter_refuses_what_is_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        filtered_softmax(torch.zeros(2, 2), **options)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_filter_computes_in_float32_at_least(dtype, expected):
    scores = random_rows(4, 9).to(dtype)
    weights = filtered_softmax(scores, temperature=0.6, top_k=3, top_p=0.8)
    assert weights.dtype == expected
    torch.testing.assert_close(weights, filtered_softmax(scores.to(expected), temperature=0.6, top_k=3, top_p=0.8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weights, filtered_softmax(scores, temperature=0.6, top_k=3, top_p=0.8))


def test_mask_is_true_where_a_weight_is():
    scores = random_rows(50, 20)
    weights = filtered_softmax(scores, top_k=6, top_p=0.8)
    assert torch.equal(keep_mask(scores, top_k=6, top_p=0.8), weights > 0)


def test_modulation_equals_the_formula():
    modulation = NKATModulation(strength=0.7).double()
    x = 3 * random_rows(5, 12) + 0.4
    factor = modulation(x.unsqueeze(0)).flatten().tolist()
    for got, row in zip(factor, x.tolist(), strict=True):
        sigmoid = 1 / (1 + math.exp(-statistics.pvariance(row)))
        alpha, beta = modulation.alpha.item(), modulation.beta.item()
        assert got == pytest.approx(1 + 0.7 * (alpha * math.tanh(statistics.fmean(row)) + beta * sigmoid), abs=1e-12)
    assert (alpha, beta) == pytest.approx((0.1, 0.05))


# --- the layer --------------------------------------------------------------------------------------------------------


def attention_layer(*, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = NKATAttention(32, **{"num_heads": 4, **options}).to(dtype)
    torch.nn.init.normal_(layer.qkv.weight, std=0.5)  # sharp enough that the filter has something to choose
    return layer


def tokens_in(count, *, batch=2, width=32):
    return torch.randn(batch, count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_with_filters_off_attention_is_scaled_dot_product_attention():
    layer, x = attention_layer(nkat_strength=0.0), tokens_in(9)
    q, k, v = layer.qkv(x).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
    expected = layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(layer(x), expected, **EXACT)
    layer.fused_attn = False
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_attention_equals_loops_over_heads_and_queries():
    layer = attention_layer(temperature=0.65, top_k=6, top_p=0.8, nkat_strength=0.9)
    x = tokens_in(10, batch=1)
    q, k, v = layer.qkv(x)[0].detach().view(10, 3, 4, 8).permute(1, 2, 0, 3)
    alpha, beta = layer.modulation.alpha.item(), layer.modulation.beta.item()  # 0.1 and 0.05, in float32
    rows = torch.zeros(10, 32, dtype=torch.float64)
    for head in range(4):
        for query in range(10):
            scores = [float(q[head, query] @ k[head, key]) / math.sqrt(8) for key in range(10)]
            weights = softmax_by_hand(scores, temperature=0.65, top_k=6, top_p=0.8)
            rows[query, 8 * head : 8 * head + 8] = sum(w * v[head, key] for key, w in enumerate(weights))
    for query, row in enumerate(x[0].tolist()):
        variance = 1 / (1 + math.exp(-statistics.pvariance(row)))
        factor = alpha * math.tanh(statistics.fmean(row)) + beta * variance
        rows[query] *= 1 + 0.9 * factor
    torch.testing.assert_close(layer(x)[0], layer.proj(rows), **EXACT)


def run(layer, x):
    x = x.clone().requires_grad_()
    out = layer(x)
    layer.zero_grad()
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("tokens", [1, 16, 80])
@pytest.mark.parametrize("options", [{"top_k": 6, "top_p": 0.8}, {"top_k": 4}, {"top_p": 0.9}, {}])
@pytest.mark.parametrize("training", [False, True])
def test_all_ways_through_the_layer_agree(tokens, options, training, monkeypatch):
    layer, x = attention_layer(temperature=0.65, nkat_strength=0.5, **options).train(training), tokens_in(tokens)
    layer.fused_attn = False
    explicit = run(layer, x)
    layer.fused_attn = True
    for limit in (0, 1000):  # the mask for SDPA; explicit weights (sparse in training)
        monkeypatch.setattr(attention, "SCATTER_TOKENS", limit)
        for got, want in zip(run(layer, x), explicit, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("limit", [0, 64])
@pytest.mark.parametrize("top_k", [6, None])
def test_dropout_acts_on_the_weights_in_every_way(fused, limit, top_k, monkeypatch):
    monkeypatch.setattr(attention, "SCATTER_TOKENS", limit)
    layer = attention_layer(top_k=top_k, dropout=0.25)
    layer.fused_attn = fused
    q, k = torch.randn(2, 64, 4, 12, 12, dtype=torch.float64).unbind()
    v = torch.eye(12, dtype=torch.float64).expand(64, 4, 12, 12)  # so that the output is the weights
    whole, dropped = layer.eval()._attend(q, k, v), layer.train()._attend(q, k, v)
    stays = dropped != 0
    torch.testing.assert_close(dropped[stays], whole[stays] / 0.75, rtol=1e-9, atol=1e-12)
    assert 1 - stays.sum().item() / whole.count_nonzero().item() == pytest.approx(0.25, abs=0.02)


def test_scores_are_float32_under_autocast():
    layer, x = attention_layer(dtype=torch.float32, top_k=6, top_p=0.8), tokens_in(16).float()
    projected, seen = [], []
    layer.qkv.register_forward_hook(lambda _module, _args, out: projected.append(out))
    layer.attn_drop.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.eval()(x).dtype == torch.float32
    q, k, _ = projected[0].double().view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)  # as rounded to bfloat16
    exact = filtered_softmax(q @ k.mT / math.sqrt(8), top_k=6, top_p=0.8)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0].double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("split_heads", [False, True])
def test_the_modulation_keeps_its_effect_under_autocast(split_heads):
    """Its factor, 1.0001 or so, is below bfloat16's resolution."""
    options = dict(dtype=torch.float32, split_heads=split_heads, **({"num_heads": 8} if split_heads else {}))
    layer, without = attention_layer(nkat_strength=0.0024, **options), attention_layer(nkat_strength=0.0, **options)
    without.load_state_dict(layer.state_dict())
    x = tokens_in(16, batch=8).float()
    x = x.view(4, 2, 16, 32) if split_heads else x
    factor = layer.modulation(x[-1] if split_heads else x)
    assert 0 < (factor - 1).abs().max() < 2**-9  # half of bfloat16's step above 1
    with torch.autocast("cpu", torch.bfloat16):
        ratio = (layer(x) - layer.proj.bias) / (without(x) - layer.proj.bias)
    assert (ratio.median(-1, keepdim=True).values - factor).abs().max() < 1e-6


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{"top_k": 6, "top_p": 0.8}, {}])
def test_a_layer_in_bfloat16_needs_no_autocast(fused, training, options):
    layer, x = attention_layer(nkat_strength=0.5, **options).train(training), tokens_in(16)
    exact = layer(x)
    layer.fused_attn = fused
    out = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_switching_fused_attention_off_is_read_when_built():
    set_fused_attn(False)
    try:
        assert not attention_layer().fused_attn
    finally:
        set_fused_attn(True)
    assert attention_layer().fused_attn


# --- split heads ------------------------------------------------------------------------------------------------------


def test_each_stream_feeds_its_two_heads_and_no_others():
    layer = attention_layer(num_heads=8, split_heads=True)
    streams = torch.randn(4, 1, 5, 32, dtype=torch.float64)
    before = torch.stack(layer._split_qkv(streams))
    for stream in range(4):
        changed = streams.clone()
        changed[stream] += 1
        differs = (torch.stack(layer._split_qkv(changed)) != before).any(-1).any(-1).any(1).any(0)
        assert differs.nonzero().flatten().tolist() == [2 * stream, 2 * stream + 1]


def test_four_equal_streams_are_ordinary_attention():
    options = {"num_heads": 8, "temperature": 0.65, "top_k": 3, "top_p": 0.8, "nkat_strength": 0.5}
    split, plain = attention_layer(split_heads=True, **options), attention_layer(**options)
    plain.load_state_dict(split.state_dict())
    order = [  # of split's rows (stream, q k v, head of the stream, E) in plain's (q k v, head, E)
        ((head // 2 * 3 + part) * 2 + head % 2) * 4 + e for part in range(3) for head in range(8) for e in range(4)
    ]
    plain.qkv.weight.data, plain.qkv.bias.data = split.qkv.weight.data[order], split.qkv.bias.data[order]
    x = tokens_in(7)
    torch.testing.assert_close(split(x.expand(4, -1, -1, -1)), plain(x), **EXACT)


def test_modulation_of_split_heads_reads_the_fused_stream():
    layer = attention_layer(num_heads=8, split_heads=True, nkat_strength=1.0)
    seen = []
    layer.modulation.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    streams = torch.randn(4, 1, 5, 32, dtype=torch.float64)
    layer(streams)
    assert torch.equal(seen[0], streams[3])


# --- which way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "options", "training", "way"),
    [
        (16, {"top_k": 6}, False, "explicit"),
        (16, {"top_k": 6}, True, "sparse"),
        (16, {"top_p": 0.8}, True, "sparse"),
        (16, {"top_k": 16, "top_p": 1.0}, True, "mask"),  # which filters nothing
        (16, {}, False, "mask"),
        (64, {"top_k": 6}, False, "explicit"),
        (65, {"top_k": 6}, False, "mask"),
        (65, {"top_k": 6}, True, "mask"),
        (65, {"top_k": 6, "dropout": 0.1}, False, "mask"),
        (65, {"top_k": 6, "dropout": 0.1}, True, "sparse"),  # SDPA has no fused kernel for it on a CPU
    ],
)
def test_the_way_through_the_layer_is_the_fastest(tokens, options, training, way, monkeypatch):
    layer, x = attention_layer(**options).train(training), tokens_in(tokens)
    ways = {"_masked_attention": "mask", "_sparse_attention": "sparse"}
    taken = []
    for name, said in ways.items():
        real = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, real=real, said=said: taken.append(said) or real(*a))
    layer(x)
    assert taken == ([] if way == "explicit" else [way])
    layer.fused_attn = False
    layer(x)
    assert len(taken) == (way != "explicit")


def test_on_another_device_dropout_is_no_reason_against_the_mask():
    layer = attention_layer(top_k=6, dropout=0.1).train()
    assert layer._prefers_mask(torch.empty(1, 1, 65, 8, device="meta"))
    assert not layer._prefers_mask(torch.empty(1, 1, 64, 8, device="meta"))


def test_the_defaults_filter_nothing_and_scale_nothing():
    layer = NKATAttention(32)
    assert (layer.num_heads, layer.temperature, layer.top_k, layer.top_p) == (8, 1.0, None, None)
    assert (layer.modulation.strength, layer.attn_drop.p, layer.split_heads) == (0.0, 0.0, False)
    assert repr(layer.modulation).startswith("NKATModulation(strength=0")
    assert "num_heads=8, temperature=1.0, top_k=None, top_p=None, split_heads=False" in repr(layer)
