"""TIFF files that OpenSlide does not take (strips, no tiles): read strip by strip, in bounded memory.

A strip is decoded by wrapping its bytes in a one-strip TIFF held in memory, which Pillow's libtiff then
reads; so every compression of libtiff works (LZW, deflate, JPEG, packbits, none) and never more than a few
strips are in memory.
"""

from __future__ import annotations

import io
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import tifffile
from PIL import Image
from pixel_rows import Layout, PixelRows
from slide_image import BAND_PX, WHOLE_PX
from slide_scale import openslide_mpp
from slides import Box, Pixels, RegionError, Slide, boxes, region_message

from utils.errors import UserError

CACHE_BYTES = 64_000_000
"""Decoded segments kept: two rows of 256-px strips of an image 40,000 px wide."""

BLACK_IS_ZERO, RGB = 1, 2
"""Values of PhotometricInterpretation."""

UNMIXED = (0, 2)
"""Kinds of a fourth sample that leave the colours as they are: unspecified and unassociated alpha."""

COPIED_TAGS = (
    "Predictor",
    "YCbCrSubSampling",
    "ReferenceBlackWhite",
    "JPEGTables",
    "ColorMap",
    "ExtraSamples",
    "FillOrder",
)
"""What a decoder must know beside the layout; copied from the file into the one-strip TIFF."""


class _Segments(NamedTuple):
    """The grid of strips or tiles of a page, sizes in px."""

    width: int
    height: int
    across: int


