"""Slides without labels, for a trained model to predict: those of a csv, or all that a store holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from datasets.labels.bags import Labelled, make_bags
from datasets.labels.classes import Classes
from datasets.labels.cohort import bag_note, cohort_of, match_rows
from datasets.labels.match import Matcher
from datasets.labels.options import CLASS_NAMES, LabelOptions
from datasets.labels.table import Row, Table, patient_of, read_names
from datasets.labels.types import ELSEWHERE, Cohort, Fold
from utils.errors import Faults


def load_unlabelled(options: LabelOptions, slides: Collection[str], absent: Mapping[str, str] | None = None) -> Cohort:
    """The bags to predict, the same for the model of every fold.

    Args:
        options: classes and bins are those of the checkpoint; without a csv_path all ``slides`` are taken.
        slides: names of the slides that can be read.
        absent: names of slides that cannot -> the words for it.

    Raises:
        UserError: all faults at once, each with row numbers and a remedy.
    """
    faults = Faults(options.csv_path or "slides")
    for problem in options.problems():
        faults.add(problem)
    table = read_names(Path(options.csv_path), faults) if options.csv_path else _all(slides)
    classes = _classes(options, faults) if options.kind == "classification" else None
    matches, notes = match_rows(options, [table], Matcher(slides, absent or {}), faults)
    rows = [Labelled(row, matches[table.name].slides[row.number], {}) for row in table.rows]
    samples = make_bags(rows, options.bag_level, table.name, faults)
    if not samples:
        faults.add(f"{table.name}: there is no slide to predict.")
    faults.raise_if_any()
    folds = tuple(
        Fold(k, options.fold_seed(k), (), samples, samples, ELSEWHERE, options.edges.get(k))
        for k in range(options.fold_start, options.cv_fold)
    )
    said = f"{table.name}: {len(samples)} bags to predict; labels are not read."
    return cohort_of(options, folds, classes, [said, *table.notes, *notes, bag_note(options, folds)])


def _all(slides: Collection[str]) -> Table:
    rows = tuple(Row(i, name, patient_of(name) or name) for i, name in enumerate(sorted(slides), start=1))
    return Table("all slides", rows, frozenset(("id",)))


def _classes(options: LabelOptions, faults: Faults) -> Classes:
    names = CLASS_NAMES[options.published_key] if options.published_key else options.classes
    if not names:
        faults.add("the checkpoint does not say what its classes are. Give --classes, in the order of its outputs.")
    return Classes(names)
