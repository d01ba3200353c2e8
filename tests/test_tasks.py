"""Losses, metrics and options of the tasks: hand-computed cases, laws, the libraries."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn import metrics as sk

from datasets.labels.types import Cohort, Fold, Sample
from datasets.loaders import TrainStream
from engine.metrics.bootstrap import bootstrap, resample_weights
from engine.metrics.classification import class_report, classification_metrics
from engine.tasks import ClassificationTask, CoxTask, SurvivalTask, losses, task_builder
from engine.tasks.multilabel import MultilabelStatistics, MultilabelTask
from engine.tasks.regression import RegressionStatistics, RegressionTask
from utils.config import Config
from utils.errors import UserError


def cohort(task: str, targets: list[dict[str, float]], names: tuple[str, ...] = ("a", "b", "c")) -> tuple[Cohort, Fold]:
    samples = tuple(Sample(f"s{i}", f"s{i}", (f"s{i}",), t) for i, t in enumerate(targets))
    fold = Fold(0, 0, samples, samples, samples, "test")
    return Cohort(task, names, (fold,)), fold  # type: ignore[arg-type]


def config(**values: object) -> Config:
    return Config.from_flat(values)


LABELS = [{"label": k} for k in (0, 0, 0, 0, 1, 1, 2, 2)]


# Class weights and balanced sampling


def test_balanced_weights_give_every_class_the_same_share_of_the_loss() -> None:
    task = task_builder.build(config(class_weights="balanced"), *cohort("classification", LABELS), 1)
    assert isinstance(task, ClassificationTask)
    assert task.class_weights == (8 / 12, 8 / 6, 8 / 6)
    label = torch.tensor([int(t["label"]) for t in LABELS])
    weights = torch.tensor(task.class_weights)[label]
    assert weights.mean() == 1
    assert [weights[label == k].sum() for k in range(3)] == [pytest.approx(8 / 3)] * 3


def test_weighted_loss_is_in_float32_and_by_hand() -> None:
    task = ClassificationTask(("a", "b"), "auc", class_weights=(0.5, 3.0))
    logits = torch.zeros(2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss(logits, {"label": torch.tensor([0, 1])})
    assert loss.dtype == torch.float32
    assert loss == pytest.approx((0.5 + 3) / 2 * math.log(2))


def test_a_class_without_training_bags_has_weight_one_and_listed_weights_are_as_given() -> None:
    balanced = task_builder.class_weights(config(class_weights="balanced"), *_split(LABELS[:6]))
    assert balanced == (6 / 8, 6 / 4, 1.0)
    assert task_builder.class_weights(config(class_weights="1, 2,0.5"), *_split(LABELS)) == (1.0, 2.0, 0.5)


def _split(targets: list[dict[str, float]]) -> tuple[Cohort, tuple[Sample, ...]]:
    labels, fold = cohort("classification", targets)
    return labels, fold.train


STRATA = [0] * 20 + [1] * 3 + [2] * 7


def test_a_balanced_epoch_holds_every_class_equally_often_and_only_its_members() -> None:
    for epoch in range(5):
        order = TrainStream(30, 2, seed=3, strata=STRATA).shuffle(epoch)
        assert [sum(STRATA[i] == k for i in order) for k in range(3)] == [10, 10, 10]
    assert len(order) == 30
    uneven = TrainStream(10, 2, seed=3, strata=[0] * 6 + [5] * 2 + [7] * 2)
    counts = np.array([[sum(uneven.strata[i] == k for i in uneven.shuffle(e)) for k in (0, 5, 7)] for e in range(60)])
    assert set(counts.ravel()) == {3, 4}
    assert (counts == 4).any(axis=0).all(), "the one draw more goes to every class in turn"


def test_a_balanced_epoch_depends_on_seed_and_epoch_alone() -> None:
    whole = list(TrainStream(30, 6, seed=3, epochs=(0, 3), strata=STRATA))
    resumed = list(TrainStream(30, 6, seed=3, epochs=(1, 3), start_step=2, strata=STRATA))
    assert whole[7:] == resumed
    ranks = [list(TrainStream(30, 3, rank=r, world=2, seed=3, epochs=(0, 3), strata=STRATA)) for r in range(2)]
    assert [one + two for one, two in zip(*ranks, strict=True)] == whole
    assert whole != list(TrainStream(30, 6, seed=4, epochs=(0, 3), strata=STRATA))


# Cox


def test_cox_risk_is_the_logit_and_pooled_patients_have_no_training_split() -> None:
    task = CoxTask(train_time=(1.0, 2.0), train_event=(1, 1))
    logits = torch.tensor([[2.0], [0.5], [-1.0]])
    target = {"time": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), "event": torch.ones(3, dtype=torch.int64)}
    assert task.statistics(logits, target).point()["c_index"] == 1
    e = logits[:, 0].exp()
    by_hand = (torch.log(e.sum()) - 2.0 + torch.log(e[1:].sum()) - 0.5) / 3
    assert task.loss(logits, target) == pytest.approx(by_hand.item())
    assert task.pooled() == CoxTask()


def test_cox_loss_over_processes_has_value_and_mean_gradient_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    time, event = torch.rand(12, generator=generator), torch.rand(12, generator=generator) < 0.6
    whole = losses.cox_loss(x @ weight, time, event)
    expected = torch.autograd.grad(whole, weight)[0]
    shares = [slice(4 * r, 4 * r + 4) for r in range(3)]

    def run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        def all_gather(out: list[torch.Tensor], own: torch.Tensor) -> None:
            for r, place in enumerate(out):
                risk = (x[shares[r]] @ weight).detach()
                place.copy_(torch.stack([risk, time[shares[r]].double(), event[shares[r]].double()]))
            assert torch.equal(out[rank], own)

        fake = SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: True, all_gather=all_gather,
            get_world_size=lambda: 3, get_rank=lambda: rank,
            all_reduce=lambda *_: None, ReduceOp=torch.distributed.ReduceOp,
        )  # fmt: skip
        monkeypatch.setattr(losses, "dist", fake)
        loss = losses.cox_loss_of_all(x[shares[rank]] @ weight, time[shares[rank]], event[shares[rank]])
        return loss, torch.autograd.grad(loss, weight)[0]

    found = [run(rank) for rank in range(3)]
    assert [loss.item() for loss, _ in found] == [pytest.approx(whole.item())] * 3
    assert torch.allclose(torch.stack([g for _, g in found]).mean(0), expected)


# Multi-label


def test_binary_cross_entropy_counts_known_labels_only() -> None:
    logits = torch.tensor([[0.0, 5.0], [math.log(3), -7.0]], requires_grad=True)
    loss = losses.binary_cross_entropy(logits, torch.tensor([[1, -1], [0, -1]]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[:, 1] == 0).all()
    assert losses.binary_cross_entropy(logits, torch.full((2, 2), -1)) == 0


def test_balanced_positives_weigh_as_much_as_the_negatives_of_their_label() -> None:
    targets = [{"a": int(i < 2), "b": int(i < 6) if i < 8 else -1, "c": 0} for i in range(10)]
    task = task_builder.build(config(class_weights="balanced"), *cohort("multilabel", targets), 1)
    assert isinstance(task, MultilabelTask)
    assert task.positive_weights == (8 / 2, 2 / 6, 1.0)
    assert task.facts()["class_weights"] == [4.0, 2 / 6, 1.0]
    logits = torch.zeros(10, 3, requires_grad=True)
    task.loss(logits, {k: torch.tensor([t[k] for t in targets]) for k in "abc"}).backward()
    assert logits.grad is not None
    assert logits.grad.sum(0)[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)  # at p = 1/2 both pull alike
    listed = task_builder.build(config(class_weights="1,2,0.5"), *cohort("multilabel", targets), 1)
    assert listed.facts()["class_weights"] == [1.0, 2.0, 0.5]


def multilabel_set(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = (rng.random((n, 3)) < (0.5, 0.2, 0.7)).astype(int)
    logits = (rng.normal(size=(n, 3)) + label).round(1)
    label[rng.random((n, 3)) < 0.1] = -1
    return logits, label


def test_multilabel_metrics_are_those_of_the_library_on_the_known_rows() -> None:
    logits, label = multilabel_set(80)
    m = MultilabelStatistics(logits, label, "xyz").point()
    aucs, f1s = [], []
    for k, name in enumerate("xyz"):
        known = label[:, k] >= 0
        aucs.append(sk.roc_auc_score(label[known, k], logits[known, k]))
        f1s.append(sk.f1_score(label[known, k], logits[known, k] > 0))
        assert m[f"auc_{name}"] == pytest.approx(aucs[-1])
        assert m[f"f1_{name}"] == pytest.approx(f1s[-1])
        right = sk.accuracy_score(label[known, k], logits[known, k] > 0)
        assert m[f"accuracy_{name}"] == pytest.approx(right)
    assert m["auc"] == pytest.approx(np.mean(aucs))
    assert m["f1_macro"] == pytest.approx(np.mean(f1s))
    assert m.notes == [f"{(label < 0).sum()} of 240 labels are unknown and left out"]


def test_multilabel_bootstrap_is_the_plain_metric_of_each_resample() -> None:
    logits, label = multilabel_set(20, 1)
    weights = np.hstack(list(resample_weights(20, 15, 1)))
    values = MultilabelStatistics(logits, label, "xyz").resampled(weights)
    for r in range(15):
        drawn = np.repeat(np.arange(20), weights[:, r].astype(int))
        plain = MultilabelStatistics(logits[drawn], label[drawn], "xyz").point()
        assert {k: v[r] for k, v in values.items()} == pytest.approx(plain.values, nan_ok=True)


def test_a_label_with_one_value_is_left_out_of_the_mean_with_a_note() -> None:
    m = MultilabelStatistics([[1.0, 3.0], [-1.0, 2.0]], [[1, 1], [0, 1]], ("ER", "PR")).point()
    assert m["auc"] == 1
    assert math.isnan(m["auc_PR"])
    assert m.notes == ["auc leaves out labels with one value only: PR"]


def test_the_order_of_the_targets_is_that_of_the_names_not_of_the_mapping() -> None:
    task = MultilabelTask(("ER", "PR"))
    target = {"PR": torch.tensor([0, 0]), "ER": torch.tensor([1, 0])}
    assert task.labels(target).tolist() == [[1, 0], [0, 0]]
    assert task.columns == ("p_ER", "p_PR")


# Regression


def test_regression_metrics_by_hand_and_by_the_library() -> None:
    m = RegressionStatistics([1.0, 2.0, 4.0], [1.0, 3.0, 3.0]).point()
    assert m["mae"] == pytest.approx(2 / 3)
    assert m["rmse"] == pytest.approx(math.sqrt(2 / 3))
    assert m["r2"] == pytest.approx(1 - 2 / (8 / 3))
    rng = np.random.default_rng(0)
    value = rng.normal(size=50).round(1) * 7 + 1000
    predicted = (value + rng.normal(size=50) * 5).round(0)
    m = RegressionStatistics(predicted, value).point()
    assert m["r2"] == pytest.approx(sk.r2_score(value, predicted))
    assert m["pearson"] == pytest.approx(np.corrcoef(value, predicted)[0, 1])
    assert m["spearman"] == pytest.approx(spearmanr(value, predicted).statistic)


def test_regression_bootstrap_is_the_plain_metric_of_each_resample() -> None:
    rng = np.random.default_rng(2)
    value, predicted = rng.integers(0, 5, 9) + 0.1, rng.normal(size=9).round(0)
    weights = np.hstack(list(resample_weights(9, 40, 1)))
    values = RegressionStatistics(predicted, value).resampled(weights)
    for r in range(40):
        drawn = np.repeat(np.arange(9), weights[:, r].astype(int))
        plain = RegressionStatistics(predicted[drawn], value[drawn]).point()
        assert {k: v[r] for k, v in values.items()} == pytest.approx(plain.values, nan_ok=True)


def test_equal_values_have_no_r2_and_equal_predictions_no_correlation() -> None:
    same = RegressionStatistics([0.1, 0.3, 0.5], [0.1, 0.1, 0.1]).point()
    assert math.isnan(same["r2"])
    assert same["mae"] == pytest.approx(0.2)
    assert same.notes == ["r2, pearson, spearman: NaN, the values are all alike"]
    flat = RegressionStatistics([0.7] * 3, [0.1, 0.2, 0.9]).point()
    assert flat["r2"] < 0
    assert flat.notes == ["pearson, spearman: NaN, the predictions are all alike"]
    assert math.isnan(bootstrap(RegressionStatistics([math.nan], [1.0]), resamples=5)["mae"].value)


@pytest.mark.parametrize(("scale", "shift"), [(1000.0, -7.0), (1e-3, 50.0)])
def test_the_unit_of_a_value_changes_neither_loss_nor_correlation(scale: float, shift: float) -> None:
    rng = np.random.default_rng(4)
    value = rng.normal(size=30)
    logits = torch.tensor(rng.normal(size=(30, 1)))
    plain, other = (_regression(v) for v in (value, scale * value + shift))
    target, changed = ({"value": torch.tensor(v)} for v in (value, scale * value + shift))
    assert plain.loss(logits, target).item() == pytest.approx(other.loss(logits, changed).item(), rel=1e-5)
    ours, theirs = plain.statistics(logits, target).point(), other.statistics(logits, changed).point()
    assert ours["r2"] == pytest.approx(theirs["r2"], rel=1e-5)
    assert theirs["rmse"] == pytest.approx(scale * ours["rmse"], rel=1e-5)


def _regression(values: np.ndarray) -> RegressionTask:
    task = task_builder.build(config(), *cohort("regression", [{"value": v} for v in values], ("value",)), 1)
    assert isinstance(task, RegressionTask)
    return task


def test_folds_of_different_scale_are_pooled_in_the_unit_of_the_csv() -> None:
    value = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    tasks = [RegressionTask(0.0, 10.0), RegressionTask(20.0, 5.0)]
    logits = [(value[:, None] - task.mean) / task.sd for task in tasks]
    joined = torch.cat([task.comparable(own) for task, own in zip(tasks, logits, strict=True)])
    assert tasks[1].pooled().statistics(joined, {"value": value.repeat(2)}).point()["mae"] == pytest.approx(0)


# Ordinal metrics and the report


def test_within_one_by_hand_and_selectable_for_grades_only() -> None:
    logits = 9.0 * np.eye(4)[[0, 1, 3, 1]]
    m = classification_metrics(logits, [0, 2, 1, 3])
    assert m["accuracy_within_one"] == pytest.approx(2 / 4)
    three = cohort("classification", LABELS)
    assert task_builder.build(config(best_metric="accuracy_within_one"), *three, 1).selection == "accuracy_within_one"
    two = cohort("classification", LABELS[:6], ("a", "b"))
    with pytest.raises(UserError, match="no metric 'accuracy_within_one'"):
        task_builder.build(config(best_metric="accuracy_within_one"), *two, 1)


def test_the_report_names_classes_and_confusion_rows_are_labels() -> None:
    logits = 9.0 * np.eye(2)[[0, 1, 1]]
    report = class_report(logits, [0, 0, 1], ("normal", "tumor"))
    told = report.as_dict()
    assert told["confusion"] == [[1, 1], [0, 1]]
    assert told["classes"]["tumor"]["precision"] == 0.5
    assert told["classes"]["normal"]["recall"] == 0.5
    assert [line.split()[:2] for line in report.lines()[1:]] == [["normal", "2"], ["tumor", "1"]]


# What cannot go together


@pytest.mark.parametrize(
    ("task", "mil", "options", "sentence"),
    [
        ("classification", "abmil", {"loss": "bce"}, "for two classes is the binary.*Give --loss=ce, or"),
        ("classification", "abmil", {"loss": "cox"}, "needs survival labels"),
        ("survival", "abmil", {"loss": "ce"}, "needs class labels.*give --loss=nll_surv or --loss=cox, or"),
        ("survival", "clam_sb", {"loss": "cox"}, "instance loss needs one class"),
        ("regression", "clam_mb", {}, "instance loss needs one class"),
        ("regression", "abmil", {"class_weights": "balanced"}, "class_weights needs classes"),
        ("survival", "abmil", {"balanced_sampling": True}, "balanced_sampling needs classes"),
        ("survival", "abmil", {"class_weights": "1,2,3"}, "class_weights needs classes"),
        ("multilabel", "abmil", {"balanced_sampling": True}, "--class_weights=balanced weighs the positives"),
        ("multilabel", "abmil", {"class_weights": "1,2"}, "3 positive numbers"),
        ("classification", "abmil", {"class_weights": "1,2"}, "3 positive numbers"),
        ("classification", "abmil", {"class_weights": "1,2,-3"}, "3 positive numbers"),
        ("classification", "abmil", {"class_weights": "even"}, "3 positive numbers"),
    ],
)
def test_options_that_do_not_fit_the_task_are_refused(task: str, mil: str, options: dict, sentence: str) -> None:
    labels, _ = cohort(task, [])
    with pytest.raises(UserError, match=sentence):
        task_builder.check_task_options(config(**options), labels, mil)


def test_cox_needs_two_bags_per_step_over_all_processes() -> None:
    labels = cohort("survival", [{"label": 0, "time": 1.0, "event": 1}])
    with pytest.raises(UserError, match=r"a step has 1 \(batch_size 1 x 1 process\)"):
        task_builder.build(config(loss="cox", batch_size=1), *labels, 1)
    assert task_builder.build(config(loss="cox", batch_size=1), *labels, 2).outputs == 1
    hazards = task_builder.build(config(), *labels, 1)
    assert isinstance(hazards, SurvivalTask)
    assert hazards.outputs == 3
    assert hazards.pooled() == replace(hazards, train_time=(), train_event=())
