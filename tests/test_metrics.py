"""Classification metrics: hand-computed cases, the libraries, laws, degenerate sets."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from engine.metrics.classification import (
    CLASSIFICATION_METRICS,
    PUBLISHED_NAMES,
    class_report,
    classification_metrics,
    log_odds,
)
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("error")


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def random_set(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) * 2
    logits[np.arange(n), label] += 1
    return logits, label


def test_two_classes_by_hand() -> None:
    """Margins -2, 1, 1, 3 with labels 0, 0, 1, 1: of four pairs three are won and one is tied."""
    logits = np.array([[2.0, 0.0], [1.0, 2.0], [5.0, 6.0], [-1.0, 2.0]])
    m = classification_metrics(logits, [0, 0, 1, 1])
    assert m["auc"] == pytest.approx(3.5 / 4)
    assert m["accuracy_micro"] == pytest.approx(3 / 4)
    assert m["accuracy_macro"] == pytest.approx((1 / 2 + 1) / 2)
    assert m["precision_macro"] == pytest.approx((1 + 2 / 3) / 2)
    assert m["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert m["kappa"] == pytest.approx(0.5)
    assert m.notes == []


def test_quadratic_kappa_by_hand() -> None:
    """Three grades, one error of two grades; chance disagreement from the margins (2, 1, 1) and (1, 1, 2)."""
    logits = 9.0 * np.eye(3)[[0, 2, 1, 2]]
    m = classification_metrics(logits, [0, 0, 1, 2])
    expected = sum(a * b * (i - j) ** 2 for i, a in enumerate((2, 1, 1)) for j, b in enumerate((1, 1, 2))) / 4
    assert m["kappa_quadratic"] == pytest.approx(1 - 4 / expected)


def test_calibration_error_by_hand() -> None:
    """Ten samples of confidence 0.75, six right: a gap of 0.15; confidence 1 with all right adds nothing."""
    logits = np.tile([0.0, math.log(3)], (10, 1))
    assert classification_metrics(logits, [1] * 6 + [0] * 4)["ece"] == pytest.approx(0.15)
    sure = np.vstack([logits, np.tile([0.0, 99.0], (10, 1))])
    assert classification_metrics(sure, [1] * 6 + [0] * 4 + [1] * 10)["ece"] == pytest.approx(0.075)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_values_are_those_of_scikit_learn(k: int) -> None:
    logits, label = random_set(300, k)
    m, predicted, p = classification_metrics(logits, label), logits.argmax(1), softmax(logits)
    auc = sk.roc_auc_score(label, p[:, 1]) if k == 2 else sk.roc_auc_score(label, p, multi_class="ovr")
    expected = {
        "auc": auc,
        "accuracy_macro": sk.balanced_accuracy_score(label, predicted),
        "accuracy_micro": sk.accuracy_score(label, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(label, predicted),
        "f1_macro": sk.f1_score(label, predicted, average="macro"),
        "precision_macro": sk.precision_score(label, predicted, average="macro"),
        "recall_macro": sk.recall_score(label, predicted, average="macro"),
        "kappa": sk.cohen_kappa_score(label, predicted),
        "kappa_quadratic": sk.cohen_kappa_score(label, predicted, weights="quadratic"),
    }
    for name, value in expected.items():
        assert m[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("absent", [None, 4])
def test_published_names_have_the_values_of_torchmetrics(absent: int | None) -> None:
    """The published program asks torchmetrics; a class predicted but without samples has recall 0."""
    tm = pytest.importorskip("torchmetrics.functional.classification")
    import torch

    logits, label = random_set(200, 5, seed=2)
    logits, label = logits[label != absent], label[label != absent]
    x, y = torch.tensor(logits), torch.tensor(label)
    m = classification_metrics(logits, label)
    options = {"num_classes": 5, "average": "macro"}
    pairs = {
        "acc": tm.multiclass_accuracy(x, y, **options),
        "precision": tm.multiclass_precision(x, y, **options),
        "recall": tm.multiclass_recall(x, y, **options),
        "fscore": tm.multiclass_f1_score(x, y, **options),
        "ck": tm.multiclass_cohen_kappa(x, y, num_classes=5),
        "acc_micro": tm.multiclass_accuracy(x, y, num_classes=5, average="micro"),
    }
    if absent is None:  # torchmetrics counts an absent class as AUC 0, we leave it out of the mean
        pairs["auc"] = tm.multiclass_auroc(x, y, **options)
    ours = {published: name for name, published in PUBLISHED_NAMES.items()}
    for published, value in pairs.items():
        assert m[ours[published]] == pytest.approx(value.item(), abs=1e-6), published
    ece = tm.multiclass_calibration_error(x.softmax(1), y, num_classes=5, n_bins=15)
    assert m["ece"] == pytest.approx(ece.item(), abs=1e-6)


def test_log_odds_are_those_of_the_softmax_and_do_not_saturate() -> None:
    logits, _ = random_set(50, 4)
    p = softmax(logits)
    np.testing.assert_allclose(log_odds(logits), np.log(p / (1 - p)), rtol=1e-9)
    sure = np.array([[0.0, 50.0], [0.0, 60.0], [0.0, 70.0], [0.0, 80.0]])
    assert classification_metrics(sure, [0, 0, 1, 1])["auc"] == 1.0


def test_samples_of_equal_probability_are_tied_to_the_last_bit() -> None:
    logits, _ = random_set(200, 6)
    np.testing.assert_array_equal(log_odds(logits[:, [0, 3, 5, 1, 4, 2]])[:, 0], log_odds(logits)[:, 0])


def test_two_class_auc_uses_both_logits() -> None:
    """The published --bin_metric looked at logit 1 alone (T20), here of AUC 0.375; the difference has 1."""
    logits = np.array([[4.0, 1.0], [5.0, 3.0], [0.0, 1.0], [1.0, 2.0]])
    assert classification_metrics(logits, [0, 0, 1, 1])["auc"] == 1.0


@pytest.mark.parametrize("k", [2, 5])
def test_a_shift_of_the_logits_of_a_sample_changes_nothing(k: int) -> None:
    logits, label = random_set(80, k)
    shifted = logits + np.random.default_rng(9).normal(size=(80, 1)) * 10
    before, after = classification_metrics(logits, label), classification_metrics(shifted, label)
    assert after.values == pytest.approx(before.values, abs=1e-9)


def test_a_renaming_of_the_classes_changes_only_the_ordinal_metrics() -> None:
    logits, label = random_set(120, 4)
    new = np.array([2, 0, 3, 1])
    before = classification_metrics(logits, label).values
    after = classification_metrics(logits[:, np.argsort(new)], new[label]).values
    for name in ("kappa_quadratic", "accuracy_within_one"):
        assert after.pop(name) != pytest.approx(before.pop(name))
    assert after == pytest.approx(before, abs=1e-12)


def test_macro_and_balanced_accuracy_part_where_a_class_is_predicted_but_absent() -> None:
    logits = 9.0 * np.eye(3)[[0, 1, 2, 1]]
    m = classification_metrics(logits, [0, 1, 1, 1])
    assert m["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert m["accuracy_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert m.notes == ["auc averages the classes present; no sample has class 2"]


def test_one_class_present_gives_nan_with_a_note() -> None:
    logits, _ = random_set(10, 3)
    m = classification_metrics(logits, [1] * 10)
    assert math.isnan(m["auc"])
    assert 0 <= m["accuracy_micro"] <= 1
    assert m.notes == ["auc is NaN: every one of the 10 samples has class 1"]


def test_kappa_of_one_agreed_class_is_nan_with_a_note() -> None:
    m = classification_metrics(np.tile([3.0, 0.0], (4, 1)), [0] * 4)
    assert math.isnan(m["kappa"])
    assert math.isnan(m["kappa_quadratic"])
    assert m["accuracy_micro"] == 1
    assert "kappa is NaN" in m.notes[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_nan_and_are_counted(bad: float) -> None:
    logits, label = random_set(10, 3)
    logits[3, 1] = bad
    m = classification_metrics(logits, label)
    assert set(m.values) == set(CLASSIFICATION_METRICS)
    assert all(math.isnan(v) for v in m.values.values())
    assert m.notes == ["all metrics are NaN: the logits of 1 of 10 samples are not finite"]


def test_an_empty_set_gives_nan_with_a_note() -> None:
    m = classification_metrics(np.empty((0, 3)), np.empty(0, dtype=int))
    assert all(math.isnan(v) for v in m.values.values())
    assert len(m.notes) == 1


def test_a_class_that_swallows_the_predictions_is_noted() -> None:
    logits = np.tile([0.0, 5.0], (100, 1))
    notes = classification_metrics(logits, [0] * 40 + [1] * 60).notes
    assert notes == ["class 1 takes 100% of the predictions, but 60% of the labels"]
    frequent = classification_metrics(logits, [0] * 3 + [1] * 97).notes
    assert frequent == []


@pytest.mark.parametrize(
    ("logits", "label", "words"),
    [
        (np.zeros((3, 1)), [0, 0, 0], "K >= 2"),
        (np.zeros((3, 2)), [0, 1], r"\(3, 2\) and \(2,\)"),
        (np.zeros((3, 2)), [0, 1, 2], "labels run from 0 to 2"),
        (np.zeros((3, 2)), [0, 1, -1], "labels run from -1 to 1"),
        (softmax(np.random.default_rng(0).normal(size=(3, 4))), [0, 1, 2], "probabilities"),
    ],
)
def test_what_does_not_fit_is_refused(logits: np.ndarray, label: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        classification_metrics(logits, label)


def test_class_report_by_hand() -> None:
    logits = 9.0 * np.eye(3)[[0, 1, 1, 0]]
    report = class_report(logits, [0, 0, 1, 0], names=["normal", "low", "high"])
    assert report.names == ["normal", "low", "high"]
    assert report.confusion == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert report.values["recall"] == pytest.approx([2 / 3, 1, math.nan], nan_ok=True)
    assert report.values["precision"] == pytest.approx([1, 1 / 2, math.nan], nan_ok=True)
    assert report.values["specificity"] == pytest.approx([1, 2 / 3, 1])
    assert report.values["f1"] == pytest.approx([4 / 5, 2 / 3, math.nan], nan_ok=True)
    assert report.values["support"] == [3, 1, 0]
    assert math.isnan(report.values["auc"][2])


def test_class_report_agrees_with_the_summary() -> None:
    logits, label = random_set(150, 4)
    report, m = class_report(logits, label), classification_metrics(logits, label)
    for column, name in (("recall", "recall_macro"), ("precision", "precision_macro"), ("auc", "auc")):
        assert np.mean(report.values[column]) == pytest.approx(m[name])
    assert np.trace(report.confusion) / 150 == pytest.approx(m["accuracy_micro"])


def test_class_report_of_nothing_is_all_nan() -> None:
    report = class_report(np.empty((0, 2)), np.empty(0, dtype=int))
    assert report.confusion == [[0, 0], [0, 0]]
    assert all(math.isnan(v) for v in report.values["recall"])


def test_no_warning_reaches_the_user() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        classification_metrics(np.tile([3.0, 0.0], (4, 1)), [0] * 4)
    assert not seen
