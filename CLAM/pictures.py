"""Pictures to look at: the contours on a thumbnail (masks/) and the kept patches on black (stitches/)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from grid import Region
from slide import Pixels

from datasets import jpeg
from utils.files import atomic_path

TISSUE_RGB, HOLE_RGB = (0, 255, 0), (0, 0, 255)
JPEG_QUALITY = 85

MAX_LINE_SHARE = 1 / 200
"""Widest line as a share of the picture: the published 250 level-0 px would cover a small slide."""


def draw_mask(overview: Pixels, scale: tuple[float, float], regions: Sequence[Region], line_px: float) -> Pixels:
    """The overview with outlines in green and holes in blue.

    Args:
        overview: (h, w, 3) RGB.
        scale: level-0 px per px of the overview, per axis.
        regions: in level-0 px.
        line_px: line width in level-0 px.
    """
    picture = overview.copy()
    width = max(1, int(min(line_px / (scale[0] * scale[1]) ** 0.5, max(picture.shape) * MAX_LINE_SHARE)))
    for region in regions:
        cv2.drawContours(picture, [_scaled(region.outline, scale)], -1, TISSUE_RGB, width, cv2.LINE_8)
        cv2.drawContours(picture, [_scaled(h, scale) for h in region.holes], -1, HOLE_RGB, width, cv2.LINE_8)
    return picture


def draw_stitch(
    overview: Pixels, scale: tuple[float, float], coords: npt.NDArray[np.int64], patch_px: tuple[int, int]
) -> Pixels:
    """The kept patches in their places, black elsewhere; ``coords`` (N, 2) and ``patch_px`` are level-0 px."""
    keep = np.zeros(overview.shape[:2], bool)
    low = np.floor(coords / scale).astype(int)
    high = np.ceil((coords + np.array(patch_px)) / scale).astype(int)
    for (x0, y0), (x1, y1) in zip(np.maximum(low, 0), np.maximum(high, 0), strict=True):
        keep[y0:y1, x0:x1] = True
    return np.where(keep[..., None], overview, np.uint8(0))


def save_jpeg(path: Path, picture: Pixels) -> None:
    """Writes a picture, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(jpeg.encode(picture, JPEG_QUALITY))


def _scaled(contour: npt.NDArray[np.integer], scale: tuple[float, float]) -> npt.NDArray[np.int32]:
    return (contour / scale).astype(np.int32).reshape(-1, 1, 2)
