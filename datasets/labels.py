"""From label csv files and the slides of a store to the samples of every fold.

The way: read rows (``label_table``), find the classes (``label_classes``) or the survival bins (``survival_bins``), divide
the rows (``splits``), find their slides (``label_match``), make bags. Rows are divided and bins are cut before slides are
looked up, so folds depend on the csv alone and not on which slides a store happens to hold.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.label_bags import Labelled, make_bags
from datasets.label_classes import Classes, find_classes
from datasets.label_match import Matcher, Matches
from datasets.label_options import LabelOptions
from datasets.label_report import describe, fingerprint, write_split
from datasets.label_table import Row, Table, read_table, rows_text
from datasets.label_types import Cohort, Fold, Sample
from datasets.splits import SplitRows, check_split, kfold, own_split
from datasets.survival_bins import bin_names, bin_of, cut_edges
from utils.errors import Faults, UserError

__all__ = [
    "Cohort",
    "Fold",
    "LabelOptions",
    "Sample",
    "describe",
    "fingerprint",
    "load_cohort",
    "write_split",
]

MOST_NAMES = 5
"""Missing names shown in full with their nearest match."""


@dataclass(frozen=True)
class _Draft:
    """A fold before its slides are known."""

    index: int
    table: Table
    rows: SplitRows


def load_cohort(options: LabelOptions, slides: Collection[str]) -> Cohort:
    """Reads the label files and joins them with the slides of a store or feature folder.

    Args:
        options: how to read.
        slides: names of the slides that can be read, in every store that the run needs.

    Returns:
        The folds fold_start .. cv_fold - 1, checked; ``notes`` must be logged.

    Raises:
        UserError: all faults at once, each with row numbers and a remedy.
    """
    faults = Faults(options.csv_path)
    for problem in options.problems():
        faults.add(problem)
    faults.raise_if_any()
    tables = _read_tables(options, faults)
    if not all(table.rows for table in tables.values()) or not tables:
        faults.raise_if_any()
    notes = [note for table in tables.values() for note in table.notes]
    classes = None
    if not options.survival:
        classes = find_classes(list(tables.values()), options, faults)
        notes += classes.notes
    drafts = _divide(options, tables, faults)
    notes += [note for draft in drafts for note in draft.rows.notes]
    matcher = Matcher(slides)
    matches = {
        name: matcher.match(table.name, table.rows, faults) for name, table in _distinct(tables).items()
    }
    for name, table in _distinct(tables).items():
        notes += matches[name].notes
        notes += _report_missing(options, table, matches[name], matcher, faults)
    folds = [_fold(options, draft, matches[draft.table.name], classes, (faults, notes)) for draft in drafts]
    faults.raise_if_any()
    return _cohort(options, folds, classes, notes)


def _read_tables(options: LabelOptions, faults: Faults) -> dict[int, Table]:
    """The table of each fold to run; one csv serves all folds."""
    path = Path(options.csv_path)
    numbers = range(options.fold_start, options.cv_fold)
    if not path.is_dir():
        table = read_table(path, options.survival, faults)
        return dict.fromkeys(numbers, table)
    present = sorted(file.name for file in path.glob("fold_*.csv"))
    absent = [f"fold_{k}.csv" for k in numbers if f"fold_{k}.csv" not in present]
    if absent:
        faults.add(
            f"{path} holds {', '.join(present) or 'no fold_<k>.csv'}, but folds {numbers[0]} to {numbers[-1]} are asked "
            f"for: {', '.join(absent)} missing. Set --cv_fold to the number of files."
        )
        return {}
    return {k: read_table(path / f"fold_{k}.csv", options.survival, faults) for k in numbers}


def _distinct(tables: dict[int, Table]) -> dict[str, Table]:
    return {table.name: table for table in tables.values()}


def _divide(options: LabelOptions, tables: dict[int, Table], faults: Faults) -> list[_Draft]:
    """The published choice: folds are cut anew from one csv when cv_fold > 1 and random_fold is off."""
    anew = options.cv_fold > 1 and not options.random_fold and not Path(options.csv_path).is_dir()
    drafts = []
    for index, table in tables.items():
        rows = kfold(table, options, index, faults) if anew else own_split(table, options, index, faults)
        drafts.append(_Draft(index, table, rows))
        if rows.train or rows.test:
            check_split(table.name if not anew else f"{table.name} fold {index}", rows, faults)
    return drafts


def _report_missing(
    options: LabelOptions, table: Table, matches: Matches, matcher: Matcher, faults: Faults
) -> list[str]:
    """One fault (policy error) or one note (policy drop) about the names that the store lacks."""
    if not matches.missing:
        return []
    rows = {row.number: row for row in table.rows}
    splits = {
        split: sum(rows[n].split == split for n in matches.missing) for split in ("train", "val", "test")
    }
    per_split = ", ".join(f"{count} {split}" for split, count in splits.items() if count)
    names = list(dict.fromkeys((n, name) for n, missing in matches.missing.items() for name in missing))
    shown = "; ".join(_near_text(number, name, matcher) for number, name in names[:MOST_NAMES])
    more = f"; and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    said = (
        f"{table.name}: {len(matches.missing)} of {len(table.rows)} rows{f' ({per_split})' if per_split else ''} name "
        f"slides that are not among the {len(matcher.names)} of the store: {shown}{more}."
    )
    if options.missing == "drop":
        return [said + " They are left out (--missing=drop)."]
    faults.add(
        said + " Correct the names, add the slides to the store, or leave them out with --missing=drop."
    )
    return []


def _near_text(number: int, name: str, matcher: Matcher) -> str:
    close = matcher.near(name)
    return f"row {number} {name!r}" + (f" (closest: {', '.join(repr(c) for c in close)})" if close else "")


def _fold(
    options: LabelOptions,
    draft: _Draft,
    matches: Matches,
    classes: Classes | None,
    report: tuple[Faults, list[str]],
) -> Fold:
    faults, notes = report
    where = f"{draft.table.name} fold {draft.index}"
    edges = None
    if classes is None:
        edges = _edges(options, draft, faults)
        labelled = _survival_labels(options, draft, edges, report)
    else:
        labelled = {row.number: {"label": classes.index(row.label or "") or 0} for row in draft.table.rows}
    bags = {}
    for split, rows in draft.rows.own().items():
        part = [Labelled(row, matches.slides[row.number], labelled[row.number]) for row in rows]
        bags[split] = make_bags(part, options.bag_level, f"{where} {split}", faults)
    if draft.rows.train and not faults.messages:
        _check_training(where, bags, edges, report)
    missing = {
        split: tuple(name for row in rows for name in matches.missing.get(row.number, ()))
        for split, rows in draft.rows.own().items()
    }
    test = bags["test"]
    return Fold(
        draft.index, options.fold_seed(draft.index), bags["train"], bags.get("val", test), test,
        draft.rows.selection, edges, missing,
    )  # fmt: skip


def _edges(options: LabelOptions, draft: _Draft, faults: Faults) -> tuple[float, ...]:
    rows: Sequence[Row] = draft.table.rows if options.bins == "published" else draft.rows.train
    cases = {row.case: row for row in rows}.values() if options.bins == "train" else rows
    try:
        return cut_edges(
            [row.time or 0.0 for row in cases], [row.event or 0 for row in cases], options.n_bins
        )
    except UserError as error:
        if draft.rows.train:
            faults.add(f"{draft.table.name} fold {draft.index}: {error}")
        return ()


def _survival_labels(
    options: LabelOptions, draft: _Draft, edges: tuple[float, ...], report: tuple[Faults, list[str]]
) -> dict[int, dict[str, float]]:
    """Bin, time and event of each row."""
    faults, notes = report
    table = draft.table
    bins = {row.number: bin_of(row.time or 0.0, edges) for row in table.rows}
    if "label" in table.columns:
        texts = {str(i): i for i in range(options.n_bins)}
        stored = {row.number: texts.get((row.label or "").removesuffix(".0"), -1) for row in table.rows}
        differ = sum(stored[number] != bins[number] for number in bins)
        if options.bins == "published":
            bad = [number for number, value in stored.items() if value < 0]
            if bad:
                faults.add(
                    f"{table.name} {rows_text(bad)}: the Label is not a bin from 0 to {options.n_bins - 1}. "
                    "Correct it, set --n_classes, or cut bins anew with --surv_bins=train."
                )
            if differ:
                notes.append(
                    f"{table.name}: {differ} stored Labels differ from bins cut on the whole table; they are used."
                )
            bins = stored
        else:
            notes.append(
                f"{table.name}: the Label column is not used; bins are cut on the training rows ({differ} of "
                f"{len(bins)} differ). --surv_bins=published uses it."
            )
    return {
        row.number: {"label": bins[row.number], "time": row.time or 0.0, "event": row.event or 0}
        for row in table.rows
    }


def _check_training(
    where: str,
    bags: dict[str, tuple[Sample, ...]],
    edges: tuple[float, ...] | None,
    report: tuple[Faults, list[str]],
) -> None:
    faults, notes = report
    for split, samples in bags.items():
        kinds = {sample.target["event" if edges is not None else "label"] for sample in samples}
        if not samples:
            faults.add(
                f"{where}: no slide of the {split} set is in the store. Check the names and the store."
            )
        elif edges is not None and 1 not in kinds:
            text = f"{where}: no event in the {split} set"
            faults.add(f"{text}; nothing can be learnt. Check Status.") if split == "train" else notes.append(
                f"{text}: its C-index is undefined."
            )
        elif edges is None and len(kinds) == 1:
            text = f"{where}: the {split} set holds one class only"
            faults.add(f"{text}. Training needs two.") if split == "train" else notes.append(
                f"{text}: its AUC is undefined."
            )


def _cohort(options: LabelOptions, folds: list[Fold], classes: Classes | None, notes: list[str]) -> Cohort:
    unique = tuple(dict.fromkeys(notes))
    if classes is not None:
        return Cohort("classification", classes.names, tuple(folds), None, unique)
    edges = {fold.bin_edges for fold in folds}
    shared = folds[0].bin_edges if len(edges) == 1 else None
    names = bin_names(shared) if shared else tuple(f"bin {i}" for i in range(options.n_bins))
    unit = "Survival times keep the unit of the csv (the published files: months)."
    return Cohort("survival", names, tuple(folds), shared, (*unique, unit))
