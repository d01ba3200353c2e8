"""Tissue: the fast, strip-wise segmentation against the published steps done plainly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "CLAM"))

import tissue
from grid import Region
from params import SlideParams
from slides import open_slide
from tissue import Scan, find_tissue, median_above, reduction, scan_level, tissue_mask

from utils.errors import UserError


def blobs(seed: int, width: int = 230, height: int = 170) -> np.ndarray:
    """A saturation image with pieces, holes and noise, (height, width) uint8."""
    rng = np.random.default_rng(seed)
    field = cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 7) * 160 + rng.normal(size=(height, width)) * 6
    return np.clip(field + 12, 0, 255).astype(np.uint8)


def scan_of(saturation: np.ndarray, scale: tuple[float, float] = (4.0, 4.0)) -> Scan:
    overview = np.zeros((1, 1, 3), np.uint8)
    return Scan(0, scale, saturation.copy(), overview, (1.0, 1.0))


def published_regions(saturation: np.ndarray, params: SlideParams, scale: tuple[float, float]) -> list[Region]:
    """Section 12 of the published behaviour, step by step."""
    blurred = cv2.medianBlur(saturation, params.mthresh)
    if params.use_otsu:
        _, mask = cv2.threshold(blurred, 0, 255, cv2.THRESH_OTSU + cv2.THRESH_BINARY)
    else:
        _, mask = cv2.threshold(blurred, params.sthresh, 255, cv2.THRESH_BINARY)
    if params.close > 0:
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((params.close, params.close), np.uint8))
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    unit = int(512 * 512 / (scale[0] * scale[1]))
    regions = []
    for i, contour in enumerate(contours):
        if hierarchy[0, i, 3] != -1:
            continue
        holes = [contours[j] for j in range(len(contours)) if hierarchy[0, j, 3] == i]
        area = cv2.contourArea(contour) - sum(cv2.contourArea(h) for h in holes)
        if area == 0 or not area > params.a_t * unit:
            continue
        holes = sorted(holes, key=cv2.contourArea, reverse=True)[: params.max_n_holes]
        holes = [h for h in holes if cv2.contourArea(h) > params.a_h * unit]
        shrunk = [np.array(c.squeeze(1) * np.array(scale), dtype=np.int32) for c in (contour, *holes)]
        regions.append(Region(shrunk[0], tuple(shrunk[1:])))
    return regions


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_otsu": True},
        {"close": 0, "mthresh": 1, "sthresh": 14},
        {"close": 5, "mthresh": 11, "a_t": 0.01, "max_n_holes": 2},
        {"a_t": 0, "a_h": 0, "sthresh": 0},
    ],
)
def test_regions_are_those_of_the_published_steps(seed, change, monkeypatch):
    params = replace(SlideParams(a_t=0.002, a_h=0.0005), **change)
    saturation, scale = blobs(seed), (4.003, 3.98)
    monkeypatch.setattr(tissue, "STRIP_PX", 37 * saturation.shape[1])
    expected = published_regions(saturation, params, scale)
    found = find_tissue(scan_of(saturation, scale), params).regions
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.outline, theirs.outline)
        assert len(ours.holes) == len(theirs.holes)
        for a, b in zip(ours.holes, theirs.holes, strict=True):
            np.testing.assert_array_equal(a, b)
    assert sum(len(r.holes) for r in expected) > 0 or "sthresh" in change or "use_otsu" in change


@pytest.mark.parametrize("edge", [1, 3, 7, 11, 15, 17, 31])
@pytest.mark.parametrize("threshold", [0, 8, 127, 254, 255])
def test_median_above_equals_median_then_threshold(edge, threshold):
    image = np.random.default_rng(edge).integers(0, 256, (61, 47)).astype(np.uint8)
    image[:20] //= 16
    expected = cv2.threshold(cv2.medianBlur(image, edge), threshold, 255, cv2.THRESH_BINARY)[1]
    np.testing.assert_array_equal(median_above(image, edge, threshold), expected)


@pytest.mark.parametrize("use_otsu", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("close", [1, 2, 4, 9, 30])
def test_strips_leave_no_seam(close, rows, use_otsu, monkeypatch):
    params = SlideParams(mthresh=9, use_otsu=use_otsu, close=close)
    whole = tissue_mask(blobs(7), params)
    monkeypatch.setattr(tissue, "STRIP_PX", rows * whole.shape[1])
    np.testing.assert_array_equal(tissue_mask(blobs(7), params), whole)


def square(side: int, canvas: int = 100) -> np.ndarray:
    image = np.zeros((canvas, canvas), np.uint8)
    image[10 : 10 + side, 10 : 10 + side] = 200
    return image


def test_the_area_limit_is_exclusive():
    """A square of 33 px has a contour area of 32 x 32; at scale 16 the unit is 1024 px: exactly one unit."""
    params = SlideParams(mthresh=1, close=0, a_t=1)
    none = find_tissue(scan_of(square(33), (16.0, 16.0)), params)
    assert not none.regions
    assert "1.00 patches of 512 px" in none.hint
    assert "--a_t" in none.hint
    assert len(find_tissue(scan_of(square(34), (16.0, 16.0)), params).regions) == 1


def test_blank_slides_say_what_to_change():
    found = find_tissue(scan_of(np.zeros((50, 50), np.uint8)), SlideParams())
    assert not found.regions
    assert "--sthresh" in found.hint


def test_keep_and_exclude_ids():
    image = np.zeros((60, 200), np.uint8)
    for i in range(4):
        image[10:50, 10 + 48 * i : 40 + 48 * i] = 200
    params = SlideParams(mthresh=1, close=0, a_t=0)
    every = find_tissue(scan_of(image), params).regions
    assert len(every) == 4

    def chosen(**change: str) -> list[int]:
        regions = find_tissue(scan_of(image), replace(params, **change)).regions
        return [next(i for i, e in enumerate(every) if np.array_equal(e.outline, r.outline)) for r in regions]

    assert chosen(keep_ids="3,0") == [0, 3]
    assert chosen(exclude_ids="1") == [0, 2, 3]
    assert chosen(keep_ids="1,2", exclude_ids="2") == [1]
    with pytest.raises(UserError, match="keep_ids names contour 4; there are 4"):
        chosen(keep_ids="4")
    assert "keep_ids" in find_tissue(scan_of(image), replace(params, keep_ids="1", exclude_ids="1")).hint


@pytest.mark.parametrize(
    ("size", "scale", "factor"),
    [
        ((10_000, 10_000), 1.0, 1),
        ((10_001, 10_000), 1.0, 4),
        ((100_000, 80_000), 1.0, 32),
        ((200_000, 200_000), 1.0, 64),
        ((40_000, 30_000), 4.0, 16),
        ((40_000, 30_000), 64.0, 4),
    ],
)
def test_only_levels_beyond_the_published_limit_are_reduced(size, scale, factor):
    """100,000 / 32 = 3,125 px long (64 would leave 1,562); 40,000 x 30,000 at 64 needs 4 to come below 1e8 px."""
    assert reduction(size, scale) == factor


def test_a_reduced_level_gives_the_same_tissue(tmp_path, monkeypatch):
    """A disc of radius 300 in a 1,030 x 1,010 image, segmented at full size and at a quarter."""
    image = np.full((1010, 1030, 3), 240, np.uint8)
    cv2.circle(image, (520, 500), 300, (190, 60, 140), -1)
    Image.fromarray(image).save(tmp_path / "d.png")
    params = SlideParams(a_t=0, mthresh=3, close=2)
    with open_slide(tmp_path / "d.png") as slide:
        full = find_tissue(scan_level(slide, 0), params).regions[0]
        monkeypatch.setattr(tissue, "reduction", lambda size, scale: 4)
        scan = scan_level(slide, 0)
    assert scan.saturation.shape == (252, 257)
    assert scan.scale == (4.0, 4.0)
    reduced = find_tissue(scan, params).regions[0]
    for f in (np.min, np.max):
        assert np.abs(f(full.outline, axis=0) - f(reduced.outline, axis=0)).max() <= 4


def test_reduced_overview_keeps_place_and_scale(tmp_path, monkeypatch):
    """A white bar at x 400..500 of 1,000: in an overview reduced by 7 it stands at 400/7..500/7."""
    image = np.zeros((600, 1000, 3), np.uint8)
    image[:, 400:500] = 255
    Image.fromarray(image).save(tmp_path / "o.png")
    monkeypatch.setattr(tissue, "MAX_OVERVIEW_PX", 600 * 1000 / 40)
    with open_slide(tmp_path / "o.png") as slide:
        scan = scan_level(slide, 0)
    assert scan.overview.shape == (85, 142, 3)
    assert scan.overview_scale == (7.0, 7.0)
    columns = np.flatnonzero(scan.overview[40, :, 0] > 127)
    assert (columns.min(), columns.max()) == (57, 70)
    assert scan.saturation.shape == (600, 1000)
