"""What is to be saved: the slides of a process list whose coordinates exist."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from utils.errors import Faults, UserError, nearest
from utils.files import is_file_name

SAMPLE_BYTES = 1 << 16
DEFAULT_SLIDE_EXT = ".svs"
"""The published default; used where neither --slide_ext nor the list gives an extension."""


@dataclass(frozen=True)
class Job:
    """One slide with its coordinates file.

    ``patch_size_px`` is the side to read at ``level``; ``target_px`` the side after resizing that the
    coordinates were made for; ``resolved_mpp`` the um/px at that size. None where the file does not say.
    """

    name: str
    slide: Path
    h5: Path
    count: int
    patch_size_px: int
    level: int
    target_px: int | None
    requested_mpp: float | None
    resolved_mpp: float | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def natural_px(self) -> int:
        """Side of the images that --img_size 0 makes."""
        return self.target_px or self.patch_size_px

    def mpp_at(self, size_px: int) -> float | None:
        """um/px of the images after resizing to ``size_px``."""
        return None if self.resolved_mpp is None else self.resolved_mpp * self.natural_px / size_px

    def coords_px(self) -> NDArray[np.int64]:
        """(N, 2) corners in level-0 px."""
        with h5py.File(self.h5, "r") as file:
            return np.asarray(file["coords"][:], dtype=np.int64).reshape(-1, 2)

    def fingerprint(self, coords_px: NDArray[np.int64]) -> str:
        """Changes when the slide, the coordinates or what is read at them changes.

        Of the slide its size and both ends are taken, not its time, so that a copied slide is the same slide.
        """
        digest = hashlib.sha256(np.ascontiguousarray(coords_px, "<i8").tobytes())
        digest.update(f"{self.patch_size_px} {self.level} {self.slide.stat().st_size}".encode())
        with self.slide.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(0, self.slide.stat().st_size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    def source(self) -> dict[str, Any]:
        """What the store records of the slide file and of its levels."""
        stat = self.slide.stat()
        return {"file": self.slide.name, "bytes": stat.st_size, "modified": int(stat.st_mtime), **self.facts}


@dataclass(frozen=True)
class Plan:
    """The jobs in the order of the list, and the slides left out with the reason."""

    jobs: list[Job]
    skipped: list[tuple[str, str]]


def make_plan(csv_path: Path, h5_dir: Path, slide_dir: Path, slide_ext: str | None) -> Plan:
    """The slides of the list whose coordinates exist.

    Raises:
        UserError: the list or a coordinates file cannot be used, no slide has coordinates, two slides
        share a name, a name leads out of the output folder, or ``slide_ext`` is not that of the slides.
    """
    folder = h5_dir / "patches" if (h5_dir / "patches").is_dir() else h5_dir
    jobs: list[Job] = []
    skipped = []
    faults = Faults(str(csv_path))
    seen: dict[str, str] = {}
    for slide_id in read_slide_ids(csv_path):
        name, file = _names(slide_id, slide_ext)
        h5 = folder / f"{name}.h5"
        if not is_file_name(name):
            # Folders of JPEGs are written, replaced and removed by this name.
            faults.add(
                f"{slide_id!r} gives the slide name {name!r}, which is no file name (no /, no \\, not . or ..); "
                "list slides by their file names"
            )
        elif name in seen:
            faults.add(f"{seen[name]} and {slide_id} would both be slide {name!r}; rename one")
        elif not h5.is_file() and not (h5 := folder / f"{name}_patches.h5").is_file():
            skipped.append((slide_id, f"no coordinates ({folder / name}.h5)"))
        else:
            try:
                jobs.append(_job(name, slide_dir / file, h5))
            except UserError as error:
                faults.add(str(error))
        seen[name] = slide_id
    faults.raise_if_any()
    if not jobs:
        raise UserError(_nothing_found(csv_path, folder, skipped))
    _check_extension(jobs, seen, slide_dir)
    return Plan(jobs, skipped)


def _check_extension(jobs: list[Job], listed: dict[str, str], slide_dir: Path) -> None:
    """Refuses a given extension with which no slide exists where the list's own names do."""
    other = [j for j in jobs if not j.slide.is_file() and (slide_dir / listed[j.name]).is_file()]
    if other:
        own = listed[other[0].name]
        raise UserError(
            f"{len(other)} of {len(jobs)} slides: there is no {other[0].slide.name} in {slide_dir}, but {own}, as in "
            f"the list. Leave --slide_ext out, or give --slide_ext {Path(own).suffix}."
        )


