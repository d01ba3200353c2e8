"""Losses: hand-computed cases, the published formula spelt out, gradients, low precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from engine.tasks.losses import cox_loss, cross_entropy, survival_nll, survival_risk

LOG2 = math.log(2)


def published_nll(logits: torch.Tensor, label: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    """The formula of the specification, bag by bag, in float64."""
    terms = []
    for z, y, e in zip(logits.double(), label.tolist(), event.tolist(), strict=True):
        hazard = torch.sigmoid(z)
        survival = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - hazard, 0)])
        before, after, h = (v.clamp(min=1e-7) for v in (survival[y], survival[y + 1], hazard[y]))
        terms.append(-(torch.log(before) + torch.log(h)) if e else -torch.log(after))
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    ("label", "event", "loss"),
    [(0, 1, LOG2), (2, 1, 3 * LOG2), (3, 1, 4 * LOG2), (0, 0, LOG2), (1, 0, 2 * LOG2), (3, 0, 4 * LOG2)],
)
def test_nll_by_hand_with_hazards_of_one_half(label: int, event: int, loss: float) -> None:
    value = survival_nll(torch.zeros(1, 4), torch.tensor([label]), torch.tensor([event]))
    assert value.item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("bins", [1, 4, 7])
def test_nll_is_the_published_formula(bins: int) -> None:
    generator = torch.Generator().manual_seed(bins)
    logits = 4 * torch.randn(200, bins, generator=generator)
    label = torch.randint(bins, (200,), generator=generator)
    event = torch.randint(2, (200,), generator=generator)
    expected = published_nll(logits, label, event)
    assert survival_nll(logits.double(), label, event).item() == pytest.approx(expected.item(), rel=1e-12)
    assert survival_nll(logits, label, event).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32_under_autocast_and_low_precision_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(64, 4, generator=generator)).to(dtype)
    label = torch.randint(4, (64,), generator=generator)
    event = torch.randint(2, (64,), generator=generator)
    time = torch.rand(64, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        values = [
            survival_nll(logits, label, event),
            cross_entropy(logits, label, torch.tensor([0.5, 1.0, 1.0, 1.5])),
            cox_loss(survival_risk(logits), time, event),
        ]
        assert survival_risk(logits).dtype == torch.float32
    exact = logits.double()
    weights = torch.tensor([0.5, 1.0, 1.0, 1.5])
    expected = [
        published_nll(exact, label, event),
        cross_entropy(exact, label, weights),
        cox_loss(survival_risk(exact), time, event),
    ]
    for value, reference in zip(values, expected, strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(reference.item(), rel=1e-5)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_nll_of_extreme_logits_is_finite_and_bounded_by_the_clamp(size: float) -> None:
    logits = torch.tensor([[size] * 4, [-size] * 4, [size] * 4], requires_grad=True)
    loss = survival_nll(logits, torch.tensor([3, 3, 0]), torch.tensor([1, 1, 0]))
    loss.backward()
    # each bag hits the clamp exactly once: log S_2, log h_3, log S_0
    assert loss.item() == pytest.approx(-math.log(1e-7), rel=1e-4)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_gradients_agree_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    label, event = torch.tensor([0, 1, 2, 3, 0, 3]), torch.tensor([1, 0, 1, 1, 0, 0])
    time = torch.tensor([1.0, 2.0, 2.0, 4.0, 4.0, 5.0])
    weights = torch.tensor([0.5, 1.0, 1.0, 1.5])
    assert torch.autograd.gradcheck(lambda z: survival_nll(z, label, event), logits)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, label, weights), logits)
    assert torch.autograd.gradcheck(lambda z: cox_loss(survival_risk(z), time, event), logits)


def test_a_step_against_the_gradient_moves_the_risk_the_right_way() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    survival_nll(logits, torch.tensor([0, 3]), torch.tensor([1, 0])).backward()
    assert logits.grad is not None
    early_death, survivor = survival_risk(logits.detach() - logits.grad)
    assert early_death > survivor


def test_risk_by_hand() -> None:
    risk = survival_risk(torch.tensor([[0.0, 0.0, 0.0, 0.0], [-60.0, -60.0, -60.0, -60.0], [60.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(risk, torch.tensor([-0.9375, -4.0, 0.0]))


def test_cross_entropy_without_weights_is_torchs() -> None:
    logits, label = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 5
    torch.testing.assert_close(cross_entropy(logits, label), F.cross_entropy(logits, label))


def test_class_weights_count_in_a_batch_of_one() -> None:
    logits, label, weights = torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([0.5, 1.5])
    one_by_one = [cross_entropy(logits[i : i + 1], label[i : i + 1], weights).item() for i in range(2)]
    assert one_by_one == pytest.approx([0.5 * LOG2, 1.5 * LOG2])
    assert cross_entropy(logits, label, weights).item() == pytest.approx(sum(one_by_one) / 2)


def test_cox_by_hand() -> None:
    """Deaths at 1 and 2 with risks log 2 and log 3, one patient censored at 3 with risk log 5."""
    risk = torch.log(torch.tensor([2.0, 3.0, 5.0]))
    value = cox_loss(risk, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 1, 0]))
    assert value.item() == pytest.approx((math.log(10 / 2) + math.log(8 / 3)) / 2, rel=1e-6)


def test_cox_is_breslows_sum_with_ties_and_ignores_a_shift() -> None:
    generator = torch.Generator().manual_seed(5)
    risk = torch.randn(40, dtype=torch.float64, generator=generator)
    time = torch.randint(1, 8, (40,), generator=generator).double()
    event = torch.randint(2, (40,), generator=generator).bool()
    terms = [torch.logsumexp(risk[time >= time[i]], 0) - risk[i] for i in range(40) if event[i]]
    expected = torch.stack(terms).mean().item()
    assert cox_loss(risk, time, event).item() == pytest.approx(expected, rel=1e-12)
    assert cox_loss(risk + 500, time, event).item() == pytest.approx(expected, rel=1e-9)


def test_cox_without_events_is_zero_with_zero_gradient() -> None:
    risk = torch.randn(4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = cox_loss(risk, torch.arange(4.0), torch.zeros(4))
    loss.backward()
    assert loss.item() == 0
    assert risk.grad is not None
    assert not risk.grad.any()
