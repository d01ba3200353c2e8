"""Targets of regression (a number per row) and multi-label tasks (a 0/1 column per label), and their strata."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import replace

import numpy as np

from datasets.labels.table import Table, point_hint, rows_text
from utils.errors import Faults

UNKNOWN = -1
"""The target of a label whose cell is empty."""


def value_of(label: str | None) -> float | None:
    """The number in a label cell, or None.

    >>> value_of("2.5"), value_of("high"), value_of("nan")
    (2.5, None, None)
    """
    try:
        value = float(label or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def check_values(table: Table, faults: Faults) -> None:
    """A fault for each label that is no number."""
    wrong: dict[str, list[int]] = {}
    for row in table.rows:
        if value_of(row.label) is None:
            wrong.setdefault(row.label or "", []).append(row.number)
    for label, numbers in wrong.items():
        what = f"the label {label!r} is no number" if label else "the label is empty"
        remedy = f"Regression needs one; correct it or remove the row.{point_hint(label)}"
        faults.add(f"{table.name} {rows_text(numbers)}: {what}. {remedy}")


def value_targets(table: Table) -> dict[int, dict[str, float]]:
    """Row number to ``{"value": number}``; rows without a number have none."""
    found = ((row.number, value_of(row.label)) for row in table.rows)
    return {number: {"value": value} for number, value in found if value is not None}


def multilabel_targets(table: Table, names: tuple[str, ...]) -> dict[int, dict[str, float]]:
    """Row number to ``{name: 1, 0 or UNKNOWN}`` in the order of the names."""
    return {row.number: dict(zip(names, row.labels, strict=True)) for row in table.rows}


def with_value_strata(table: Table) -> Table:
    """The table with each row's quarter of the values, which random divisions spread evenly."""
    values = [value_of(row.label) or 0.0 for row in table.rows]
    edges = np.quantile(values, [0.25, 0.5, 0.75]).tolist() if values else []
    strata = [f"quarter {bisect_right(edges, value) + 1} of the values" for value in values]
    return replace(table, rows=tuple(replace(r, stratum=s) for r, s in zip(table.rows, strata, strict=True)))


def with_label_strata(table: Table, names: tuple[str, ...]) -> Table:
    """The table with each row's rarest positive label, which random divisions spread evenly."""
    counts = Counter(name for row in table.rows for name, label in zip(names, row.labels, strict=True) if label == 1)
    rows = []
    for row in table.rows:
        positive = [name for name, label in zip(names, row.labels, strict=True) if label == 1]
        rows.append(replace(row, stratum=min(positive, key=lambda name: counts[name]) if positive else "none"))
    return replace(table, rows=tuple(rows))
