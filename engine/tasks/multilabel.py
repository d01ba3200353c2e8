"""Several labels per bag that do not exclude each other: task, metrics, bootstrap.

N samples, L labels, R resamples. A label is 1, 0, or below 0 where it is unknown; unknown ones count nowhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from engine.metrics.bootstrap import Statistics
from engine.metrics.classification import Metrics
from engine.metrics.weighted import Floats, ratio, weighted_auc
from engine.tasks import FoldFree, Target, Task
from engine.tasks.losses import binary_cross_entropy
from utils.errors import UserError

MULTILABEL_SELECTION = ("auc", "f1_macro", "accuracy_macro")
"""Metrics that may choose the epoch: means over the labels."""


@dataclass(frozen=True)
class MultilabelTask(FoldFree):
    """A sigmoid per label, binary cross-entropy. Implements ``Task``.

    Attributes:
        label_names: names in the order of the outputs; also the keys of a target.
        selection: metric that chooses the epoch.
        positive_weights: factor of the loss of each label's positives; None for 1.
    """

    label_names: tuple[str, ...]
    selection: str = "auc"
    positive_weights: tuple[float, ...] | None = None
    name: str = "multilabel"

    @property
    def outputs(self) -> int:
        return len(self.label_names)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"p_{c}" for c in self.label_names)

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        return self.criterion(logits, self.labels(target))

    def labels(self, target: Target) -> Tensor:
        """(B, L)."""
        return torch.stack([target[name].long() for name in self.label_names], 1)

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.positive_weights is None else torch.tensor(self.positive_weights)
        return binary_cross_entropy(logits, labels, weights)

    def share(self, target: Target, counts: Sequence[int], rank: int) -> Tensor:
        """By known labels, of which the loss is the mean; every process must call it."""
        known = (self.labels(target) >= 0).sum().float()
        total = known.clone()
        dist.all_reduce(total)
        return known * len(counts) / total.clamp(min=1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        return MultilabelStatistics(logits.numpy(), self.labels(target).numpy(), self.label_names)

    def facts(self) -> dict[str, Any]:
        weights = None if self.positive_weights is None else list(self.positive_weights)
        return {"loss": "bce", "class_weights": weights}

    def pooled(self) -> Task:
        return self


class MultilabelStatistics:
    """AUC, F1 and accuracy of every label, and their means over the labels where they are defined.

    A label is predicted where its logit is above 0 (probability above one half). F1 of a label without positives and
    without predicted ones is undefined; so is the AUC of a label that has one value only.
    """

    def __init__(self, logits: ArrayLike, label: ArrayLike, names: Sequence[str]) -> None:
        """Takes (N, L) logits and labels, and L names; raises UserError when they do not fit."""
        self.logits, self.label = np.asarray(logits, np.float64), np.asarray(label)
        self.names = tuple(names)
        self.size = len(self.logits)
        if self.logits.shape != self.label.shape or self.logits.shape[1:] != (len(self.names),):
            raise UserError(
                f"multi-label metrics need logits and labels (N, {len(self.names)}), but got {self.logits.shape} and "
                f"{self.label.shape}. Pass one column per label."
            )

    def point(self) -> Metrics:
        """The metrics of the whole set; NaN with a note where undefined."""
        bad = int((~np.isfinite(self.logits)).any(axis=1).sum())
        values = {name: float(v[0]) for name, v in self.resampled(np.ones((self.size, 1), np.float32)).items()}
        if bad or not self.size:
            reason = f"the logits of {bad} of {self.size} samples are not finite" if bad else "there is no sample"
            return Metrics(dict.fromkeys(values, float("nan")), [f"all metrics are NaN: {reason}"])
        return Metrics(values, self._notes(values))

    def _notes(self, values: dict[str, float]) -> list[str]:
        single = [name for name in self.names if np.isnan(values[f"auc_{name}"])]
        unknown = int((self.label < 0).sum())
        notes = [f"auc leaves out labels with one value only: {', '.join(single)}"] if single else []
        return notes + ([f"{unknown} of {self.label.size} labels are unknown and left out"] if unknown else [])

    def resampled(self, weights: NDArray[np.float32]) -> dict[str, Floats]:
        """The metrics, each (R,), of resamples with ``weights`` (N, R); NaN where undefined."""
        values: dict[str, Floats] = {}
        kinds: dict[str, list[Floats]] = {"auc": [], "f1": [], "accuracy": []}
        for column, name in enumerate(self.names):
            for kind, value in self._of_label(column, weights).items():
                values[f"{kind}_{name}"] = value
                kinds[kind].append(value)
        means = {"auc": "auc", "f1": "f1_macro", "accuracy": "accuracy_macro"}
        return {means[kind]: _mean(per_label) for kind, per_label in kinds.items()} | values

    def _of_label(self, column: int, weights: NDArray[np.float32]) -> dict[str, Floats]:
        known = self.label[:, column] >= 0
        score, positive, drawn = self.logits[known, column], self.label[known, column] == 1, weights[known]
        predicted = score > 0
        hits, right = drawn[positive & predicted].sum(axis=0), drawn[positive == predicted].sum(axis=0)
        return {
            "auc": weighted_auc(score, positive, drawn),
            "f1": ratio(2 * hits, drawn[positive].sum(axis=0) + drawn[predicted].sum(axis=0)),
            "accuracy": ratio(right, drawn.sum(axis=0)),
        }


def _mean(per_label: list[Floats]) -> Floats:
    """Mean over the labels where the metric is defined; NaN where it is for none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(np.nanmean(np.stack(per_label), axis=0))
