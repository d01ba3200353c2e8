"""Makes the published sub-typing form (case, slide, label, fold) from a TCGA clinical table.

    python labels/build_subtyping.py clinical.tsv labels/brca.csv --task brca --slides manifest.txt
    python labels/build_subtyping.py clinical.tsv labels/brca_twin.csv --slides manifest.txt --oversample 2

The table may be GDC's clinical.tsv or cBioPortal's clinical data. --task brca takes invasive ductal (IDC) and
lobular (ILC) carcinomas, nsclc takes LUAD and LUSC by project or diagnosis; other diagnoses are left out and
counted. --oversample 2 draws training rows of the rarest class again, with replacement, until it is twice as
large: the published resampled file.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # before an installed package "datasets"

from labels.clinical import Patient, read_patients  # noqa: E402
from labels.tables import (  # noqa: E402
    Dropped,
    diagnostic,
    divide,
    numbers,
    oversample,
    pairs,
    read_slides,
    run,
    write_rows,
)
from utils.errors import UserError  # noqa: E402

SPLITS = ("train", "val", "test")
TASKS: dict[str, dict[str, str]] = {
    "brca": {
        "infiltrating duct carcinoma, nos": "IDC",
        "infiltrating ductal carcinoma": "IDC",
        "breast invasive ductal carcinoma": "IDC",
        "idc": "IDC",
        "lobular carcinoma, nos": "ILC",
        "infiltrating lobular carcinoma": "ILC",
        "breast invasive lobular carcinoma": "ILC",
        "ilc": "ILC",
    },
    "nsclc": {
        "tcga-luad": "LUAD",
        "luad": "LUAD",
        "lung adenocarcinoma": "LUAD",
        "tcga-lusc": "LUSC",
        "lusc": "LUSC",
        "lung squamous cell carcinoma": "LUSC",
    },
}
"""Text of the diagnosis or project column, in lower case, to the class of the published task."""


@dataclass(frozen=True)
class Request:
    """What to build; ``map`` adds 'text=class' entries to the task's own."""

    table: Path
    out: Path
    slides: Path
    task: str = "brca"
    map: Sequence[str] = ()
    shares: Sequence[float] = (0.67, 0.1, 0.23)
    seed: int = 2021
    oversample: float = 1.0
    first_slide: bool = False
    all_slides: bool = False


def build(request: Request) -> list[str]:
    """Writes the csv and returns sentences on what it holds.

    Raises:
        UserError: a column is missing or no patient is left.
    """
    if len(request.shares) != len(SPLITS):
        raise UserError(f"shares has {len(request.shares)} numbers; it needs three: train, val, test.")
    classes = TASKS[request.task] | pairs(request.map)
    slides = read_slides(request.slides, lambda name: request.all_slides or diagnostic(name))
    dropped = Dropped("patients")
    labels = _labels(read_patients(request.table, survival=False), classes, slides, dropped)
    if not labels:
        raise UserError("\n".join([f"{request.table}: no patient is left.", *dropped.sentences()]))
    cases = sorted(labels)
    parts = divide(cases, [labels[case] for case in cases], request.shares, request.seed)
    rows = [
        [case, slide, labels[case], SPLITS[part]]
        for case, part in zip(cases, parts, strict=True)
        for slide in slides[case][: 1 if request.first_slide else None]
    ]
    if request.oversample != 1:
        rows = oversample(rows, request.oversample, request.seed)
    write_rows(request.out, ("case", "slide", "label", "fold"), rows)
    counts = Counter((row[3], row[2]) for row in rows)
    listing = [f"{split} {label} {counts[split, label]}" for split in SPLITS for label in sorted(set(labels.values()))]
    return [
        f"{request.out}: {len(cases)} patients, {len(rows)} rows: {', '.join(listing)}",
        *dropped.sentences(),
    ]


def _labels(
    patients: Sequence[Patient], classes: Mapping[str, str], slides: Mapping[str, list[str]], dropped: Dropped
) -> dict[str, str]:
    """Patient to class; who has two classes, none, or no slide is left out and reported."""
    labels = {}
    for patient in patients:
        texts = [*patient.diagnoses, patient.project]
        found = {classes[text.lower()] for text in texts if text.lower() in classes}
        if len(found) > 1:
            dropped.add("two classes", patient.case)
        elif not found:
            dropped.add(f"diagnosis {' / '.join(patient.diagnoses) or 'unknown'}", patient.case)
        elif patient.case not in slides:
            dropped.add("no slide", patient.case)
        else:
            labels[patient.case] = found.pop()
    return labels


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="a TCGA clinical table to a sub-typing csv")
    parser.add_argument("table", type=Path, help="clinical table (csv or tab-separated)")
    parser.add_argument("out", type=Path, help="label csv to write")
    parser.add_argument("--slides", type=Path, required=True, help="folder of slides, GDC manifest, or list of names")
    parser.add_argument("--task", choices=sorted(TASKS), default="brca")
    parser.add_argument("--map", action="append", default=[], metavar="TEXT=CLASS", help="a further diagnosis to take")
    parser.add_argument("--shares", type=numbers, default=[0.67, 0.1, 0.23], help="train,val,test")
    parser.add_argument("--seed", type=int, default=2021)
    parser.add_argument("--oversample", type=float, default=1.0, help="size of the rarest training class, 2 doubles it")
    parser.add_argument("--first_slide", action="store_true", help="one slide per patient: the first by name")
    parser.add_argument("--all_slides", action="store_true", help="frozen sections too, not only diagnostic slides")
    args = parser.parse_args(argv)
    return run(lambda: build(Request(**vars(args))))


if __name__ == "__main__":
    sys.exit(main())
