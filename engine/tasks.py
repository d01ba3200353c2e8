"""What differs between classification and survival: loss, scores, metrics, and the metric that chooses the epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.bootstrap import Statistics
from engine.losses import cross_entropy, survival_nll, survival_risk
from engine.metrics import CLASSIFICATION_METRICS, PUBLISHED_NAMES, ClassificationStatistics
from utils.errors import UserError, did_you_mean

Target = Mapping[str, Tensor]

PUBLISHED_METRIC_ORDER = tuple(PUBLISHED_NAMES)[:7]
"""The list that the published ``--best_metric_index`` counts through."""


class Task(Protocol):
    """One kind of label. K outputs, B bags, N evaluated bags.

    Attributes:
        name: "classification" or "survival".
        outputs: K, the width of the logits.
        selection: the metric whose maximum chooses the epoch.
    """

    @property
    def name(self) -> str: ...

    @property
    def outputs(self) -> int: ...

    @property
    def selection(self) -> str: ...

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Mean loss of (B, K) float32 logits."""
        ...

    def labels(self, target: Target) -> Tensor:
        """(B,) integers that ``criterion`` understands, for heads with an auxiliary loss."""
        ...

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss in terms of ``labels``."""
        ...

    def scores(self, logits: Tensor) -> Tensor:
        """What is written for people: (N, K) probabilities or (N,) risks."""
        ...

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        """Every metric of the task on N evaluated bags, ready for a bootstrap."""
        ...


@dataclass(frozen=True)
class ClassificationTask:
    """Softmax over classes, cross-entropy. Implements ``Task``.

    Attributes:
        class_names: names in label order.
        selection: metric that chooses the epoch.
    """

    class_names: tuple[str, ...]
    selection: str
    name: str = "classification"

    @property
    def outputs(self) -> int:
        return len(self.class_names)

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        return cross_entropy(logits, target["label"])

    def labels(self, target: Target) -> Tensor:
        return target["label"]

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        return ClassificationStatistics(logits.numpy(), target["label"].numpy())


@dataclass(frozen=True)
class SurvivalTask:
    """Discrete-time hazards over K bins, negative log-likelihood. Implements ``Task``.

    Attributes:
        outputs: number of bins.
        train_time, train_event: of the training split, for metrics that weight by censoring.
        selection: metric that chooses the epoch.
    """

    outputs: int
    train_time: tuple[float, ...] = ()
    train_event: tuple[int, ...] = ()
    selection: str = "c_index"
    name: str = "survival"

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        return survival_nll(logits, target["label"], target["event"])

    def labels(self, target: Target) -> Tensor:
        """Bin, plus K for a censored bag; ``label % K`` is the bin."""
        return target["label"] + self.outputs * (1 - target["event"])

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return survival_nll(logits, labels % self.outputs, (labels < self.outputs).long())

    def scores(self, logits: Tensor) -> Tensor:
        return survival_risk(logits)

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        from engine.survival_metrics import SurvivalStatistics

        risk, time, event = self.scores(logits).numpy(), target["time"].numpy(), target["event"].numpy()
        return SurvivalStatistics(risk, time, event, self.train_time or None, self.train_event or None)


def selection_metric(name: str | None, index: int, classes: int | None) -> str:
    """The metric that chooses the epoch.

    Args:
        name: ``--best_metric``; None follows ``index``.
        index: the published ``--best_metric_index``; -1 is the default of the task.
        classes: number of classes, None for survival.

    Raises:
        UserError: for a metric that the task has not.
    """
    if classes is None:
        known: tuple[str, ...] = ("c_index", "c_index_ipcw", "auc_td")
    else:
        known = tuple(m for m in CLASSIFICATION_METRICS if m != "ece")
    if name is not None:
        if name not in known:
            raise UserError(
                f"best_metric: there is no metric {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}"
            )
        return name
    if classes is None:
        return "c_index"
    if index == -1:
        return "auc" if classes == 2 else "accuracy_macro"
    if not 0 <= index < len(PUBLISHED_METRIC_ORDER):
        raise UserError(
            f"best_metric_index: {index} is outside 0..{len(PUBLISHED_METRIC_ORDER) - 1} "
            f"({', '.join(PUBLISHED_METRIC_ORDER)}). Give --best_metric by name."
        )
    return PUBLISHED_METRIC_ORDER[index]
