"""TIFF files that OpenSlide does not take (strips, no tiles), in bounded memory.

Uncompressed pixels are read in place. A compressed strip is decoded by wrapping its bytes in a one-strip TIFF held in
memory, which Pillow's libtiff then reads; so every compression of libtiff works (LZW, deflate, JPEG, packbits). What
was decoded goes to a nameless temporary file, so that no strip is decoded twice.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import tifffile
from PIL import Image
from pixel_rows import Layout, PixelRows
from slide import Box, Pixels, RegionError, Slide, boxes, region_message
from slide_image import BAND_PX, WHOLE_PX
from slide_scale import openslide_mpp
from spooled import temporary_room

from utils.errors import UserError

BLACK_IS_ZERO, RGB = 1, 2
"""Values of PhotometricInterpretation."""

FRACTIONS = (5, 10)
"""Types of a tag (unsigned, signed) whose number is two: numerator and denominator."""

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
        self._in_file = self._rows is not None
        self._seen: dict[int, str] = {}
        if not self._in_file and seg_width * seg_height > WHOLE_PX:
            raise UserError(
                f"{path}: one compressed strip holds {seg_width} x {seg_height} px; the limit is "
                f"{WHOLE_PX / 1e6:.0f} Mpx. Convert it to a tiled TIFF."
            )

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
        try:
            if self._rows is None:
                width, height = self.dimensions
                self._rows = PixelRows(temporary_room(self.path, 3 * width * height), Layout(width, height, "RGB"))
            if not self._in_file:
                self._unpack(location_px, size_px)
            return self._rows.region(location_px, size_px)
        except OSError as error:
            raise RegionError(region_message(self.path, location_px, level, error)) from error

    def _unpack(self, corner_px: tuple[int, int], size_px: tuple[int, int]) -> None:
        """Decodes the segments under a box into the temporary file, each once."""
        (x, y), (w, h) = corner_px, size_px
        width, height = self.dimensions
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        seg_w, seg_h, across = self._segments
        for row in range(y0 // seg_h, -(-y1 // seg_h)):
            for column in range(x0 // seg_w, -(-x1 // seg_w)):
                self._segment(row * across + column, (column * seg_w, row * seg_h))

    def block_boxes(self, level: int, multiple_px: int) -> Iterator[Box]:
        """Bands over the whole width, so that no strip is decoded twice."""
        rows = max(1, BAND_PX // self.dimensions[0] // multiple_px) * multiple_px
        return boxes(self.dimensions, (self.dimensions[0], rows))

    def _segment(self, index: int, corner_px: tuple[int, int]) -> None:
        """Puts a strip or tile into the temporary file, unless it is there; ``_seen`` holds what was wrong with it."""
        if index not in self._seen and self._rows is not None:
            try:
                pixels = self._decode(index)
            except (OSError, ValueError, SyntaxError, struct.error) as error:
                self._seen[index] = str(error) or type(error).__name__
            else:
                self._rows.write(corner_px, pixels)
                self._seen[index] = ""
        if self._seen[index]:
            raise OSError(f"strip or tile {index}: {self._seen[index]}")

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
        self._rows = None
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
    """The image file directory (IFD) at ``offset``, long values after it."""
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
    resolution, unit = (_number(page.tags.get(name)) for name in ("XResolution", "ResolutionUnit"))
    names = {2.0: "inch", 3.0: "centimeter"}
    return openslide_mpp(
        {
            "tiff.XResolution": str(resolution),
            "tiff.ResolutionUnit": "" if unit is None else names.get(unit, ""),
        }
    )


def _number(tag: Any) -> float | None:
    """The one number in a tag, a fraction worked out; None for whatever else writers put there (text, lists)."""
    values = () if tag is None else tuple(np.ravel(tag.value).tolist())
    if not all(isinstance(value, (int, float)) for value in values):
        return None
    if len(values) == 2 and tag.dtype in FRACTIONS:
        return values[0] / values[1] if values[1] else None
    return float(values[0]) if len(values) == 1 else None