class FlatTiffSlide(Slide):
    """The first page of a TIFF as a one-level slide. Eight bits per sample."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            self._file = tifffile.TiffFile(str(path))
            self._page = cast(Any, self._file.pages[0])
        except (tifffile.TiffFileError, IndexError, struct.error) as error:
            raise UserError(f"{path}: is a damaged TIFF: {error}") from error
        width, height = int(self._page.imagewidth), int(self._page.imagelength)
        self.level_dimensions = ((width, height),)
        self._check()
        self.mpp, self.mpp_source = _resolution(self._page)
        seg_width = int(self._page.tilewidth) if self._page.is_tiled else width
        seg_height = int(self._page.tilelength if self._page.is_tiled else min(self._page.rowsperstrip, height))
        self._segments = _Segments(seg_width, seg_height, -(-width // seg_width))
        self._rows = self._plain_rows()
        if self._rows is None and seg_width * seg_height > WHOLE_PX:
            raise UserError(
                f"{path}: one compressed strip holds {seg_width} x {seg_height} px; the limit is "
                f"{WHOLE_PX / 1e6:.0f} Mpx. Convert it to a tiled TIFF."
            )
        self._cache: OrderedDict[int, Pixels] = OrderedDict()

    def _check(self) -> None:
        page = self._page
        if page.bitspersample != 8 or page.samplesperpixel not in (1, 3, 4) or page.planarconfig != 1:
            raise UserError(
                f"{self.path}: {page.samplesperpixel} samples of {page.bitspersample} bits (planar "
                f"configuration "
                f"{page.planarconfig}); flat TIFFs must have 1, 3 or 4 interleaved samples of 8 "
                f"bits. Convert it."
            )

    def _plain_rows(self) -> PixelRows | None:
        """Pixels that lie uncompressed and in one piece are read in place."""
        page = self._page
        extra = tuple(int(v) for v in page.extrasamples)
        orders: dict[tuple[int, int, tuple[int, ...]], str] = {(1, BLACK_IS_ZERO, ()): "L", (3, RGB, ()): "RGB"}
        orders |= {(4, RGB, (kind,)): "RGBX" for kind in UNMIXED}
        order = orders.get((int(page.samplesperpixel), int(page.photometric), extra))
        if order is None or not page.is_memmappable:
            return None
        layout = Layout(int(page.imagewidth), int(page.imagelength), order, int(page.dataoffsets[0]))
        return PixelRows(os.open(self.path, os.O_RDONLY), layout)

    def read_region(self, location_px: tuple[int, int], level: int, size_px: tuple[int, int]) -> Pixels:
        if self._rows is not None:
            try:
                return self._rows.region(location_px, size_px)
            except OSError as error:
                raise RegionError(region_message(self.path, location_px, level, error)) from error
        (x, y), (w, h) = location_px, size_px
        result = np.zeros((h, w, 3), np.uint8)
        width, height = self.dimensions
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if x1 <= x0 or y1 <= y0:
            return result
        seg_w, seg_h, across = self._segments
        for row in range(y0 // seg_h, (y1 - 1) // seg_h + 1):
            for column in range(x0 // seg_w, (x1 - 1) // seg_w + 1):
                part = self._segment(row * across + column)
                left, top = column * seg_w, row * seg_h
                a, b = max(x0, left), min(x1, left + part.shape[1])
                c, d = max(y0, top), min(y1, top + part.shape[0])
                result[c - y : d - y, a - x : b - x] = part[c - top : d - top, a - left : b - left]
        return result

    def block_boxes(self, level: int, multiple_px: int) -> Iterator[Box]:
        """Bands over the whole width, so that no strip is decoded twice."""
        rows = max(1, BAND_PX // self.dimensions[0] // multiple_px) * multiple_px
        return boxes(self.dimensions, (self.dimensions[0], rows))

    def _segment(self, index: int) -> Pixels:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        try:
            pixels = self._decode(index)
        except (OSError, ValueError, SyntaxError, struct.error) as error:
            raise RegionError(f"{self.path}: strip or tile {index} cannot be decoded: {error}") from error
        while self._cache and sum(p.nbytes for p in self._cache.values()) + pixels.nbytes > CACHE_BYTES:
            self._cache.popitem(last=False)
        self._cache[index] = pixels
        return pixels

    def _decode(self, index: int) -> Pixels:
        handle = self._file.filehandle
        handle.seek(self._page.dataoffsets[index])
        data = handle.read(self._page.databytecounts[index])
        top = (index // self._segments.across) * self._segments.height
        full = self._page.is_tiled or top + self._segments.height <= self.dimensions[1]
        rows = self._segments.height if full else self.dimensions[1] - top
        with Image.open(io.BytesIO(one_strip_tiff(self._page, data, (self._segments.width, rows)))) as image:
            return np.array(image.convert("RGB"))

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
        self._cache.clear()
        self._file.close()


def one_strip_tiff(page: Any, data: bytes, size_px: tuple[int, int]) -> bytes:
    """A TIFF file of one strip that holds ``data`` as compressed in ``page``."""
    samples = int(page.samplesperpixel)
    entries: dict[int, tuple[int, tuple[int, ...] | bytes]] = {
        256: (4, (size_px[0],)),
        257: (4, (size_px[1],)),
        258: (3, (8,) * samples),
        259: (3, (int(page.compression),)),
        262: (3, (int(page.photometric),)),
        273: (4, (8,)),
        277: (3, (samples,)),
        278: (4, (size_px[1],)),
        279: (4, (len(data),)),
        284: (3, (1,)),
    }
    for name in COPIED_TAGS:
        tag = page.tags.get(name)
        if tag is not None:
            entries[tag.code] = _entry(tag.value)
    padding = b"\0" * (len(data) % 2)
    directory = tiff_directory(entries, 8 + len(data) + len(padding))
    return struct.pack("<2sHI", b"II", 42, 8 + len(data) + len(padding)) + data + padding + directory


def _entry(value: Any) -> tuple[int, tuple[int, ...] | bytes]:
    if isinstance(value, bytes):
        return 7, value
    return 3, tuple(int(v) for v in np.atleast_1d(value))


def tiff_directory(entries: dict[int, tuple[int, tuple[int, ...] | bytes]], offset: int) -> bytes:
    """The image file directory (IFD) at ``offset``, long values behind it."""
    extra_offset = offset + 2 + 12 * len(entries) + 4
    head, extra = struct.pack("<H", len(entries)), b""
    for code, (kind, value) in sorted(entries.items()):
        packed = value if isinstance(value, bytes) else struct.pack(f"<{len(value)}{'H' if kind == 3 else 'I'}", *value)
        if len(packed) > 4:
            place = struct.pack("<I", extra_offset + len(extra))
            extra += packed + b"\0" * (len(packed) % 2)
        else:
            place = packed.ljust(4, b"\0")
        head += struct.pack("<HHI", code, kind, len(value)) + place
    return head + struct.pack("<I", 0) + extra


def _resolution(page: Any) -> tuple[float | None, str | None]:
    """um/px from the TIFF resolution tags, under the same rules as for OpenSlide's copy of them."""
    tag, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    if tag is None or unit is None or not tag.value[1]:
        return None, None
    names = {2: "inch", 3: "centimeter"}
    return openslide_mpp(
        {
            "tiff.XResolution": str(tag.value[0] / tag.value[1]),
            "tiff.ResolutionUnit": names.get(int(unit.value), ""),
        }
    )
