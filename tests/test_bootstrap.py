"""The bootstrap: each vectorised value is the plain metric of the materialised resample; intervals; notes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from engine.metrics import bootstrap as module
from engine.metrics.bootstrap import bootstrap, resample_weights, summarise
from engine.metrics.classification import ClassificationStatistics, Metrics, classification_metrics
from engine.metrics.survival import SurvivalStatistics
from utils.files import write_json

pytestmark = pytest.mark.filterwarnings("error")


def all_weights(size: int, resamples: int, seed: int = 1) -> np.ndarray:
    return np.hstack(list(resample_weights(size, resamples, seed)))


def same(vectorised: dict[str, np.ndarray], column: int, plain: Metrics) -> None:
    assert set(vectorised) == set(plain.values)
    for name, value in plain.values.items():
        assert vectorised[name][column] == pytest.approx(value, abs=1e-10, nan_ok=True), name


@pytest.mark.parametrize(("size", "classes", "decimals"), [(30, 2, 0), (30, 2, 9), (50, 3, 0), (60, 6, 1), (7, 4, 0)])
def test_classification_is_the_plain_metric_of_each_resample(size: int, classes: int, decimals: int) -> None:
    rng = np.random.default_rng(size)
    logits, label = rng.normal(size=(size, classes)).round(decimals), rng.integers(0, classes, size)
    weights = all_weights(size, 25)
    values = ClassificationStatistics(logits, label).resampled(weights)
    for r in range(25):
        drawn = np.repeat(np.arange(size), weights[:, r].astype(int))
        same(values, r, classification_metrics(logits[drawn], label[drawn]))


@pytest.mark.parametrize(("size", "last"), [(40, 20), (60, 1000), (12, 5), (6, 4)])
@pytest.mark.parametrize("trained", [True, False])
def test_survival_is_the_plain_metric_of_each_resample(
    size: int, last: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sksurv")
    from engine.metrics import survival

    monkeypatch.setattr(survival, "BLOCK_CELLS", 100)  # several blocks of pairs
    rng = np.random.default_rng(size)
    risk, time = rng.normal(size=size).round(1), rng.integers(1, last, size) * 1.0
    risk[: size // 3] += rng.choice([0, 6e-9], size // 3)  # neighbours closer than the tolerance
    event = rng.random(size) < 0.5
    train = (rng.integers(1, last, 50) * 1.0, rng.random(50) < 0.5) if trained else (time, event)
    weights = all_weights(size, 25)
    values = SurvivalStatistics(risk, time, event, *train).resampled(weights)
    for r in range(25):
        drawn = np.repeat(np.arange(size), weights[:, r].astype(int))
        same(values, r, survival.survival_metrics(risk[drawn], time[drawn], event[drawn], *train))


def test_weights_are_draws_with_replacement() -> None:
    weights = all_weights(40, 3000)
    assert weights.shape == (40, 3000)
    assert (weights.sum(axis=0) == 40).all()
    assert weights.mean(axis=1) == pytest.approx(np.ones(40), abs=0.12)
    assert weights.var() == pytest.approx(1 - 1 / 40, rel=0.03)


def test_the_size_of_the_parts_does_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = all_weights(33, 50)
    monkeypatch.setattr(module, "CHUNK_CELLS", 33 * 7)
    parts = list(resample_weights(33, 50, 1))
    assert len(parts) == 8
    np.testing.assert_array_equal(np.hstack(parts), whole)


def test_seed_is_the_fold() -> None:
    rng = np.random.default_rng(0)
    statistics = ClassificationStatistics(rng.normal(size=(50, 3)), rng.integers(0, 3, 50))
    again = bootstrap(statistics, fold=1, resamples=50)
    assert bootstrap(statistics, fold=1, resamples=50) == again
    other = bootstrap(statistics, fold=2, resamples=50)
    assert other.values == again.values
    assert other["auc"].std != again["auc"].std


def test_estimate_of_a_share_is_that_of_the_binomial_law() -> None:
    """Accuracy of 300 of 400: standard error sqrt(.75 x .25 / 400) = .02165, interval +- 1.96 of it."""
    logits = np.tile([0.0, 1.0], (400, 1)) + 1e-3 * np.arange(400)[:, None] * [0, 1]
    estimate = bootstrap(ClassificationStatistics(logits, [1] * 300 + [0] * 100), resamples=4000)["accuracy_micro"]
    assert estimate.value == 0.75
    assert estimate.mean == pytest.approx(0.75, abs=0.002)
    assert estimate.std == pytest.approx(0.02165, rel=0.05)
    assert estimate.low == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.004)
    assert estimate.high == pytest.approx(0.75 + 1.96 * 0.02165, abs=0.004)
    assert estimate.resamples == 4000


def test_value_is_the_point_estimate_not_the_mean_of_resamples() -> None:
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(40, 3)), rng.integers(0, 3, 40)
    result = bootstrap(ClassificationStatistics(logits, label), resamples=100)
    assert result.values == classification_metrics(logits, label).values
    assert result["ece"].mean != result["ece"].value


def test_resamples_without_a_value_are_left_out_and_counted() -> None:
    """Two samples of two classes: half of all resamples hold one class, and there AUC is undefined."""
    logits = np.array([[1.0, 0.0], [0.0, 2.0]])
    result = bootstrap(ClassificationStatistics(logits, [0, 1]), resamples=400)
    left_out = 400 - result["auc"].resamples
    assert 150 < left_out < 250
    assert (result["auc"].low, result["auc"].high, result["auc"].std) == (1.0, 1.0, 0.0)
    assert f"auc: undefined in {left_out} of 400 resamples, left out" in result.notes
    assert result["accuracy_micro"].resamples == 400


def test_small_survival_set_does_not_raise() -> None:
    """The published program stopped at a resample without an event (T51)."""
    pytest.importorskip("sksurv")
    result = bootstrap(SurvivalStatistics([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1, 0, 0]), resamples=200)
    assert result["c_index"].value == 1.0
    assert 0 < result["c_index"].resamples < 200
    assert any(note.startswith("c_index: undefined in") for note in result.notes)


@pytest.mark.parametrize("label", [[1] * 6, []])
def test_a_degenerate_set_is_nan_throughout(label: list[int]) -> None:
    logits = np.random.default_rng(0).normal(size=(len(label), 3))
    result = bootstrap(ClassificationStatistics(logits, label), resamples=20)
    estimate = result["auc"]
    assert all(math.isnan(v) for v in (estimate.value, estimate.mean, estimate.std, estimate.low, estimate.high))
    assert estimate.resamples == 0
    assert len(result.notes) >= 1


def test_logits_that_are_not_finite_do_not_raise() -> None:
    result = bootstrap(ClassificationStatistics([[math.nan, 1.0], [0.0, 2.0]], [0, 1]), resamples=20)
    assert all(math.isnan(v) for v in result.values.values())


def test_zero_resamples_give_point_estimates_alone() -> None:
    estimate = bootstrap(ClassificationStatistics([[1.0, 0.0], [0.0, 2.0]], [0, 1]), resamples=0)["auc"]
    assert estimate.value == 1.0
    assert math.isnan(estimate.std)


def test_result_survives_json(tmp_path: Path) -> None:
    result = bootstrap(ClassificationStatistics(np.ones((3, 2)) * [0, 2], [1, 1, 1]), resamples=5)
    write_json(tmp_path / "m.json", result.as_dict())
    read = json.loads((tmp_path / "m.json").read_text())
    assert read["auc"]["value"] is None
    assert read["accuracy_micro"] == {"value": 1, "mean": 1, "std": 0, "low": 1, "high": 1, "resamples": 5}


def test_summary_over_folds() -> None:
    folds = [{"auc": 0.8, "f1": 0.5}, {"auc": 0.9, "f1": math.nan}, {"auc": 1.0, "f1": math.nan}]
    summary = summarise(folds)
    assert summary["auc"] == pytest.approx({"mean": 0.9, "sd": 0.1, "folds": 3})
    assert summary["f1"] == pytest.approx({"mean": 0.5, "sd": math.nan, "folds": 1}, nan_ok=True)
    assert summarise([]) == {}
