"""What each MIL head is: exact cases, computed by hand or in a second, plain way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import gigap, wikg
from modules.abmil import ABMIL
from modules.chief import CHIEF
from modules.clam import CLAM, smooth_svm
from modules.dsmil import DSMIL
from modules.dtfd import DTFD
from modules.heads import build_mil
from modules.layers import PatchBatchNorm, StemOptions, masked_softmax
from modules.mamba2d import Mamba2DMIL, grid_cells, scan_2d
from modules.pooling import FeatureMean, InstancePooling
from modules.qamil import QAMIL
from modules.rrt import (
    CrossRegionAttention,
    RegionAttention,
    RRTOptions,
    SelfAttention,
    from_regions,
    spread,
    to_regions,
)
from modules.transmil import PPEG, NystromAttention, pseudo_inverse, segment_means
from modules.vitmil import Attention, sincos
from utils.config import ModelConfig

STEM = StemOptions(inner_dim=8, act="none", dropout=0.0)
CE = F.cross_entropy


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Millions of parameters in Table 1 of the ABMILX paper, 512 wide, two classes; CHIEF on its own 768 features.
PUBLISHED = {"clam_sb": 0.79, "transmil": 2.67, "dsmil": 0.87, "wikg": 1.71, "rrtmil": 2.70, "abmilx": 0.80}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_published_parameter_counts(name: str, millions: float) -> None:
    head = build_mil(name, 1024, 2, ModelConfig())
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_published_parameter_counts_of_foundation_heads() -> None:
    chief = build_mil("chief", 768, 2, ModelConfig())
    assert sum(p.numel() for p in chief.parameters()) / 1e6 == pytest.approx(1.05, abs=0.005)
    with torch.device("meta"):
        options = ModelConfig(inner_dim=768, n_layers=12, n_heads=16, pos="sincos")
        slide = build_mil("gigap", 1536, 2, options)
    assert sum(p.numel() for p in slide.parameters()) / 1e6 == pytest.approx(86, abs=0.5)


@pytest.mark.parametrize("gated", [False, True])
def test_abmil_is_the_equation(gated: bool) -> None:
    head, x = ABMIL(4, 2, STEM, hidden=5, gated=gated).eval(), torch.randn(1, 6, 4)
    h = x[0] @ head.stem.proj.weight.T + head.stem.proj.bias
    hidden = torch.tanh(head.scores.value(h))
    if gated:
        hidden = hidden * torch.sigmoid(head.scores.gate(h))
    raw = torch.stack([head.scores.score.weight[0] @ row for row in hidden])
    a = torch.exp(raw) / torch.exp(raw).sum()
    z = sum(a[i] * h[i] for i in range(6))
    torch.testing.assert_close(head(x)[0], head.classifier.weight @ z + head.classifier.bias)
    torch.testing.assert_close(head.attention(x)[0, 0], a)


def test_scores_in_blocks_equal_scores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = ABMIL(4, 2, STEM, gated=True).eval(), torch.randn(2, 10, 4)
    whole = head(x)
    monkeypatch.setattr("modules.layers.BLOCK_PATCHES", 3)
    torch.testing.assert_close(head(x), whole)


def test_norms_of_abmil_stand_at_the_input_and_before_the_classifier() -> None:
    head = ABMIL(4, 2, StemOptions(inner_dim=8, dropout=0.0, norm="ln"), gated=True).eval()
    x = torch.randn(1, 6, 4)
    torch.testing.assert_close(head(x), head(3 * x + 5), atol=1e-3, rtol=1e-3)
    assert any(name.startswith("norm.") for name, _ in head.named_parameters())


def test_no_bias_means_no_bias() -> None:
    for name in ("abmil", "clam_mb", "dsmil", "dtfd", "qamil", "vitmil", "rrtmil", "wikg", "chief", "meanP"):
        head = build_mil(name, 8, 2, ModelConfig(inner_dim=16, mil_bias=False, mil_norm="ln", ffn=True))
        linear = (nn.Linear, nn.Conv1d)
        assert [n for n, m in head.named_modules() if isinstance(m, linear) and m.bias is not None] == []


def test_instance_pooling_pools_the_logits_of_single_patches() -> None:
    x = torch.randn(1, 5, 4)
    for maximum in (False, True):
        head = InstancePooling(4, 3, STEM, maximum=maximum).eval()
        alone = torch.cat([head(x[:, i : i + 1]) for i in range(5)])
        expected = alone.amax(0) if maximum else alone.mean(0)
        torch.testing.assert_close(head(x)[0], expected)


def test_feature_mean_is_linear_in_the_bag() -> None:
    head, x = FeatureMean(4, 2, STEM).eval(), torch.randn(1, 5, 4)
    torch.testing.assert_close(head(x), head(x.mean(1, keepdim=True)))


def test_masked_softmax_ignores_padding_of_any_size() -> None:
    scores = torch.tensor([[[1.0, 1.0, 1e9]]])
    weights = masked_softmax(scores, torch.tensor([[True, True, False]]))
    assert weights.tolist() == [[[0.5, 0.5, 0.0]]]


def test_batch_norm_takes_its_statistics_from_real_patches_only() -> None:
    norm = PatchBatchNorm(2).train()
    x = torch.tensor([[[0.0, 0.0], [2.0, 4.0], [99.0, 99.0]]])
    out = norm(x, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(out[0, :2], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4, rtol=0)
    assert out[0, 2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(norm.norm.running_mean, torch.tensor([0.1, 0.2]))


def test_smooth_svm_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.0]])
    assert smooth_svm(scores, torch.tensor([0])).item() == pytest.approx(math.log(1 + math.exp(1 - 2)))
    assert smooth_svm(scores, torch.tensor([1])).item() == pytest.approx(math.log(1 + math.exp(1 + 2)))


@pytest.mark.parametrize("multi_branch", [False, True])
def test_clam_instance_loss_touches_the_ends_of_the_attention_only(multi_branch: bool) -> None:
    head = CLAM(4, 1, STEM, multi_branch=multi_branch, k_sample=2).eval()
    x = torch.randn(1, 9, 4, requires_grad=True)
    head.forward_with_aux(x, None, torch.tensor([0]), CE)[1].backward()
    order = head.attention(x)[0, 0].argsort()
    touched = x.grad[0].abs().sum(-1) > 0
    assert set(touched.nonzero().flatten().tolist()) == set(order[[0, 1, -2, -1]].tolist())


def test_clam_instance_loss_by_hand() -> None:
    head, x = CLAM(4, 2, STEM, multi_branch=False).eval(), torch.randn(1, 3, 4)
    order = head.attention(x)[0, 0].argsort(descending=True)
    scores = head.instance(head.stem(x))[0]  # two scores for class 0, then two for class 1
    own = smooth_svm(scores[order[[0, 1, 2]], 2:], torch.tensor([1, 1, 0]))  # three patches: two most, one least
    other = smooth_svm(scores[order[:2], :2], torch.tensor([0, 0]))
    aux = head.forward_with_aux(x, None, torch.tensor([1]), CE)[1]
    torch.testing.assert_close(aux, (own + other) / 2)


def test_a_branch_of_clam_mb_answers_for_its_class_alone() -> None:
    head, x = CLAM(4, 3, STEM, multi_branch=True).eval(), torch.randn(1, 7, 4)
    before = head(x)
    with torch.no_grad():
        head.scores.score.weight[1].mul_(-3)
    changed = (head(x) - before).abs()[0] > 1e-6
    assert changed.tolist() == [False, True, False]


def test_dsmil_auxiliary_is_the_loss_of_the_largest_instance_logits() -> None:
    head, x = DSMIL(4, 3, STEM).eval(), torch.randn(2, 6, 4)
    target = torch.tensor([2, 0])
    largest = head.instance(head.stem(x)).amax(1)
    torch.testing.assert_close(head.forward_with_aux(x, None, target, CE)[1], CE(largest, target))


def test_dsmil_attends_by_likeness_to_the_critical_patch() -> None:
    head, x = DSMIL(4, 2, STEM).eval(), torch.randn(1, 6, 4)
    h = head.stem(x)[0]
    q = head.query(h)
    for k in range(2):
        critical = head.instance(h)[:, k].argmax()
        expected = (q @ q[critical] / math.sqrt(128)).softmax(0)
        torch.testing.assert_close(head.attention(x)[0, k], expected)


def test_dtfd_pools_pseudo_bags_then_their_features() -> None:
    head, x = DTFD(4, 2, STEM, pseudo_bags=2).eval(), torch.randn(1, 5, 4)
    h, features = head.stem(x)[0], []
    for group in (h[0::2], h[1::2]):
        a = head.scores(group.unsqueeze(0))[0, 0].softmax(0)
        features.append(a @ group)
    z = torch.stack(features)
    b = head.bag_scores(z.unsqueeze(0))[0, 0].softmax(0)
    target = torch.tensor([1])
    logits, aux = head.forward_with_aux(x, None, target, CE)
    torch.testing.assert_close(logits[0], head.bag_classifier(b @ z))
    torch.testing.assert_close(aux, sum(CE(head.classifier(f).unsqueeze(0), target) for f in features) / 2)


def test_dtfd_of_two_patches_has_two_pseudo_bags() -> None:
    head, x = DTFD(4, 2, STEM, pseudo_bags=5).eval(), torch.randn(1, 2, 4)
    z = head.stem(x)[0]  # each patch is its pseudo-bag's feature
    b = head.bag_scores(z.unsqueeze(0))[0, 0].softmax(0)
    target = torch.tensor([0])
    logits, aux = head.forward_with_aux(x, None, target, CE)
    losses = [CE(head.classifier(z[i : i + 1]), target) for i in (0, 1, 0, 1, 0)]
    torch.testing.assert_close(logits[0], head.bag_classifier(b @ z))
    torch.testing.assert_close(aux, torch.stack(losses).mean())


def test_dtfd_draws_new_pseudo_bags_in_training() -> None:
    head, x = DTFD(4, 2, STEM).train(), torch.randn(1, 40, 4)
    assert not torch.equal(head(x), head(x))
    members = head._members(x, None)
    assert members.sum(1).eq(1).all()  # every patch in exactly one
    assert members.sum(2).eq(8).all()


def test_qamil_equals_torch_attention_with_one_query() -> None:
    head, x = QAMIL(4, 2, STEM, n_heads=2).eval(), torch.randn(3, 6, 4)
    h = head.stem(x)
    torch_mha = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        torch_mha.in_proj_weight.copy_(torch.cat([torch.eye(8), head.key.weight, head.value.weight]))
        torch_mha.out_proj.weight.copy_(head.out.weight)
    query = head.query.reshape(1, 1, 8).expand(3, -1, -1)
    expected, weights = torch_mha(query, h, h, average_attn_weights=False)
    torch.testing.assert_close(head(x), head.classifier(head.norm(expected[:, 0])))
    torch.testing.assert_close(head.attention(x), weights[:, :, 0])


def test_vitmil_attention_equals_torch_attention() -> None:
    ours, x = Attention(8, 2), torch.randn(2, 5, 8)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    expected, weights = theirs(x, x, x, key_padding_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(ours(x, mask)[mask], expected[mask])
    without_first = weights[:, :, 0, 1:] / weights[:, :, 0, 1:].sum(-1, keepdim=True)
    torch.testing.assert_close(ours.weights_of_first(x, mask), without_first)


def test_sincos_tells_columns_from_rows() -> None:
    code = sincos(torch.tensor([[[0, 0], [1, 0], [0, 1]]]), 8)[0]
    assert code[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert code[1, 0].item() == pytest.approx(math.sin(1))
    assert code[1, 1].item() == pytest.approx(math.sin(0.01))
    torch.testing.assert_close(code[1, 4:], code[0, 4:])
    torch.testing.assert_close(code[2], torch.cat([code[0, :4], code[1, :4]]))
    assert sincos(torch.tensor([[[3, 4]]]), 10)[0, 0, 8:].tolist() == [0, 0]


def test_pseudo_inverse_of_a_stochastic_matrix() -> None:
    a = (torch.randn(2, 3, 6, 6) * 0.3 + 3 * torch.eye(6)).softmax(-1)
    torch.testing.assert_close(pseudo_inverse(a, 12) @ a, torch.eye(6).expand_as(a), atol=1e-3, rtol=0)


def test_segment_means_by_hand() -> None:
    x = torch.arange(5.0).view(1, 1, 5, 1)
    assert segment_means(x, 2).flatten().tolist() == [1.0, 3.5]
    assert segment_means(x, 4).flatten().tolist() == [0.5, 2.5, 4.0]  # two each: three segments suffice
    assert segment_means(x, 9).flatten().tolist() == x.flatten().tolist()


def test_nystrom_with_every_row_a_landmark_is_exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.transmil.pseudo_inverse", lambda a: torch.linalg.pinv(a))
    layer, x = NystromAttention(8, 2, landmarks=6).double().eval(), torch.randn(1, 6, 8).double()
    nn.init.zeros_(layer.value_conv.weight)
    q, k, v = (part.view(1, 6, 2, 4).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.out(exact), atol=1e-3, rtol=1e-3)


def test_ppeg_with_silent_convolutions_changes_nothing() -> None:
    ppeg, x = PPEG(4), torch.randn(2, 7, 4)
    for parameter in ppeg.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(ppeg(x), x)
    ppeg.convs[2].weight.data[:, :, 1, 1] = 1.0  # the centre of the 3 x 3 kernel: adds the patch itself
    torch.testing.assert_close(ppeg(x), 2 * x)


@pytest.mark.parametrize(("count", "per_side"), [(1, 2), (7, 2), (16, 2), (17, 3), (5, 8)])
def test_regions_round_trip(count: int, per_side: int) -> None:
    x = torch.randn(2, count, 3)
    regions = to_regions(x, per_side)
    assert regions.shape[1] == per_side**2
    assert torch.equal(from_regions(regions, per_side, count), x)


def test_regions_are_squares_of_the_reading_order() -> None:
    x = torch.arange(16.0).view(1, 16, 1)
    assert to_regions(x, 2)[0, :, :, 0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_region_attention_stays_in_its_region_and_cross_region_does_not() -> None:
    options = RRTOptions(n_heads=2, region_num=2, epeg_k=3)
    x, real = torch.randn(1, 4, 4, 8), torch.ones(4, 4, dtype=torch.bool)
    other = x.clone()
    other[0, 0, 0] += 1
    within, across = RegionAttention(8, options), CrossRegionAttention(8, options)
    moved = (within(x, real) != within(other, real)).flatten(2).any(-1)[0]
    assert moved.tolist() == [True, False, False, False]
    assert (across(x, real) != across(other, real)).flatten(2).any(-1).all()


def test_empty_cells_do_not_matter_to_attention_with_epeg() -> None:
    layer, x = SelfAttention(8, 2, epeg_k=3), torch.randn(1, 4, 8)
    nn.init.normal_(layer.qkv.bias)
    real = torch.tensor([[True, True, False, True]])
    other = x.masked_fill(~real.unsqueeze(-1), 7.0)
    torch.testing.assert_close(layer(x, real)[real], layer(other, real)[real])


def test_spread_by_hand() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 9.0]).view(1, 2, 2, 1)
    cells = torch.tensor([[True, True], [True, False]]).unsqueeze(-1)
    assert spread(logits, cells)[0, :, :, 0][cells[..., 0]].tolist() == [0.0, 1.0, 0.0]


def test_wikg_neighbours_in_blocks_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, tails = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    expected = (heads @ tails.transpose(1, 2)).masked_fill(~mask.unsqueeze(1), -math.inf).topk(3).indices
    monkeypatch.setattr(wikg, "BLOCK_SCORES", 40)
    assert torch.equal(wikg.nearest(heads, tails, 3, mask), expected)


def test_wikg_message_by_hand() -> None:
    head, x = wikg.WiKG(4, 2, STEM, neighbours=2).eval(), torch.randn(1, 5, 4)
    h = head.stem(x)
    u, t = head.head(h)[0], head.tail(h)[0]
    messages = []
    for i in range(5):
        likeness = t @ u[i] / math.sqrt(8)
        values, chosen = likeness.topk(2)
        p = values.softmax(0).unsqueeze(1)
        edge = p * t[chosen] + (1 - p) * u[i]
        a = (t[chosen] * torch.tanh(u[i] + edge)).sum(1).softmax(0)
        messages.append(a @ t[chosen])
    torch.testing.assert_close(head._neighbourhood(head.head(h), head.tail(h), None)[0], torch.stack(messages))


def dilated_by_definition(q: Tensor, k: Tensor, v: Tensor, branches: tuple[tuple[int, int], ...]) -> Tensor:
    """LongNet attention row by row: every branch's permitted pairs, summed before one division."""
    count, width = q.shape[2:]
    weights = torch.zeros(q.shape[0], q.shape[1], count, count)
    scores = (q @ k.transpose(-1, -2) / width**0.5).exp()
    for segment, ratio in branches:
        for j, a, b in itertools.product(range(q.shape[1]), range(count), range(count)):
            same = a // min(segment, count) == b // min(segment, count)
            seen = all(row % min(segment, count) % ratio == j % ratio for row in (a, b))
            weights[:, j, a, b] += scores[:, j, a, b] * (same and seen)
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("branches", [((3, 1), (6, 2), (100, 3)), ((4, 1), (5, 4)), ((100, 1),)])
def test_dilated_attention_is_its_definition(
    branches: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = torch.randn(3, 2, 4, 11, 5).unbind(0)
    expected = dilated_by_definition(q, k, v, branches)
    torch.testing.assert_close(gigap.dilated_attention(q, k, v, branches), expected)
    monkeypatch.setattr(gigap, "BLOCK_SCORES", 7)
    torch.testing.assert_close(gigap.dilated_attention(q, k, v, branches), expected)


def test_one_branch_over_everything_is_attention() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind(0)
    ours = gigap.dilated_attention(q, k, v, ((1024, 1),))
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v))


