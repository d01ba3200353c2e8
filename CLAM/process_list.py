"""process_list_autogen.csv: one row per slide with its parameters, status and reason."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import Outcome
from params import PARAM_NAMES, SlideParams, from_row

from utils.errors import Faults, UserError
from utils.files import write_text

FACT_COLUMNS = (
    "reason",
    "patches",
    "contours",
    "tissue_fraction",
    "width",
    "height",
    "levels",
    "objective_power",
    "level0_mpp",
    "mpp_source",
    "requested_mpp",
    "resolved_mpp",
    "read_level",
    "read_size_px",
    "target_patch_size_px",
    "corrupt_blocks",
)
"""Columns of ours, after the published ones."""


SECONDS_BETWEEN_WRITES = 2.0


@dataclass
class Row:
    """One slide of the list. ``todo`` is the published column ``process``."""

    slide_id: str
    params: SlideParams
    todo: bool = True
    status: str = "tbp"
    facts: dict[str, Any] = field(default_factory=dict)
    old_area: float | None = None

    def take(self, outcome: Outcome) -> None:
        """Fills in what happened. A failed slide stays ``process`` 1, so that running the list again retries it."""
        self.status, self.todo = outcome.status, outcome.failed
        self.params = outcome.params or self.params
        self.facts = {**outcome.facts, "reason": outcome.reason}
        if outcome.params is not None and outcome.params.seg_level >= 0:
            self.old_area = None


def read_process_list(path: Path, base: SlideParams) -> list[Row]:
    """Reads a list. Missing columns and empty cells take ``base``; an old-format list (column ``a``) is converted.

    Raises:
        UserError: the file is missing or its rows have faults; all of them are listed.
    """
    if not path.is_file():
        raise UserError(f"--process_list {path}: there is no such file. It is looked up in --save_dir.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = file.readline().rstrip("\r\n")
        separator = next((s for s in (",", ";", "\t") if "slide_id" in header.split(s)), ",")
        file.seek(0)
        records = list(csv.DictReader(file, delimiter=separator))
    if not records or "slide_id" not in records[0]:
        raise UserError(
            f"{path}: needs a header with the column slide_id, and a row per slide. Its first line is {header[:80]!r}."
        )
    faults, rows = Faults(str(path)), []
    for number, record in enumerate(records, start=2):
        try:
            rows.append(_row(record, base, f"row {number}"))
        except (UserError, ValueError) as error:
            faults.add(f"row {number}: {error}")
    faults.raise_if_any()
    return rows


def _row(record: dict[str, Any], base: SlideParams, subject: str) -> Row:
    # The old format knew an area `a` in px of seg_level and nothing of holes; those columns take the defaults.
    old = record.get("a") not in (None, "")
    known = ("seg_level", "sthresh", "mthresh", "close", "use_otsu", "use_padding", "keep_ids", "exclude_ids")
    cells = {k: v for k, v in record.items() if not old or k in known}
    todo = _number(record, "process", 1.0) == 1
    row = Row(str(record["slide_id"]).strip(), from_row(cells, base, subject), todo)
    row.status = str(record.get("status") or "tbp")
    row.facts = {k: record[k] for k in FACT_COLUMNS if record.get(k) not in (None, "")}
    row.old_area = _number(record, "a", 0.0) if old else None
    return row


def _number(record: dict[str, Any], column: str, default: float) -> float:
    text = str(record.get(column) or "").strip()
    try:
        return float(text) if text else default
    except ValueError:
        raise UserError(f"column {column} is {text!r}, but must be a number") from None


class Ledger:
    """The list on disk, kept up to date while slides finish."""

    def __init__(self, path: Path, rows: list[Row]) -> None:
        self.path, self.rows = path, rows
        self._written = 0.0
        self.write()

    def write(self) -> None:
        write_process_list(self.path, self.rows)
        self._written = time.monotonic()

    def write_now_and_then(self) -> None:
        """Writes unless it was written just now: with 10,000 slides, a rewrite per slide would cost the most."""
        if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
            self.write()


def write_process_list(path: Path, rows: list[Row]) -> None:
    """Writes the list, whole or not at all."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["slide_id", "process", "status", *PARAM_NAMES, *FACT_COLUMNS])
    for row in rows:
        params = [_cell(getattr(row.params, name)) for name in PARAM_NAMES]
        facts = [_cell(row.facts.get(name)) for name in FACT_COLUMNS]
        writer.writerow([row.slide_id, int(row.todo), row.status, *params, *facts])
    write_text(path, buffer.getvalue())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
