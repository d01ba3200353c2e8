"""Classification metrics: plain, and for all resamples of a bootstrap at once. Names: docs/metrics.md.

N samples, K classes, R resamples. A resample is a column of weights: how often each sample was drawn.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.errors import UserError

Floats = NDArray[np.float64]
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
    "ece",
)

ECE_BINS = 15
"""Equal-width bins of the confidence, as in Guo et al. 2017 and torchmetrics."""


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


def log_odds(scores: ArrayLike) -> Floats:
    """Log(p_k / (1 - p_k)) of the softmax probabilities of logits (N, K).

    It orders samples as p_k does but does not saturate where p_k rounds to 1; for two classes it is the
    difference of the logits. The other classes are summed in ascending order: equal probabilities stay equal.
    """
    x = np.asarray(scores, dtype=np.float64)
    x = x - x.max(axis=1, keepdims=True)
    odds = np.empty_like(x)
    for k in range(x.shape[1]):
        others = np.sort(np.delete(x, k, axis=1), axis=1)
        odds[:, k] = x[:, k] - np.logaddexp.reduce(others, axis=1)
    return odds


def _confidence(scores: Floats) -> Floats:
    """Softmax probability of the predicted class, (N, K) -> (N,)."""
    return np.asarray(1 / np.exp(scores - scores.max(axis=1, keepdims=True)).sum(axis=1))


def _checked(scores: ArrayLike, label: ArrayLike) -> tuple[Floats, Ints]:
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(label)
    if x.ndim != 2 or x.shape[1] < 2 or y.shape != x.shape[:1]:
        raise UserError(
            f"classification metrics need scores (N, K) with K >= 2 and labels (N,), "
            f"but got {x.shape} and {y.shape}. Pass one row of logits and one label per bag."
        )
    if y.size and (y.min() < 0 or y.max() >= x.shape[1]):
        raise UserError(
            f"labels run from {y.min()} to {y.max()}, but the scores have {x.shape[1]} classes "
            f"(0 to {x.shape[1] - 1}). Set n_classes to the number of classes."
        )
    return x, y.astype(np.int64)


def _obstacle(scores: Floats, label: Ints) -> str | None:
    """Why no metric at all can be computed, or None."""
    if not label.size:
        return "all metrics are NaN: there is no sample"
    bad = int((~np.isfinite(scores)).any(axis=1).sum())
    return f"all metrics are NaN: the scores of {bad} of {label.size} samples are not finite" if bad else None


def classification_metrics(scores: ArrayLike, label: ArrayLike) -> Metrics:
    """All metrics of CLASSIFICATION_METRICS; their definitions are in docs/metrics.md.

    Args:
        scores: (N, K) logits.
        label: (N,) integers in 0..K-1.

    Returns:
        Values, NaN with a note where a metric is undefined (one class present, no sample, scores not finite).

    Raises:
        UserError: shapes or labels do not fit.
    """
    x, y = _checked(scores, label)
    if obstacle := _obstacle(x, y):
        return Metrics(dict.fromkeys(CLASSIFICATION_METRICS, float("nan")), [obstacle])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = _plain(x, y)
    return Metrics(
        {name: float(values[name]) for name in CLASSIFICATION_METRICS}, _notes(values, y, x.shape[1])
    )


def _plain(x: Floats, y: Ints) -> dict[str, Any]:
    from sklearn import metrics as sk

    predicted, classes = x.argmax(axis=1), np.arange(x.shape[1])
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        y, predicted, average="macro", zero_division=0
    )
    aucs = class_aucs(x, y)
    return {
        "auc": aucs[~np.isnan(aucs)].mean() if len(np.unique(y)) > 1 else np.nan,
        "accuracy_macro": recall,
        "accuracy_micro": sk.accuracy_score(y, predicted),
        "balanced_accuracy": sk.recall_score(
            y, predicted, labels=np.unique(y), average="macro", zero_division=0
        ),
        "f1_macro": f1,
        "precision_macro": precision,
        "recall_macro": recall,
        "kappa": sk.cohen_kappa_score(y, predicted, labels=classes),
        "kappa_quadratic": sk.cohen_kappa_score(y, predicted, labels=classes, weights="quadratic"),
        "ece": np.abs(_calibration_gaps(x, y).sum(axis=1)).sum() / len(y),
    }


def class_aucs(scores: Floats, label: Ints) -> Floats:
    """AUC of every class against the rest, (K,); NaN for a class that no sample or every sample has."""
    from sklearn.metrics import roc_auc_score

    odds, aucs = log_odds(scores), np.full(scores.shape[1], np.nan)
    for k in range(scores.shape[1]):
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


def _notes(values: dict[str, Any], y: Ints, n_classes: int) -> list[str]:
    notes = []
    absent = sorted(set(range(n_classes)) - set(np.unique(y).tolist()))
    if len(absent) == n_classes - 1:
        notes.append(f"auc is NaN: every one of the {len(y)} samples has class {y[0]}")
    elif absent:
        notes.append(f"auc averages the classes present; no sample has class {', '.join(map(str, absent))}")
    if np.isnan(values["kappa"]):
        notes.append("kappa is NaN: labels and predictions are one and the same class")
    return notes


def class_report(scores: ArrayLike, label: ArrayLike, names: list[str] | None = None) -> ClassReport:
    """Precision, recall, specificity, F1, AUC and support of every class, and the confusion matrix.

    Args:
        scores: (N, K) logits.
        label: (N,) integers in 0..K-1.
        names: K class names; default their indices.

    Raises:
        UserError: shapes or labels do not fit.
    """
    from sklearn import metrics as sk

    x, y = _checked(scores, label)
    classes = list(range(x.shape[1]))
    finite = np.isfinite(x).all(axis=1)
    x, y = x[finite], y[finite]
    if not y.size:
        empty = [float("nan")] * len(classes)
        keys = ("precision", "recall", "specificity", "f1", "auc", "support")
        return ClassReport(
            names or [str(k) for k in classes],
            [[0 for _ in classes] for _ in classes],
            dict.fromkeys(keys, empty),
        )
    predicted = x.argmax(axis=1)
    confusion = sk.confusion_matrix(y, predicted, labels=classes)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        y, predicted, labels=classes, average=None, zero_division=np.nan
    )
    negatives = len(y) - support
    false_positives = confusion.sum(axis=0) - confusion.diagonal()
    columns = {
        "precision": precision,
        "recall": recall,
        "specificity": ratio(negatives - false_positives, negatives),
        "f1": f1,
        "auc": class_aucs(x, y),
        "support": support,
    }
    values = {name: [float(v) for v in column] for name, column in columns.items()}
    return ClassReport(names or [str(k) for k in classes], confusion.tolist(), values)


def ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> Floats:
    """Quotient in float64, NaN where the denominator is zero."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


