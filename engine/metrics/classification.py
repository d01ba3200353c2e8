"""Classification metrics: plain, and for all resamples of a bootstrap at once. Names: docs/metrics.md.

N samples, K classes, R resamples. A resample is a column of weights: how often each sample was drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.metrics.weighted import Floats, confusion_metrics, ratio, weighted_auc
from utils.errors import UserError

Ints = NDArray[np.int64]

PUBLISHED_NAMES = {
    "auc": "auc",
    "accuracy_macro": "acc",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "f1_macro": "fscore",
    "kappa": "ck",
    "accuracy_micro": "acc_micro",
    "c_index": "cindex",
}
"""Our names -> the published wandb names; the first seven in the order of the published metric list."""

CLASSIFICATION_METRICS = (
    "auc",
    "accuracy_macro",
    "accuracy_micro",
    "balanced_accuracy",
    "f1_macro",
    "precision_macro",
    "recall_macro",
    "kappa",
    "kappa_quadratic",
    "accuracy_within_one",
    "ece",
)


def metric_names(n_classes: int) -> tuple[str, ...]:
    """CLASSIFICATION_METRICS, less the one that is always 1 for two classes."""
    return tuple(m for m in CLASSIFICATION_METRICS if n_classes > 2 or m != "accuracy_within_one")


ECE_BINS = 15
"""Equal-width bins of the confidence, as in Guo et al. 2017 and torchmetrics."""


MOST_PREDICTIONS = 0.95
"""A note says so when one class takes more of the predictions than this, without being that frequent."""


@dataclass(frozen=True)
class Metrics:
    """Named values (NaN where undefined) and sentences that say why a value is undefined or unusual."""

    values: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> float:
        return self.values[name]


@dataclass(frozen=True)
class ClassReport:
    """Each class against the rest, in class order; ``confusion`` has rows = label, columns = prediction."""

    names: list[str]
    confusion: list[list[int]]
    values: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: each class with its numbers, and the confusion matrix."""
        classes = {n: {k: column[i] for k, column in self.values.items()} for i, n in enumerate(self.names)}
        return {"classes": classes, "confusion": self.confusion, "confusion_rows": "label", "order": self.names}

    def lines(self) -> list[str]:
        """A table for the log: one line per class, with its row of the confusion matrix behind it."""
        columns = [c for c in self.values if c != "support"]
        table = [["class", "n", *columns, *(f"> {name}" for name in self.names)]]
        for i, name in enumerate(self.names):
            numbers = [f"{self.values[c][i]:.3f}" for c in columns]
            table.append([name, f"{self.values['support'][i]:.0f}", *numbers, *map(str, self.confusion[i])])
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in table]


def log_odds(logits: ArrayLike) -> Floats:
    """Log(p_k / (1 - p_k)) of the softmax probabilities of logits (N, K).

    It orders samples as p_k does but does not saturate where p_k rounds to 1; for two classes it is the
    difference of the logits. The other classes are summed in ascending order: equal probabilities stay equal.
    """
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=1, keepdims=True)
    odds = np.empty_like(x)
    for k in range(x.shape[1]):
        others = np.sort(np.delete(x, k, axis=1), axis=1)
        odds[:, k] = x[:, k] - np.logaddexp.reduce(others, axis=1)
    return odds


def _confidence(logits: Floats) -> Floats:
    """Softmax probability of the predicted class, (N, K) -> (N,)."""
    return np.asarray(1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))


def _checked(logits: ArrayLike, label: ArrayLike) -> tuple[Floats, Ints]:
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(label)
    if x.ndim != 2 or x.shape[1] < 2 or y.shape != x.shape[:1]:
        raise UserError(
            f"classification metrics need logits (N, K) with K >= 2 and labels (N,), "
            f"but got {x.shape} and {y.shape}. Pass one row of logits and one label per bag."
        )
    if y.size and (y.min() < 0 or y.max() >= x.shape[1]):
        raise UserError(
            f"labels run from {y.min()} to {y.max()}, but there are logits of {x.shape[1]} classes "
            f"(0 to {x.shape[1] - 1}). Set n_classes to the number of classes."
        )
    if y.size and (x >= 0).all() and np.allclose(x.sum(axis=1), 1, atol=1e-5):
        raise UserError(
            f"all {y.size} rows of the logits are probabilities: not negative, and their sum is 1. "
            "AUC and calibration would be wrong after a second softmax; pass logits or log-probabilities."
        )
    return x, y.astype(np.int64)


