"""What differs between kinds of labels: losses, scores, metrics (``task``); which one a run has: ``task_builder``."""

from engine.tasks.task import (
    ClassificationTask,
    CoxTask,
    FoldFree,
    SurvivalTask,
    Target,
    Task,
    known_metric,
    selection_metric,
)

__all__ = [
    "ClassificationTask",
    "CoxTask",
    "FoldFree",
    "SurvivalTask",
    "Target",
    "Task",
    "known_metric",
    "selection_metric",
]
