"""Losses of the tasks, in float32 whatever the autocast and the dtype of the logits (float64 stays float64).

B bags, K classes, labels or survival bins.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

LOG_FLOOR = math.log(1e-7)
"""The published loss clamps each probability at 1e-7 before its logarithm."""


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, label: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the bags.

    With weights the mean is of weight x loss over bags, not divided by the weights drawn: that quotient,
    torch's default, cancels the weights wherever a batch holds one bag.

    Args:
        logits: (B, K).
        label: (B,) integers in 0..K-1.
        class_weights: (K,), of mean one over the training set if the step size should stay as it is.

    Returns:
        A scalar.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = _full(logits)
        per_bag = F.cross_entropy(logits, label.long(), reduction="none")
        if class_weights is not None:
            per_bag = per_bag * class_weights.to(logits, non_blocking=True)[label.long()]
        return _mean(per_bag)


def _mean(per_bag: Tensor) -> Tensor:
    """Mean over bags; zero, with zero gradient, for none."""
    return per_bag.mean() if len(per_bag) else per_bag.sum()


def _log_survival(logits: Tensor) -> Tensor:
    """Log S_k = sum over j <= k of log(1 - h_j), with h = sigmoid(logits); (B, K)."""
    return F.logsigmoid(-logits).cumsum(1)


def survival_nll(logits: Tensor, label: Tensor, event: Tensor) -> Tensor:
    """Negative log-likelihood of discrete hazards (Zadeh and Schmid 2020), as published: both terms in full.

    With h = sigmoid(logits), S_k = prod over j <= k of (1 - h_j) and S_{-1} = 1, a death in bin y costs
    -(log S_{y-1} + log h_y), a bag censored in bin y costs -log S_y; each probability is clamped at 1e-7.
    The sums are of logarithms: a product in float32 loses log S long before the clamp.

    Args:
        logits: (B, K) hazards of K bins before the sigmoid.
        label: (B,) bin of the event or of the censoring, integers in 0..K-1.
        event: (B,) 1 for a death, 0 for censored.

    Returns:
        A scalar, the mean over bags.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = _full(logits)
        bin_index = label.long().unsqueeze(1)
        log_hazard = F.logsigmoid(logits)
        log_survival = F.pad(_log_survival(logits), (1, 0))  # (B, K + 1), column y is S_{y-1}
        log_hazard, log_survival = log_hazard.clamp(min=LOG_FLOOR), log_survival.clamp(min=LOG_FLOOR)
        died = log_survival.gather(1, bin_index) + log_hazard.gather(1, bin_index)
        censored = log_survival.gather(1, bin_index + 1)
        return -_mean(torch.where(event.bool().unsqueeze(1), died, censored))


def survival_risk(logits: Tensor) -> Tensor:
    """Risk -sum_k S_k of discrete hazards, (B, K) -> (B,) in [-K, 0]; higher means an earlier event."""
    with torch.autocast(logits.device.type, enabled=False):
        return -_log_survival(_full(logits)).exp().sum(1)


def cox_loss(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative partial log-likelihood of Cox (1972) with Breslow's handling of ties, per event.

    Every event i costs log(sum over t_j >= t_i of exp(risk_j)) - risk_i. The risk set is the batch, so a
    batch of one teaches nothing (``cox_loss_of_all`` joins the batches of several processes); without an event the
    loss is zero (and so is its gradient).

    Args:
        risk: (B,) log relative hazard; higher means an earlier event.
        time: (B,) any unit.
        event: (B,) 1 for an event, 0 for censored.

    Returns:
        A scalar, the mean over the events of the batch.
    """
    with torch.autocast(risk.device.type, enabled=False):
        risk, event = _full(risk), event.bool()
        order = torch.argsort(time, descending=True)
        later = -time[order].contiguous()
        last = torch.searchsorted(later, -time.contiguous(), right=True) - 1  # last patient still at risk
        log_risk_set = torch.logcumsumexp(risk[order], 0)[last]
        per_patient = (log_risk_set - risk) * event
        return per_patient.sum() / event.sum().clamp(min=1)


def cox_loss_of_all(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """``cox_loss`` over the bags of all processes, where there are several and ``risk`` is being trained.

    The risks of the other processes are constants here, and this process's share of the gradient is multiplied by
    the number of processes: their mean, which distributed training takes, is then the gradient of one process that
    holds all bags. Every process must call it equally often; the numbers of bags may differ and may be 0.

    Args:
        risk: (B,) of this process, as in ``cox_loss``; so are the others.
        time: (B,), finite.
        event: (B,).

    Returns:
        A scalar, the same on every process.
    """
    if not (risk.requires_grad and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return cox_loss(risk, time, event)
    most = torch.full((), len(risk), device=risk.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    # Bags that fill up a share left before any other, so they are in no risk set, and without an event.
    fill = risk.new_tensor([0.0, -math.inf, 0.0]).double().unsqueeze(1).expand(-1, int(most) - len(risk))
    own = torch.cat([torch.stack([risk.detach().double(), time.double(), event.double()]), fill], 1)
    shares = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, own)
    risks = [share[0].to(_full(risk)) for share in shares]
    risks[dist.get_rank()] = torch.cat([_full(risk), fill[0].to(_full(risk))])
    times, events = torch.cat([share[1] for share in shares]), torch.cat([share[2] for share in shares])
    loss = cox_loss(torch.cat(risks), times, events)
    return loss + (len(shares) - 1) * (loss - loss.detach())


def binary_cross_entropy(logits: Tensor, label: Tensor, positive_weights: Tensor | None = None) -> Tensor:
    """Mean over bags and known labels of -[w y log p + (1 - y) log(1 - p)], p = sigmoid(logit).

    Args:
        logits: (B, K), one per label; labels do not exclude each other.
        label: (B, K) 1 or 0; anything below 0 is unknown and does not count.
        positive_weights: (K,) factors w of the positives; None for 1.

    Returns:
        A scalar; zero, with zero gradient, where no label is known.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = _full(logits)
        known = label >= 0
        weights = None if positive_weights is None else positive_weights.to(logits, non_blocking=True)
        per_label = F.binary_cross_entropy_with_logits(
            logits, label.clamp(min=0).to(logits), reduction="none", pos_weight=weights
        )
        return (per_label * known).sum() / known.sum().clamp(min=1)


def squared_error(logits: Tensor, value: Tensor, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    """Mean squared error of a standardised value: ``logits`` predict (value - mean) / sd.

    Args:
        logits: (B, 1).
        value: (B,) in the csv's unit.
        mean: of the training set.
        sd: of the training set, so that the loss does not depend on the unit.

    Returns:
        A scalar.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = _full(logits)
        return _mean((logits[:, 0] - ((value - mean) / sd).to(logits)) ** 2)
