"""Reads clinical tables of TCGA in the forms of GDC, cBioPortal, UCSC Xena and the TCGA-CDR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.labels.table import patient_of
from labels.tables import Record, find, known, read_records, require
from utils.errors import UserError

CASE = (
    "case_submitter_id", "cases.submitter_id", "bcr_patient_barcode", "_patient", "patient id", "patient_id",
    "patient", "case", "case_id",
)  # fmt: skip
STATUS = (
    "vital_status", "demographic.vital_status", "os_status", "overall survival status", "os", "vital status",
)  # fmt: skip
DEATH_DAYS = ("days_to_death", "demographic.days_to_death")
FOLLOW_DAYS = (
    "days_to_last_follow_up", "diagnoses.days_to_last_follow_up", "days_to_last_followup",
    "demographic.days_to_last_follow_up",
)  # fmt: skip
TIME_DAYS = ("os.time",)
TIME_MONTHS = ("os_months", "overall survival (months)")
DIAGNOSIS = (
    "primary_diagnosis", "diagnoses.primary_diagnosis", "histological_type", "cancer type detailed",
    "cancer_type_detailed", "oncotree code", "oncotree_code",
)  # fmt: skip
PROJECT = (
    "project_id",
    "project.project_id",
    "cases.project.project_id",
    "type",
    "study",
    "cancer type acronym",
)

DAYS_PER_MONTH = 30
"""As in the published survival files (421 days are 14.0333 months)."""

DEAD = {"dead", "deceased", "1", "1.0", "1:deceased"}
ALIVE = {"alive", "living", "0", "0.0", "0:living"}


@dataclass(frozen=True)
class Patient:
    """One patient of a clinical table.

    Attributes:
        case: barcode.
        months: overall survival or follow-up in months, None where unknown.
        event: 1 died, 0 alive at last contact, None where unknown.
        diagnoses: the texts of the diagnosis column, in the table's order.
        project: study, such as TCGA-BRCA, or the empty string.
    """

    case: str
    months: float | None
    event: int | None
    diagnoses: tuple[str, ...]
    project: str


def read_patients(path: Path, survival: bool) -> list[Patient]:
    """The patients of a clinical table, each once (GDC repeats a patient for every diagnosis and treatment).

    Args:
        path: csv or tab-separated table.
        survival: whether status and time columns are needed.

    Raises:
        UserError: the table has no column for the patient, or none for the status or the time.
    """
    records = read_records(path)
    case = require(path, records, CASE, "patient")
    if survival:
        require(path, records, STATUS, "vital status")
        require(path, records, (*TIME_MONTHS, *TIME_DAYS, *FOLLOW_DAYS), "survival time")
    by_case: dict[str, list[Record]] = {}
    for record in records:
        name = record.get(case, "")
        if known(name):
            by_case.setdefault(patient_of(name) or name, []).append(record)
    return [_patient(name, members) for name, members in by_case.items()]


def _patient(case: str, records: Sequence[Record]) -> Patient:
    status = _texts(records, STATUS)
    words = {text.lower() for text in status}
    event = 1 if words & DEAD else 0 if words & ALIVE else None
    if words & DEAD and words & ALIVE:
        raise UserError(f"patient {case} is both dead and alive in the table. Correct the status column.")
    return Patient(
        case=case,
        months=_months(records, event),
        event=event,
        diagnoses=tuple(_texts(records, DIAGNOSIS)),
        project=next(iter(_texts(records, PROJECT)), ""),
    )


def _months(records: Sequence[Record], event: int | None) -> float | None:
    """Time to death of the dead, latest follow-up of the others; where rows differ, the longest."""
    for columns, per_month in ((TIME_MONTHS, 1), (TIME_DAYS, DAYS_PER_MONTH)):
        if find(records, columns):
            return _longest(records, columns, per_month)
    return _longest(records, DEATH_DAYS if event else FOLLOW_DAYS, DAYS_PER_MONTH)


def _longest(records: Sequence[Record], columns: Sequence[str], per_month: int) -> float | None:
    values = []
    for text in _texts(records, columns):
        try:
            values.append(float(text) / per_month)
        except ValueError as error:
            raise UserError(f"{text!r} in the time column is not a number. Correct the table.") from error
    return max(values, default=None)


def _texts(records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """What is known in the first column that exists, each text once."""
    column = find(records, columns)
    texts = (known(record.get(column)) for record in records) if column else ()
    return list(dict.fromkeys(text for text in texts if text))
