"""Class names, their order, and the class of each row."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from datasets.labels.options import CLASS_NAMES, LabelOptions
from datasets.labels.table import Row, Table, rows_text
from utils.errors import Faults, did_you_mean

_INTEGER = re.compile(r"[+-]?\d+(\.0+)?")

NO_LABEL = frozenset(("na", "n/a", "#n/a", "nan", "none", "null"))
"""What spreadsheets and pandas write into an empty cell, whatever its case."""


@dataclass(frozen=True)
class Classes:
    """Names in the order of the model's outputs, and the sentence on where they come from.

    ``by_number`` tells that the csv holds the positions 0 .. n - 1 instead of the names.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    by_number: bool = False

    def index(self, label: str) -> int | None:
        """Position of a label cell, or None if it is outside the classes."""
        if not self.by_number:
            return self.names.index(label) if label in self.names else None
        value = _integer(label)
        return value if value is not None and 0 <= value < len(self.names) else None


def find_classes(tables: Sequence[Table], options: LabelOptions, faults: Faults) -> Classes:
    """The classes by ``classes``, else by the task key, else by what the csv holds.

    A label outside the classes and a number of classes that does not fit become faults.
    """
    found = {row.label for table in tables for row in table.rows if row.label}
    labels = sorted(label for label in found if not _says_nothing(label, options.classes))
    classes = _choose(labels, options, faults)
    for table in tables:
        _check_labels(table, classes, faults)
    return classes


def _choose(labels: list[str], options: LabelOptions, faults: Faults) -> Classes:
    if options.classes:
        return _given(labels, options, faults)
    if options.published_key:
        return _published(options.published_key, options)
    numbers = [_integer(label) for label in labels]
    integers = [number for number in numbers if number is not None]
    if options.key.startswith("bio") or (options.n_classes and len(integers) == len(labels)):
        count = options.n_classes or max(integers, default=0) + 1
        return _numbered(
            count, f"the datasets key {options.datasets!r} and n_classes" if options.n_classes else "the csv"
        )
    return _inferred(labels, options, faults)


def _given(labels: list[str], options: LabelOptions, faults: Faults) -> Classes:
    names = options.classes
    if options.n_classes not in (None, len(names)):
        faults.add(
            f"classes names {len(names)} ({', '.join(names)}), but n_classes is {options.n_classes}. "
            "Give --n_classes=none or make them agree."
        )
    positions = {str(i) for i in range(len(names))}
    by_number = bool(labels) and not set(labels) & set(names) and {_plain(label) for label in labels} <= positions
    notes = [f"Classes as given by --classes: {_listing(names)}."]
    if by_number:
        notes.append("The csv holds class numbers; --classes names them in that order.")
    return Classes(names, tuple(notes), by_number)


def _published(key: str, options: LabelOptions) -> Classes:
    names = CLASS_NAMES[key]
    notes = [f"Classes of the published task {key!r}: {_listing(names)}."]
    if options.n_classes not in (None, len(names)):
        notes.append(f"n_classes {options.n_classes} is not used: {key!r} has {len(names)} classes.")
    return Classes(names, tuple(notes), by_number=key == "panda")


def _numbered(count: int, source: str) -> Classes:
    names = tuple(str(i) for i in range(count))
    return Classes(names, (f"Classes by number, from {source}: 0 to {count - 1}.",), by_number=True)


def _inferred(labels: list[str], options: LabelOptions, faults: Faults) -> Classes:
    if all(_integer(label) is not None for label in labels):
        labels = sorted(labels, key=lambda label: (_integer(label), label))
    names = tuple(labels)
    for spellings in _same_but_for_spelling(names):
        shown = " and ".join(repr(name) for name in spellings)
        faults.add(
            f"the labels {shown} differ in spelling only and would be classes of their own. Write them alike, or name "
            "the classes in order with --classes."
        )
    if options.n_classes not in (None, len(names)):
        faults.add(
            f"the csv holds {len(names)} classes ({', '.join(names[:10])}), but n_classes is "
            f"{options.n_classes}. Give --n_classes=none, or name the classes in order with --classes."
        )
    return Classes(names, (f"Classes inferred from the csv, sorted: {_listing(names)}. --classes sets another order.",))


def _check_labels(table: Table, classes: Classes, faults: Faults) -> None:
    outside: dict[str, list[Row]] = {}
    for row in table.rows:
        if classes.index(row.label or "") is None:
            outside.setdefault(row.label or "", []).append(row)
    for label, rows in outside.items():
        where = f"{table.name} {rows_text(row.number for row in rows)}"
        if not label:
            faults.add(f"{where}: the label is empty. Fill it in or remove the row.")
            continue
        if _says_nothing(label, classes.names):
            faults.add(
                f"{where}: the label is {label!r}, which counts as empty. Fill it in, remove the row, or name the "
                "classes with --classes if it is one."
            )
            continue
        allowed = f"0 to {len(classes.names) - 1}" if classes.by_number else ", ".join(classes.names)
        faults.add(
            f"{where}: label {label!r} is outside the classes ({allowed})."
            f"{_like(label, classes.names)} Correct the csv, or name the classes in order with "
            "--classes."
        )


def unlearnt(classes: Classes, trained: Collection[int]) -> tuple[str, ...]:
    """A note on the classes without a training row; ``trained`` holds the positions of those with one."""
    absent = [name for position, name in enumerate(classes.names) if position not in trained]
    if not absent:
        return ()
    what, whose = ("class", "its output is") if len(absent) == 1 else ("classes", "their outputs are")
    return (f"No training row of any fold has the {what} {', '.join(absent)}: {whose} never taught.",)


def _says_nothing(label: str, names: Sequence[str]) -> bool:
    """Whether a label cell stands for an empty one; a word that is the name of a class does not."""
    return label.lower() in NO_LABEL and label.lower() not in {name.lower() for name in names}


def _same_but_for_spelling(names: Sequence[str]) -> list[list[str]]:
    """Names that differ in case only, or that are one number (1, 1.0)."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_plain(name).lower(), []).append(name)
    return [spellings for spellings in alike.values() if len(spellings) > 1]


def _like(label: str, names: Sequence[str]) -> str:
    same = [name for name in names if name.lower() == label.lower()]
    return f" Did you mean {same[0]!r}?" if same else did_you_mean(label, names)


def _integer(label: str) -> int | None:
    """The integer that a cell holds, also as spreadsheets write it (2.0)."""
    return int(float(label)) if _INTEGER.fullmatch(label) else None


def _plain(label: str) -> str:
    value = _integer(label)
    return label if value is None else str(value)


def _listing(names: Sequence[str]) -> str:
    return ", ".join(f"{i} = {name}" for i, name in enumerate(names))