def _obstacle(logits: Floats, label: Ints) -> str | None:
    """Why no metric at all can be computed, or None."""
    if not label.size:
        return "all metrics are NaN: there is no sample"
    bad = int((~np.isfinite(logits)).any(axis=1).sum())
    return f"all metrics are NaN: the logits of {bad} of {label.size} samples are not finite" if bad else None


def classification_metrics(logits: ArrayLike, label: ArrayLike) -> Metrics:
    """All metrics of CLASSIFICATION_METRICS; their definitions are in docs/metrics.md.

    Args:
        logits: (N, K), or log-probabilities.
        label: (N,) integers in 0..K-1.

    Returns:
        Values, NaN with a note where a metric is undefined (one class present, no sample, logits not finite).

    Raises:
        UserError: shapes or labels do not fit.
    """
    x, y = _checked(logits, label)
    if obstacle := _obstacle(x, y):
        return Metrics(dict.fromkeys(metric_names(x.shape[1]), float("nan")), [obstacle])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = _plain(x, y)
    return Metrics({name: float(values[name]) for name in metric_names(x.shape[1])}, _notes(values, x, y))


def _plain(x: Floats, y: Ints) -> dict[str, Any]:
    from sklearn import metrics as sk

    predicted, classes = x.argmax(axis=1), np.arange(x.shape[1])
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, predicted, average="macro", zero_division=0)
    aucs = class_aucs(x, y)
    return {
        "auc": aucs[~np.isnan(aucs)].mean() if len(np.unique(y)) > 1 else np.nan,
        "accuracy_macro": recall,
        "accuracy_micro": sk.accuracy_score(y, predicted),
        "balanced_accuracy": sk.recall_score(y, predicted, labels=np.unique(y), average="macro", zero_division=0),
        "f1_macro": f1,
        "precision_macro": precision,
        "recall_macro": recall,
        "kappa": sk.cohen_kappa_score(y, predicted, labels=classes),
        "kappa_quadratic": sk.cohen_kappa_score(y, predicted, labels=classes, weights="quadratic"),
        "accuracy_within_one": (np.abs(predicted - y) <= 1).mean(),
        "ece": np.abs(_calibration_gaps(x, y).sum(axis=1)).sum() / len(y),
    }


def class_aucs(logits: Floats, label: Ints) -> Floats:
    """AUC of every class against the rest, (K,); NaN for a class that no sample or every sample has."""
    from sklearn.metrics import roc_auc_score

    odds, aucs = log_odds(logits), np.full(logits.shape[1], np.nan)
    for k in range(logits.shape[1]):
        positive = label == k
        if positive.any() and not positive.all():
            aucs[k] = roc_auc_score(positive, odds[:, k])
    return aucs


def _calibration_gaps(x: Floats, y: Ints) -> Floats:
    """(ECE_BINS, N): confidence - correctness of each sample, in the row of its confidence bin."""
    confidence = _confidence(x)
    row = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    gaps = np.zeros((ECE_BINS, len(y)))
    gaps[row, np.arange(len(y))] = confidence - (x.argmax(axis=1) == y)
    return gaps


