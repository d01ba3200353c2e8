"""Divides rows into train, validation and test: from the csv's split column, at random, or in k folds.

Random divisions keep a patient's rows together and spread every stratum (class, or event in survival) evenly.
They are a function of the rows' order in the csv and the seed, and use Python's own generator, whose sequence
does not change between versions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datasets.labels.options import LabelOptions
from datasets.labels.table import Row, Table, rows_text
from datasets.labels.types import ELSEWHERE
from utils.errors import Faults

MOST_PATIENTS = 10
"""Patients named in a leakage fault; the rest is counted."""


@dataclass(frozen=True)
class SplitRows:
    """The rows of one fold; ``val`` is ``test`` if ``selection`` is not "val"; not ``divided`` after a fault."""

    train: tuple[Row, ...]
    val: tuple[Row, ...]
    test: tuple[Row, ...]
    selection: str
    notes: tuple[str, ...] = ()
    divided: bool = True

    def own(self) -> dict[str, tuple[Row, ...]]:
        """Split name to rows, validation only where it is a set of its own."""
        own = {"train": self.train, "val": self.val, "test": self.test}
        return own if self.selection == "val" else {"train": self.train, "test": self.test}


def partition(groups: Sequence[str], strata: Sequence[object], shares: Sequence[float], seed: int) -> list[int]:
    """Assigns every row to a part; rows of a group stay together and strata are spread by the shares.

    Greedy: groups in random order, large ones first, each to the part that lacks most rows of the group's
    strata. For groups of one row every part then holds its share of each stratum to within one row.

    Args:
        groups: group (patient) of each row.
        strata: stratum (class or event) of each row.
        shares: wanted share of each part; they add up to 1.
        seed: seed of the order.

    Returns:
        The part of each row.
    """
    members: dict[str, Counter[object]] = {}
    for group, stratum in zip(groups, strata, strict=True):
        members.setdefault(group, Counter())[stratum] += 1
    order = list(members)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -sum(members[group].values()))
    totals = Counter(strata)
    lacks = [{stratum: share * count for stratum, count in totals.items()} for share in shares]
    part_of = {}
    for group in order:
        needs = [
            (
                round(sum(n * lack[s] for s, n in members[group].items()), 9),
                round(sum(lack.values()), 9),
                -part,
            )
            for part, lack in enumerate(lacks)
        ]
        part = -max(needs)[2]
        part_of[group] = part
        for stratum, count in members[group].items():
            lacks[part][stratum] -= count
    return [part_of[group] for group in groups]


def stratum_of(row: Row) -> object:
    """What a random division spreads evenly: the event in survival, else what the row says, else the label."""
    if row.stratum is not None:
        return row.stratum
    return row.event if row.time is not None else row.label


def kfold(table: Table, options: LabelOptions, fold: int, faults: Faults) -> SplitRows:
    """Fold ``fold`` of ``cv_fold``: its part is the test set, ``val_ratio`` of the others validation."""
    patients = len({row.case for row in table.rows})
    if patients < options.cv_fold:
        faults.add(
            f"{table.name}: {patients} patients cannot make {options.cv_fold} folds. "
            f"Lower --cv_fold to {patients} at most."
        )
        return SplitRows((), (), (), "test", divided=False)
    parts = _divide(table.rows, [1 / options.cv_fold] * options.cv_fold, options.seed)
    test = tuple(parts[fold])
    tested = {row.number for row in test}
    rest = tuple(row for row in table.rows if row.number not in tested)
    notes: list[str] = []
    if "split" in table.columns:
        notes.append(
            f"{table.name}: its split column is not used, because cv_fold is {options.cv_fold} and folds "
            "are cut anew. Use --cv_fold=1 (or --random_fold) for the csv's own split."
        )
    notes += _rare(table, options.cv_fold)
    if not options.val_ratio:
        return _on_test(rest, test, "folds without --val_ratio", notes)
    train, val = _divide(rest, [1 - options.val_ratio, options.val_ratio], options.fold_seed(fold))
    if options.val2test:
        return _on_test(tuple(train), test + tuple(val), "val2test was given", notes)
    return SplitRows(tuple(train), tuple(val), test, "val", tuple(notes))


def _rare(table: Table, folds: int) -> list[str]:
    """A note on strata with fewer patients than there are folds."""
    patients: dict[object, set[str]] = {}
    for row in table.rows:
        patients.setdefault(stratum_of(row), set()).add(row.case)
    kind = "events" if table.rows[0].time is not None else "label"
    return [
        f"{table.name}: {kind} {stratum!r} has {len(cases)} patients for {folds} folds; some test sets lack it."
        for stratum, cases in patients.items()
        if len(cases) < folds
    ]


def only_tested(table: Table, options: LabelOptions) -> bool:
    """Whether nothing is trained and the csv holds no train rows: a cohort for a model that is there already."""
    if "split" not in table.columns:
        return options.elsewhere
    return not options.training and all(row.split != "train" for row in table.rows)


def _on_all(table: Table, test: tuple[Row, ...]) -> SplitRows:
    said = f"{table.name}: a test only, of {len(test)} rows"
    left = len(table.rows) - len(test)
    said += f"; {left} val rows are left out (--val2test adds them)." if left else "."
    return SplitRows((), test, test, ELSEWHERE, (said,))


def own_split(table: Table, options: LabelOptions, fold: int, faults: Faults) -> SplitRows:
    """The csv's split column; without one a random ``val_ratio`` share of the rows is the test set."""
    if "split" not in table.columns:
        return _random_test(table, options, fold, faults)
    parts: dict[str | None, list[Row]] = {"train": [], "val": [], "test": []}
    for row in table.rows:
        parts.setdefault(row.split, []).append(row)
    train, val, test = (tuple(parts[name]) for name in ("train", "val", "test"))
    if only_tested(table, options):
        return _on_all(table, test + val if options.val2test else test)
    if options.val2test:
        return _on_test(train, test + val, "val2test was given" if val else "the csv has no val rows", [])
    if not val and options.val_ratio:
        seed = options.fold_seed(fold)
        share = f"{options.val_ratio:g} of the training rows, by patient,"
        drawn = f"{table.name}: no val rows; {share} are validation (seed {seed})."
        kept, held_out = _divide(train, [1 - options.val_ratio, options.val_ratio], seed)
        return SplitRows(tuple(kept), tuple(held_out), test, "val", (drawn,))
    if not val:
        return _on_test(train, test, "the csv has no val rows", [])
    if options.val_ratio == 0:
        unused = f"{table.name}: its {len(val)} val rows are not used, because val_ratio is 0."
        return _on_test(train, test, "val_ratio is 0", [unused])
    return SplitRows(train, val, test, "val")