class ClassificationStatistics:
    """The metrics of ``classification_metrics`` for many resamples at once.

    Sorting, predictions and bins are made once; a resample only changes weights. AUC is the weighted
    Mann-Whitney statistic from cumulated weights, everything else follows from confusion matrices, one matrix
    product for all.
    """

    def __init__(self, scores: ArrayLike, label: ArrayLike) -> None:
        self.scores, self.label = _checked(scores, label)
        self.size, self.n_classes = self.scores.shape
        self.sound = _obstacle(self.scores, self.label) is None
        if self.sound:
            self.odds = log_odds(self.scores)
            self.gaps = _calibration_gaps(self.scores, self.label)
            cell = self.label * self.n_classes + self.scores.argmax(axis=1)
            self.cells = (cell == np.arange(self.n_classes**2)[:, None]).astype(np.float32)

    def point(self) -> Metrics:
        """The plain metrics of the whole set."""
        return classification_metrics(self.scores, self.label)

    def resampled(self, weights: NDArray[np.float32]) -> dict[str, Floats]:
        """The metrics, each (R,), of resamples with ``weights`` (N, R); NaN where undefined."""
        confusion = (self.cells @ weights).reshape(self.n_classes, self.n_classes, -1).astype(np.float64)
        return {
            "auc": self._auc(weights),
            **_from_confusion(confusion),
            "ece": np.abs(self.gaps @ weights).sum(axis=0) / confusion.sum(axis=(0, 1)),
        }

    def _auc(self, weights: NDArray[np.float32]) -> Floats:
        aucs = np.stack([self._class_auc(k, weights) for k in range(self.n_classes)])  # (K, R)
        defined = ~np.isnan(aucs)
        return ratio(np.where(defined, aucs, 0).sum(axis=0), defined.sum(axis=0))

    def _class_auc(self, k: int, weights: NDArray[np.float32]) -> Floats:
        positive = self.label == k
        return weighted_auc(self.odds[:, k], positive, weights)


def weighted_auc(score: Floats, positive: NDArray[np.bool_], weights: NDArray[Any]) -> Floats:
    """P(positive scores higher) + half P(tie), for weights (N, R); (R,), NaN without a pair."""
    negative_index = np.flatnonzero(~positive)
    negative_index = negative_index[np.argsort(score[negative_index], kind="stable")]
    below = np.zeros((len(negative_index) + 1, weights.shape[1]))
    np.cumsum(weights[negative_index], axis=0, out=below[1:])
    drawn, ordered = weights[positive].astype(np.float64), score[negative_index]
    beaten = below[np.searchsorted(ordered, score[positive], side="left")]
    beaten += below[np.searchsorted(ordered, score[positive], side="right")]
    return ratio(np.einsum("nr,nr->r", drawn, beaten) / 2, drawn.sum(axis=0) * below[-1])


def _from_confusion(c: Floats) -> dict[str, Floats]:
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
    }


def _kappa(c: Floats, cost: NDArray[Any]) -> Floats:
    """1 - observed / chance disagreement (Cohen 1968) of confusion matrices (K, K, R), cost (K, K)."""
    observed = np.einsum("ij,ijr->r", cost, c)
    chance = np.einsum("ij,ir,jr->r", cost, c.sum(axis=1), c.sum(axis=0)) / c.sum(axis=(0, 1))
    return np.asarray(1 - ratio(observed, chance))
