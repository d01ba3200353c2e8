"""Laws of the MIL heads, for every name in the registry: a new head is tested by being registered."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.heads import attention_weights, build_mil
from modules.registry import mils
from utils.config import ModelConfig
from utils.errors import UserError

DIM, CLASSES, PATCHES = 16, 3, 11


@dataclass(frozen=True)
class Case:
    """A head with options that differ from the defaults; ``pos``: whether its bags have positions."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    pos: bool = True

    def __str__(self) -> str:
        words = [self.name, *(f"{k}={v}" for k, v in self.options.items())]
        return " ".join(words if self.pos else [*words, "without positions"])


LN = {"mil_norm": "ln", "mil_bias": False, "act": "gelu"}
CASES = [
    *(Case(name) for name in mils.names()),
    *(Case(name, LN) for name in mils.names()),
    *(Case(name, {"mil_norm": "bn", "act": "none"}) for name in mils.names()),
    Case("abmilx", {"abx_attn_plus": False, "ffn": True}),
    Case("vitmil", {"pos": "sincos", "ffn": True}),
    Case("vitmil", {"pos": "ppeg"}),
    Case("vitmil", {"pos": "ppeg", "pool": "mean"}),
    Case("vitmil", {"pool": "mean"}),
    Case("vitmil", {"pool": "attn", "n_layers": 1}),
    Case("gigap", {"pos": "sincos"}),
    Case("2dmamba", pos=False),
    Case("rrtmil", {"rrt_n_layers": 3, "epeg_k": 3, "crmsa_k": 1}),
]

# The exceptions from the laws, each with its reason.
ORDERED = {
    "transmil": "landmarks, squaring and PPEG follow the list order",
    "rrtmil": "regions follow the list order",
    "gigap": "segments and dilation follow the list order",
    "dtfd": "evaluation splits pseudo-bags by list position",
    "vitmil pos=ppeg": "PPEG takes the list order for reading order",
    "2dmamba without positions": "the list fills a square in reading order",
}
NOT_A_MILLION = {
    "abmilx": "A+ compares every pair of patches: memory linear, time quadratic",
    "vitmil": "exact self-attention: memory linear, time quadratic",
    "wikg": "compares every pair of patches: memory linear, time quadratic",
    "gigap": "the long segments make time grow faster than N",
    "rrtmil": "attention logits of a region: memory quadratic in N / regions",
}
NO_ATTENTION = {
    "transmil": "the Nystrom weights of the class token are no distribution: they may be negative",
    "gigap": "a row's weights are spread over branches and never exist together",
    "meanmil": "no attention",
    "maxmil": "no attention",
    "meanP": "no attention",
}


def ordered(case: Case) -> bool:
    return any(str(case).startswith(key) or key == str(case) for key in ORDERED)


def build(case: Case, seed: int = 0, **more: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"inner_dim": 32, "n_heads": 4, "rrt_n_heads": 4, "region_num": 2, "dropout": 0.0}
    head = build_mil(case.name, DIM, CLASSES, ModelConfig(**{**sizes, **case.options, **more}))
    if case.options.get("mil_norm") == "bn":  # running statistics that are not 0 and 1
        head.train()
        with torch.no_grad():
            head(torch.randn(2, 9, DIM) * 2 + 1, pos=positions(2, 9))
    return head.eval()


