"""JPEG tiles of TIFF slides, decoded straight from the file: the pixels that OpenSlide gives, without its
detours.

OpenSlide paints tiles into a premultiplied ARGB canvas through cairo and gives a copy; for patches of 256
px that costs several times the decoding itself. The tiles of generic tiled TIFFs and of Aperio files are
plain JPEG streams, so they are read and decoded here, and kept in a cache that neighbouring patches share.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from datasets import jpeg

Pixels = NDArray[np.uint8]

PLAIN_VENDORS = ("generic-tiff", "aperio")
"""Formats whose levels are single pages of adjoining tiles (others let tiles overlap or leave them out)."""

CACHE_BYTES = 64_000_000
"""Decoded tiles kept: 325 of 256 px, two columns of a slide 40,000 px high."""

NO_COLOUR_TRANSFORM = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Marker that says 'these components are RGB', for TIFF pages of photometric RGB."""

JPEG_COMPRESSION, RGB, YCBCR = 7, 2, 6


class TileError(Exception):
    """A tile that cannot be decoded here; OpenSlide has the last word on it."""


class _Page(NamedTuple):
    """A level: sizes in px, tile positions in bytes, and what goes between a tile's first marker and the
    rest.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    prefix: bytes


class JpegTiles:
    """The levels of one slide whose tiles are JPEG streams.

    Args:
        path: the slide.
        level_dimensions: (width, height) in px of the levels as OpenSlide numbers them.
    """

    def __init__(self, path: str | Path, level_dimensions: tuple[tuple[int, int], ...]) -> None:
        self.path = Path(path)
        self._pages = _pages(self.path, level_dimensions)
        self._fd = os.open(self.path, os.O_RDONLY) if self._pages else -1
        self._cache: OrderedDict[tuple[int, int], Pixels] = OrderedDict()
        self._cached_bytes = 0

    def has(self, level: int) -> bool:
        """Whether this level can be read here."""
        return level in self._pages

    def read(self, corner_px: tuple[int, int], level: int, side_px: int) -> Pixels:
        """A square of a level, black outside the slide.

        Args:
            corner_px: (x, y) in px of the level itself.
            level: the level; ``has(level)`` must be true.
            side_px: side in px of the level.

        Returns:
            (side, side, 3) uint8 RGB; read-only where it is a cached tile.

        Raises:
            TileError: a tile is missing or damaged.
        """
        page = self._pages[level]
        (x, y), tw, th = corner_px, page.tile_width, page.tile_height
        if x % tw == 0 and y % th == 0 and side_px == tw == th and _inside(page, x, y, side_px):
            return self._tile(level, x // tw, y // th)
        out = np.zeros((side_px, side_px, 3), np.uint8)
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + side_px, page.width), min(y + side_px, page.height)
        for row in range(y0 // th, -(-y1 // th)):
            top, bottom = max(y0, row * th), min(y1, row * th + th)
            for column in range(x0 // tw, -(-x1 // tw)):
                left, right = max(x0, column * tw), min(x1, column * tw + tw)
                tile = self._tile(level, column, row)
                part = tile[top - row * th : bottom - row * th, left - column * tw : right - column * tw]
                out[top - y : bottom - y, left - x : right - x] = part
        return out

    def _tile(self, level: int, column: int, row: int) -> Pixels:
        page = self._pages[level]
        number = row * -(-page.width // page.tile_width) + column
        key = (level, number)
        tile = self._cache.get(key)
        if tile is None:
            tile = self._decode(page, number)
            self._remember(key, tile)
        else:
            self._cache.move_to_end(key)
        return tile

    def _decode(self, page: _Page, number: int) -> Pixels:
        size = page.sizes[number]
        data = os.pread(self._fd, size, page.offsets[number]) if size else b""
        try:
            tile = jpeg.decode(
                data[:2] + page.prefix + data[2:], out=np.empty((page.tile_height, page.tile_width, 3), np.uint8)
            )
        except jpeg.JpegError as error:
            raise TileError(f"{self.path}: tile {number}: {error}") from error
        tile.flags.writeable = False
        return tile

    def _remember(self, key: tuple[int, int], tile: Pixels) -> None:
        self._cache[key] = tile
        self._cached_bytes += tile.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._pages = -1, {}
        self._cache.clear()


def _inside(page: _Page, x: int, y: int, side_px: int) -> bool:
    return 0 <= x <= page.width - side_px and 0 <= y <= page.height - side_px


def _pages(path: Path, level_dimensions: tuple[tuple[int, int], ...]) -> dict[int, _Page]:
    """The readable levels; empty for other formats and where size does not tell the pages apart."""
    if openslide.OpenSlide.detect_format(str(path)) not in PLAIN_VENDORS:
        return {}
    try:
        with tifffile.TiffFile(str(path)) as file:
            tiled: list[Any] = [page for page in file.pages if getattr(page, "is_tiled", False)]
            found = {}
            for level, size in enumerate(level_dimensions):
                fitting = [page for page in tiled if (page.imagewidth, page.imagelength) == size]
                if len(fitting) == 1 and _is_plain(fitting[0]):
                    found[level] = _page(fitting[0])
            return found
    except (tifffile.TiffFileError, OSError, ValueError, KeyError):
        return {}


def _is_plain(page: Any) -> bool:
    return bool(
        page.compression == JPEG_COMPRESSION
        and page.photometric in (RGB, YCBCR)
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == 1
        and max(page.tilewidth, page.tilelength) <= 4096
    )


def _page(page: Any) -> _Page:
    tables = page.jpegtables or b""
    # The tables are a JPEG stream of their own: without its first and last marker they fit into the tile's.
    prefix = tables[2:-2] + (NO_COLOUR_TRANSFORM if page.photometric == RGB else b"")
    places = tuple(page.dataoffsets), tuple(page.databytecounts)
    return _Page(page.imagewidth, page.imagelength, page.tilewidth, page.tilelength, *places, prefix)