def _notes(values: dict[str, Any], x: Floats, y: Ints) -> list[str]:
    notes = []
    n_classes = x.shape[1]
    absent = sorted(set(range(n_classes)) - set(np.unique(y).tolist()))
    if len(absent) == n_classes - 1:
        notes.append(f"auc is NaN: every one of the {len(y)} samples has class {y[0]}")
    elif absent:
        notes.append(f"auc averages the classes present; no sample has class {', '.join(map(str, absent))}")
    if np.isnan(values["kappa"]):
        notes.append("kappa is NaN: labels and predictions are one and the same class")
    shares = np.bincount(x.argmax(axis=1), minlength=n_classes) / len(y)
    top = int(shares.argmax())
    own = float((y == top).mean())
    if shares[top] > MOST_PREDICTIONS > own:
        notes.append(f"class {top} takes {shares[top]:.0%} of the predictions, but {own:.0%} of the labels")
    return notes


def class_report(logits: ArrayLike, label: ArrayLike, names: Sequence[str] | None = None) -> ClassReport:
    """Precision, recall, specificity, F1, AUC and support of every class, and the confusion matrix.

    Args:
        logits: (N, K); samples whose logits are not finite are left out.
        label: (N,) integers in 0..K-1.
        names: K class names; default their indices.

    Returns:
        Values are NaN where a class has no sample, no prediction, or nothing else beside it.

    Raises:
        UserError: shapes or labels do not fit.
    """
    x, y = _checked(logits, label)
    finite = np.isfinite(x).all(axis=1)
    x, y = x[finite], y[finite]
    n_classes = x.shape[1]
    confusion = np.bincount(y * n_classes + x.argmax(axis=1), minlength=n_classes**2).reshape(n_classes, -1)
    hits, labelled, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    columns = {
        "precision": ratio(hits, predicted),
        "recall": ratio(hits, labelled),
        "specificity": ratio(len(y) - labelled - predicted + hits, len(y) - labelled),
        "f1": ratio(2 * hits, labelled + predicted),
        "auc": class_aucs(x, y),
        "support": labelled,
    }
    values = {name: [float(v) for v in column] for name, column in columns.items()}
    return ClassReport(list(names or map(str, range(n_classes))), confusion.tolist(), values)


class ClassificationStatistics:
    """The metrics of ``classification_metrics`` for many resamples at once.

    Sorting, predictions and bins are made once; a resample only changes weights. AUC is the weighted
    Mann-Whitney statistic from cumulated weights, everything else follows from confusion matrices, one matrix
    product for all.
    """

    def __init__(self, logits: ArrayLike, label: ArrayLike) -> None:
        self.logits, self.label = _checked(logits, label)
        self.size, self.n_classes = self.logits.shape
        self.sound = _obstacle(self.logits, self.label) is None
        if self.sound:
            self.odds = log_odds(self.logits)
            self.gaps = _calibration_gaps(self.logits, self.label)
            cell = self.label * self.n_classes + self.logits.argmax(axis=1)
            self.cells = (cell == np.arange(self.n_classes**2)[:, None]).astype(np.float32)

    def point(self) -> Metrics:
        """The plain metrics of the whole set."""
        return classification_metrics(self.logits, self.label)

    def resampled(self, weights: NDArray[np.float32]) -> dict[str, Floats]:
        """The metrics, each (R,), of resamples with ``weights`` (N, R); NaN where undefined."""
        confusion = (self.cells @ weights).reshape(self.n_classes, self.n_classes, -1).astype(np.float64)
        values = {
            "auc": self._auc(weights),
            **confusion_metrics(confusion),
            "ece": np.abs(self.gaps @ weights).sum(axis=0) / confusion.sum(axis=(0, 1)),
        }
        return {name: values[name] for name in metric_names(self.n_classes)}

    def _auc(self, weights: NDArray[np.float32]) -> Floats:
        aucs = np.stack([self._class_auc(k, weights) for k in range(self.n_classes)])  # (K, R)
        defined = ~np.isnan(aucs)
        return ratio(np.where(defined, aucs, 0).sum(axis=0), defined.sum(axis=0))

    def _class_auc(self, k: int, weights: NDArray[np.float32]) -> Floats:
        positive = self.label == k
        return weighted_auc(self.odds[:, k], positive, weights)
