"""Where the tissue is: saturation, median filter, threshold, closing, contours, as in the published CLAM script.

A level is read block by block, so that the memory is that of its saturation (one byte a pixel) and not of
its colours. A level above ``MAX_SEGMENT_PX`` is reduced on the way: a slide without a pyramid is segmented
on a thumbnail of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from grid import Region
from params import SlideParams, contour_ids
from slide import Pixels, Slide

from utils.errors import UserError

log = logging.getLogger(__name__)

MAX_SEGMENT_PX = 100_000_000
"""The published program refuses a segmentation level above 1e8 px. Up to here we segment the same pixels."""

MAX_OVERVIEW_PX = 16_000_000
"""Pictures for people: 48 MB in memory."""

MAX_OVERVIEW_SIDE_PX = 30_000
"""JPEG ends at 65,535 px a side."""

AREA_UNIT_PX = 512
"""Areas are compared in units of a patch of this edge in level-0 px."""

STRIP_PX = 8_000_000
"""Filtered at once, so that the copies of OpenCV and ours stay small."""

Scale = tuple[float, float]


@dataclass
class Scan:
    """One level, read once: its saturation for the segmentation and its colours, reduced, for the pictures."""

    level: int
    scale: Scale
    """Level-0 px per px of ``saturation``, per axis."""
    saturation: Pixels
    overview: Pixels
    overview_scale: Scale
    corrupt_blocks: int = 0
    blocks: int = 1


@dataclass(frozen=True)
class Tissue:
    """The pieces of tissue of a slide, in level-0 px; ``hint`` says why there are none and what to change."""

    regions: tuple[Region, ...]
    fraction: float
    hint: str = ""
    found: int = field(default=0)


def reduction(size_px: tuple[int, int], level_scale: float) -> int:
    """By how much a level must be reduced for segmentation: 1 up to the published limit, else a power of two.

    The thumbnail comes as near to downsample 64 as leaves it 2,000 px long, where the published defaults fit.
    """
    if size_px[0] * size_px[1] <= MAX_SEGMENT_PX:
        return 1
    factor = 2
    while 2 * factor * level_scale <= 64 and max(size_px) // (2 * factor) >= 2000:
        factor *= 2
    while (size_px[0] // factor) * (size_px[1] // factor) > MAX_SEGMENT_PX:
        factor *= 2
    return factor


def overview_reduction(size_px: tuple[int, int]) -> int:
    """By how much a picture must be reduced to be looked at."""
    by_area = math.ceil(math.sqrt(size_px[0] * size_px[1] / MAX_OVERVIEW_PX))
    return max(1, by_area, math.ceil(max(size_px) / MAX_OVERVIEW_SIDE_PX))


def scan_level(slide: Slide, level: int, want_saturation: bool = True) -> Scan:
    """Reads a level once, block by block. A corrupt block counts as background and is counted."""
    size = slide.level_dimensions[level]
    factor = reduction(size, max(slide.level_downsamples[level])) if want_saturation else 1
    shrink = factor * overview_reduction((size[0] // factor, size[1] // factor))
    saturation = np.zeros((size[1] // factor, size[0] // factor) if want_saturation else (0, 0), np.uint8)
    overview = np.zeros((max(1, size[1] // shrink), max(1, size[0] // shrink), 3), np.uint8)
    corrupt = blocks = 0
    for block in slide.blocks(level, shrink):
        blocks += 1
        if block.pixels is None:
            corrupt += 1
            continue
        _put(overview, _shrunk(block.pixels, shrink), (block.x // shrink, block.y // shrink))
        if want_saturation:
            _put(
                saturation,
                saturation_of(_shrunk(block.pixels, factor)),
                (block.x // factor, block.y // factor),
            )
    x, y = slide.level_downsamples[level]
    # A reduced picture drops the last incomplete row and column: its scale is the factor, not the ratio of sizes.
    scale = (x * factor, y * factor)
    return Scan(level, scale, saturation, overview, (x * shrink, y * shrink), corrupt, blocks)


def _shrunk(pixels: Pixels, factor: int) -> Pixels:
    """An image reduced by averaging factor x factor px; the incomplete last row and column are dropped."""
    if factor == 1:
        return pixels
    rows, columns = pixels.shape[0] // factor, pixels.shape[1] // factor
    if not rows or not columns:
        return np.zeros((rows, columns, 3), np.uint8)
    whole = np.ascontiguousarray(pixels[: rows * factor, : columns * factor])
    return cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def _put(canvas: Pixels, part: Pixels, corner: tuple[int, int]) -> None:
    x, y = corner
    rows, columns = min(part.shape[0], canvas.shape[0] - y), min(part.shape[1], canvas.shape[1] - x)
    if rows > 0 and columns > 0:
        canvas[y : y + rows, x : x + columns] = part[:rows, :columns]


def saturation_of(pixels: Pixels) -> Pixels:
    """The S channel of OpenCV's 8-bit HSV: (h, w, 3) RGB to (h, w)."""
    if pixels.size == 0:
        return np.zeros(pixels.shape[:2], np.uint8)
    return np.asarray(cv2.extractChannel(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), 1), np.uint8)


