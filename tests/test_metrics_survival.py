"""Survival metrics: the sign of the risk, hand-computed cases, the library, laws, degenerate sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.tasks.losses import survival_risk
from utils.errors import UserError

pytest.importorskip("sksurv")

from sksurv.compare import compare_survival
from sksurv.metrics import concordance_index_ipcw, cumulative_dynamic_auc
from sksurv.util import Surv

from engine.metrics.survival import SURVIVAL_METRICS, SurvivalStatistics, survival_metrics

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # scikit-survival for Python 3.10 still calls numpy.trapz
    pytest.mark.filterwarnings("ignore:`trapz` is deprecated:DeprecationWarning"),
]


def cohort(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Risks that say something about exponential times, a part of them censored."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    death, leave = rng.exponential(np.exp(-risk)), rng.exponential(1.5, size=n)
    return risk, np.minimum(death, leave), death <= leave


def test_sign_of_the_risk_on_three_patients() -> None:
    """Hazards high in the first, third and no bin; deaths at 2 and 14 months, the last alive at 60."""
    logits = torch.tensor([[4.0, 0.0, 0.0, 0.0], [-4.0, -4.0, 4.0, 0.0], [-4.0, -4.0, -4.0, -4.0]])
    risk = survival_risk(logits).numpy()
    time, event = [2.0, 14.0, 60.0], [1, 1, 0]
    assert risk[0] > risk[1] > risk[2]
    assert survival_metrics(risk, time, event)["c_index"] == 1.0
    assert survival_metrics(-risk, time, event)["c_index"] == 0.0


def test_c_index_by_hand_with_ties_and_censoring() -> None:
    """Of the first: won, tied, won; of the third against the fourth: won; the second had left before."""
    m = survival_metrics([2.0, 1.0, 2.0 + 5e-9, 1.5], [1.0, 2.0, 3.0, 4.0], [1, 0, 1, 0])
    assert m["c_index"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_an_event_is_comparable_to_a_censoring_of_the_same_time() -> None:
    assert survival_metrics([2.0, 1.0], [5.0, 5.0], [1, 0])["c_index"] == 1.0
    assert math.isnan(survival_metrics([2.0, 1.0], [5.0, 5.0], [1, 1])["c_index"])


def test_values_are_those_of_scikit_survival() -> None:
    risk, time, event = cohort(120)
    _, train_time, train_event = cohort(300, seed=1)
    time = np.minimum(time, 0.9 * train_time[train_event].max())  # then the library needs no cut
    m = survival_metrics(risk, time, event, train_time, train_event)
    train, test = Surv.from_arrays(train_event, train_time), Surv.from_arrays(event, time)
    times = np.quantile(train_time[train_event], [0.25, 0.5, 0.75])
    assert m["c_index_ipcw"] == pytest.approx(concordance_index_ipcw(train, test, risk)[0], abs=1e-12)
    assert m["auc_td"] == pytest.approx(cumulative_dynamic_auc(train, test, risk, times)[1], abs=1e-12)
    assert m["logrank_p"] == pytest.approx(compare_survival(test, risk > np.median(risk))[1], rel=1e-9)
    assert m["c_index"] > 0.6
    assert m.notes == []


def test_without_censoring_the_weights_are_one() -> None:
    risk, time, _ = cohort(60)
    m = survival_metrics(risk, time, np.ones(60))
    assert m["c_index_ipcw"] == pytest.approx(m["c_index"], abs=1e-12)


def test_follow_up_beyond_the_training_patients_is_cut() -> None:
    """The library refuses such a set; what happens after the cut does not count."""
    risk, time, event = cohort(80)
    _, train_time, train_event = cohort(100, seed=3)
    end = float(np.quantile(train_time, 0.7))
    seen_time, seen_event = np.minimum(train_time, end), train_event & (train_time < end)
    m = survival_metrics(risk, time, event, seen_time, seen_event)
    shuffled_time = np.where(time > end, end + 50 * np.random.default_rng(0).random(80), time)
    other = survival_metrics(risk, shuffled_time, event, seen_time, seen_event)
    assert 0.5 < m["c_index_ipcw"] < 1
    assert other["c_index_ipcw"] == pytest.approx(m["c_index_ipcw"], abs=1e-12)
    assert other["auc_td"] == pytest.approx(m["auc_td"], abs=1e-12)


def test_only_the_order_of_the_risks_counts() -> None:
    risk, time, event = cohort(70)
    before, after = survival_metrics(risk, time, event), survival_metrics(np.exp(3 * risk), time, event)
    assert after.values == pytest.approx(before.values, abs=1e-12)


def test_the_unit_of_time_does_not_count() -> None:
    risk, time, event = cohort(70)
    before, after = survival_metrics(risk, time, event), survival_metrics(risk, time * 30.4375, event)
    assert after.values == pytest.approx(before.values, abs=1e-9)


def test_the_opposite_risk_has_the_opposite_concordance() -> None:
    risk, time, event = cohort(70)
    before, after = survival_metrics(risk, time, event), survival_metrics(-risk, time, event)
    for name in ("c_index", "c_index_ipcw", "auc_td"):
        assert after[name] == pytest.approx(1 - before[name], abs=1e-12)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_no_event_gives_nan_with_one_note(count: int) -> None:
    m = survival_metrics(np.arange(count), np.arange(count) + 1.0, np.zeros(count))
    assert set(m.values) == set(SURVIVAL_METRICS)
    assert all(math.isnan(v) for v in m.values.values())
    assert m.notes == [f"all metrics are NaN: none of the {count} patients has an event"]


def test_no_comparable_pair_gives_nan_with_notes() -> None:
    m = survival_metrics([1.0, 2.0, 3.0], [1.0, 2.0, 9.0], [0, 0, 1])
    assert math.isnan(m["c_index"])
    assert "c_index is NaN: no two patients can be compared" in m.notes


def test_equal_risks_are_a_coin_toss_without_groups() -> None:
    m = survival_metrics(np.zeros(6), np.arange(6) + 1.0, [1, 1, 0, 1, 0, 1])
    assert m["c_index"] == 0.5
    assert math.isnan(m["logrank_p"])
    assert any(note.startswith("logrank_p is NaN") for note in m.notes)


def test_training_patients_without_events_leave_the_c_index() -> None:
    risk, time, event = cohort(30)
    m = survival_metrics(risk, time, event, [1.0, 2.0], [0, 0])
    assert math.isnan(m["auc_td"])
    assert not math.isnan(m["c_index"])
    assert "c_index_ipcw is NaN: no training patient has an event" in m.notes


def test_a_risk_that_is_not_finite_is_counted() -> None:
    m = survival_metrics([1.0, math.nan], [1.0, 2.0], [1, 0])
    assert m.notes == ["all metrics are NaN: the risks of 1 of 2 patients are not finite"]


@pytest.mark.parametrize(
    ("risk", "time", "event", "words"),
    [
        ([1.0, 2.0], [1.0], [1], "one risk, time and event per patient"),
        ([1.0, 2.0], [1.0, math.nan], [1, 0], "1 of 2 times are negative or missing"),
        ([1.0, 2.0], [1.0, -1.0], [1, 0], "1 of 2 times are negative or missing"),
        ([1.0, 2.0], [1.0, 2.0], [1, 2], "only 1 .event. and 0 .censored."),
    ],
)
def test_what_does_not_fit_is_refused(risk: list, time: list, event: list, words: str) -> None:
    with pytest.raises(UserError, match=words):
        survival_metrics(risk, time, event)


def test_training_patients_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="Pass arrays of one length"):
        SurvivalStatistics([1.0, 2.0], [1.0, 2.0], [1, 0], [1.0, 2.0, 3.0], [1, 0])