def positions(bags: int, count: int) -> Tensor:
    """Distinct cells of a 6 x 6 grid for every bag, in random order: (B, N, 2)."""
    cells = torch.stack([torch.randperm(36)[:count] for _ in range(bags)])
    return torch.stack([cells % 6, cells // 6], -1)


def batch(case: Case, bags: int = 3, count: int = PATCHES) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(bags, count, DIM, generator=generator)
    return x, positions(bags, count) if case.pos else None


def part(pos: Tensor | None, index: Any) -> Tensor | None:
    return None if pos is None else pos[index]


def every(cases: list[Case] = CASES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def test_exceptions_name_registered_heads() -> None:
    keys = {*ORDERED, *NOT_A_MILLION, *NO_ATTENTION}
    assert {key.split()[0] for key in keys} <= set(mils.names())


@every()
def test_order_of_patches_does_not_matter(case: Case) -> None:
    head, (x, pos) = build(case), batch(case)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(1))
    same = torch.allclose(head(x, pos=pos), head(x[:, order], pos=part(pos, (slice(None), order))), atol=1e-5)
    assert same or ordered(case)


@every([case for case in CASES if ordered(case) and case.options.get("mil_norm") is None])
def test_exceptions_from_the_order_law_are_needed(case: Case) -> None:
    head, (x, pos) = build(case), batch(case)
    order = torch.tensor([3, 0, 7, 1, 10, 2, 9, 4, 6, 5, 8])
    difference = head(x, pos=pos) - head(x[:, order], pos=part(pos, (slice(None), order)))
    assert difference.abs().max() > 1e-5


@every()
def test_batch_of_bags_equals_bags_one_by_one(case: Case) -> None:
    head, (x, pos) = build(case), batch(case)
    single = torch.cat([head(bag, pos=part(pos, i)) for i, bag in enumerate(x)])
    assert single.shape == (3, CLASSES)
    torch.testing.assert_close(head(x, pos=pos), single, atol=1e-5, rtol=1e-5)


@every()
def test_mask_equals_truncation(case: Case) -> None:
    head, (x, pos) = build(case), batch(case, bags=4)
    mask = torch.ones(4, PATCHES, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, [0, 3, 4, 8]] = False  # padding need not stand at the end
    mask[2, 1:] = False
    single = torch.cat([head(x[i, mask[i]], pos=part(pos, (i, mask[i]))) for i in range(4)])
    for garbage in (0.0, 1e3, float("nan")):
        padded = x.masked_fill(~mask.unsqueeze(-1), garbage)
        torch.testing.assert_close(head(padded, mask, pos=pos), single, atol=1e-5, rtol=1e-5)


@every()
def test_mask_equals_truncation_in_training(case: Case) -> None:
    head, (x, pos) = build(case).train(), batch(case)
    if case.name in ("dtfd", "transmil") or case.options.get("mil_norm") == "bn":
        pytest.skip("random pseudo-bags, fixed dropout, or statistics of all bags together")
    mask = torch.arange(PATCHES) < torch.tensor([[4], [PATCHES], [7]])
    single = torch.cat([head(x[i, mask[i]], pos=part(pos, (i, mask[i]))) for i in range(3)])
    torch.testing.assert_close(head(x, mask, pos=pos), single, atol=1e-5, rtol=1e-5)


def training_loss(head: nn.Module, x: Tensor, mask: Tensor | None, pos: Tensor | None) -> Tensor:
    """The loss as the engine builds it."""
    target = torch.arange(len(x)) % CLASSES
    if not hasattr(head, "loss_weights"):
        return F.cross_entropy(head(x, mask, pos=pos), target)
    main, aux = head.loss_weights
    logits, extra = head.forward_with_aux(x, mask, target, F.cross_entropy)
    return main * F.cross_entropy(logits, target) + aux * extra


@every()
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_reaches_every_parameter(case: Case, masked: bool) -> None:
    head, (x, pos) = build(case).train(), batch(case)
    mask = torch.arange(PATCHES) < torch.tensor([[7], [PATCHES], [9]]) if masked else None
    training_loss(head, x, mask, pos).backward()
    without = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 1e-12]
    assert without == []
    assert all(p.grad.isfinite().all() for p in head.parameters())


@every()
def test_gradient_reaches_every_patch_and_no_padding(case: Case) -> None:
    head, (x, pos) = build(case), batch(case)
    mask = torch.arange(PATCHES) < torch.tensor([[7], [PATCHES], [9]])
    x.requires_grad_()
    head(x, mask, pos=pos).square().sum().backward()
    reached = x.grad.abs().sum(-1) > 0
    assert not reached[~mask].any()
    assert reached[mask].all() or case.name == "maxmil"


@every()
@pytest.mark.parametrize("training", [False, True])
def test_bag_of_one_patch(case: Case, training: bool) -> None:
    head = build(case).train(training)
    x, pos = batch(case, bags=1, count=1)
    logits = head(x, pos=pos)
    loss = training_loss(head, x, None, pos)
    loss.backward()
    assert logits.shape == (1, CLASSES)
    assert logits.isfinite().all()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@every()
def test_evaluation_is_deterministic_and_draws_nothing(case: Case) -> None:
    head, (x, pos) = build(case, dropout=0.5), batch(case)
    state = torch.get_rng_state()
    first, second = head(x, pos=pos), head(x, pos=pos)
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


@every()
def test_auxiliary_loss_is_the_mean_over_bags_and_keeps_the_logits(case: Case) -> None:
    head, (x, _) = build(case), batch(case)
    if not hasattr(head, "loss_weights"):
        assert not hasattr(head, "forward_with_aux")
        pytest.skip("no auxiliary loss")
    mask = torch.arange(PATCHES) < torch.tensor([[3], [PATCHES], [1]])
    target = torch.tensor([0, 1, 2])
    logits, aux = head.forward_with_aux(x, mask, target, F.cross_entropy)
    assert torch.equal(logits, head(x, mask))
    bags = [(x[i, mask[i]].unsqueeze(0), None, target[i : i + 1], F.cross_entropy) for i in range(3)]
    torch.testing.assert_close(aux, torch.stack([head.forward_with_aux(*bag)[1] for bag in bags]).mean())


@every()
def test_state_dict_round_trip(case: Case, tmp_path: Path) -> None:
    head, other, (x, pos) = build(case), build(case, seed=1), batch(case)
    before = head(x, pos=pos)
    assert not torch.allclose(before, other(x, pos=pos), atol=1e-4)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert torch.equal(before, other(x, pos=pos))


@every()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(case: Case, dtype: torch.dtype) -> None:
    head, (x, pos) = build(case), batch(case)
    mask = torch.arange(PATCHES) < torch.tensor([[7], [PATCHES], [9]])
    exact = head(x, mask, pos=pos)
    with torch.autocast("cpu", dtype):
        half = head(x, mask, pos=pos)
        loss = training_loss(head.train(), x, mask, pos)
    loss.backward()
    assert loss.isfinite()
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)


