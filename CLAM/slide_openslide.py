"""Slides through OpenSlide, whole levels by their JPEG tiles where that gives the same pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import openslide
from patch_tiles import JpegTiles, TileError
from PIL import Image
from slide import Block, Pixels, RegionError, Slide, region_message
from slide_scale import openslide_mpp, positive

from utils.errors import UserError, told

WHOLE_LEVEL_PX = 60_000_000
"""Levels up to here are read by one call where tiles cannot be read directly: 240 MB of RGBA."""

TRIAL_PX = 256
"""Edge of the region that direct decoding must reproduce before it is trusted with a slide."""


class OpenSlideSlide(Slide):
    """A file that OpenSlide opens."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._handle = openslide.OpenSlide(str(path))
        self.level_dimensions = self._handle.level_dimensions
        self.mpp, self.mpp_source = openslide_mpp(dict(self._handle.properties))
        self.objective_power = positive(self._handle.properties.get("openslide.objective-power"))

    def best_level(self, downsample: float) -> int:
        return int(self._handle.get_best_level_for_downsample(downsample))

    def read_region(self, location_px: tuple[int, int], level: int, size_px: tuple[int, int]) -> Pixels:
        return _rgb(self._read(location_px, level, size_px))

    def _read(self, location_px: tuple[int, int], level: int, size_px: tuple[int, int]) -> Image.Image:
        x, y = int(location_px[0]), int(location_px[1])
        try:
            return self._handle.read_region((x, y), level, (int(size_px[0]), int(size_px[1])))
        except openslide.OpenSlideError as error:
            message = region_message(self.path, (x, y), level, error)
            self._open_again(message)
            raise RegionError(message) from error

    def _open_again(self, message: str) -> None:
        """A new handle: after an error OpenSlide refuses everything, also the rest of the slide.

        Raises:
            UserError: the file does not open any more, so that the whole slide is lost, not only a region.
        """
        try:
            handle = openslide.OpenSlide(str(self.path))
        except (openslide.OpenSlideError, OSError) as error:
            raise UserError(f"{message}; after that the file cannot be opened again: {told(error)}") from error
        self._handle.close()
        self._handle = handle

    def blocks(self, level: int, multiple_px: int = 1) -> Iterator[Block]:
        """The whole level, with the very pixels of one read from its corner.

        OpenSlide takes locations in level-0 px: where a level's downsample is not whole, a block's corner
        would fall between two pixels and the block come out interpolated. So JPEG tiles are decoded directly,
        and other levels read in one call as long as that fits into memory.
        """
        size = self.level_dimensions[level]
        tiles = self._direct_tiles(level)
        if tiles is not None:
            with contextlib.closing(tiles):
                yield from self._tile_blocks(tiles, level, multiple_px)
        elif level > 0 and size[0] * size[1] <= WHOLE_LEVEL_PX:
            yield from self._whole_blocks(level, multiple_px)
        else:
            yield from super().blocks(level, multiple_px)

    def _direct_tiles(self, level: int) -> JpegTiles | None:
        """A reader of the level's JPEG tiles, if it gives OpenSlide's pixels for a tile in the middle of level 0."""
        tiles = JpegTiles(self.path, self.level_dimensions)
        if tiles.has(level) and tiles.has(0):
            width, height = self.dimensions
            middle = width // 2 // TRIAL_PX * TRIAL_PX, height // 2 // TRIAL_PX * TRIAL_PX
            with contextlib.suppress(TileError, RegionError):
                ours, theirs = (
                    tiles.read(middle, 0, TRIAL_PX),
                    self.read_region(middle, 0, (TRIAL_PX, TRIAL_PX)),
                )
                if np.array_equal(ours, theirs):
                    return tiles
        tiles.close()
        return None

    def _tile_blocks(self, tiles: JpegTiles, level: int, multiple_px: int) -> Iterator[Block]:
        for x, y, w, h in self.block_boxes(level, multiple_px):
            try:
                yield Block(x, y, w, h, tiles.read((x, y), level, max(w, h))[:h, :w])
            except TileError:
                yield self._block(level, (x, y, w, h))

    def _whole_blocks(self, level: int, multiple_px: int) -> Iterator[Block]:
        try:
            image = self._read((0, 0), level, self.level_dimensions[level])
        except RegionError:
            yield from super().blocks(level, multiple_px)
            return
        for x, y, w, h in self.block_boxes(level, multiple_px):
            yield Block(x, y, w, h, _rgb(image.crop((x, y, x + w, y + h))))

    def close(self) -> None:
        self._handle.close()


def _rgb(image: Image.Image) -> Pixels:
    """An RGBA image's colours, (h, w, 3)."""
    return np.asarray(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGBA2RGB), np.uint8)
