"""From label csv files and the slides of a store to the samples of every fold.

The way: read rows (``table``), find the classes (``classes``), divide the rows (``splits``), find their slides
(``match``), cut survival bins (``survival_bins``), make bags (``folds``, ``bags``). Rows are divided and bins are cut
before slides are looked up, so folds depend on the csv alone and not on which slides a store happens to hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from datasets.labels.classes import Classes, find_classes, unlearnt
from datasets.labels.folds import Draft, FoldBuilder
from datasets.labels.match import Matcher, Matches, stem
from datasets.labels.options import LabelOptions
from datasets.labels.splits import check_split, kfold, only_tested, own_split
from datasets.labels.survival_bins import bin_names
from datasets.labels.table import Table, read_table
from datasets.labels.types import Cohort, Fold, TaskName
from datasets.labels.values import check_values, with_label_strata, with_value_strata
from utils.errors import Faults

MOST_NAMES = 5
"""Missing names shown in full with their nearest match."""


UNIT_NOTES = {
    "survival": "Survival times keep the unit of the csv (the published files: months).",
    "regression": "Values keep the unit of the csv.",
    "multilabel": "A bag may have several labels; an empty cell is unknown and counts nowhere.",
}
"""What is said of the targets of a task without classes."""


def load_cohort(options: LabelOptions, slides: Collection[str], absent: Mapping[str, str] | None = None) -> Cohort:
    """Reads the label files and joins them with the slides of a store or feature folder.

    Args:
        options: how to read.
        slides: names of the slides that can be read, in every store that the run needs.
        absent: names of slides that only some of these stores hold -> the words for it, such as "not in low.lmdb".

    Returns:
        The folds fold_start .. cv_fold - 1, checked; ``notes`` must be logged.

    Raises:
        UserError: all faults at once, each with row numbers and a remedy.
    """
    faults = Faults(options.csv_path)
    for problem in options.problems():
        faults.add(problem)
    faults.raise_if_any()
    by_fold = _read_tables(options, faults)
    tables = list({table.name: table for table in by_fold.values()}.values())
    if not any(table.rows for table in tables):
        faults.raise_if_any()
    notes = [note for table in tables for note in table.notes]
    notes += _unused_files(options, by_fold)
    classes = find_classes(tables, options, faults) if options.kind == "classification" else None
    notes += classes.notes if classes else (UNIT_NOTES[options.kind],)
    if options.kind == "regression":
        for table in tables:
            check_values(table, faults)
    drafts = _divide(options, by_fold, faults)
    notes += [note for draft in drafts for note in draft.rows.notes]
    matches, said = match_rows(options, tables, Matcher(slides, absent or {}), faults)
    notes += said
    if options.survival:
        faults.raise_if_any()  # what the bins and events of unread rows would say is not so
    builder = FoldBuilder(options, classes, faults)
    folds = tuple(builder.build(draft, matches[draft.table.name]) for draft in drafts)
    faults.raise_if_any()
    if classes and options.training:
        notes += unlearnt(classes, {int(sample.target["label"]) for fold in folds for sample in fold.train})
    notes += [*builder.notes, bag_note(options, folds)]
    return cohort_of(options, folds, classes, notes)


def _read_tables(options: LabelOptions, faults: Faults) -> dict[int, Table]:
    """The table of each fold to run; one csv serves all folds."""
    path = Path(options.csv_path)
    numbers = range(options.fold_start, options.cv_fold)
    if not path.is_dir():
        return dict.fromkeys(numbers, _read_table(path, options, faults))
    present = sorted(file.name for file in path.glob("fold_*.csv"))
    absent = [f"fold_{k}.csv" for k in numbers if f"fold_{k}.csv" not in present]
    if absent:
        faults.add(
            f"the folder holds {', '.join(present) or 'no fold_<k>.csv'}; folds {numbers[0]} to "
            f"{numbers[-1]} are asked for, so {', '.join(absent)} is missing. Set --cv_fold to the number "
            "of files."
        )
        return {}
    return {k: _read_table(path / f"fold_{k}.csv", options, faults) for k in numbers}


def _read_table(path: Path, options: LabelOptions, faults: Faults) -> Table:
    if options.kind == "multilabel":
        return with_label_strata(read_table(path, False, faults, options.classes), options.classes)
    table = read_table(path, options.survival, faults)
    return with_value_strata(table) if options.kind == "regression" else table


def _unused_files(options: LabelOptions, by_fold: dict[int, Table]) -> list[str]:
    """A note on fold files that are not run; none for a single csv."""
    path = Path(options.csv_path)
    used = {table.name for table in by_fold.values()}
    unused = sorted({file.name for file in path.glob("fold_*.csv")} - used) if path.is_dir() else []
    return [f"{', '.join(unused)}: not run, because cv_fold is {options.cv_fold}."] if unused else []


def _divide(options: LabelOptions, by_fold: dict[int, Table], faults: Faults) -> list[Draft]:
    """The published choice: folds are cut anew from one csv when cv_fold > 1 and random_fold is off.

    A csv of test rows is not: the model of every fold is tested on all of them.
    """
    anew = options.cv_fold > 1 and not options.random_fold and not Path(options.csv_path).is_dir()
    anew = anew and not any(only_tested(table, options) for table in by_fold.values())
    divide = kfold if anew else own_split
    drafts = [Draft(k, table, divide(table, options, k, faults)) for k, table in by_fold.items()]
    seen: set[str] = set()
    for draft in drafts:
        name = draft.table.name if not anew and "split" in draft.table.columns else draft.where
        if name not in seen and draft.table.rows and draft.rows.divided:
            check_split(name, draft.rows, faults, options.training)
        seen.add(name)
    return drafts


def match_rows(
    options: LabelOptions, tables: Iterable[Table], matcher: Matcher, faults: Faults
) -> tuple[dict[str, Matches], list[str]]:
    """What each csv's rows match, and the sentences about it."""
    found: dict[str, Matches] = {}
    notes: list[str] = []
    for table in tables:
        found[table.name] = matcher.match(table.name, table.rows, faults)
        notes += found[table.name].notes
        if not found[table.name].missing:
            continue
        said = _missing_text(table, found[table.name], matcher)
        if options.missing == "drop":
            notes.append(f"{said} They are left out (--missing=drop).")
        else:
            faults.add(f"{said} Correct the names, add the slides to the store, or leave them out with --missing=drop.")
    return found, notes


