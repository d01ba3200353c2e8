"""Cuts survival times into the bins of the discrete hazard model.

The edges are the quantiles of the times at which an event happened (quartiles for the paper's 4 bins), bins
are closed on the left: bin i holds edge[i-1] <= time < edge[i]. The first bin starts at 0 and the last one is
open, so a test patient who lives longer than any training patient still has a bin.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from utils.errors import UserError


def cut_edges(times: Sequence[float], events: Sequence[int], n_bins: int) -> tuple[float, ...]:
    """The n_bins - 1 inner edges: quantiles of the times with an event, interpolated linearly.

    Args:
        times: survival or censoring time of each patient.
        events: 1 where the event happened, 0 where censored.
        n_bins: number of bins.

    Raises:
        UserError: the event times are too few or too equal for that many bins.
    """
    happened = [time for time, event in zip(times, events, strict=True) if event]
    edges: list[float] = []
    if happened:
        edges = [float(edge) for edge in np.quantile(happened, np.arange(1, n_bins) / n_bins)]
    full = [min(happened, default=0.0), *edges, max(happened, default=0.0)]
    if any(low >= high for low, high in zip(full, full[1:], strict=False)):
        raise UserError(
            f"{len(happened)} events at {len(set(happened))} distinct times cannot be cut into {n_bins} bins "
            f"with different edges. Lower --n_classes, or cut on the whole table with --surv_bins=published."
        )
    return tuple(edges)


def bin_of(time: float, edges: Sequence[float]) -> int:
    """Index of the bin that holds ``time``.

    >>> [bin_of(t, (10.0, 20.0)) for t in (0.0, 10.0, 19.9, 500.0)]
    [0, 1, 1, 2]
    """
    return bisect_right(edges, time)


def bin_names(edges: Sequence[float]) -> tuple[str, ...]:
    """Names that show the edges.

    >>> bin_names((24.3167, 79.0))
    ('[0, 24.32)', '[24.32, 79)', '[79, inf)')
    """
    texts = ["0", *(f"{edge:.4g}" for edge in edges), "inf"]
    return tuple(f"[{low}, {high})" for low, high in zip(texts, texts[1:], strict=False))
