r"""Draws attention onto slides: a heat map and the patches with most of it, for each slide.

    python CLAM/heatmap.py --attention RUN/attention/fold_0 --source SLIDES --save_dir OUT --top 12

``RUN/attention`` is written by ``main.py`` with ``--save_attention`` (test and predict). Colours are ranks within the
slide, blue least and red most, so that slides of any number of patches look alike. Exit status: 0 all slides done, 1
some slide failed, 2 the options are at fault.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT / "CLAM", ROOT):
    # Before the installed packages: one of them is called "datasets", too.
    if str(_folder) not in sys.path[:2]:
        sys.path.insert(1, str(_folder))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
from pictures import save_jpeg  # noqa: E402
from slide import Pixels, RegionError, Slide  # noqa: E402
from slides import open_slide  # noqa: E402
from tissue import scan_level  # noqa: E402
from tqdm import tqdm  # noqa: E402
from worklist import find_slides  # noqa: E402

from utils.errors import Faults, UserError  # noqa: E402

log = logging.getLogger("heatmap")

TILE_PX = 224
"""Edge of a patch in the picture of those with most attention."""

PER_ROW = 4
OVERVIEW_PX = 4_000_000
"""Pixels of the level that the heat map is drawn on, at least, where the slide has so many."""


@dataclass(frozen=True)
class Attention:
    """What one file says of one slide.

    Attributes:
        corners: (N, 2) in level-0 px.
        edge_px: of a patch, in level-0 px.
        weight: (N,).
    """

    corners: npt.NDArray[np.int64]
    edge_px: int
    weight: npt.NDArray[np.float64]

    @property
    def rank(self) -> npt.NDArray[np.float64]:
        """(N,) 0 for the least attention to 1 for the most; equal ones have the same."""
        values, place = np.unique(self.weight, return_inverse=True)
        return place / max(len(values) - 1, 1)


def read_attention(path: Path) -> Attention:
    """Reads a file of ``--save_attention``.

    Raises:
        UserError: for other files, and where corners are not known.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        corners = np.array([(int(row["x"]), int(row["y"])) for row in rows], np.int64)
        weight = np.array([float(row["attention"]) for row in rows])
        edge = int(rows[0]["edge_px"])
    except (OSError, UnicodeDecodeError, csv.Error, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: needs the columns x, y, edge_px and attention, numbers in each row ({error}). Where x and y are "
            "empty, the store or feature files hold no coordinates: give main.py --h5_path."
        ) from error
    return Attention(corners, edge, weight)


def draw_heatmap(slide: Slide, attention: Attention, strength: float) -> Pixels:
    """The slide with colours on its patches.

    Args:
        slide: open.
        attention: of its patches.
        strength: of the colours, 0 to 1.
    """
    sizes = [width * height for width, height in slide.level_dimensions]
    level = max((i for i, size in enumerate(sizes) if size >= OVERVIEW_PX), key=lambda i: -sizes[i], default=0)
    shown = scan_level(slide, level, want_saturation=False)
    picture, scale = shown.overview.copy(), np.array(shown.overview_scale)
    colours = cv2.applyColorMap(np.rint(255 * attention.rank).astype(np.uint8), cv2.COLORMAP_JET)[:, 0, ::-1]
    low = np.floor(attention.corners / scale).astype(int)
    high = np.ceil((attention.corners + attention.edge_px) / scale).astype(int)
    for (x0, y0), (x1, y1), colour in zip(np.maximum(low, 0), np.maximum(high, 0), colours, strict=True):
        part = picture[y0:y1, x0:x1]
        part[:] = np.rint((1 - strength) * part + strength * colour).astype(np.uint8)
    return picture


def draw_top(slide: Slide, attention: Attention, count: int) -> Pixels:
    """The patches with most attention, row by row, from the first to the ``count``-th."""
    order = np.argsort(-attention.weight, kind="stable")[:count]
    level = slide.best_level(attention.edge_px / TILE_PX)
    across, down = slide.level_downsamples[level]
    size = max(round(attention.edge_px / across), 1), max(round(attention.edge_px / down), 1)
    rows = -(-len(order) // PER_ROW)
    page = np.full((rows * TILE_PX, min(len(order), PER_ROW) * TILE_PX, 3), 255, np.uint8)
    for place, patch in enumerate(order):
        x, y = attention.corners[patch].tolist()
        tile = cv2.resize(slide.read_region((x, y), level, size), (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)
        row, column = place // PER_ROW * TILE_PX, place % PER_ROW * TILE_PX
        page[row : row + TILE_PX, column : column + TILE_PX] = tile
    return page


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=Path, required=True, help="folder of <slide>.csv, or one such file")
    parser.add_argument("--source", type=Path, required=True, help="folder of the slides")
    parser.add_argument("--save_dir", type=Path, required=True, help="for <slide>_heatmap.jpg and <slide>_top.jpg")
    parser.add_argument("--top", type=int, default=12, help="patches with most attention that are shown; 0: none")
    parser.add_argument("--strength", type=float, default=0.4, help="of the colours, 0 to 1")
    return parser


def jobs_of(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Each attention file with its slide.

    Raises:
        UserError: naming every option at fault and every file without a slide.
    """
    faults = Faults("heatmap")
    if args.top < 0:
        faults.add(f"--top is {args.top}; it must be at least 0")
    if not 0 <= args.strength <= 1:
        faults.add(f"--strength is {args.strength}; it must lie between 0 and 1")
    files = sorted(args.attention.glob("*.csv")) if args.attention.is_dir() else [args.attention]
    if not files or not files[0].is_file():
        faults.add(f"--attention {args.attention}: holds no <slide>.csv. Give main.py --save_attention first")
    faults.raise_if_any()
    by_name: dict[str, set[str]] = {}
    for name in find_slides(args.source):
        for known in (name, Path(name).stem):
            by_name.setdefault(known, set()).add(name)
    found = []
    for file in files:
        fitting = by_name.get(file.stem, set())
        if len(fitting) == 1:
            found += [(file, args.source / name) for name in fitting]
        else:
            faults.add(f"{file.stem}: {len(fitting)} slides of that name are in {args.source}; one is needed")
    faults.raise_if_any()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Draws every slide; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args(argv)
    try:
        jobs = jobs_of(args)
        args.save_dir.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        log.error("error: %s", error)
        return 2
    failed = 0
    for file, path in tqdm(jobs, unit="slide", disable=None):
        try:
            attention = read_attention(file)
            with open_slide(path) as slide:
                save_jpeg(args.save_dir / f"{file.stem}_heatmap.jpg", draw_heatmap(slide, attention, args.strength))
                if args.top:
                    save_jpeg(args.save_dir / f"{file.stem}_top.jpg", draw_top(slide, attention, args.top))
        except (UserError, RegionError, OSError) as error:
            log.error("%s: %s", file.stem, error)
            failed += 1
    log.info("%d of %d slides are in %s.", len(jobs) - failed, len(jobs), args.save_dir)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
