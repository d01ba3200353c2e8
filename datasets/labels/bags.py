"""Rows with their slides and targets become bags: one per slide, or one per patient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datasets.labels.table import Row, rows_text
from datasets.labels.types import Sample
from utils.errors import Faults


@dataclass(frozen=True)
class Labelled:
    """A row, the slides found for it (none: left out) and its target."""

    row: Row
    slides: tuple[str, ...]
    target: Mapping[str, float]


def make_bags(rows: Sequence[Labelled], level: str, where: str, faults: Faults) -> tuple[Sample, ...]:
    """The samples of one split.

    Args:
        rows: rows in the order of the csv; repeated rows stay repeated.
        level: "slide" or "case".
        where: csv, fold and split, for messages.
        faults: collects targets that contradict each other.
    """
    _check_targets(rows, level, where, faults)
    if level == "slide":
        return tuple(Sample(slide, r.row.case, (slide,), r.target) for r in rows for slide in r.slides)
    return _per_case(rows)


def _per_case(rows: Sequence[Labelled]) -> tuple[Sample, ...]:
    """One bag per patient, repeated as often as the most repeated of the patient's rows."""
    cases: dict[str, list[Labelled]] = {}
    for r in rows:
        if r.slides:
            cases.setdefault(r.row.case, []).append(r)
    samples: list[Sample] = []
    for case, members in cases.items():
        slides = tuple(dict.fromkeys(slide for member in members for slide in member.slides))
        times = max(Counter(member.row.id for member in members).values())
        samples += [Sample(case, case, slides, members[0].target)] * times
    return tuple(samples)


def _check_targets(rows: Sequence[Labelled], level: str, where: str, faults: Faults) -> None:
    """One slide has one target; with one bag per patient, one patient has."""
    found: dict[str, list[Labelled]] = {}
    for r in rows:
        found.setdefault(r.row.case if level == "case" else r.row.id, []).append(r)
    what, remedy = ("patient", " or use --bag_level=slide") if level == "case" else ("slide", "")
    for name, members in found.items():
        if any(member.target != members[0].target for member in members):
            faults.add(
                f"{where}: {what} {name!r} has different targets in "
                f"{rows_text(m.row.number for m in members)}. Correct the csv{remedy}."
            )
