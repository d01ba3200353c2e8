"""Which slides of a cohort deserve a look, and why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from process_list import Row

MOST_TISSUE, LEAST_TISSUE = 0.9, 0.005
"""Shares of the slide: above, background was taken for tissue; below, tissue was missed or there is hardly any."""

OUTLIER = 3.5
"""Robust z-score (0.6745 x distance from the median / median distance) of log patch count: the usual cut."""

FEWEST_FOR_OUTLIERS = 8

SCALE_TOLERANCE = 0.1
"""um/px of the patches may differ from the cohort's median by 10 %."""

DONE = ("processed", "already_exist")


@dataclass(frozen=True)
class Flag:
    """One reason to look at a slide; a larger weight comes first on the page."""

    weight: int
    text: str


def flags_of(rows: Sequence[Row]) -> list[list[Flag]]:
    """The flags of every row, worst first; they depend on the whole cohort."""
    counts = _numbers(rows, "patches")
    scales = _numbers(rows, "resolved_mpp")
    pieces = _numbers(rows, "contours")
    flags = []
    for row in rows:
        found = [*_own_flags(row), *_scale_flags(row, scales), *_count_flags(row, counts)]
        if pieces and statistics.median(pieces) >= 3 and _number(row, "contours") == 1:
            found.append(Flag(20, "a single piece of tissue"))
        flags.append(sorted(found, key=lambda f: -f.weight))
    return flags


def _own_flags(row: Row) -> list[Flag]:
    """What can be said of a slide without the others."""
    found = []
    if row.status not in DONE:
        found.append(Flag(100, {"tbp": "not done", "failed_seg": "no tissue"}.get(row.status, row.status)))
    elif row.facts.get("reason"):
        found.append(Flag(90, "damaged"))
    share = _number(row, "tissue_fraction")
    if share is not None and share > MOST_TISSUE:
        found.append(Flag(50, f"tissue {share:.0%}"))
    if share is not None and 0 < share < LEAST_TISSUE:
        found.append(Flag(45, f"tissue {share:.2%}"))
    if row.facts.get("width") and _number(row, "level0_mpp") is None:
        found.append(Flag(5, "um/px unknown"))
    return found


def _scale_flags(row: Row, scales: Sequence[float]) -> list[Flag]:
    own = _number(row, "resolved_mpp")
    if own is None or not scales:
        return []
    ratio = own / statistics.median(scales)
    return [Flag(60, f"um/px {ratio:.2f} x the cohort's")] if abs(ratio - 1) > SCALE_TOLERANCE else []


def _count_flags(row: Row, counts: Sequence[float]) -> list[Flag]:
    own = _number(row, "patches")
    if not own or len(counts) < FEWEST_FOR_OUTLIERS:
        return []
    logs = [math.log(c) for c in counts if c]
    middle = statistics.median(logs)
    spread = statistics.median(abs(v - middle) for v in logs)
    z = 0.6745 * (math.log(own) - middle) / spread if spread else 0.0
    return [Flag(40, f"{'many' if z > 0 else 'few'} patches")] if abs(z) > OUTLIER else []


def _numbers(rows: Sequence[Row], name: str) -> list[float]:
    values = (_number(row, name) for row in rows if row.status in DONE)
    return [v for v in values if v is not None]


def _number(row: Row, name: str) -> float | None:
    value = row.facts.get(name)
    return float(value) if value not in (None, "") else None
