"""Bootstrap of the metrics: point estimate, standard deviation, percentile interval; all resamples at once.

N samples, R resamples. A resample is not a list of samples but a column of counts, so that each metric of
all resamples is a few products of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.metrics.classification import Metrics
from engine.metrics.weighted import Floats

PUBLISHED_SEED = 7784414403328510413
"""The published program seeds the resamples of a fold with fold + this number."""

CHUNK_CELLS = 1 << 18
"""Weights per chunk of resamples: 1 MiB in float32, which stays in a core's cache."""


class Statistics(Protocol):
    """A set of metrics of one set of samples."""

    size: int

    def point(self) -> Metrics:
        """The plain metrics of the whole set."""
        ...

    def resampled(self, weights: NDArray[np.float32]) -> dict[str, Floats]:
        """The metrics, each (R,), of resamples with ``weights`` (N, R); NaN where undefined."""
        ...


@dataclass(frozen=True)
class Estimate:
    """One metric: of the set itself (``value``); mean, sample sd, 95 % percentile interval of resamples."""

    value: float
    mean: float
    std: float
    low: float
    high: float
    resamples: int


@dataclass(frozen=True)
class Bootstrap:
    """Estimates by metric name, and sentences about undefined values and resamples left out."""

    estimates: dict[str, Estimate]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    @property
    def values(self) -> dict[str, float]:
        """The point estimates, as ``Metrics.values``."""
        return {name: estimate.value for name, estimate in self.estimates.items()}

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Plain nested dictionaries, for JSON."""
        return {name: asdict(estimate) for name, estimate in self.estimates.items()}


def resample_weights(size: int, resamples: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Draws resamples of ``size`` samples with replacement, a few at a time.

    Yields:
        (N, r), how often each sample was drawn; columns add up to N, the r of all parts to ``resamples``.
    """
    generator = np.random.default_rng(seed)
    width = max(1, CHUNK_CELLS // size)
    for start in range(0, resamples, width):
        count = min(width, resamples - start)
        drawn = generator.integers(size, size=(count, size)) + np.arange(count)[:, None] * size
        counts = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        yield np.ascontiguousarray(counts.T, dtype=np.float32)


def bootstrap(statistics: Statistics, fold: int = 0, resamples: int = 1000) -> Bootstrap:
    """Estimates every metric of ``statistics``; each metric sees the same resamples.

    Args:
        statistics: ``ClassificationStatistics(logits, label)`` or
            ``SurvivalStatistics(risk, time, event, train_time, train_event)``.
        fold: seeds the resamples together with the published constant.
        resamples: number of resamples; 0 for point estimates alone.

    Returns:
        Estimates. Resamples in which a metric is undefined are left out of it, and a note counts them. A
        metric that is undefined on the whole set is NaN throughout.
    """
    point = statistics.point()
    drawn: dict[str, list[Floats]] = {name: [] for name in point.values}
    if resamples and any(not math.isnan(v) for v in point.values.values()):
        for weights in resample_weights(statistics.size, resamples, fold + PUBLISHED_SEED):
            for name, values in statistics.resampled(weights).items():
                drawn[name].append(values)
    estimates, notes = {}, list(point.notes)
    for name, value in point.values.items():
        values = np.concatenate(drawn[name]) if drawn[name] and not math.isnan(value) else np.empty(0)
        defined = values[~np.isnan(values)]
        estimates[name] = _estimate(value, defined)
        if len(defined) < len(values):
            notes.append(f"{name}: undefined in {len(values) - len(defined)} of {len(values)} resamples, left out")
    return Bootstrap(estimates, notes)


def _estimate(value: float, resampled: Floats) -> Estimate:
    if not len(resampled):
        return Estimate(value, math.nan, math.nan, math.nan, math.nan, 0)
    low, high = np.percentile(resampled, [2.5, 97.5])
    std = float(resampled.std(ddof=1)) if len(resampled) > 1 else math.nan
    return Estimate(value, float(resampled.mean()), std, float(low), float(high), len(resampled))


def summarise(folds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation of every metric over folds; folds where it is NaN are left out.

    Args:
        folds: one mapping of metric names to values per fold.

    Returns:
        ``{metric: {"mean": ..., "sd": ..., "folds": folds counted}}``; NaN where too few folds count.
    """
    names = dict.fromkeys(name for fold in folds for name in fold)
    return {name: _spread([fold[name] for fold in folds if name in fold]) for name in names}


def _spread(values: list[float]) -> dict[str, float]:
    known = [v for v in values if not math.isnan(v)]
    mean = float(np.mean(known)) if known else math.nan
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else math.nan
    return {"mean": mean, "sd": sd, "folds": len(known)}
