"""Which slides are to be done: the source folder, lists, shards, and um/px given by hand."""

from __future__ import annotations

import argparse
import csv
import logging
from collections.abc import Sequence
from pathlib import Path

from params import SlideParams
from process_list import Row, read_process_list

from utils.errors import Faults, UserError, did_you_mean

log = logging.getLogger(__name__)

NOT_SLIDES = {
    ".csv", ".tsv", ".txt", ".md", ".json", ".geojson", ".xml", ".html", ".pdf", ".log", ".yaml", ".yml",
    ".xlsx", ".h5", ".hdf5", ".pt", ".zip", ".gz", ".tar", ".md5", ".sha256", ".ini", ".py", ".lmdb",
}  # fmt: skip
"""Files often found beside slides; they are named in the log and left alone."""

ID_COLUMNS = ("slide_id", "slide", "wsi", "filename", "name")


def find_slides(source: Path) -> list[str]:
    """The names of the slide files in a folder, sorted; hidden files and known other kinds are left out.

    Raises:
        UserError: the folder is missing or empty, or two files would write the same outputs.
    """
    if not source.is_dir():
        raise UserError(f"--source {source}: there is no such folder.")
    files = sorted(p.name for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
    others = [name for name in files if Path(name).suffix.lower() in NOT_SLIDES]
    if others:
        log.info("Not slides, left alone: %s%s", ", ".join(others[:5]), " ..." if len(others) > 5 else "")
    slides = [name for name in files if name not in set(others)]
    if not slides:
        raise UserError(f"--source {source}: holds no slides ({len(files)} files). Give the folder that holds them.")
    return slides


def choose_rows(args: argparse.Namespace, base: SlideParams) -> list[Row]:
    """The rows to list: from the process list or the folder, restricted by --slide_list and --shard.

    Raises:
        UserError: a list names slides that are not there, or two slides share a name.
    """
    if args.process_list:
        given = Path(args.process_list)
        inside = args.save_dir / given
        rows = read_process_list(inside if inside.is_file() or not given.is_file() else given, base)
        _with_extension(rows, find_slides(args.source))
    else:
        rows = [Row(name, base) for name in find_slides(args.source)]
    if args.slide_list:
        rows = _listed(rows, args.slide_list)
    _check_names(rows)
    return _shard(rows, args.shard) if args.shard else rows


def _with_extension(rows: Sequence[Row], present: Sequence[str]) -> None:
    """Gives names without an extension that of the one file of that name."""
    files: dict[str, list[str]] = {}
    for name in present:
        files.setdefault(Path(name).stem, []).append(name)
    for row in rows:
        fitting = files.get(row.slide_id, [])
        if row.slide_id not in present and len(fitting) == 1:
            row.slide_id = fitting[0]


def _listed(rows: Sequence[Row], path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"--slide_list {path}: there is no such file.")
    wanted = [line.strip().split(",")[0] for line in path.read_text(encoding="utf-8-sig").splitlines()]
    wanted = [w for w in wanted if w and w not in ID_COLUMNS]
    by_name = {key: row for row in rows for key in (Path(row.slide_id).stem, row.slide_id)}
    faults = Faults(f"--slide_list {path}")
    for name in wanted:
        if name not in by_name:
            faults.add(f"{name!r} is not in the source folder.{did_you_mean(name, by_name)}")
    faults.raise_if_any()
    chosen = {by_name[name].slide_id for name in wanted}
    return [row for row in rows if row.slide_id in chosen]


def _check_names(rows: Sequence[Row]) -> None:
    """Two files that differ only in their extension would overwrite each other's outputs."""
    seen: dict[str, str] = {}
    faults = Faults("slides that would write the same outputs")
    for row in rows:
        stem = Path(row.slide_id).stem
        if stem in seen:
            faults.add(f"{seen[stem]} and {row.slide_id}; rename one, or choose with --slide_list")
        seen[stem] = row.slide_id
    faults.raise_if_any()


def _shard(rows: Sequence[Row], text: str) -> list[Row]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise UserError(f"--shard is {text!r}; write it as I/N, for example 0/4.") from None
    if not 0 <= index < count:
        raise UserError(f"--shard is {text}; I must be within 0..{count - 1}.")
    return list(rows[index::count])


def read_mpp_csv(path: Path) -> dict[str, float]:
    """um/px of level 0 by slide name, with or without extension.

    Raises:
        UserError: the file, a column or a value is at fault; all faults are listed.
    """
    if not path.is_file():
        raise UserError(f"--mpp_csv {path}: there is no such file.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        records = list(csv.DictReader(file))
    column = next((c for c in ID_COLUMNS if records and c in records[0]), None)
    if column is None or "mpp" not in records[0]:
        raise UserError(f"--mpp_csv {path}: needs the columns slide_id and mpp (um/px of level 0).")
    faults, values = Faults(str(path)), {}
    for number, record in enumerate(records, start=2):
        try:
            mpp = float(record["mpp"])
        except (TypeError, ValueError):
            mpp = 0.0
        if not 0.01 <= mpp <= 100:
            faults.add(f"row {number}: mpp is {record['mpp']!r}; it must be um/px within 0.01..100")
        values[str(record[column]).strip()] = mpp
    faults.raise_if_any()
    return values