def _random_test(table: Table, options: LabelOptions, fold: int, faults: Faults) -> SplitRows:
    if only_tested(table, options) or not (options.training or options.val_ratio):
        return _on_all(table, tuple(table.rows))
    if not options.val_ratio:
        faults.add(
            f"{table.name} has no split column. Add one (train, val, test), give the share of the test set "
            "with --val_ratio=0.2, or cut folds with --cv_fold=5."
        )
        return SplitRows((), (), (), "test", divided=False)
    train, test = _divide(table.rows, [1 - options.val_ratio, options.val_ratio], options.fold_seed(fold))
    seed = options.fold_seed(fold)
    drawn = f"{table.name}: a random {options.val_ratio:g} of the rows is the test set (seed {seed})."
    return _on_test(tuple(train), tuple(test), "a csv without a split column gives no val rows", [drawn])


def _divide(rows: Sequence[Row], shares: Sequence[float], seed: int) -> list[list[Row]]:
    placed = partition([row.case for row in rows], [stratum_of(row) for row in rows], shares, seed)
    parts: list[list[Row]] = [[] for _ in shares]
    for row, part in zip(rows, placed, strict=True):
        parts[part].append(row)
    return parts


def _on_test(train: tuple[Row, ...], test: tuple[Row, ...], reason: str, notes: list[str]) -> SplitRows:
    said = (
        f"Validation equals test ({reason}): the epoch is chosen on the test set, so test results are "
        "optimistic. A set of its own comes from val rows in the csv or from --val_ratio with folds."
    )
    return SplitRows(train, test, test, "test", (*notes, said))


def check_split(name: str, rows: SplitRows, faults: Faults, training: bool = True) -> None:
    """Faults for an empty set (without ``training`` of the test only) and for patients on both sides of a split."""
    remedies = {
        "train": "Mark rows as train.",
        "val": "Raise --val_ratio.",
        "test": "Mark rows as test, or let --val2test use the val rows.",
    }
    for split, members in rows.own().items():
        if not members and (training or split == "test"):
            faults.add(f"{name}: the {split} set is empty. {remedies[split]}")
    sides: dict[str, dict[str, list[int]]] = {}
    for split, members in rows.own().items():
        for row in members:
            sides.setdefault(row.case, {}).setdefault(split, []).append(row.number)
    leaks = {case: found for case, found in sides.items() if len(found) > 1}
    if leaks:
        shown = "; ".join(_leak_text(case, found) for case, found in list(leaks.items())[:MOST_PATIENTS])
        more = f"; and {len(leaks) - MOST_PATIENTS} more" if len(leaks) > MOST_PATIENTS else ""
        faults.add(
            f"{name}: {len(leaks)} patient{'s are' if len(leaks) > 1 else ' is'} on both sides of a split: "
            f"{shown}{more}. Move all rows of a patient to one split."
        )


def _leak_text(case: str, found: dict[str, list[int]]) -> str:
    return f"{case} ({', '.join(f'{split} {rows_text(numbers)}' for split, numbers in found.items())})"
