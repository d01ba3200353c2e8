"""What the builders share: public tables of any common form, slide lists, splits, output."""

from __future__ import annotations

import csv
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets.labels.match import EXTENSIONS, stem
from datasets.labels.report import csv_text
from datasets.labels.splits import partition
from datasets.labels.table import patient_of
from utils.errors import UserError
from utils.files import write_text

MISSING = {
    "",
    "'--",
    "--",
    "na",
    "n/a",
    "nan",
    "not reported",
    "unknown",
    "[not available]",
    "[not applicable]",
}
"""What public clinical tables write where they know nothing, in lower case."""

MOST_NAMES = 5

Record = dict[str, str]
"""Column name in lower case to text."""


@dataclass
class Dropped:
    """Reasons for leaving something out, with the names, so that every drop is reported."""

    what: str
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def sentences(self) -> list[str]:
        """One sentence per reason."""
        return [
            f"left out {len(names)} {self.what}: {reason} ({', '.join(names[:MOST_NAMES])}"
            f"{', ...' if len(names) > MOST_NAMES else ''})"
            for reason, names in self.names.items()
        ]


def read_records(path: Path) -> list[Record]:
    """Rows of a csv or tab-separated table; lines that start with # are comments (cBioPortal).

    Raises:
        UserError: the file is absent, is not text, or has no rows.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}). Save spreadsheets as csv first.") from error
    lines = [line for line in lines if not line.startswith("#")]
    if len(lines) < 2:
        raise UserError(f"{path} holds no rows under a header. Give the table as downloaded.")
    reader = csv.reader(lines, delimiter="\t" if "\t" in lines[0] else ",")
    header = [name.strip().lower() for name in next(reader)]
    return [dict(zip(header, (cell.strip() for cell in cells), strict=False)) for cells in reader]


def find(records: Sequence[Record], names: Sequence[str]) -> str | None:
    """The first of ``names`` (in lower case) that is a column."""
    return next((name for name in names if name in records[0]), None)


def require(path: Path, records: Sequence[Record], names: Sequence[str], what: str) -> str:
    """Like ``find``, but a UserError where no name is a column."""
    column = find(records, names)
    if column is None:
        raise UserError(
            f"{path} has no column for the {what}: one of {', '.join(names)} is needed; it has "
            f"{', '.join(list(records[0])[:12])}. Give the table as downloaded."
        )
    return column


def known(text: str | None) -> str:
    """``text``, or the empty string for the ways of saying that nothing is known."""
    return "" if text is None or text.lower() in MISSING else text


def read_slides(path: Path, keep: Callable[[str], bool]) -> dict[str, list[str]]:
    """Patient to slide names, from a folder of slides, a GDC manifest, or a text file with one name per line.

    Args:
        path: the folder or file.
        keep: which names to take.

    Raises:
        UserError: nothing is left.
    """
    if path.is_dir():
        names = [file.name for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"slides: {path} cannot be read as text ({error}). Give a folder or a list.") from error
        cells = [re.split(r"[\t,]", line.strip()) for line in lines if line.strip()]
        column = cells[0].index("filename") if cells and "filename" in cells[0] else None
        names = [row[column or 0] for row in (cells if column is None else cells[1:])]
    found: dict[str, list[str]] = {}
    for name in sorted({stem(Path(name).name) for name in names}):
        patient = patient_of(name)
        if patient and keep(name):
            found.setdefault(patient, []).append(name)
    if not found:
        raise UserError(
            f"slides: none of the {len(names)} names in {path} is a TCGA or CPTAC slide that is wanted. "
            "Diagnostic slides hold -DX in their names; --all_slides takes the others too."
        )
    return found


def diagnostic(name: str) -> bool:
    """Whether a TCGA name is that of a diagnostic (formalin-fixed) slide; other names always are."""
    return not name.startswith("TCGA-") or "-DX" in name


def divide(groups: Sequence[str], strata: Sequence[object], shares: Sequence[float], seed: int) -> list[int]:
    """Part of each row; a patient stays in one part, strata are spread by the shares."""
    if len(shares) < 2 or any(share < 0 for share in shares) or not sum(shares):
        raise UserError(f"shares {shares} must be two or more numbers of 0 and above. Use 0.7,0.1,0.2, say.")
    if len(set(groups)) < sum(share > 0 for share in shares):
        raise UserError(f"{len(set(groups))} patients cannot be divided into {len(shares)} parts. Give a larger table.")
    total = sum(shares)
    return partition(groups, strata, [share / total for share in shares], seed)


def oversample(rows: Sequence[list[str]], times: float, seed: int) -> list[list[str]]:
    """Training rows of the rarest class drawn again with replacement, until it is ``times`` as large.

    The drawn rows follow the given ones, as in the published file (138 ILC rows, times 2).

    Args:
        rows: case, slide, label, fold.
        times: wanted size in units of the present one, at least 1.
        seed: seed of the draw.
    """
    if times < 1:
        raise UserError(f"oversample is {times}; it must be at least 1 (2 doubles the rarest class).")
    train = [row for row in rows if row[3] == "train"]
    by_class: dict[str, list[list[str]]] = {}
    for row in train:
        by_class.setdefault(row[2], []).append(row)
    rarest = min(by_class.values(), key=len)
    drawn = random.Random(seed).choices(rarest, k=round((times - 1) * len(rarest)))
    return [*rows, *drawn]


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a label csv, whole or not at all."""
    write_text(path, csv_text(header, rows))


def numbers(text: str) -> list[float]:
    """A comma-separated list of numbers, for the command line."""
    return [float(part) for part in text.split(",")]


def pairs(entries: Sequence[str]) -> dict[str, str]:
    """'text=class' entries as a mapping from lower-case text."""
    wrong = [entry for entry in entries if "=" not in entry]
    if wrong:
        raise UserError(f"map {wrong[0]!r} is not of the form 'text in the table=class'.")
    return {text.strip().lower(): name.strip() for text, name in (entry.rsplit("=", 1) for entry in entries)}


def run(build: Callable[[], list[str]]) -> int:
    """Runs a builder: its sentences go to standard output, a UserError to standard error with status 2."""
    try:
        lines = build()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0
