"""DAttentionX against a plain reading of the published structure, and the laws of its parts."""

from __future__ import annotations

import copy
import itertools
import math
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.abmilx import DAttentionX

INPUT, INNER, HEADS, CLASSES = 12, 16, 4, 3

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "readme": {"mil_bias": True, "attn_bias": True},
    "ln": {"mil_norm": "ln"},
    "ln-bias": {"mil_norm": "ln", "mil_bias": True, "act": "relu"},
    "no-act": {"act": "none"},
    "off": {"attn_plus": False},
    "ffn": {"ffn": True},
    "ffn-ln": {"ffn": True, "mil_norm": "ln"},
    "ffn-ln-bias": {"ffn": True, "mil_norm": "ln", "mil_bias": True, "attn_bias": True},
    "ffn-none-string": {"ffn": True, "mil_norm": "none"},
    "gated": {"attn_type": "mlp_gated", "attn_bias": True},
    "gated-no-bias": {"attn_type": "mlp_gated"},
    "embed": {"attn_plus_embed_new": True},
    "embed-off": {"attn_plus_embed_new": True, "attn_plus": False, "attn_bias": True},
    "embed-gated": {"attn_plus_embed_new": True, "attn_type": "mlp_gated", "mil_norm": "ln"},
    "D-divisor": {"D": 2.0},
    "D-absolute": {"D": 24.0},
    "one-head": {"n_heads": 1},
}