def _nothing_found(csv_path: Path, folder: Path, skipped: list[tuple[str, str]]) -> str:
    there = sorted(p.stem for p in folder.glob("*.h5")) if folder.is_dir() else []
    wanted = skipped[0][0] if skipped else "no slide"
    close = nearest(Path(wanted).stem, there)
    hint = f" Nearest to {wanted}: {', '.join(close)}." if close else ""
    return (
        f"{csv_path}: none of its {len(skipped)} slides has coordinates in {folder}, which holds "
        f"{len(there)} .h5 files.{hint} "
        "Run CLAM/create_patches_fp.py with --seg --patch first, or check --data_h5_dir."
    )


def read_slide_ids(path: Path) -> list[str]:
    """The column ``slide_id`` of a process list."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: the process list cannot be read: {error}") from error
    if not rows:
        raise UserError(f"{path}: the process list has no rows.")
    if "slide_id" not in rows[0]:
        raise UserError(f"{path}: has no column slide_id; its columns are {', '.join(map(str, rows[0]))}.")
    return [row["slide_id"].strip() for row in rows if (row["slide_id"] or "").strip()]


def _names(slide_id: str, slide_ext: str | None) -> tuple[str, str]:
    """Slide name and file name: the given extension, else the list's own, else the published default."""
    given = slide_ext if not slide_ext or slide_ext.startswith(".") else f".{slide_ext}"
    if given and slide_id.endswith(given):
        # A given .ome.tiff is one extension; create_patches_fp names files after the part before the last
        # dot.
        name = Path(slide_id).stem
        return name, slide_id
    suffix = Path(slide_id).suffix
    has_extension = 1 < len(suffix) <= 6 and not suffix[1:].isdigit()
    name = Path(slide_id).stem if has_extension else slide_id
    if given:
        return name, name + given
    return name, slide_id if has_extension else slide_id + DEFAULT_SLIDE_EXT


def _job(name: str, slide: Path, h5: Path) -> Job:
    try:
        with h5py.File(h5, "r") as file:
            coords = file["coords"]
            attributes = dict(coords.attrs)
            count, width = coords.shape
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{h5}: is not a coordinates file with a dataset 'coords' (N, 2): {error}") from error
    if width != 2:
        raise UserError(f"{h5}: its dataset coords has {width} columns, not 2 (x, y).")
    size, level, target = _geometry(h5, attributes)
    return Job(
        name=name,
        slide=slide,
        h5=h5,
        count=int(count),
        patch_size_px=size,
        level=level,
        target_px=target,
        requested_mpp=_number(attributes, "requested_mpp"),
        resolved_mpp=_number(attributes, "resolved_mpp"),
        facts=_facts(attributes),
    )


def _geometry(h5: Path, attributes: Mapping[str, Any]) -> tuple[int, int, int | None]:
    """Side to read, its level, and side after resizing or None; from the attributes of CLAM or TRIDENT.

    TRIDENT gives the side at its target magnification and the side in level-0 px, which is then what is read.
    """
    size, target = _number(attributes, "patch_size"), _number(attributes, "target_patch_size_px")
    if size is not None and "patch_level" in attributes:
        return int(size), int(attributes["patch_level"]), None if target is None else int(target)
    level0_size = _number(attributes, "patch_size_level0")
    if size is not None and level0_size is not None:
        return int(level0_size), 0, int(size)
    raise UserError(
        f"{h5}: its dataset coords lacks the attributes patch_size and patch_level (CLAM) or "
        "patch_size_level0 (TRIDENT). Write it again with CLAM/create_patches_fp.py."
    )


def _facts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The level's geometry, for the h5 files that ``python -m datasets.store export`` writes."""
    facts: dict[str, Any] = {"level0_mpp": _number(attributes, "level0_mpp")}
    for name, key, kind in (("downsample", "downsample", float), ("level_dimensions_px", "level_dim", int)):
        value = np.ravel(attributes.get(key, ()))
        facts[name] = [kind(v) for v in value] if len(value) == 2 else None
    return {name: value for name, value in facts.items() if value is not None}


def _number(attributes: Mapping[str, Any], key: str) -> float | None:
    try:
        value = float(attributes[key])
    except (KeyError, TypeError, ValueError):
        return None
    return value if value > 0 else None


def take_shard(jobs: Sequence[Job], shard: str | None) -> list[Job]:
    """Jobs I, I + N, ... for a shard 'I/N' with I from 0 to N - 1; all without one."""
    if shard is None:
        return list(jobs)
    index, count = parse_shard(shard)
    return list(jobs[index::count])


def parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of 'I/N'."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise UserError(f"--shard is {text!r}; write it as I/N, for example 0/4.") from None
    if not 0 <= index < count:
        raise UserError(f"--shard is {text}; I must be within 0..{count - 1}.")
    return index, count


def common(values: Sequence[Any]) -> Any:
    """The value that all share, or None."""
    return values[0] if values and all(value == values[0] for value in values) else None