def test_selective_scan_is_its_recurrence() -> None:
    rows, columns, width, states = 3, 4, 2, 3
    u, delta = torch.randn(rows, columns, width), torch.rand(rows, columns, width)
    rates, b, c = (
        -torch.rand(width, states),
        torch.randn(rows, columns, states),
        torch.randn(rows, columns, states),
    )
    expected = torch.zeros(rows, columns, width)
    for e in range(width):
        below = torch.zeros(columns, states)
        for i in range(rows):
            along = torch.zeros(states)
            for j in range(columns):
                decay = torch.exp(delta[i, j, e] * rates[e])
                along = decay * along + delta[i, j, e] * b[i, j] * u[i, j, e]
                below[j] = decay * below[j] + along
                expected[i, j, e] = c[i, j] @ below[j]
    torch.testing.assert_close(scan_2d(u, delta, rates, b, c), expected)


def test_every_parameter_has_a_gradient_on_a_grid_of_one_cell() -> None:
    """DistributedDataParallel waits for the gradients of all."""
    head = Mamba2DMIL(8, 2, StemOptions(inner_dim=8))
    head(torch.randn(1, 1, 8), pos=torch.zeros(1, 1, 2, dtype=torch.long)).sum().backward()
    assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []


def test_grid_leaves_out_empty_rows_and_columns() -> None:
    cells, rows, columns = grid_cells(torch.tensor([[5, 100], [90, 100], [5, 7]]))
    assert (rows, columns) == (2, 2)
    assert cells.tolist() == [2, 3, 0]


def test_patches_of_one_cell_share_its_mean() -> None:
    head, h = Mamba2DMIL(4, 2, STEM).eval(), torch.randn(3, 8)
    pos = torch.tensor([[2, 5], [2, 5], [3, 5]])
    mean = torch.stack([(h[0] + h[1]) / 2, h[2]])
    torch.testing.assert_close(head._scan(h, pos), head._scan(mean, pos[1:])[[0, 0, 1]])


def test_chief_site_moves_every_slide_alike() -> None:
    head = CHIEF(4, 2, STEM).eval()
    x, y = torch.randn(1, 5, 4), torch.randn(1, 8, 4)
    before = head(x) - head(y)
    nn.init.normal_(head.site)
    torch.testing.assert_close(head(x) - head(y), before)
