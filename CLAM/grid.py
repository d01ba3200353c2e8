"""Which corners of a regular grid become patches: exact, vectorised contour tests on whole numbers.

The contour rules are those of the published CLAM script: OpenCV's ``pointPolygonTest`` on integer
polygons. A point-by-point test costs (points x vertices); here each polygon edge is cut with the grid's
rows once, and the parity of the cuts to the right of every grid point follows from one cumulative sum. All
arithmetic is on 64-bit integers, so the answer, "on the contour" included, is the one of OpenCV
(tests/test_grid.py compares them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

CONTOUR_FNS = ("four_pt", "four_pt_hard", "center", "basic")
"""The contour tests by name: any of four points, all four, the centre, the corner."""

BLOCK_POINTS = 4_000_000
"""Grid points tested at once: about 100 MB of working memory, whatever the slide and the patch size."""

Points = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Region:
    """One piece of tissue: an outline (n, 2) and its holes, each (m, 2), as int32 (x, y) in level-0 px."""

    outline: Points
    holes: tuple[Points, ...] = field(default=())


class Lattice(NamedTuple):
    """The numbers start, start + step, ... (``number`` of them)."""

    start: int
    step: int
    number: int


@dataclass(frozen=True)
class Grid:
    """A grid of patches, in level-0 px per axis (x, y), and the test that chooses among them."""

    patch_px: tuple[int, int]
    step_px: tuple[int, int]
    slide_px: tuple[int, int]
    contour_fn: str = "four_pt"
    use_padding: bool = True


def lattice_in_polygon(polygon: Points, xs: Lattice, ys: Lattice) -> npt.NDArray[np.int8]:
    """Tests every point of a lattice against a closed polygon, as ``cv2.pointPolygonTest`` does.

    Args:
        polygon: (n, 2) integer vertices; the last one joins the first. Magnitudes up to 2**30 are exact.
        xs: lattice of x.
        ys: lattice of y.

    Returns:
        (ys.number, xs.number): 1 inside, 0 on the polygon, -1 outside.
    """
    result = np.full((ys.number, xs.number), -1, np.int8)
    rows = max(1, BLOCK_POINTS // max(1, xs.number))
    for first in range(0, ys.number, rows):
        part = Lattice(ys.start + first * ys.step, ys.step, min(rows, ys.number - first))
        result[first : first + part.number] = _lattice_block(polygon.astype(np.int64), xs, part)
    return result


def _lattice_block(polygon: npt.NDArray[np.int64], xs: Lattice, ys: Lattice) -> npt.NDArray[np.int8]:
    cuts = _cuts(polygon, ys)
    width = xs.number + 1
    # A cut lies strictly to the right of the points whose index is below `column`.
    column = np.clip(_ceil_div(cuts.x_ceil - xs.start, xs.step), 0, xs.number)
    counts = np.bincount(cuts.row * width + column, minlength=ys.number * width).reshape(ys.number, width)
    right = counts.sum(axis=1, keepdims=True) - np.cumsum(counts, axis=1)
    result = np.where(right[:, : xs.number] & 1, 1, -1).astype(np.int8)
    _mark(result, cuts.x_ceil[cuts.exact], ys.start + cuts.row[cuts.exact] * ys.step, (xs, ys))
    _mark(result, polygon[:, 0], polygon[:, 1], (xs, ys))
    _mark_horizontal(result, polygon, xs, ys)
    return result


class _Cuts(NamedTuple):
    """Where the rows of a lattice cut the edges of a polygon: row index, x rounded up, whether x is whole."""

    row: npt.NDArray[np.int64]
    x_ceil: npt.NDArray[np.int64]
    exact: npt.NDArray[np.bool_]


def _cuts(polygon: npt.NDArray[np.int64], ys: Lattice) -> _Cuts:
    # An edge owns its lower end and not its upper one, so that a row through a vertex is counted once per side.
    start, end = np.roll(polygon, 1, axis=0), polygon
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first = np.clip(_ceil_div(low - ys.start, ys.step), 0, ys.number)
    last = np.clip(_ceil_div(high - ys.start, ys.step), 0, ys.number)
    number = last - first
    edge = np.repeat(np.arange(len(polygon)), number)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(number) - number, number) + first[edge]
    delta = (end - start)[edge]
    sign = np.sign(delta[:, 1])
    numerator = (ys.start + row * ys.step - start[edge, 1]) * delta[:, 0] * sign
    quotient, remainder = np.divmod(numerator, np.abs(delta[:, 1]))
    exact = remainder == 0
    return _Cuts(row, start[edge, 0] + quotient + ~exact, exact)


def _mark(
    result: npt.NDArray[np.int8],
    x: npt.NDArray[np.int64],
    y: npt.NDArray[np.int64],
    axes: tuple[Lattice, Lattice],
) -> None:
    """Sets 0 where a point (x, y) of the polygon is a point of the lattice."""
    xs, ys = axes
    column, off_x = np.divmod(x - xs.start, xs.step)
    row, off_y = np.divmod(y - ys.start, ys.step)
    hit = (off_x == 0) & (off_y == 0) & (column >= 0) & (column < xs.number) & (row >= 0) & (row < ys.number)
    result[row[hit], column[hit]] = 0


def _mark_horizontal(result: npt.NDArray[np.int8], polygon: npt.NDArray[np.int64], xs: Lattice, ys: Lattice) -> None:
    """Sets 0 along horizontal edges that run on a row of the lattice."""
    start = np.roll(polygon, 1, axis=0)
    row, off = np.divmod(polygon[:, 1] - ys.start, ys.step)
    on_row = (start[:, 1] == polygon[:, 1]) & (off == 0) & (row >= 0) & (row < ys.number)
    for j, a, b in zip(row[on_row], start[on_row, 0], polygon[on_row, 0], strict=True):
        first = max(0, -((xs.start - min(a, b)) // xs.step))
        last = (max(a, b) - xs.start) // xs.step
        result[j, first : max(first, last + 1)] = 0


def _ceil_div(a: npt.NDArray[np.int64], b: int) -> npt.NDArray[np.int64]:
    return -((-a) // b)


def region_coords(region: Region, grid: Grid) -> npt.NDArray[np.int64]:
    """The kept corners of one region's grid, x in the outer and y in the inner order.

    Returns:
        (N, 2) int64 (x, y) in level-0 px.
    """
    low = region.outline.min(axis=0).astype(int)
    high = region.outline.max(axis=0).astype(int) + 1
    if not grid.use_padding:
        high = np.minimum(high, np.subtract(grid.slide_px, grid.patch_px) + 1)
    xs, ys = (
        Lattice(int(low[a]), grid.step_px[a], max(0, -((int(low[a]) - int(high[a])) // grid.step_px[a])))
        for a in (0, 1)
    )
    if xs.number == 0 or ys.number == 0:
        return np.empty((0, 2), np.int64)
    keep = _passes(region.outline, (xs, ys), grid)
    for hole in region.holes:
        _drop_hole(keep, hole, (xs, ys), grid)
    i, j = np.nonzero(keep.T)
    return np.stack([xs.start + i * xs.step, ys.start + j * ys.step], axis=1).astype(np.int64)


def _passes(outline: Points, axes: tuple[Lattice, Lattice], grid: Grid) -> npt.NDArray[np.bool_]:
    """The contour test of every corner: (rows, columns)."""
    offsets = _test_offsets(grid)
    tests = (
        lattice_in_polygon(outline, *(a._replace(start=a.start + o) for a, o in zip(axes, offset, strict=True))) >= 0
        for offset in offsets
    )
    keep = next(tests)
    for test in tests:
        keep = keep & test if grid.contour_fn == "four_pt_hard" else keep | test
    return keep


def _test_offsets(grid: Grid) -> list[tuple[int, int]]:
    """Offsets of the tested points from the corner, in level-0 px."""
    if grid.contour_fn == "basic":
        return [(0, 0)]
    centre_x, centre_y = (p // 2 for p in grid.patch_px)
    if grid.contour_fn == "center":
        return [(centre_x, centre_y)]
    shift_x, shift_y = (int(p // 2 * 0.5) for p in grid.patch_px)
    return [(centre_x + i * shift_x, centre_y + j * shift_y) for i in (-1, 1) for j in (-1, 1)]


def _drop_hole(keep: npt.NDArray[np.bool_], hole: Points, axes: tuple[Lattice, Lattice], grid: Grid) -> None:
    """Clears the corners whose patch centre is strictly inside a hole.

    The centre is corner + patch / 2, which may end in .5: everything is doubled to stay whole.
    """
    spans, parts = [], []
    for axis, patch, low, high in zip(axes, grid.patch_px, hole.min(axis=0), hole.max(axis=0), strict=True):
        start, step = 2 * axis.start + patch, 2 * axis.step
        first = min(axis.number, max(0, -((start - 2 * int(low)) // step)))
        last = max(first, min(axis.number, (2 * int(high) - start) // step + 1))
        spans.append(slice(first, last))
        parts.append(Lattice(start + first * step, step, last - first))
    if parts[0].number and parts[1].number:
        keep[spans[1], spans[0]] &= lattice_in_polygon(hole.astype(np.int64) * 2, *parts) <= 0
