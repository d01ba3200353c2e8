"""Patches of one slide: read, resized and encoded. This is what the worker processes do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from patch_resize import resize
from patch_tiles import JpegTiles, Pixels, TileError
from slide import RegionError, Slide
from slides import open_slide

from datasets import jpeg

MAX_STRIP_PX = 8_000_000
"""Neighbouring patches are read as one region of up to so many px: 32 MB of RGBA."""

MESSAGE_PATCHES = 64
"""Patches that travel to the writing process at once: about 1 MB."""


@dataclass(frozen=True)
class Task:
    """A run of patches of one slide.

    ``coords_px`` (n, 2): corners in level-0 px; ``start``: index of the first; ``sizes_px``: sides of the
    images to make (0: as read); ``blank``: put a black image where a region cannot be read, instead of
    failing.
    """

    number: int
    slide: Path
    level: int
    patch_size_px: int
    start: int
    coords_px: NDArray[np.int64]
    sizes_px: tuple[int, ...]
    quality: int
    blank: bool
    kernel: str


@dataclass(frozen=True)
class Images:
    """Finished patches ``start``, ``start + 1``, ... of a task: JPEGs per size, and indices left blank."""

    number: int
    start: int
    jpegs: dict[int, list[bytes]]
    blank: list[int]


class PatchReader:
    """Reads square patches of one slide."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.slide: Slide = open_slide(path)
        self.tiles = JpegTiles(path, self.slide.level_dimensions)

    def close(self) -> None:
        self.tiles.close()
        self.slide.close()

    def read(self, coords_px: NDArray[np.int64], level: int, side_px: int) -> Iterator[Pixels | RegionError]:
        """The patches in order, each (side, side, 3) uint8 RGB, or the error of a damaged region.

        Whole pixels of the level are taken: a corner that falls between two is rounded, never interpolated.
        """
        if not 0 <= level < len(self.slide.level_dimensions):
            levels = len(self.slide.level_dimensions)
            raise RegionError(f"{self.path}: has {levels} levels; the coordinates are for level {level}.")
        if self.tiles.has(level):
            yield from self._read_tiles(coords_px, level, side_px)
            return
        scale = np.array(self.slide.level_downsamples[level])
        for strip in strips(coords_px / scale, side_px):
            yield from self._read_strip(coords_px[strip], level, side_px)

    def _read_tiles(self, coords_px: NDArray[np.int64], level: int, side_px: int) -> Iterator[Pixels | RegionError]:
        corners = np.rint(coords_px / np.array(self.slide.level_downsamples[level])).astype(int)
        for corner, (x, y) in zip(coords_px, corners.tolist(), strict=True):
            try:
                yield self.tiles.read((x, y), level, side_px)
            except TileError:
                yield self._read_one(corner, level, side_px)

    def _read_one(self, corner_px: NDArray[np.int64], level: int, side_px: int) -> Pixels | RegionError:
        try:
            return self.slide.read_region((int(corner_px[0]), int(corner_px[1])), level, (side_px, side_px))
        except RegionError as error:
            return error

    def _read_strip(self, coords_px: NDArray[np.int64], level: int, side_px: int) -> Iterator[Pixels | RegionError]:
        """Neighbouring patches as one region; one by one where that cannot be read."""
        offsets = np.rint((coords_px - coords_px.min(0)) / np.array(self.slide.level_downsamples[level])).astype(int)
        width, height = (offsets.max(0) + side_px).tolist()
        x, y = coords_px.min(0).tolist()
        try:
            region = self.slide.read_region((x, y), level, (width, height))
        except RegionError:
            yield from (self._read_one(corner, level, side_px) for corner in coords_px)
            return
        for x, y in offsets.tolist():
            yield region[y : y + side_px, x : x + side_px]


def strips(corners_px: NDArray[np.float64], side_px: int) -> Iterator[slice]:
    """Runs of consecutive patches in one column or row without gaps, of at most MAX_STRIP_PX.

    ``corners_px`` (n, 2) in px of the level that is read.
    """
    start = 0
    for index in range(1, len(corners_px) + 1):
        if index < len(corners_px) and _joins(corners_px[start : index + 1], side_px):
            continue
        yield slice(start, index)
        start = index


def _joins(corners_px: NDArray[np.float64], side_px: int) -> bool:
    """Whether the last patch continues the run of those before it."""
    extent = corners_px.max(0) - corners_px.min(0)
    step = np.abs(corners_px[-1] - corners_px[-2])
    in_line = extent.min() < 1
    return bool(in_line and step.max() <= side_px + 1 and (extent.max() + side_px) * side_px <= MAX_STRIP_PX)


def perform(task: Task, reader: PatchReader) -> Iterator[Images]:
    """Does a task, some patches at a time.

    Raises:
        RegionError: a region cannot be read and the task does not ask for blank patches.
    """
    patches = reader.read(task.coords_px, task.level, task.patch_size_px)
    for first in range(0, len(task.coords_px), MESSAGE_PATCHES):
        jpegs: dict[int, list[bytes]] = {size: [] for size in task.sizes_px}
        blank = []
        for index in range(first, min(first + MESSAGE_PATCHES, len(task.coords_px))):
            patch = next(patches)
            if isinstance(patch, RegionError):
                if not task.blank:
                    raise RegionError(f"{patch} --bad_region blank stores a black image there and records it.")
                blank.append(task.start + index)
                patch = np.zeros((task.patch_size_px, task.patch_size_px, 3), np.uint8)
            for size in task.sizes_px:
                jpegs[size].append(jpeg.encode(resize(patch, size or task.patch_size_px, task.kernel), task.quality))
        yield Images(task.number, task.start + first, jpegs, blank)