def _missing_text(table: Table, matches: Matches, matcher: Matcher) -> str:
    rows = [row for row in table.rows if row.number in matches.missing]
    splits = {split: sum(row.split == split for row in rows) for split in ("train", "val", "test")}
    per_split = ", ".join(f"{count} {split}" for split, count in splits.items() if count)
    names = [(row.number, name) for row in rows for name in matches.missing[row.number]]
    shown = "; ".join(_near_text(number, name, matcher) for number, name in names[:MOST_NAMES])
    more = f"; and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    whole = "that can be read" if matcher.absent else "of the store"
    return (
        f"{table.name}: {len(rows)} of {len(table.rows)} rows{f' ({per_split})' if per_split else ''} name "
        f"slides that are not among the {len(matcher.names)} {whole}: {shown}{more}."
        f"{_spreadsheet_hint([name for _, name in names], matcher)}"
    )


def _spreadsheet_hint(names: list[str], matcher: Matcher) -> str:
    """What became of names that are slides but for zeros in front or '.0' after, or nothing."""
    pairs = [(name, slide) for name in names for slide in matcher.as_number(name)[:1]]
    if not pairs:
        return ""
    zeros = any(stem(slide).startswith("0") for _, slide in pairs)
    what = "The leading zeros were lost" if zeros else "Names were turned into numbers"
    name, slide = pairs[0]
    return f" {what} ({name!r} for {slide!r}), as spreadsheets do: make the column text."


def _near_text(number: int, name: str, matcher: Matcher) -> str:
    absence = matcher.absence(name)
    if absence:
        return f"row {number} {name!r} ({absence})"
    close = matcher.near(name)
    return f"row {number} {name!r}" + (f" (closest: {', '.join(repr(c) for c in close)})" if close else "")


def bag_note(options: LabelOptions, folds: tuple[Fold, ...]) -> str:
    """One sentence on the bag level and on how many patients it concerns."""
    slides: dict[str, set[str]] = {}
    for samples in folds[0].splits().values():
        for sample in samples:
            slides.setdefault(sample.case, set()).update(sample.slides)
    several = sum(len(names) > 1 for names in slides.values())
    what = "patient, of all its slides" if options.bag_level == "case" else "slide"
    return f"One bag per {what} (--bag_level): {several} of {len(slides)} patients have several slides."


def cohort_of(options: LabelOptions, folds: tuple[Fold, ...], classes: Classes | None, notes: list[str]) -> Cohort:
    unique = tuple(dict.fromkeys(notes))
    if classes is not None:
        return Cohort("classification", classes.names, folds, None, unique)
    kind: TaskName = "multilabel" if options.kind == "multilabel" else "regression"
    if not options.survival:
        return Cohort(kind, options.classes or ("value",), folds, None, unique)
    shared = folds[0].bin_edges if len({fold.bin_edges for fold in folds}) == 1 else None
    names = bin_names(shared) if shared else tuple(f"bin {i}" for i in range(options.n_bins))
    return Cohort("survival", names, folds, shared, unique)
