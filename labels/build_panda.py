"""Makes labels/panda.csv's form from PANDA's train.csv (image_id, isup_grade).

    python labels/build_panda.py train.csv labels/panda.csv [--only names.txt] [--shares 0.7,0.1,0.2]

Every image is a patient of its own, as in the published file (the table names no patients). The published
file holds 10,202 of the 10,616 images in shares 7:1:2; its random draw is not published, so the rows of a
split differ from it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # before an installed package "datasets"

from datasets.labels.match import stem  # noqa: E402
from labels.tables import Dropped, divide, numbers, read_records, require, run, write_rows  # noqa: E402
from utils.errors import Faults, UserError  # noqa: E402

GRADES = tuple(str(grade) for grade in range(6))
SPLITS = ("train", "val", "test")


def build(table: Path, out: Path, only: Path | None, shares: Sequence[float], seed: int) -> list[str]:
    """Writes the csv and returns sentences on what it holds.

    Args:
        table: train.csv as downloaded.
        out: csv to write: case, slide, label, fold.
        only: file with one image name per line (extensions do not matter); others are left out.
        shares: train, val, test.
        seed: seed of the draw.

    Raises:
        UserError: a column is missing, a grade is not 0 to 5, an image occurs twice, or nothing is left.
    """
    records = read_records(table)
    image = require(table, records, ("image_id",), "image")
    grade = require(table, records, ("isup_grade",), "grade")
    faults = Faults(str(table))
    twice = [name for name, count in Counter(r[image] for r in records).items() if count > 1]
    for name in twice:
        faults.add(f"image {name!r} occurs more than once. Remove the repeated rows.")
    for record in records:
        if record.get(grade) not in GRADES:
            faults.add(
                f"image {record[image]!r}: isup_grade {record.get(grade)!r} is not 0 to 5. Correct or remove it."
            )
    faults.raise_if_any()
    if len(shares) != len(SPLITS):
        raise UserError(f"shares has {len(shares)} numbers; it needs three: train, val, test (0.7,0.1,0.2).")
    dropped = Dropped("images")
    kept = sorted(_wanted(records, image, only, dropped), key=lambda record: record[image])
    if not kept:
        raise UserError(f"none of the {len(records)} images of {table} is in {only}. Compare the names.")
    parts = divide([r[image] for r in kept], [r[grade] for r in kept], shares, seed)
    rows = [[r[image], r[image], r[grade], SPLITS[part]] for r, part in zip(kept, parts, strict=True)]
    write_rows(out, ("case", "slide", "label", "fold"), rows)
    counts = Counter(row[3] for row in rows)
    return [
        f"{out}: {len(rows)} images, {', '.join(f'{s} {counts[s]}' for s in SPLITS)}",
        *dropped.sentences(),
    ]


def _wanted(records: list[dict[str, str]], image: str, only: Path | None, dropped: Dropped) -> list[dict[str, str]]:
    if only is None:
        return records
    try:
        names = {stem(line.strip()) for line in only.read_text(encoding="utf-8-sig").splitlines()}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"only: {only} cannot be read ({error}). Give a text file with one name per line.") from error
    for record in records:
        if record[image] not in names:
            dropped.add(f"not in {only.name}", record[image])
    return [record for record in records if record[image] in names]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="PANDA's train.csv to a label csv")
    parser.add_argument("table", type=Path, help="train.csv as downloaded")
    parser.add_argument("out", type=Path, help="label csv to write")
    parser.add_argument("--only", type=Path, help="text file with one image name per line; others are left out")
    parser.add_argument("--shares", type=numbers, default=[0.7, 0.1, 0.2], help="train,val,test")
    parser.add_argument("--seed", type=int, default=2021)
    args = parser.parse_args(argv)
    return run(lambda: build(args.table, args.out, args.only, args.shares, args.seed))


if __name__ == "__main__":
    sys.exit(main())
