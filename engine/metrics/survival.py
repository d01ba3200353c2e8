"""Survival metrics: plain, and for all resamples of a bootstrap at once. Names: docs/metrics.md.

N patients, E of them with an event, U distinct times, R resamples, T evaluation times. Risk: higher means an
earlier event. Times are in any one unit. scikit-survival gives the plain values and is imported when they are
asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.metrics.classification import Metrics
from engine.metrics.weighted import Bools, Floats, life_table, ratio, tie_groups, weighted_auc, weighted_median
from utils.errors import UserError

SURVIVAL_METRICS = ("c_index", "c_index_ipcw", "auc_td", "logrank_p")

TIED_RISK = 1e-8
"""Risks that differ by no more count as tied, as in the published program and scikit-survival."""

BLOCK_CELLS = 1 << 22
"""Largest part of the E x N matrix of pairs that is held at once: 16 MiB in float32."""


class SurvivalStatistics:
    """The metrics of ``survival_metrics`` for one set of patients: plain, and for many resamples at once.

    The censoring distribution and the evaluation times come from the training patients, so that they are the
    same in every resample; without training patients they come from the patients evaluated.
    """

    def __init__(
        self,
        risk: ArrayLike,
        time: ArrayLike,
        event: ArrayLike,
        train_time: ArrayLike | None = None,
        train_event: ArrayLike | None = None,
    ) -> None:
        """Raises UserError when the arrays do not fit; see ``survival_metrics`` for their meaning."""
        self.risk = np.asarray(risk, dtype=np.float64)
        self.time, self.event = _checked(time, event, self.risk.shape)
        self.size = len(self.risk)
        self.own_censoring = train_time is None or train_event is None
        self.train_time, self.train_event = self.time, self.event
        if train_time is not None and train_event is not None:
            self.train_time, self.train_event = _checked(train_time, train_event, np.shape(train_time))

    @property
    def obstacle(self) -> str | None:
        """Why no metric at all can be computed, or None."""
        bad = int((~np.isfinite(self.risk)).sum())
        if bad:
            return f"all metrics are NaN: the risks of {bad} of {self.size} patients are not finite"
        if not self.event.any():
            return f"all metrics are NaN: none of the {self.size} patients has an event"
        return None

    @cached_property
    def _censoring(self) -> Any:
        from sksurv.nonparametric import CensoringDistributionEstimator

        return CensoringDistributionEstimator().fit(_surv(self.train_time, self.train_event))

    @cached_property
    def tau(self) -> float:
        """Follow-up from here on is cut off: the training patients do not tell how likely censoring is."""
        if not self.train_event.any():
            return 0.0
        gone = self._censoring.unique_time_[self._censoring.prob_ <= 0]
        return float(gone[0]) if len(gone) else float(self.train_time.max())

    @cached_property
    def cut_event(self) -> Bools:
        """Events before tau."""
        return self.event & (self.time < self.tau)

    @cached_property
    def cut_time(self) -> Floats:
        """Times, at most tau."""
        return np.minimum(self.time, self.tau)

    @cached_property
    def times(self) -> Floats:
        """(T,) quartiles of the event times of the training patients that lie before tau."""
        events = self.train_time[self.train_event]
        quartiles = np.unique(np.quantile(events, [0.25, 0.5, 0.75])) if len(events) else np.empty(0)
        return quartiles[quartiles < self.tau]

    @cached_property
    def inverse_censoring(self) -> Floats:
        """(N,) 1 / G(t) of the events before tau, else 0."""
        if not self.cut_event.any():
            return np.zeros(self.size)
        return np.asarray(self._censoring.predict_ipcw(_surv(self.cut_time, self.cut_event)))

    def point(self) -> Metrics:
        """The plain metrics of the whole set."""
        if self.obstacle:
            return Metrics(dict.fromkeys(SURVIVAL_METRICS, float("nan")), [self.obstacle])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = {
                "c_index": _c_index(self),
                "c_index_ipcw": _c_index_ipcw(self),
                "auc_td": _auc_td(self),
                "logrank_p": _logrank_p(self),
            }
        return Metrics(values, _notes(self, values))

    def resampled(self, weights: NDArray[np.float32]) -> dict[str, Floats]:
        """The metrics, each (R,), of resamples with ``weights`` (N, R); NaN where undefined."""
        return {
            **self._concordance(weights),
            "auc_td": self._auc_td(weights),
            "logrank_p": self.resampled_logrank_p(weights),
        }

    def _pairs(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]]:
        """Blocks of rows: event indices (e,), comparable (e, N), concordant (e, N) with ties as a half."""
        rows = np.flatnonzero(self.event)
        for part in np.array_split(rows, max(1, -(-len(rows) * self.size // BLOCK_CELLS))):
            later = self.time > self.time[part, None]
            comparable = later | ((self.time == self.time[part, None]) & ~self.event)
            lead = self.risk[part, None] - self.risk
            concordant = np.where(np.abs(lead) <= TIED_RISK, 0.5, lead > 0) * comparable
            yield part, comparable.astype(np.float32), concordant.astype(np.float32)

    def _concordance(self, weights: NDArray[np.float32]) -> dict[str, Floats]:
        factors = {"c_index": np.ones(self.size), "c_index_ipcw": self.inverse_censoring**2}
        top = {name: np.zeros(weights.shape[1]) for name in factors}
        bottom = {name: np.zeros(weights.shape[1]) for name in factors}
        for rows, comparable, concordant in self._pairs():
            drawn = weights[rows].astype(np.float64)
            pairs, won = (
                drawn * (comparable @ weights),
                drawn * (concordant @ weights),
            )  # (e, R), exact below 2^23
            for name, factor in factors.items():
                top[name] += factor[rows] @ won
                bottom[name] += factor[rows] @ pairs
        return {name: ratio(top[name], bottom[name]) for name in factors}

    def _auc_td(self, weights: NDArray[np.float32]) -> Floats:
        """AUC at each time, weighted with the fall of the survival curve since the time before."""
        top = bottom = np.zeros(weights.shape[1])
        before = np.ones(weights.shape[1])
        for time, survival in zip(self.times, self._survival_at_times(weights), strict=True):
            auc, fall, before = self._auc_at(time, weights), before - survival, survival
            defined = ~np.isnan(auc)
            top = top + np.where(defined, auc, 0) * np.where(defined, fall, 0)
            bottom = bottom + np.where(defined, fall, 0)
        return ratio(top, bottom)

    def _auc_at(self, time: float, weights: NDArray[np.float32]) -> Floats:
        case = self.cut_event & (self.cut_time <= time)
        used = case | (self.cut_time > time)
        factor = np.where(case, self.inverse_censoring, 1.0)[used, None]
        return weighted_auc(tie_groups(self.risk, TIED_RISK)[used], case[used], weights[used] * factor)

    def _survival_at_times(self, weights: NDArray[np.float32]) -> Floats:
        """Kaplan-Meier survival of every resample at ``times``, (T, R)."""
        distinct, at_risk, died = life_table(self.cut_time, self.cut_event, weights)
        step = np.divide(died, at_risk, out=np.zeros_like(died), where=at_risk > 0)
        curve = np.vstack([np.ones((1, weights.shape[1])), np.cumprod(1 - step, axis=0)])
        return np.asarray(curve[np.searchsorted(distinct, self.times, side="right")])

    def resampled_logrank_p(self, weights: NDArray[Any]) -> Floats:
        """Log-rank test (Mantel 1966) between risks above the median of the resample and the others."""
        from scipy.stats import chi2

        high = (self.risk[:, None] > weighted_median(self.risk, weights)) * weights
        _, at_risk, died = life_table(self.time, self.event, weights)
        _, high_at_risk, high_died = life_table(self.time, self.event, high)
        share = np.divide(high_at_risk, at_risk, out=np.zeros_like(at_risk), where=at_risk > 0)
        surplus = (high_died - died * share).sum(axis=0)
        spread = died * share * (1 - share) * (at_risk - died) / np.maximum(at_risk - 1, 1)
        return np.asarray(chi2.sf(ratio(surplus**2, spread.sum(axis=0)), 1))


def survival_metrics(
    risk: ArrayLike,
    time: ArrayLike,
    event: ArrayLike,
    train_time: ArrayLike | None = None,
    train_event: ArrayLike | None = None,
) -> Metrics:
    """C-index, IPCW C-index, mean time-dependent AUC, and log-rank p between the halves of the risk.

    Args:
        risk: (N,), higher means an earlier event.
        time: (N,) time of event or censoring, not negative, any unit.
        event: (N,) 1 for an event, 0 for censored.
        train_time: (M,) training patients, to know the censoring; default: the patients evaluated.
        train_event: (M,).

    Returns:
        Values, NaN with a note where undefined (no event, no comparable pair, risk not finite, equal risks).

    Raises:
        UserError: shapes or values do not fit.
    """
    return SurvivalStatistics(risk, time, event, train_time, train_event).point()


def _checked(time: ArrayLike, event: ArrayLike, shape: tuple[int, ...]) -> tuple[Floats, Bools]:
    t, e = np.asarray(time, dtype=np.float64), np.asarray(event)
    if len(shape) != 1 or t.shape != shape or e.shape != shape:
        raise UserError(
            f"survival metrics need one risk, time and event per patient, but got {shape}, {t.shape} and "
            f"{e.shape}. Pass arrays of one length."
        )
    if not (np.isfinite(t).all() and (t >= 0).all()):
        raise UserError(f"{int((~(t >= 0) | np.isinf(t)).sum())} of {t.size} times are negative or missing. Drop them.")
    if not np.isin(e, (0, 1)).all():
        raise UserError(f"events are {np.unique(e)[:5].tolist()}, but only 1 (event) and 0 (censored) are known.")
    return t, e.astype(bool)


def _surv(time: Floats, event: Bools) -> Any:
    from sksurv.util import Surv

    return Surv.from_arrays(event, time)


def _c_index(data: SurvivalStatistics) -> float:
    from sksurv.metrics import concordance_index_censored

    if not _comparable(data.time, data.event):
        return float("nan")
    return float(concordance_index_censored(data.event, data.time, data.risk, tied_tol=TIED_RISK)[0])


def _c_index_ipcw(data: SurvivalStatistics) -> float:
    from sksurv.metrics import concordance_index_ipcw

    if not _comparable(data.cut_time, data.cut_event):
        return float("nan")
    train, test = _surv(data.train_time, data.train_event), _surv(data.cut_time, data.cut_event)
    return float(concordance_index_ipcw(train, test, data.risk, tied_tol=TIED_RISK)[0])


def _comparable(time: Floats, event: Bools) -> bool:
    """Whether an event has a patient of later time, or of the same time and censored, beside it."""
    first = time[event].min() if event.any() else np.inf
    return bool(((time > first) | ((time == first) & ~event)).any())


def _auc_td(data: SurvivalStatistics) -> float:
    from sksurv.metrics import cumulative_dynamic_auc

    first = data.cut_time[data.cut_event].min() if data.cut_event.any() else np.inf
    times = data.times[(data.times >= first) & (data.times < data.cut_time.max())]
    if not len(times):
        return float("nan")
    train, test = _surv(data.train_time, data.train_event), _surv(data.cut_time, data.cut_event)
    return float(cumulative_dynamic_auc(train, test, data.risk, times, tied_tol=TIED_RISK)[1])


def _logrank_p(data: SurvivalStatistics) -> float:
    from sksurv.compare import compare_survival

    # Where both groups are never at risk together the statistic is 0 / 0; the library then gives 1 or raises.
    if np.isnan(data.resampled_logrank_p(np.ones((data.size, 1)))[0]):
        return float("nan")
    high = data.risk > np.median(data.risk)
    return float(compare_survival(_surv(data.time, data.event), high)[1])


def _notes(data: SurvivalStatistics, values: dict[str, float]) -> list[str]:
    trained = "no training patient has an event"
    if data.train_event.any():
        trained = f"no two patients can be compared before {data.tau:g}, the end of known censoring"
    reasons = {
        "c_index": "no two patients can be compared",
        "c_index_ipcw": trained,
        "auc_td": f"no time of {data.times.tolist()} has patients with an earlier event and patients left",
        "logrank_p": "the risks do not split the patients into two groups that can be compared",
    }
    notes = [f"{name} is NaN: {reasons[name]}" for name, value in values.items() if np.isnan(value)]
    if data.own_censoring:
        notes.append("c_index_ipcw and auc_td take the censoring from the patients evaluated, not from training")
    return notes
