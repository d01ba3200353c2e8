"""From options and labels to the task of a fold, and what cannot go together."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Sequence

from datasets.labels.types import Cohort, Fold, Sample
from engine.tasks import ClassificationTask, CoxTask, SurvivalTask, Task, known_metric, selection_metric
from engine.tasks.multilabel import MULTILABEL_SELECTION, MultilabelTask
from engine.tasks.regression import REGRESSION_SELECTION, RegressionTask
from utils.config import Config, EvalConfig
from utils.errors import Faults, UserError

log = logging.getLogger(__name__)

LOSSES = {
    "classification": ("ce",),
    "survival": ("nll_surv", "cox"),
    "multilabel": ("bce",),
    "regression": ("mse",),
}
"""Task to its losses, the default first."""

NEEDS = {
    "ce": "class labels",
    "nll_surv": "survival labels: name the data set surv_<name> with --datasets, or give --task=survival",
    "cox": "survival labels: name the data set surv_<name> with --datasets, or give --task=survival",
    "bce": "several labels per bag: give --task=multilabel and name the label columns with --classes",
    "mse": "numbers as labels: give --task=regression",
}


def loss_name(config: Config, cohort: Cohort) -> str:
    """The loss of the run: ``--loss``, else the task's default."""
    return config.train.loss or LOSSES[cohort.task][0]


def check_task_options(config: Config, cohort: Cohort, mil: str) -> None:
    """Refuses options that do not fit the task, all at once.

    Args:
        config: the options.
        cohort: the labels.
        mil: name of the MIL head.

    Raises:
        UserError: with a sentence per fault.
    """
    faults = Faults("options")
    loss = loss_name(config, cohort)
    if loss == "bce" and cohort.task == "classification":
        faults.add(
            "loss bce: classes that exclude each other are trained with ce, which for two classes is the binary "
            "cross-entropy of the difference of their logits. Give --loss=ce, or --task=multilabel for labels that do "
            "not exclude each other."
        )
    elif loss not in LOSSES[cohort.task]:
        # The loss may come from a YAML file, where it cannot be removed by the command line, only replaced.
        fitting = " or ".join(f"--loss={name}" for name in LOSSES[cohort.task])
        faults.add(
            f"loss {loss} needs {NEEDS[loss]}. The labels are those of a {cohort.task} task: give {fitting}, or "
            "correct the task (--datasets, --task)."
        )
    if mil.startswith("clam") and (loss == "cox" or cohort.task in ("multilabel", "regression")):
        faults.add(
            f"model {mil}: its instance loss needs one class or survival bin per bag, which loss {loss} has not. "
            "Choose another head, such as abmilx."
        )
    if config.train.class_weights is not None or config.train.balanced_sampling:
        _check_balance(config, cohort, faults)
    faults.raise_if_any()


def _check_balance(config: Config, cohort: Cohort, faults: Faults) -> None:
    weights = config.train.class_weights
    if config.train.balanced_sampling and cohort.task == "multilabel":
        faults.add(
            "balanced_sampling draws every class equally often, and the bags of a multilabel task have several labels. "
            "Give --no_balanced_sampling; --class_weights=balanced weighs the positives of each label instead."
        )
    elif config.train.balanced_sampling and cohort.task != "classification":
        faults.add(f"balanced_sampling needs classes, and the task is {cohort.task}. Give --no_balanced_sampling.")
    if weights is not None and cohort.task not in ("classification", "multilabel"):
        faults.add(f"class_weights needs classes, and the task is {cohort.task}. Give --class_weights=none.")
    elif weights not in (None, "balanced"):
        try:
            _listed_weights(weights, cohort)
        except UserError as error:
            faults.add(str(error))


