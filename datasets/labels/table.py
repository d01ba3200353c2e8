"""Reads one label csv into typed rows; every fault is collected with its row number.

Row numbers are those of a spreadsheet: the header is row 1. All cells stay text, so that "007" remains "007".
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets.labels.columns import LABEL_ROLE, SPLIT_WORDS, by_name, find_columns, find_multilabel_columns
from utils.errors import Faults

_TCGA_CASE = re.compile(r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}|C3[LN]-\d{5})(?=$|[-.])")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
CLAM_SPLITS = ["", "train", "val", "test"]
"""Header of CLAM's files of splits."""

EVENT_WORDS = {
    "true": 1.0,
    "false": 0.0,
    "dead": 1.0,
    "alive": 0.0,
    "deceased": 1.0,
    "living": 0.0,
    "1:deceased": 1.0,
    "0:living": 0.0,
}
"""Words of public tables for an event (1) and a censored time (0)."""

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may separate cells; Excel writes semicolons where the comma is the decimal point."""

MOST_ROWS = 5
"""Row numbers named per kind of fault; the rest is counted."""


@dataclass(frozen=True)
class Row:
    """One line of a label csv.

    Attributes:
        number: row number, the header being row 1.
        id, case: the slide (or patient) that the row labels, and the patient.
        label: text of the label cell, None without such a column.
        split: "train", "val" or "test", None without such a column.
        time: survival time in the csv's unit, None for classification.
        event: 1 if the event happened, 0 if censored, None for classification.
        wsi: slide names of the row's own list (the published WSI column), often empty.
        labels: 1, 0 or -1 (unknown) per label of a multi-label task, else empty.
        stratum: what random divisions spread evenly, where it is neither event nor label.
    """

    number: int
    id: str
    case: str
    label: str | None = None
    split: str | None = None
    time: float | None = None
    event: int | None = None
    wsi: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    stratum: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of one csv and what its header offered."""

    name: str
    rows: tuple[Row, ...]
    columns: frozenset[str]
    notes: tuple[str, ...] = ()


def patient_of(name: str) -> str | None:
    """The patient in a TCGA or CPTAC barcode (TCGA-XX-XXXX..., C3L-00000...), else None."""
    match = _TCGA_CASE.match(name)
    return match.group(1) if match else None


def rows_text(numbers: Iterable[int]) -> str:
    """'row 3', 'rows 3, 9' or 'rows 3, 9, ... (12 rows)'.

    >>> rows_text([3, 9])
    'rows 3, 9'
    """
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    shown = ", ".join(str(n) for n in numbers[:MOST_ROWS])
    return f"rows {shown}" + (f", ... ({len(numbers)} rows)" if len(numbers) > MOST_ROWS else "")


def read_table(path: Path, survival: bool, faults: Faults, label_columns: tuple[str, ...] = ()) -> Table:
    """Reads a label csv; what is wrong with it goes into ``faults`` and the row is left out.

    Args:
        path: text separated by commas, or by semicolons or tabs as its header shows; UTF-8 with or without byte order
            mark, any line ending.
        survival: whether times and events are needed.
        faults: collects the sentences.
        label_columns: names of the columns of a multi-label task.
    """
    separator, lines = _read_lines(path, faults)
    empty = Table(path.name, (), frozenset())
    if not lines:
        return empty
    header = [name.strip() for name in lines[0][1]]
    found = find_multilabel_columns(header, label_columns) if label_columns else find_columns(header, survival)
    columns = _columns(path.name, [header, *(cells for _, cells in lines[1:])], found, faults)
    if columns is None:
        return empty
    body = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            faults.add(f"{path.name} row {number}: {len(cells)} cells, but the header has {len(header)}.")
        else:
            body.append((number, [cell.strip() for cell in cells]))
    if not body:
        faults.add(f"{path.name}: no row under the header. Add one row per slide.")
    rows = _Parser(path.name, columns, faults).parse(body)
    notes = _notes(path.name, columns, rows)
    if separator != ",":
        notes = (f"{path.name} is read as separated by {SEPARATORS[separator]}, as its header is.", *notes)
    return Table(path.name, rows, frozenset(columns), notes)