def published_shapes(o: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of section 17, written down again from its table."""
    heads, norm, bias, ffn = o.get("n_heads", HEADS), o.get("mil_norm"), o.get("mil_bias"), o.get("ffn")
    embed, d = o.get("attn_plus_embed_new"), INNER // o.get("n_heads", HEADS)
    width, scores = (INNER, heads) if embed else (d, 1)
    hidden = {None: width, 2.0: width // 2, 24.0: 24 // heads}[o.get("D")]
    s: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, inp: int, with_bias: Any) -> None:
        s[f"{name}.weight"] = (out, inp)
        if with_bias:
            s[f"{name}.bias"] = (out,)

    def layer_norm(name: str, size: int, with_bias: Any) -> None:
        s[f"{name}.weight"] = (size,)
        if with_bias:
            s[f"{name}.bias"] = (size,)

    if norm == "ln":
        layer_norm("feature.0", INPUT, bias)
        layer_norm("norm1", INNER, bias)
    linear("feature.1" if norm == "ln" else "feature.0", INNER, INPUT, bias)
    if o.get("attn_type") == "mlp_gated":
        linear("attention.attention_a.0", hidden, width, o.get("attn_bias"))
        linear("attention.attention_b.0", hidden, width, o.get("attn_bias"))
        linear("attention.attention_c", scores, hidden, o.get("attn_bias"))
    else:
        linear("attention.fc1", hidden, width, o.get("attn_bias"))
        linear("attention.fc2", scores, hidden, o.get("attn_bias"))
    if o.get("attn_plus", True):
        layer_norm("attn_plus_fn.norm_x", width, True)
        s["attn_plus_fn.qk.weight"] = (2 * width, width)
        s["attn_plus_fn.v.weight"] = (1, 1)
    linear("proj", INNER, INNER, bias)
    if ffn:
        linear("mlp.fc1", 4 * INNER, INNER, True)
        linear("mlp.fc2", INNER, 4 * INNER, True)
        if norm is None:
            layer_norm("norm_ffn", INNER, True)
    linear("classifier", CLASSES, INNER, bias)
    return s


def random_weights(o: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).div(math.sqrt(shape[-1])).to(dtype)
        for name, shape in published_shapes(o).items()
    }


def reference(w: dict[str, Tensor], o: dict[str, Any], bag: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (K,) and attention (heads, N) of one bag (N, C), head by head, with the N x N matrix."""

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        y = x * w[f"{name}.weight"]
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def score(x: Tensor) -> Tensor:
        if "attention.fc1.weight" in w:
            return linear("attention.fc2", gelu(linear("attention.fc1", x)))
        gate = torch.sigmoid(linear("attention.attention_b.0", x))
        return linear("attention.attention_c", gelu(linear("attention.attention_a.0", x)) * gate)

    heads = o.get("n_heads", HEADS)
    d, embed = INNER // heads, o.get("attn_plus_embed_new", False)
    x = norm("feature.0", bag) if o.get("mil_norm") == "ln" else bag
    x = linear("feature.1" if o.get("mil_norm") == "ln" else "feature.0", x)
    x = {"gelu": gelu, "relu": lambda t: t.clamp(min=0), "none": lambda t: t}[o.get("act", "gelu")](x)
    parts, attention = [], []
    for j in range(heads):
        h = x[:, j * d : (j + 1) * d]
        a = score(x)[:, j : j + 1] if embed else score(h)
        if o.get("attn_plus", True):
            qk = norm("attn_plus_fn.norm_x", x if embed else h) @ w["attn_plus_fn.qk.weight"].T
            q = qk[:, j * d : (j + 1) * d] if embed else qk[:, :d]
            k = qk[:, INNER + j * d : INNER + (j + 1) * d] if embed else qk[:, d:]
            u = (q @ k.T * (INNER if embed else d) ** -0.5).softmax(dim=1)
            a = a + u @ (a * w["attn_plus_fn.v.weight"].squeeze())
        a = a.softmax(dim=0)
        attention.append(a[:, 0])
        parts.append((a * h).sum(0))
    z = linear("proj", torch.cat(parts))
    if o.get("ffn"):
        y = norm("norm_ffn", z) if o.get("mil_norm") is None else z
        z = z + linear("mlp.fc2", gelu(linear("mlp.fc1", y)))
    z = norm("norm1", z) if o.get("mil_norm") == "ln" else z
    return linear("classifier", z), torch.stack(attention)


def build(o: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> DAttentionX:
    options = {"inner_dim": INNER, "n_heads": HEADS} | o | more
    return DAttentionX(INPUT, CLASSES, **options).to(dtype).eval()


def loaded(o: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any) -> DAttentionX:
    model = build(o, dtype, **more)
    model.load_state_dict(random_weights(o, dtype=dtype), strict=True)
    return model


def bags(*sizes: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, INPUT, generator=g, dtype=torch.float64).to(dtype) for n in sizes]


def padded(items: list[Tensor], fill: float = 0.0) -> tuple[Tensor, Tensor]:
    longest = max(len(b) for b in items)
    x = torch.full((len(items), longest, INPUT), fill, dtype=items[0].dtype)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for row, bag in enumerate(items):
        x[row, : len(bag)], mask[row, : len(bag)] = bag, True
    return x, mask


@pytest.mark.parametrize("kernel", ["torch", "math"])
@pytest.mark.parametrize("name", VARIANTS)
def test_published_weights_give_the_published_values(name: str, kernel: str) -> None:
    o = VARIANTS[name]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = loaded(o, dtype, sdpa_type=kernel)
        (bag,) = bags(37)
        logits, attention = model(bag.to(dtype)[None], return_attn=True)
        want_logits, want_attention = reference(random_weights(o), o, bag)
        torch.testing.assert_close(logits[0].double(), want_logits, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(attention[0].double(), want_attention, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dict_round_trip_keeps_published_names(name: str) -> None:
    o = VARIANTS[name]
    model = loaded(o)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == published_shapes(o)
    again = build(o)
    again.load_state_dict(model.state_dict(), strict=True)
    (bag,) = bags(9)
    assert torch.equal(model(bag), again(bag))


def test_readme_example() -> None:
    abmilx_model = DAttentionX(input_dim=1024, n_classes=2, mil_bias=True, attn_bias=True, n_heads=8)
    assert abmilx_model(torch.randn(1, 1000, 1024)).shape == (1, 2)
    assert sum(p.numel() for p in abmilx_model.parameters()) == 801_028  # the 0.80 M of the paper's Table 1


@pytest.mark.parametrize(("norm", "bias"), list(itertools.product(["ln", None], [True, False])))
def test_a_new_ffn_has_a_norm_and_follows_the_bias_switch(norm: str | None, bias: bool) -> None:
    model = build({"ffn": True, "mil_norm": norm, "mil_bias": bias})
    assert isinstance(model.norm_ffn, torch.nn.LayerNorm)
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith("attn_plus_fn")}
    assert bool(biases) == bias
    z = torch.randn(1, INNER, dtype=torch.float64)
    torch.testing.assert_close(model.mlp(model.norm_ffn(3 * z)), model.mlp(model.norm_ffn(z)), atol=1e-3, rtol=1e-3)
    copy_ = build({"ffn": True, "mil_norm": norm, "mil_bias": bias})
    copy_.load_state_dict(model.state_dict(), strict=True)
    (bag,) = bags(5)
    assert torch.equal(model(bag), copy_(bag))


def test_loading_weights_of_the_same_form_keeps_the_parameters_that_an_optimizer_holds() -> None:
    model = build({"ffn": True, "mil_norm": "ln"})
    before = [id(p) for p in model.parameters()]
    model.load_state_dict(build({"ffn": True, "mil_norm": "ln"}).state_dict(), strict=True)
    assert [id(p) for p in model.parameters()] == before


def test_published_ffn_weights_load_inside_another_module() -> None:
    o = VARIANTS["ffn-ln"]
    whole = torch.nn.ModuleDict({"mil": build(o)})
    whole.load_state_dict({f"mil.{k}": v for k, v in random_weights(o).items()}, strict=True)
    (bag,) = bags(6)
    torch.testing.assert_close(whole["mil"](bag)[0], reference(random_weights(o), o, bag)[0])


def test_arguments_of_other_models_are_named_and_change_nothing() -> None:
    with pytest.warns(UserWarning, match="goes on without foo, nheads"):
        model = DAttentionX(INPUT, CLASSES, inner_dim=INNER, nheads=2, foo=1)
    assert model.n_heads == 8


@pytest.mark.parametrize("name", ["readme", "off", "gated", "embed", "ffn-ln", "one-head"])
def test_padded_batch_equals_bags_one_by_one(name: str) -> None:
    model = loaded(VARIANTS[name])
    items = bags(11, 1, 23)
    x, mask = padded(items, fill=math.nan)
    logits, attention = model(x, mask, return_attn=True)
    for row, bag in enumerate(items):
        alone, alone_attention = model(bag, return_attn=True)
        torch.testing.assert_close(logits[row], alone[0], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(attention[row, :, : len(bag)], alone_attention[0], atol=1e-12, rtol=1e-10)
        assert attention[row, :, len(bag) :].eq(0).all()


def test_mask_with_holes_equals_selection_and_so_do_gradients() -> None:
    model = loaded(VARIANTS["readme"])
    (bag,) = bags(1400)
    mask = torch.rand(1400, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[:700] = False  # a whole block of the kernel without a single key
    masked, chosen = bag.clone().requires_grad_(), bag[mask].clone().requires_grad_()
    out = model(masked[None], mask[None])
    torch.testing.assert_close(out, model(chosen), atol=1e-12, rtol=1e-10)
    out.square().sum().backward()
    model(chosen).square().sum().backward()
    assert masked.grad is not None
    assert chosen.grad is not None
    torch.testing.assert_close(masked.grad[mask], chosen.grad, atol=1e-12, rtol=1e-8)
    assert masked.grad[~mask].eq(0).all()


@pytest.mark.parametrize("name", ["readme", "gated", "embed", "ffn-ln-bias"])
def test_gradients_equal_those_of_the_plain_form(name: str) -> None:
    fused, plain = loaded(VARIANTS[name]), loaded(VARIANTS[name], sdpa_type="math")
    x = torch.stack(bags(40, 40))
    for model in (fused, plain):
        model(x).square().sum().backward()
    for (key, a), (_, b) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        assert a.grad is not None, key
        assert a.grad.abs().sum() > 0, key
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-8)


def peak_mib() -> float:
    """Most memory that this process has held at once since ``forget_peak``."""
    line = next(x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let a process reset its peak memory")


@pytest.mark.parametrize(("kernel", "linear"), [("torch", True), ("math", False)])
def test_memory_of_training_on_the_cpu(kernel: str, linear: bool) -> None:
    count = 8_192  # its N x N matrix has 256 MiB in float32
    model = DAttentionX(INPUT, CLASSES, inner_dim=16, n_heads=1, sdpa_type=kernel)
    x, mask = torch.randn(1, count, INPUT), torch.arange(count).remainder(3).gt(0)[None]
    model(x[:, :64], mask[:, :64]).sum().backward()
    forget_peak()
    before = peak_mib()
    model(x, mask).sum().backward()
    assert (peak_mib() - before < 128) == linear


def test_order_of_instances_does_not_matter() -> None:
    model = loaded(VARIANTS["ln-bias"])
    (bag,) = bags(50)
    order = torch.randperm(50)
    a, attention = model(bag, return_attn=True)
    b, moved = model(bag[order], return_attn=True)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(attention[..., order], moved)


def test_one_head_without_attention_plus_is_attention_pooling() -> None:
    o = {"n_heads": 1, "attn_plus": False}
    model, w = loaded(o), random_weights(o)
    (bag,) = bags(20)
    h = torch.nn.functional.gelu(bag @ w["feature.0.weight"].T)
    a = torch.nn.functional.gelu(h @ w["attention.fc1.weight"].T) @ w["attention.fc2.weight"].T
    pooled = (a.softmax(0) * h).sum(0)
    torch.testing.assert_close(model(bag)[0], w["classifier.weight"] @ (w["proj.weight"] @ pooled))


def test_alpha_zero_is_multi_head_attention_pooling() -> None:
    model = loaded(VARIANTS["readme"])
    plain = build(VARIANTS["readme"] | {"attn_plus": False})
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("attn_plus_fn")})
    (bag,) = bags(20)
    assert not torch.allclose(model(bag), plain(bag))
    torch.nn.init.zeros_(model.attn_plus_fn.v.weight)
    torch.testing.assert_close(model(bag), plain(bag))


def test_alpha_starts_at_the_documented_constant_or_from_a_normal_draw() -> None:
    assert build({}).attn_plus_fn.v.weight.item() == 1.0
    assert build({}, alpha_init="0.5").attn_plus_fn.v.weight.item() == 0.5
    torch.manual_seed(0)
    draws = torch.tensor([build({}, alpha_init="normal").attn_plus_fn.v.weight.item() for _ in range(200)])
    assert abs(draws.mean()) < 0.25
    assert abs(draws.std() - 1) < 0.2
    assert (draws < 0).float().mean() > 0.3


def test_returned_parts() -> None:
    model = loaded(VARIANTS["readme"])
    x = torch.stack(bags(7, 7))
    logits = model(x)
    (same, feature), attention, act = model(x, return_attn=True, return_act=True, return_img_feat=True)
    assert torch.equal(same, logits)
    assert torch.equal(model.classifier(feature), logits)
    assert torch.equal(act, model.feature(x))
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, HEADS, dtype=torch.float64))
    assert torch.equal(model(x, pos=torch.zeros(2, 7, 2), anything="else"), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    model = loaded(VARIANTS["readme"], torch.float32)
    x = torch.stack(bags(60, 60, dtype=torch.float32))
    x, mask = x, torch.arange(60).lt(45).repeat(2, 1)
    want = model(x, mask)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(model(x, mask).float(), want, atol=0.05, rtol=0.05)
    whole = copy.deepcopy(model).to(dtype)
    torch.testing.assert_close(whole(x.to(dtype), mask).float(), want, atol=0.05, rtol=0.05)


class TestBatchNorm:
    def test_input_statistics_are_those_of_the_instances_that_exist(self) -> None:
        model = build({"mil_norm": "bn"}, dropout=0.0).train()
        items = bags(5, 9)
        x, mask = padded(items, fill=1e6)
        model(x, mask)
        rows = torch.cat(items)
        torch.testing.assert_close(model.feature[0].running_mean, 0.1 * rows.mean(0))
        torch.testing.assert_close(model.norm1.running_var.shape, torch.Size([INNER]))

    def test_a_batch_of_one_bag_of_one_patch_trains(self) -> None:
        model = build({"mil_norm": "bn"}).train()
        out = model(torch.randn(1, 1, INPUT, dtype=torch.float64))
        out.sum().backward()
        assert out.isfinite().all()

    def test_padded_batch_equals_bags_one_by_one_in_evaluation(self) -> None:
        model = build({"mil_norm": "bn"}).train()
        items = bags(5, 9)
        x, mask = padded(items)
        model(x, mask)
        model.eval()
        torch.testing.assert_close(model(x, mask), torch.cat([model(bag) for bag in items]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_dim": 10}, "multiple of n_heads"),
        ({"act": "tanh"}, "'tanh' is not one of 'gelu'"),
        ({"mil_norm": "gn"}, "mil_norm 'gn'"),
        ({"attn_type": "x"}, "attn_type 'x'"),
        ({"sdpa_type": "x"}, "sdpa_type 'x'"),
        ({"alpha_init": "big"}, "neither a number nor 'normal'"),
        ({"D": 0}, "must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(options)


@pytest.mark.parametrize("shape", [(1, 5, INPUT + 1), (INPUT,), (1, 0, INPUT)])
def test_bad_bags_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="with N > 0"):
        build({})(torch.zeros(shape, dtype=torch.float64))


def test_bad_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="torch.bool"):
        build({})(torch.zeros(1, 5, INPUT, dtype=torch.float64), torch.ones(1, 5))