def build(config: Config, cohort: Cohort, fold: Fold, processes: int) -> Task:
    """The task of one fold; what depends on the training split is taken from there.

    Raises:
        UserError: for a metric that the task has not, and Cox's loss with one bag per step.
    """
    options = config.eval
    if cohort.task == "multilabel":
        weights = positive_weights(config, cohort, fold.train)
        return MultilabelTask(cohort.class_names, _selection(options, MULTILABEL_SELECTION), weights)
    if cohort.task == "regression":
        mean, sd = fold.scale or _scale(fold.train)
        log.info(
            "values of the training split: mean %.4g, standard deviation %.4g; the loss is in units of it", mean, sd
        )
        return RegressionTask(mean, sd, _selection(options, REGRESSION_SELECTION))
    classes = None if cohort.task == "survival" else cohort.n_classes
    selection = selection_metric(options.best_metric, options.best_metric_index, classes)
    if cohort.task == "classification":
        return ClassificationTask(cohort.class_names, selection, class_weights(config, cohort, fold.train))
    cox = loss_name(config, cohort) == "cox"
    if cox:
        _check_risk_set(config, processes)
    return (CoxTask if cox else SurvivalTask)(
        outputs=1 if cox else cohort.n_classes,
        train_time=tuple(float(s.target["time"]) for s in fold.train),
        train_event=tuple(int(s.target["event"]) for s in fold.train),
        selection=selection,
    )


def _scale(train: Sequence[Sample]) -> tuple[float, float]:
    values = [float(s.target["value"]) for s in train]
    return statistics.fmean(values), statistics.pstdev(values)


def _selection(options: EvalConfig, known: tuple[str, ...]) -> str:
    """The metric of a task that the published program did not have; the first one is the default."""
    if options.best_metric_index != -1:
        raise UserError(
            f"best_metric_index counts classification metrics. Give --best_metric by name: {', '.join(known)}."
        )
    return known[0] if options.best_metric is None else known_metric(options.best_metric, known)


def _check_risk_set(config: Config, processes: int) -> None:
    bags = config.train.batch_size * processes
    if bags < 2:
        raise UserError(
            f"loss cox compares the bags of a step with each other, and a step has {bags} (batch_size "
            f"{config.train.batch_size} x {processes} process). Raise --batch_size to 2 at least, better 16; "
            "accumulation_steps does not help. Or use --loss=nll_surv."
        )


def class_weights(config: Config, cohort: Cohort, train: Sequence[Sample]) -> tuple[float, ...] | None:
    """Factors of the classes' losses, or None.

    "balanced" gives class k the weight n / (K n_k), with n training bags, n_k of them of class k, K classes present:
    every class then has the same share in the loss, and the mean weight over the training set is 1. A class without
    training bags has weight 1.

    Raises:
        UserError: a list of another length, or with something else than positive numbers.
    """
    text = config.train.class_weights
    if text is None:
        return None
    if text != "balanced":
        return _listed_weights(text, cohort)
    counts = Counter(int(s.target["label"]) for s in train)
    weights = tuple(len(train) / (len(counts) * counts[k]) if counts[k] else 1.0 for k in range(cohort.n_classes))
    log.info("class weights of the loss: %s", _shown(weights, cohort))
    return weights


def positive_weights(config: Config, cohort: Cohort, train: Sequence[Sample]) -> tuple[float, ...] | None:
    """Factors of the losses of each label's positives, or None.

    "balanced" gives a label with n known training bags, p of them positive, the weight (n - p) / p: positives and
    negatives then have the same share in its loss. A label with one value only has weight 1.

    Raises:
        UserError: a list of another length, or with something else than positive numbers.
    """
    text = config.train.class_weights
    if text is None:
        return None
    if text != "balanced":
        return _listed_weights(text, cohort)
    counts = [Counter(int(s.target[name]) for s in train) for name in cohort.class_names]
    weights = tuple(c[0] / c[1] if c[0] and c[1] else 1.0 for c in counts)
    log.info("weights of the positives in the loss: %s", _shown(weights, cohort))
    return weights


def _shown(weights: Sequence[float], cohort: Cohort) -> str:
    return ", ".join(f"{name} {weight:.3f}" for name, weight in zip(cohort.class_names, weights, strict=True))


def _listed_weights(text: str, cohort: Cohort) -> tuple[float, ...]:
    try:
        weights = tuple(float(word) for word in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != cohort.n_classes or not all(0 < w < float("inf") for w in weights):
        raise UserError(
            f"class_weights is {text!r}: give none, balanced, or {cohort.n_classes} positive numbers separated by "
            f"commas, in the order of the classes ({', '.join(cohort.class_names)})."
        )
    return weights


def strata(config: Config, train: Sequence[Sample]) -> list[int] | None:
    """The class of every training bag, where an epoch draws the classes equally often; else None."""
    return [int(s.target["label"]) for s in train] if config.train.balanced_sampling else None