def read_names(path: Path, faults: Faults) -> Table:
    """Reads the slides, and the patients where they are given, of a csv whose labels do not matter.

    Args:
        path: as for ``read_table``; or a plain list of slides without a header.
        faults: collects the sentences.
    """
    separator, lines = _read_lines(path, faults)
    if not lines:
        return Table(path.name, (), frozenset())
    header = [name.strip() for name in lines[0][1]]
    named = by_name(header)
    columns = {role: at for role, at in named.items() if role in ("id", "case", "wsi")}
    plain = len(header) == 1 and not columns
    if not plain and not columns.keys() & {"id", "case"}:
        faults.add(f"{path.name}: none of the columns {', '.join(header)} names slides. Call one of them slide.")
        return Table(path.name, (), frozenset())
    columns.setdefault("id", columns.get("case", 0))
    lines = lines if plain else lines[1:]
    body = [(number, [cell.strip() for cell in cells]) for number, cells in lines if len(cells) == len(header)]
    if len(body) < len(lines):
        faults.add(f"{path.name}: {len(lines) - len(body)} rows have another number of cells than the first line.")
    rows = _Parser(path.name, columns, faults).parse(body)
    return Table(path.name, rows, frozenset(columns))


def _read_lines(path: Path, faults: Faults) -> tuple[str, list[tuple[int, list[str]]]]:
    """The separator, and the rows that are not empty, with their numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            separator = _separator(next((cells for _, cells in _filled_lines(stream, ",")), []))
            stream.seek(0)
            lines = list(_filled_lines(stream, separator))
    except FileNotFoundError:
        faults.add(f"{path} does not exist. Give --csv_path, a label csv or a folder of fold_<k>.csv.")
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        faults.add(f"{path} cannot be read as csv ({error}). Save it as comma-separated UTF-8 text.")
    else:
        if not lines:
            faults.add(f"{path} is empty. It needs a header line and one row per slide.")
        return separator, lines
    return ",", []


def _filled_lines(stream: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    rows = enumerate(csv.reader(stream, delimiter=separator), start=1)
    return ((number, cells) for number, cells in rows if any(map(str.strip, cells)))


def _separator(header: list[str]) -> str:
    """A comma, unless the header is one cell to it and several to one other separator."""
    if len(header) != 1 or header[0].lower().startswith("sep="):
        return ","
    fitting = [s for s in SEPARATORS if s != "," and len(next(csv.reader(header, delimiter=s), [])) > 1]
    return fitting[0] if len(fitting) == 1 else ","


def _columns(name: str, lines: list[list[str]], columns: dict[str, int] | str, faults: Faults) -> dict[str, int] | None:
    """``columns``, the roles found in the header or what is wrong with it, once the header itself is sound."""
    header = lines[0]
    if len(header) == 1 and any(separator in header[0] for separator in SEPARATORS):
        faults.add(f"{name}: what separates the cells of {header[0]!r} is not clear. Save it with commas.")
        return None
    twice = [column for column, count in Counter(h for h in header if h).items() if count > 1]
    if twice:
        faults.add(f"{name}: the header names {', '.join(twice)} more than once. Rename or remove one.")
        return None
    if isinstance(columns, str):
        faults.add(f"{name}: {columns}")
        return None
    if header == CLAM_SPLITS:
        faults.add(
            f"{name} is a table of CLAM's splits, a column of slides for each. Write a row per slide with its label, "
            "such as case,slide,label,fold."
        )
        return None
    if _is_data(columns, lines):
        faults.add(
            f"{name}: row 1 looks like data ({', '.join(header)}). Add a header line, such as case,slide,label,fold."
        )
        return None
    return columns


def _is_data(columns: dict[str, int], lines: list[list[str]]) -> bool:
    """Whether the first line is a row: what stands for a split is one, or a label of other rows, or a number."""
    first = {role: lines[0][place] for role, place in columns.items()}
    if first.get("split", "").lower() in SPLIT_WORDS or _number(first.get("time", "")) is not None:
        return True
    label = columns.get("label")
    return label is not None and first["label"] in {cells[label].strip() for cells in lines[1:] if label < len(cells)}


def _notes(name: str, columns: dict[str, int], rows: tuple[Row, ...]) -> tuple[str, ...]:
    if "case" in columns or columns.keys() & {"time"}:
        return ()
    barcodes = sum(patient_of(row.id) is not None for row in rows)
    if barcodes == len(rows):
        return (f"{name} has no case column: the patient is taken from the barcode (TCGA-XX-XXXX).",)
    return (
        f"{name} has no case column: every ID counts as a patient of its own"
        + (f", except {barcodes} barcodes, where it is TCGA-XX-XXXX" if barcodes else "")
        + ". Slides of one patient may then land on both sides of a split; add a case column to prevent it.",
    )


class _Parser:
    """Cells to rows; faults of one kind are gathered so that each gives one sentence."""

    def __init__(self, name: str, columns: dict[str, int], faults: Faults) -> None:
        self.name = name
        self.columns = columns
        self.faults = faults
        self.found: dict[str, tuple[str, list[int]]] = {}

    def parse(self, body: list[tuple[int, list[str]]]) -> tuple[Row, ...]:
        rows = [row for number, cells in body if (row := self._row(number, cells)) is not None]
        for sentence, numbers in self.found.values():
            self.faults.add(f"{self.name} {rows_text(numbers)}: {sentence}")
        return tuple(rows)

    def _bad(self, number: int, sentence: str, kind: str = "") -> None:
        """Notes a fault; those of a ``kind`` (default: the sentence) are one, with the sentence of the first."""
        self.found.setdefault(kind or sentence, (sentence, []))[1].append(number)

    def _cell(self, role: str, cells: list[str]) -> str | None:
        return cells[self.columns[role]] if role in self.columns else None

    def _row(self, number: int, cells: list[str]) -> Row | None:
        name = self._cell("id", cells) or ""
        case = self._cell("case", cells)
        if not name or case == "":
            self._bad(number, f"the {'case' if name else 'slide ID'} is empty. Fill it in or remove the row.")
            return None
        wsi = (part.strip() for part in (self._cell("wsi", cells) or "").split(";"))
        timed = "time" in self.columns
        return Row(
            number=number,
            id=name,
            case=case or patient_of(name) or name,
            label=self._cell("label", cells),
            split=self._split(number, cells),
            time=self._time(number, cells) if timed else None,
            event=self._event(number, cells) if timed else None,
            wsi=tuple(part for part in wsi if part),
            labels=tuple(self._flag(number, cells, role) for role in self.columns if role.startswith(LABEL_ROLE)),
        )

    def _flag(self, number: int, cells: list[str], role: str) -> int:
        text = self._cell(role, cells) or ""
        value = _number(text)
        if text and value not in (0.0, 1.0):
            self._bad(number, f"{role} is {text!r}. Write 1, 0, or nothing where it is not known.{point_hint(text)}")
        return int(value) if value in (0.0, 1.0) else -1

    def _split(self, number: int, cells: list[str]) -> str | None:
        word = self._cell("split", cells)
        if word is not None and word.lower() not in SPLIT_WORDS:
            self._bad(number, f"split {word!r} is not one of train, val, test. Write one of them or remove the row.")
        return None if word is None else word.lower()

    def _time(self, number: int, cells: list[str]) -> float:
        text = self._cell("time", cells) or ""
        value = _number(text)
        if value is None or value < 0:
            what = "missing" if not text else f"no number of 0 or more (here {text!r})"
            remedy = f"Give the time, in months, say, or remove the row.{point_hint(text)}"
            self._bad(number, f"the survival time is {what}. {remedy}", "no time" if text else "")
            return 0.0
        return value

    def _event(self, number: int, cells: list[str]) -> int:
        text = self._cell("event", cells) or ""
        value = EVENT_WORDS.get(text.lower(), _number(text))
        if value not in (0.0, 1.0):
            self._bad(
                number,
                f"the status is {text!r}. Write 1 where the event happened and 0 where it is censored.",
            )
            return 0
        return int(value)


def point_hint(text: str) -> str:
    """What to do with a decimal comma. It is not guessed at: 1,234 is another number in another country."""
    return " Write a point for the decimal comma." if _DECIMAL_COMMA.fullmatch(text) else ""


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
