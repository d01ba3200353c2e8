"""Statistics of weighted samples, for many resamples of a bootstrap at once.

N samples, R resamples, K classes, U distinct times. A resample is a column of weights (N, R): how often each
sample was drawn. Every function gives, in each column, what its plain form gives on the samples repeated that
often.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> Floats:
    """Quotient in float64, NaN where the denominator is zero."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def weighted_auc(score: Floats, positive: Bools, weights: NDArray[Any]) -> Floats:
    """P(positive scores higher) + half P(tie), for weights (N, R); (R,), NaN without a pair."""
    negative_index = np.flatnonzero(~positive)
    negative_index = negative_index[np.argsort(score[negative_index], kind="stable")]
    below = np.zeros((len(negative_index) + 1, weights.shape[1]))
    np.cumsum(weights[negative_index], axis=0, out=below[1:])
    drawn, ordered = weights[positive].astype(np.float64), score[negative_index]
    beaten = below[np.searchsorted(ordered, score[positive], side="left")]
    beaten += below[np.searchsorted(ordered, score[positive], side="right")]
    return ratio(np.einsum("nr,nr->r", drawn, beaten) / 2, drawn.sum(axis=0) * below[-1])


def confusion_metrics(c: Floats) -> dict[str, Floats]:
    """Metrics of confusion matrices (K, K, R), rows = label."""
    total = c.sum(axis=(0, 1))
    hits, labelled, predicted = np.einsum("kkr->kr", c), c.sum(axis=1), c.sum(axis=0)
    seen = labelled + predicted > 0
    recall = np.nan_to_num(ratio(hits, labelled))
    macro = {
        "recall_macro": recall,
        "precision_macro": np.nan_to_num(ratio(hits, predicted)),
        "f1_macro": np.nan_to_num(ratio(2 * hits, labelled + predicted)),
    }
    values = {name: (column * seen).sum(axis=0) / seen.sum(axis=0) for name, column in macro.items()}
    index = np.arange(len(c))
    return {
        **values,
        "accuracy_macro": values["recall_macro"],
        "accuracy_micro": hits.sum(axis=0) / total,
        "balanced_accuracy": recall.sum(axis=0) / (labelled > 0).sum(axis=0),
        "kappa": _kappa(c, (index[:, None] != index).astype(np.float64)),
        "kappa_quadratic": _kappa(c, (index[:, None] - index) ** 2.0),
        "accuracy_within_one": np.einsum("ij,ijr->r", (abs(index[:, None] - index) <= 1) * 1.0, c) / total,
    }


def _kappa(c: Floats, cost: NDArray[Any]) -> Floats:
    """1 - observed / chance disagreement (Cohen 1968) of confusion matrices (K, K, R), cost (K, K)."""
    observed = np.einsum("ij,ijr->r", cost, c)
    chance = np.einsum("ij,ir,jr->r", cost, c.sum(axis=1), c.sum(axis=0)) / c.sum(axis=(0, 1))
    return np.asarray(1 - ratio(observed, chance))


def tie_groups(risk: Floats, tolerance: float) -> Floats:
    """Ranks of risks, (N,); neighbours in order that differ by no more than ``tolerance`` share one."""
    order = np.argsort(risk, kind="stable")
    ranks = np.zeros(len(risk))
    ranks[order[1:]] = np.cumsum(np.diff(risk[order]) > tolerance)
    return ranks


def weighted_median(values: Floats, weights: NDArray[Any]) -> Floats:
    """np.median of every materialised resample: values (N,), counts (N, R) -> (R,)."""
    order = np.argsort(values, kind="stable")
    drawn = np.cumsum(weights[order], axis=0)
    count = drawn[-1]
    low = (drawn > (count - 1) // 2).argmax(axis=0)
    high = (drawn > count // 2).argmax(axis=0)
    return np.asarray((values[order[low]] + values[order[high]]) / 2)


def life_table(time: Floats, event: Bools, weights: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """Distinct times (U,), and at each the weight at risk and the weight of events, (U, R)."""
    order = np.argsort(time, kind="stable")
    distinct, start = np.unique(time[order], return_index=True)
    drawn = weights[order].astype(np.float64)
    leaving = np.add.reduceat(drawn, start, axis=0)
    died = np.add.reduceat(drawn * event[order, None], start, axis=0)
    return distinct, leaving[::-1].cumsum(axis=0)[::-1], died
