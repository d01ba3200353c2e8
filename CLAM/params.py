"""The published parameters of segmentation, filtering, drawing and patching, and the presets that set them."""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grid import CONTOUR_FNS

from utils.errors import Faults, UserError, did_you_mean

PRESET_FOLDER = Path(__file__).resolve().parent / "presets"
IGNORED_COLUMNS = ("white_thresh", "black_thresh")
"""Columns of CLAM's presets that CLAM's own patching does not read either."""


def _param(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class SlideParams:
    """What may differ from slide to slide: a preset, an option or a row of the process list sets each value."""

    seg_level: int = _param(-1, "level for segmentation; -1: the one best for downsample 64")
    sthresh: int = _param(8, "saturation above which a pixel is tissue, 0..255")
    mthresh: int = _param(7, "edge of the median filter in px of the segmentation level, odd")
    close: int = _param(4, "edge of the closing in px of the segmentation level; 0: none")
    use_otsu: bool = _param(False, "choose the saturation threshold by Otsu's method instead of sthresh")
    keep_ids: str = _param("none", "contours to keep, as a comma list of indices")
    exclude_ids: str = _param("none", "contours to drop, as a comma list of indices")
    a_t: float = _param(100, "least tissue area, in patches of 512 x 512 level-0 px")
    a_h: float = _param(16, "least hole area, in the same unit")
    max_n_holes: int = _param(8, "most holes kept per contour")
    vis_level: int = _param(-1, "level for the pictures; -1: the one best for downsample 64")
    line_thickness: int = _param(250, "line width in the mask picture, in level-0 px")
    use_padding: bool = _param(True, "let patches run over the right and lower edge of the slide")
    contour_fn: str = _param("four_pt", f"which points of a patch must lie in the tissue: {', '.join(CONTOUR_FNS)}")

    def check(self, subject: str) -> None:
        """Raises a UserError that lists every value out of its range."""
        faults = Faults(subject)
        if self.mthresh < 1 or self.mthresh % 2 == 0:
            faults.add(f"mthresh is {self.mthresh}; it must be odd and at least 1")
        if not 0 <= self.sthresh <= 255:
            faults.add(f"sthresh is {self.sthresh}; it must be within 0..255")
        if self.close < 0:
            faults.add(f"close is {self.close}; it must be 0 or more")
        if self.contour_fn not in CONTOUR_FNS:
            hint = did_you_mean(self.contour_fn, CONTOUR_FNS)
            faults.add(f"contour_fn is {self.contour_fn!r}; it must be one of {', '.join(CONTOUR_FNS)}.{hint}")
        for name in ("a_t", "a_h", "max_n_holes"):
            if getattr(self, name) < 0:
                faults.add(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("keep_ids", "exclude_ids"):
            if contour_ids(getattr(self, name)) is None:
                faults.add(f"{name} is {getattr(self, name)!r}; it must be 'none' or a comma list of indices")
        faults.raise_if_any()


PARAM_NAMES = tuple(f.name for f in dataclasses.fields(SlideParams))
_DEFAULTS = SlideParams()


def contour_ids(text: str) -> tuple[int, ...] | None:
    """The indices in ``'1,3'``; empty for ``'none'``; None when it is neither."""
    text = text.strip().strip("[]")
    if text.lower() in ("", "none", "nan"):
        return ()
    parts = [p.strip() for p in text.split(",") if p.strip()]
    return tuple(int(p) for p in parts) if all(p.isdigit() for p in parts) else None


def typed(name: str, text: Any) -> Any:
    """A parameter's value in its own type, from the text of a csv cell or an option.

    Raises:
        UserError: the text is no such value.
    """
    default = getattr(_DEFAULTS, name)
    text = str(text).strip()
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "1.0": True, "yes": True}.get(text.lower()) or _false(text)
        if isinstance(default, str):
            return text
        number = float(text)
        if name in ("a_t", "a_h") and number != int(number):
            return number
        if number != int(number):
            raise ValueError
        return int(number)
    except ValueError:
        kind = {bool: "true or false", str: "text", int: "a whole number"}[type(default)]
        raise UserError(f"{name} is {text!r}; it must be {kind}.") from None


def _false(text: str) -> bool:
    if text.lower() in ("false", "0", "0.0", "no"):
        return False
    raise ValueError(text)


def from_row(row: dict[str, Any], base: SlideParams, subject: str) -> SlideParams:
    """``base`` with the values that a csv row holds; empty cells keep the base's value.

    Raises:
        UserError: a cell does not parse or a value is out of range; ``subject`` names the row.
    """
    faults, values = Faults(subject), {}
    for name in PARAM_NAMES:
        cell = row.get(name)
        if cell is None or str(cell).strip().lower() in ("", "nan"):
            continue
        try:
            values[name] = typed(name, cell)
        except UserError as error:
            faults.add(str(error))
    faults.raise_if_any()
    params = dataclasses.replace(base, **values)
    params.check(subject)
    return params


def preset_names() -> list[str]:
    """Names of the presets that ship."""
    return sorted(p.stem for p in PRESET_FOLDER.glob("*.csv"))


def find_preset(name: str) -> Path:
    """The file of a preset: a path of one's own, else a shipped name with or without ``.csv``.

    Raises:
        UserError: neither; the message lists the shipped names.
    """
    for path in (Path(name), Path("presets") / name, PRESET_FOLDER / name, PRESET_FOLDER / f"{name}.csv"):
        if path.is_file():
            return path
    known = preset_names()
    raise UserError(
        f"--preset {name}: there is no such file, and the presets that ship are {', '.join(known)}."
        + did_you_mean(Path(name).stem, known)
    )


def read_preset(name: str) -> SlideParams:
    """The parameters in the first row of a preset.

    Raises:
        UserError: the preset is not found, has no row, an unknown column or a value out of range.
    """
    path = find_preset(name)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{path}: holds no row of values; the first row below the header is used.")
    for column in rows[0]:
        if column not in PARAM_NAMES and column not in IGNORED_COLUMNS:
            raise UserError(f"{path}: unknown column {column!r}.{did_you_mean(str(column), PARAM_NAMES)}")
    return from_row(rows[0], _DEFAULTS, str(path))
