"""A number per bag: task, metrics, bootstrap. N samples, R resamples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from engine.metrics.bootstrap import Statistics
from engine.metrics.classification import Metrics
from engine.metrics.weighted import Floats, ratio
from engine.tasks import FoldFree, Target, Task
from engine.tasks.losses import squared_error
from utils.errors import UserError

REGRESSION_METRICS = ("mae", "rmse", "r2", "pearson", "spearman")
REGRESSION_SELECTION = ("r2", "pearson", "spearman")
"""Metrics that may choose the epoch: those of which more is better. ``r2`` orders epochs as ``rmse`` does."""

NO_SPREAD = 1e-12
"""A standard deviation below this share of the largest magnitude is rounding."""


@dataclass(frozen=True)
class RegressionTask(FoldFree):
    """One logit, the value in units of the training split's standard deviation from its mean. Implements ``Task``.

    Attributes:
        mean, sd: of the training split, in the csv's unit.
        selection: metric that chooses the epoch.
    """

    mean: float
    sd: float
    selection: str = "r2"
    name: str = "regression"
    outputs: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        return ("predicted",)

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        return self.criterion(logits, target["value"])

    def labels(self, target: Target) -> Tensor:
        return target["value"]

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return squared_error(logits, labels, self.mean, self.sd)

    def scores(self, logits: Tensor) -> Tensor:
        """(N,) values in the csv's unit."""
        return self.comparable(logits)[:, 0]

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        return RegressionStatistics(self.scores(logits).numpy(), target["value"].numpy())

    def facts(self) -> dict[str, Any]:
        return {"loss": "mse", "mean": self.mean, "sd": self.sd}

    def comparable(self, logits: Tensor) -> Tensor:
        return self.mean + self.sd * logits.double()

    def pooled(self) -> Task:
        return replace(self, mean=0.0, sd=1.0)


class RegressionStatistics:
    """Mean absolute and root mean squared error, R2, Pearson and Spearman correlation.

    R2 and correlations are undefined without spread in the values, correlations also without spread in what was
    predicted.
    """

    def __init__(self, predicted: ArrayLike, value: ArrayLike) -> None:
        """Takes (N,) predictions and values in one unit; raises UserError when they do not fit."""
        self.predicted, self.value = np.asarray(predicted, np.float64), np.asarray(value, np.float64)
        self.size = len(self.value)
        if self.predicted.shape != self.value.shape or self.value.ndim != 1:
            raise UserError(
                f"regression metrics need one prediction and one value per bag, but got {self.predicted.shape} and "
                f"{self.value.shape}. Pass arrays (N,)."
            )

    def point(self) -> Metrics:
        """The metrics of the whole set; NaN with a note where undefined."""
        bad = int((~np.isfinite(self.predicted)).sum())
        if bad or not self.size:
            reason = f"{bad} of {self.size} predictions are not finite" if bad else "there is no sample"
            return Metrics(dict.fromkeys(REGRESSION_METRICS, float("nan")), [f"all metrics are NaN: {reason}"])
        values = {k: float(v[0]) for k, v in self.resampled(np.ones((self.size, 1), np.float32)).items()}
        undefined = [name for name, value in values.items() if np.isnan(value)]
        what = "predictions" if np.isfinite(values["r2"]) else "values"
        return Metrics(values, [f"{', '.join(undefined)}: NaN, the {what} are all alike"] if undefined else [])

    def resampled(self, weights: NDArray[np.float32]) -> dict[str, Floats]:
        """The metrics, each (R,), of resamples with ``weights`` (N, R); NaN where undefined."""
        drawn = weights.astype(np.float64)
        total = drawn.sum(axis=0)
        error = self.predicted - self.value
        squared = error**2 @ drawn
        columns = self.predicted[:, None], self.value[:, None]
        ranks = _mid_ranks(self.predicted, drawn), _mid_ranks(self.value, drawn)
        return {
            "mae": ratio(np.abs(error) @ drawn, total),
            "rmse": np.sqrt(ratio(squared, total)),
            "r2": 1 - ratio(squared, _centred(columns[1], drawn)[1]),
            "pearson": _correlation(*columns, drawn),
            "spearman": _correlation(*ranks, drawn),
        }


def _centred(x: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Distances (N, R) from the mean of every resample, and the sum of their squares (R,); 0 where it is rounding."""
    total = weights.sum(axis=0)
    distance = x - (x * weights).sum(axis=0) / total
    spread = (weights * distance**2).sum(axis=0)
    smallest = total * (NO_SPREAD * np.abs(x).max()) ** 2
    return distance, np.where(spread > smallest, spread, 0.0)


def _correlation(x: Floats, y: Floats, weights: Floats) -> Floats:
    (dx, x_spread), (dy, y_spread) = _centred(x, weights), _centred(y, weights)
    return ratio((weights * dx * dy).sum(axis=0), np.sqrt(x_spread) * np.sqrt(y_spread))


def _mid_ranks(x: Floats, weights: Floats) -> Floats:
    """Ranks (N, R) of the samples in every resample written out; equal values share the mean of their ranks."""
    order = np.argsort(x, kind="stable")
    _, start, group = np.unique(x[order], return_index=True, return_inverse=True)
    count = np.add.reduceat(weights[order], start, axis=0)
    rank = np.cumsum(count, axis=0) - (count - 1) / 2
    ranks = np.empty_like(weights)
    ranks[order] = rank[group.reshape(-1)]
    return ranks
