"""Makes the published survival form (a folder of fold_<k>.csv) from a TCGA clinical table.

    python labels/build_survival.py clinical.tsv labels/surv_brca --slides manifest.txt --study TCGA-BRCA

The table may be GDC's clinical.tsv, cBioPortal's clinical data, the TCGA-CDR or UCSC Xena's survival table
(as csv or tab-separated text). Event is the overall survival in months (days / 30), Status 1 died and 0
censored, Label the quartile of the whole table as in the published files (training cuts its own unless
--surv_bins=published), WSI the patient's slides. Test sets are disjoint, cover everyone, and have equal
shares of events.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # before an installed package "datasets"

from datasets.labels.survival_bins import bin_of, cut_edges  # noqa: E402
from labels.clinical import Patient, read_patients  # noqa: E402
from labels.tables import Dropped, diagnostic, divide, read_slides, run, write_rows  # noqa: E402
from utils.errors import UserError  # noqa: E402

BINS = 4
HEADER = ("Study", "ID", "Event", "Status", "WSI", "Label", "Split")


@dataclass(frozen=True)
class Request:
    """What to build: ``slides`` None leaves WSI empty, so that slides are found by barcode."""

    table: Path
    out: Path
    slides: Path | None = None
    study: str = ""
    folds: int = 3
    seed: int = 2021
    all_slides: bool = False


def build(request: Request) -> list[str]:
    """Writes fold_<k>.csv for every fold and returns sentences on what they hold.

    Raises:
        UserError: a column is missing, nobody is left, or the events are too few for four bins.
    """
    if request.folds < 2:
        raise UserError(f"folds is {request.folds}; it must be at least 2.")
    slides = None
    if request.slides is not None:
        slides = read_slides(request.slides, lambda name: request.all_slides or diagnostic(name))
    dropped = Dropped("patients")
    kept = [p for p in read_patients(request.table, survival=True) if _usable(p, request.study, slides, dropped)]
    if not kept:
        raise UserError("\n".join([f"{request.table}: no patient is left.", *dropped.sentences()]))
    events = [patient.event or 0 for patient in kept]
    edges = cut_edges([patient.months or 0.0 for patient in kept], events, BINS)
    parts = divide([patient.case for patient in kept], events, [1 / request.folds] * request.folds, request.seed)
    said = [f"{len(kept)} patients, {sum(events)} deaths; quartiles at {', '.join(f'{e:.4f}' for e in edges)} months"]
    for fold in range(request.folds):
        rows = [_row(p, edges, slides, part == fold, request.study) for p, part in zip(kept, parts, strict=True)]
        write_rows(request.out / f"fold_{fold}.csv", HEADER, sorted(rows, key=lambda row: row[-1] == "test"))
        test = [p for p, part in zip(kept, parts, strict=True) if part == fold]
        deaths = sum(patient.event or 0 for patient in test)
        said.append(
            f"{request.out / f'fold_{fold}.csv'}: train {len(kept) - len(test)}, test {len(test)} ({deaths} deaths)"
        )
    return [*said, *dropped.sentences()]


def _usable(patient: Patient, study: str, slides: dict[str, list[str]] | None, dropped: Dropped) -> bool:
    reasons = {
        f"another study than {study}": bool(study and patient.project and not _same_study(patient.project, study)),
        "no vital status": patient.event is None,
        "no survival time": patient.months is None,
        "a negative survival time": patient.months is not None and patient.months < 0,
        "no slide": slides is not None and patient.case not in slides,
    }
    reason = next((text for text, applies in reasons.items() if applies), None)
    if reason:
        dropped.add(reason, patient.case)
    return reason is None


def _same_study(project: str, study: str) -> bool:
    return project.upper().removeprefix("TCGA-") == study.upper().removeprefix("TCGA-")


def _row(
    patient: Patient, edges: Sequence[float], slides: dict[str, list[str]] | None, test: bool, study: str
) -> tuple[object, ...]:
    months = patient.months or 0.0
    names = ";".join(slides[patient.case]) if slides else ""
    split = "test" if test else "train"
    return (
        study or patient.project,
        patient.case,
        f"{months:.10g}",
        patient.event,
        names,
        bin_of(months, edges),
        split,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="a TCGA clinical table to survival folds")
    parser.add_argument("table", type=Path, help="clinical table (csv or tab-separated)")
    parser.add_argument("out", type=Path, help="folder for fold_<k>.csv")
    parser.add_argument("--slides", type=Path, help="folder of slides, GDC manifest, or list of names")
    parser.add_argument("--study", default="", help="keep this study only, such as TCGA-BRCA")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=2021)
    parser.add_argument("--all_slides", action="store_true", help="frozen sections too, not only diagnostic slides")
    args = parser.parse_args(argv)
    return run(lambda: build(Request(**vars(args))))


if __name__ == "__main__":
    sys.exit(main())