def tissue_mask(saturation: Pixels, params: SlideParams) -> Pixels:
    """The binary mask (0, 255) of tissue. Overwrites ``saturation`` to save memory."""
    edge = params.mthresh
    if params.use_otsu:
        _filter_in_place(saturation, edge // 2, lambda strip: cv2.medianBlur(strip, edge))
        cv2.threshold(saturation, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU, dst=saturation)
    else:
        _filter_in_place(saturation, edge // 2, lambda strip: median_above(strip, edge, params.sthresh))
    if params.close > 0:
        kernel = np.ones((params.close, params.close), np.uint8)
        # Dilation and erosion reach half a kernel each.
        _filter_in_place(saturation, params.close, lambda strip: cv2.morphologyEx(strip, cv2.MORPH_CLOSE, kernel))
    return saturation


def median_above(image: Pixels, edge_px: int, threshold: int) -> Pixels:
    """``medianBlur`` then a fixed threshold, as 0 or 255, thirty times faster than the two calls.

    The median of a window exceeds the threshold exactly where more than half of its values do, and a box
    filter counts those. ``edge_px`` is odd.
    """
    _, above = cv2.threshold(image, threshold, 1, cv2.THRESH_BINARY)
    depth = -1 if edge_px <= 15 else cv2.CV_16U
    count = cv2.boxFilter(above, depth, (edge_px, edge_px), normalize=False, borderType=cv2.BORDER_REPLICATE)
    return np.where(count > edge_px**2 // 2, np.uint8(255), np.uint8(0))


def _filter_in_place(image: Pixels, halo: int, function: Callable[[Pixels], Any]) -> None:
    """Applies a local filter strip by strip; each strip sees ``halo`` original rows of its neighbours."""
    height, rows = image.shape[0], max(1, STRIP_PX // max(1, image.shape[1]), halo)
    above = image[:0].copy()
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = np.concatenate([above, image[top : min(bottom + halo, height)]])
        skip = len(above)
        above = image[max(0, bottom - halo) : bottom].copy()
        image[top:bottom] = function(strip)[skip : skip + bottom - top]


def find_tissue(scan: Scan, params: SlideParams) -> Tissue:
    """Segments a scanned level and keeps the contours and holes that are large enough; empties ``scan.saturation``.

    Raises:
        UserError: keep_ids or exclude_ids names a contour that there is not.
    """
    size = scan.saturation.size
    mask = tissue_mask(scan.saturation, params)
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    del mask
    scan.saturation = scan.saturation[:0].copy()
    if not contours:
        return Tissue((), 0.0, _no_contour_hint(scan, params))
    pieces = _pieces(contours, np.asarray(hierarchy, np.int32)[0, :, 3])
    unit = int(AREA_UNIT_PX**2 / (scan.scale[0] * scan.scale[1]))
    kept = [p for p in pieces if p.area != 0 and p.area > params.a_t * unit]
    if not kept:
        largest = max(p.area for p in pieces) / max(unit, 1)
        hint = (
            f"the largest of {len(pieces)} pieces of tissue has {largest:.2f} patches of {AREA_UNIT_PX} px, "
            f"not above a_t {params.a_t:g}; lower --a_t"
        )
        return Tissue((), 0.0, hint, len(pieces))
    chosen = _chosen(kept, params)
    fraction = sum(p.area for p in chosen) / max(size, 1)
    hint = "" if chosen else f"keep_ids and exclude_ids leave none of {len(kept)} pieces; change them"
    return Tissue(tuple(_region(p, params, unit, scan.scale) for p in chosen), fraction, hint, len(pieces))


@dataclass
class _Piece:
    outline: npt.NDArray[np.int32]
    holes: list[Any]
    area: float


def _pieces(contours: Any, parents: npt.NDArray[np.int32]) -> list[_Piece]:
    """Outlines with their holes, in OpenCV's order; ``area`` is the outline's less its holes', in px."""
    children: dict[int, list[Any]] = {}
    for child, parent in enumerate(parents.tolist()):
        if parent >= 0:
            children.setdefault(parent, []).append(contours[child])
    pieces = []
    for index in np.flatnonzero(parents == -1).tolist():
        holes = children.get(index, [])
        area = cv2.contourArea(contours[index]) - sum(cv2.contourArea(h) for h in holes)
        pieces.append(_Piece(contours[index], holes, area))
    return pieces


def _region(piece: _Piece, params: SlideParams, unit: int, scale: Scale) -> Region:
    by_area = sorted(piece.holes, key=cv2.contourArea, reverse=True)[: int(params.max_n_holes)]
    holes = tuple(_scaled(h, scale) for h in by_area if cv2.contourArea(h) > params.a_h * unit)
    return Region(_scaled(piece.outline, scale), holes)


def _scaled(contour: npt.NDArray[np.int32], scale: Scale) -> npt.NDArray[np.int32]:
    return (contour.reshape(-1, 2) * np.array(scale)).astype(np.int32)


def _chosen(pieces: list[_Piece], params: SlideParams) -> list[_Piece]:
    """The pieces that keep_ids and exclude_ids leave, in ascending order of index."""
    keep = contour_ids(params.keep_ids) or tuple(range(len(pieces)))
    drop = contour_ids(params.exclude_ids) or ()
    beyond = [i for i in keep if i >= len(pieces)]
    if beyond:
        raise UserError(f"keep_ids names contour {beyond[0]}; there are {len(pieces)} (0 to {len(pieces) - 1}).")
    return [pieces[i] for i in sorted(set(keep) - set(drop))]


def _no_contour_hint(scan: Scan, params: SlideParams) -> str:
    return (
        f"no pixel of level {scan.level} passes the threshold (sthresh {params.sthresh}); "
        "lower --sthresh or give --use_otsu"
    )
