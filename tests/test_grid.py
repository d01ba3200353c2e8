"""The vectorised grid against the published rules applied point by point with OpenCV."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "CLAM"))

import grid as grid_module
from grid import CONTOUR_FNS, Grid, Lattice, Region, lattice_in_polygon, region_coords


def inside(polygon: np.ndarray, x: float, y: float) -> float:
    return cv2.pointPolygonTest(polygon.reshape(-1, 1, 2).astype(np.int32), (float(x), float(y)), False)


def published_coords(region: Region, grid: Grid) -> list[tuple[int, int]]:
    """Section 12 of the published behaviour, written down point by point."""
    x0, y0, w, h = cv2.boundingRect(region.outline.reshape(-1, 1, 2))
    px, py = grid.patch_px
    stop_x, stop_y = x0 + w, y0 + h
    if not grid.use_padding:
        stop_x = min(stop_x, grid.slide_px[0] - px + 1)
        stop_y = min(stop_y, grid.slide_px[1] - py + 1)
    kept = []
    for x in range(x0, stop_x, grid.step_px[0]):
        for y in range(y0, stop_y, grid.step_px[1]):
            cx, cy = x + px // 2, y + py // 2
            sx, sy = int(px // 2 * 0.5), int(py // 2 * 0.5)
            four = [(cx - sx, cy - sy), (cx + sx, cy + sy), (cx + sx, cy - sy), (cx - sx, cy + sy)]
            hits = [inside(region.outline, *p) >= 0 for p in four]
            passes = {
                "four_pt": any(hits),
                "four_pt_hard": all(hits),
                "center": inside(region.outline, cx, cy) >= 0,
                "basic": inside(region.outline, x, y) >= 0,
            }[grid.contour_fn]
            if passes and not any(inside(hole, x + px / 2, y + py / 2) > 0 for hole in region.holes):
                kept.append((x, y))
    return kept


def random_regions(seed: int, scale: float, size: int = 160) -> list[Region]:
    """Contours with holes as segmentation gives them: traced from blobs, scaled, truncated."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(size=(size, size)).astype(np.float32), (0, 0), float(rng.uniform(1, 9)))
    mask = (noise > np.quantile(noise, rng.uniform(0.2, 0.8))).astype(np.uint8)
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scaled = [(c.reshape(-1, 2) * scale).astype(np.int32) for c in contours]
    parents = hierarchy[0, :, 3]
    return [
        Region(scaled[i], tuple(scaled[j] for j in np.flatnonzero(parents == i))) for i in np.flatnonzero(parents == -1)
    ]


@pytest.mark.parametrize("contour_fn", CONTOUR_FNS)
@pytest.mark.parametrize("use_padding", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_same_coordinates_in_the_same_order_as_point_by_point(contour_fn, use_padding, seed):
    rng = np.random.default_rng(100 + seed)
    scale = float(rng.choice([1.0, 4.0, 16.002, 31.97]))
    patch = tuple(int(p) for p in rng.integers(1, 40 * scale, 2)) if seed % 2 else (int(scale) * 8,) * 2
    step = tuple(int(max(1, p * f)) for p, f in zip(patch, rng.choice([0.3, 0.5, 1.0, 1.7], 2), strict=True))
    grid = Grid(patch, step, (int(150 * scale), int(155 * scale)), contour_fn, use_padding)
    total = 0
    for region in sorted(random_regions(seed, scale), key=lambda r: -len(r.outline))[:6]:
        if np.ptp(region.outline, axis=0).prod() / (step[0] * step[1]) > 20_000:
            grid = Grid(patch, (max(step[0], int(scale) * 4), max(step[1], int(scale) * 4)), *_rest(grid))
        expected = published_coords(region, grid)
        found = region_coords(region, grid)
        assert found.dtype == np.int64
        assert [tuple(c) for c in found.tolist()] == expected
        total += len(expected)
    assert total > 0 or patch[0] > 20 * scale


def _rest(grid: Grid) -> tuple[tuple[int, int], str, bool]:
    return grid.slide_px, grid.contour_fn, grid.use_padding


@pytest.mark.parametrize("seed", range(40))
def test_lattice_equals_opencv_on_wild_polygons(seed):
    """Self-crossing, repeated, collinear and single vertices on a tiny raster, so that points often touch edges."""
    rng = np.random.default_rng(seed)
    polygon = rng.integers(0, 12, (int(rng.integers(1, 14)), 2))
    if seed % 3 == 0:
        polygon = np.repeat(polygon, 2, axis=0)
    if seed % 4 == 0:
        polygon[: len(polygon) // 2, 1] = 5
    step = int(rng.integers(1, 4))
    xs, ys = Lattice(-3 + step, step, 14), Lattice(-2, step, 13)
    found = lattice_in_polygon(polygon, xs, ys)
    expected = [[inside(polygon, xs[0] + i * step, ys[0] + j * step) for i in range(14)] for j in range(13)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("patch", [7, 8, 9, 10, 11])
def test_centre_in_hole_with_half_pixels(patch):
    """p + P / 2 ends in .5 for odd patches: strictly inside the hole drops, on its edge keeps."""
    outline = np.array([[0, 0], [99, 0], [99, 99], [0, 99]], np.int32)
    hole = np.array([[20, 20], [43, 20], [43, 50], [31, 55], [20, 50]], np.int32)
    grid = Grid((patch, patch), (1, 3), (100, 100), "basic", True)
    found = region_coords(Region(outline, (hole,)), grid)
    assert [tuple(c) for c in found.tolist()] == published_coords(Region(outline, (hole,)), grid)


def test_blocks_of_rows_join_without_a_seam(monkeypatch):
    region = max(random_regions(3, 8.0), key=lambda r: len(r.outline))
    grid = Grid((64, 64), (32, 32), (1280, 1280))
    whole = region_coords(region, grid)
    monkeypatch.setattr(grid_module, "BLOCK_POINTS", 100)
    np.testing.assert_array_equal(region_coords(region, grid), whole)


def test_patch_larger_than_the_slide_without_padding_gives_nothing():
    square = np.array([[0, 0], [50, 0], [50, 50], [0, 50]], np.int32)
    assert len(region_coords(Region(square), Grid((256, 256), (256, 256), (51, 51), "basic", False))) == 0


def test_hand_computed_square():
    """A square 0..99, patches of 50: corners at 0 and 50 per axis; centre test keeps all, a hole in one
    corner drops one."""
    square = np.array([[0, 0], [99, 0], [99, 99], [0, 99]], np.int32)
    hole = np.array([[60, 60], [90, 60], [90, 90], [60, 90]], np.int32)
    grid = Grid((50, 50), (50, 50), (100, 100), "center")
    assert region_coords(Region(square), grid).tolist() == [[0, 0], [0, 50], [50, 0], [50, 50]]
    assert region_coords(Region(square, (hole,)), grid).tolist() == [[0, 0], [0, 50], [50, 0]]