@every()
def test_attention_is_a_distribution_over_the_patches(case: Case) -> None:
    head, (x, pos) = build(case), batch(case)
    if case.name in NO_ATTENTION:
        with pytest.raises(UserError, match="no attention"):
            attention_weights(head, x)
        pytest.skip(NO_ATTENTION[case.name])
    mask = torch.arange(PATCHES) < torch.tensor([[7], [PATCHES], [9]])
    weights = attention_weights(head, x, mask, pos)
    assert weights.dim() == 3
    assert weights.shape[::2] == (3, PATCHES)
    assert (weights >= 0).all()
    assert not weights.masked_select(~mask.unsqueeze(1)).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    single = attention_weights(head, x[0, :7], pos=part(pos, (0, slice(7))))
    torch.testing.assert_close(weights[:1, :, :7], single, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in mils.names() if name not in NOT_A_MILLION])
def test_a_million_patches_on_cpu(name: str) -> None:
    head = build_mil(name, 4, 2, ModelConfig(inner_dim=8, n_heads=2)).eval()
    with torch.inference_mode():
        assert head(torch.randn(1, 1_000_000, 4)).isfinite().all()


@pytest.mark.parametrize("name", ["abmilx", "transmil", "vitmil", "qamil", "gigap", "rrtmil"])
def test_heads_that_do_not_divide_the_width_are_refused(name: str) -> None:
    with pytest.raises((UserError, ValueError), match="32.*5|5.*32"):
        build_mil(name, DIM, 2, ModelConfig(inner_dim=32, n_heads=5, rrt_n_heads=5))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vitmil", {"pool": "max"}, "pool"),
        ("vitmil", {"n_layers": 0}, "n_layers"),
        ("gigap", {"pos": "ppeg"}, "sincos"),
        ("rrtmil", {"epeg_k": 4}, "odd"),
        ("rrtmil", {"region_num": 0}, "region_num"),
        ("abmil", {"act": "tanh"}, "relu"),
        ("abmil", {"mil_norm": "gn"}, "bn, ln, none"),
        ("abmilx", {"abx_alpha_init": "one"}, "number"),
    ],
)
def test_options_without_a_meaning_are_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_mil(name, DIM, 2, ModelConfig(**{"inner_dim": 32, **options}))


@pytest.mark.parametrize("name", ["vitmil", "gigap"])
def test_sincos_without_positions_is_refused_with_the_remedy(name: str) -> None:
    head = build(Case(name, {"pos": "sincos"}))
    with pytest.raises(UserError, match="--pos=none"):
        head(torch.randn(1, 4, DIM))


def test_bags_of_a_wrong_shape_are_refused() -> None:
    head = build(Case("abmil"))
    with pytest.raises(UserError, match="with a patch"):
        head(torch.randn(1, 0, DIM))
    with pytest.raises(UserError, match="mask"):
        head(torch.randn(1, 4, DIM), torch.ones(1, 5, dtype=torch.bool))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every()
def test_gpu_in_half_precision_is_close_to_cpu(case: Case) -> None:
    head, (x, pos) = build(case), batch(case)
    mask = torch.arange(PATCHES) < torch.tensor([[7], [PATCHES], [9]])
    exact = head(x, mask, pos=pos)
    head, x, mask = head.cuda(), x.cuda(), mask.cuda()
    pos = None if pos is None else pos.cuda()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tolerance = 1e-3 if dtype is torch.float32 else 0.05
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            logits = head(x, mask, pos=pos)
        torch.testing.assert_close(logits.float().cpu(), exact, atol=tolerance, rtol=tolerance)
