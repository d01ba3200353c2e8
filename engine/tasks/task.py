"""What differs between kinds of label: loss, scores, metrics, and the metric that chooses the epoch.

Classification and survival are here; several labels per bag are in ``multilabel``, a number is in ``regression``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.metrics.bootstrap import Statistics
from engine.metrics.classification import PUBLISHED_NAMES, ClassificationStatistics, class_report, metric_names
from engine.tasks.losses import cox_loss_of_all, cross_entropy, survival_nll, survival_risk
from utils.errors import UserError, did_you_mean

Target = Mapping[str, Tensor]

PUBLISHED_METRIC_ORDER = tuple(PUBLISHED_NAMES)[:7]
"""The list that the published ``--best_metric_index`` counts through."""

SURVIVAL_SELECTION = ("c_index", "c_index_ipcw", "auc_td")
"""Survival metrics that may choose the epoch: those of which more is better."""


class Task(Protocol):
    """One kind of label. K outputs, B bags, N evaluated bags.

    Attributes:
        name: "classification", "survival", "multilabel" or "regression".
        outputs: K, the width of the logits.
        selection: the metric whose maximum chooses the epoch.
        columns: names of the columns of ``scores``.
    """

    @property
    def name(self) -> str: ...

    @property
    def outputs(self) -> int: ...

    @property
    def selection(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Mean loss of (B, K) float32 logits."""
        ...

    def labels(self, target: Target) -> Tensor:
        """(B,) or (B, n) numbers that ``criterion`` understands, for heads with an auxiliary loss."""
        ...

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss in terms of ``labels``."""
        ...

    def share(self, target: Target, counts: Sequence[int], rank: int) -> Tensor | float:
        """What the loss of process ``rank`` is multiplied by, so that the mean over processes is that of all bags.

        Args:
            target: of this process's bags.
            counts: bags of every process in this step.
            rank: this process.
        """
        ...

    def scores(self, logits: Tensor) -> Tensor:
        """What is written for people: (N, K) probabilities, or (N,) risks or values."""
        ...

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        """Every metric of the task on N evaluated bags, ready for a bootstrap."""
        ...

    def report(self, logits: Tensor, target: Target) -> dict[str, Any]:
        """What else the records hold of N tested bags; empty for most tasks."""
        ...

    def facts(self) -> dict[str, Any]:
        """What checkpoint and results must hold to read the logits and the loss again, as plain values."""
        ...

    def comparable(self, logits: Tensor) -> Tensor:
        """Logits in terms that do not depend on the fold, for ``pooled``."""
        ...

    def pooled(self) -> Task:
        """The task of ``comparable`` logits of several folds: without what a training split set."""
        ...


class FoldFree:
    """What most tasks have in common.

    The loss is a mean over bags, logits mean the same in every fold, and there is nothing more to report.
    """

    def share(self, target: Target, counts: Sequence[int], rank: int) -> Tensor | float:
        return counts[rank] * len(counts) / sum(counts)

    def report(self, logits: Tensor, target: Target) -> dict[str, Any]:
        return {}

    def comparable(self, logits: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True)
class ClassificationTask(FoldFree):
    """Softmax over classes, cross-entropy. Implements ``Task``.

    Attributes:
        class_names: names in label order.
        selection: metric that chooses the epoch.
        class_weights: factor of the loss of each class; None for 1.
    """

    class_names: tuple[str, ...]
    selection: str
    class_weights: tuple[float, ...] | None = None
    name: str = "classification"

    @property
    def outputs(self) -> int:
        return len(self.class_names)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"p_{c}" for c in self.class_names)

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        return self.criterion(logits, target["label"])

    def labels(self, target: Target) -> Tensor:
        return target["label"]

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.class_weights is None else torch.tensor(self.class_weights)
        return cross_entropy(logits, labels, weights)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        return ClassificationStatistics(logits.numpy(), target["label"].numpy())

    def report(self, logits: Tensor, target: Target) -> dict[str, Any]:
        """Numbers of each class, the confusion matrix, and both as lines of text."""
        report = class_report(logits.numpy(), target["label"].numpy(), self.class_names)
        return {**report.as_dict(), "lines": report.lines()}

    def facts(self) -> dict[str, Any]:
        weights = None if self.class_weights is None else list(self.class_weights)
        return {"loss": "ce", "class_weights": weights}

    def pooled(self) -> Task:
        return self


@dataclass(frozen=True)
class SurvivalTask(FoldFree):
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

    @property
    def columns(self) -> tuple[str, ...]:
        return ("risk",)

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        return self.criterion(logits, self.labels(target))

    def labels(self, target: Target) -> Tensor:
        """Bin, plus K for a censored bag; ``label % K`` is the bin."""
        return target["label"] + self.outputs * (1 - target["event"])

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return survival_nll(logits, labels % self.outputs, (labels < self.outputs).long())

    def scores(self, logits: Tensor) -> Tensor:
        return survival_risk(logits)

    def statistics(self, logits: Tensor, target: Target) -> Statistics:
        from engine.metrics.survival import SurvivalStatistics

        risk, time, event = self.scores(logits).numpy(), target["time"].numpy(), target["event"].numpy()
        return SurvivalStatistics(risk, time, event, self.train_time or None, self.train_event or None)

    def facts(self) -> dict[str, Any]:
        return {"loss": "nll_surv"}

    def pooled(self) -> Task:
        """Pooled patients have no training split: censoring comes from themselves."""
        return replace(self, train_time=(), train_event=())


@dataclass(frozen=True)
class CoxTask(SurvivalTask):
    """Proportional hazards: one logit, the log relative hazard; the risk set is the bags of a step. A ``Task``."""

    outputs: int = 1

    def labels(self, target: Target) -> Tensor:
        """(B, 2): time and event."""
        return torch.stack([target["time"].double(), target["event"].double()], 1)

    def criterion(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cox_loss_of_all(logits[:, 0], labels[:, 0], labels[:, 1])

    def share(self, target: Target, counts: Sequence[int], rank: int) -> float:
        return 1.0  # the loss of every process is that of all bags already

    def scores(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def facts(self) -> dict[str, Any]:
        return {"loss": "cox"}


def selection_metric(name: str | None, index: int, classes: int | None) -> str:
    """The metric that chooses the epoch of a classification or survival run.

    Args:
        name: ``--best_metric``; None follows ``index``.
        index: the published ``--best_metric_index``; -1 is the default of the task.
        classes: number of classes, None for survival.

    Raises:
        UserError: for a metric that the task has not.
    """
    known = SURVIVAL_SELECTION if classes is None else tuple(m for m in metric_names(classes) if m != "ece")
    if name is not None:
        return known_metric(name, known)
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


def known_metric(name: str, known: tuple[str, ...]) -> str:
    """``name`` if a task can select by it; raises UserError naming those that it can."""
    if name not in known:
        raise UserError(
            f"best_metric: there is no metric {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return name
