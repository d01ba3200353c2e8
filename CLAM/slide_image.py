"""Ordinary images as one-level slides, in bounded memory.

Small ones are decoded whole by Pillow. Of large ones, those whose pixels lie uncompressed in the file are read in
place, and PNG, JPEG and WebP are decoded once into a temporary file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from image_probe import damage, held_bytes, png_depth
from PIL import Image
from pixel_rows import ORDERS, Layout, PixelRows
from slide import Box, Pixels, RegionError, Slide, boxes, region_message
from spooled import spool

from utils.errors import UserError

MAX_PX = (1 << 30) - 1
"""OpenCV decodes no more. Decoded they take 3 or 4 GB of disk, never of memory."""

WHOLE_PX = 16_000_000
"""Decoded whole up to here: Pillow takes up to 16 bytes a pixel (JPEG 2000), mostly 4."""

HELD_BYTES = 320_000_000
"""What a decoder may hold at once: with 80 MB of program a worker stays below 500 MB. Segmentation comes later."""

BAND_PX = 4_000_000
"""Pixels of the bands in which a large image is read."""

T = TypeVar("T")

SPOOLED_FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}
"""Pillow's names, and what these files begin as: an MPO is a JPEG with others behind it."""

MAX_WEBP_BYTES = 1 << 26
"""OpenCV opens no larger ones."""

# The limits above stand in for Pillow's, which would refuse 178 Mpx already when it reads the header.
Image.MAX_IMAGE_PIXELS = MAX_PX


class ImageSlide(Slide):
    """PNG, JPEG, WebP and other images that Pillow opens; one level."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(self.path) as image:
                self.level_dimensions = (image.size,)
                self._check(image)
                self._alpha = _has_alpha(image)
                self._format = image.format or ""
                self._is_large = _count(image) > WHOLE_PX
                self._layout = raw_layout(image) if self._is_large else None
                if self._is_large and self._layout is None:
                    self._check_large(image)
        self._image: Image.Image | None = None
        self._rows: PixelRows | None = None
        self._fault = ""

    def _check(self, image: Image.Image) -> None:
        if image.mode.startswith(("I", "F")):
            raise UserError(
                f"{self.path}: has pixels of mode {image.mode}; images must have 8 bits a sample. Convert it."
            )
        if _count(image) > MAX_PX:
            raise UserError(f"{self._size()}; the limit is {MAX_PX / 1e6:.0f} Mpx. Convert it to a tiled TIFF.")

    def _check_large(self, image: Image.Image) -> None:
        """Refuses images that no decoder reads in parts.

        Raises:
            UserError: decoding would take more memory than a worker may use.
        """
        odd_alpha = self._alpha and (image.mode in ("1", "L") or (self._format == "PNG" and png_depth(self.path) > 8))
        if self._format not in SPOOLED_FORMATS or odd_alpha:
            kind = f"{self._format} of mode {image.mode}" + (" with transparency" if odd_alpha else "")
            raise UserError(
                f"{self._size()}, and {kind} is decoded whole, up to {WHOLE_PX / 1e6:.0f} Mpx. "
                "Convert it to a tiled TIFF, or to an ordinary PNG."
            )
        kind = SPOOLED_FORMATS[self._format]
        held = held_bytes(self.path, kind)
        if kind == "WEBP" and self.path.stat().st_size > MAX_WEBP_BYTES:
            raise UserError(f"{self._size()}; WebP files of this size may have up to 67 MB. Convert it to PNG.")
        if held > HELD_BYTES:
            remedy = {
                "JPEG": "It is progressive: make it sequential without loss (jpegtran -outfile NEW OLD)",
                "WEBP": "It is lossless, transparent or animated: convert it to PNG",
                "PNG": "Its data are in one chunk: write it anew with another program",
            }[kind]
            raise UserError(
                f"{self._size()}, and decoding it takes {held / 1e6:.0f} MB at once; the limit is "
                f"{HELD_BYTES / 1e6:.0f} MB. {remedy}, or convert it to a tiled TIFF."
            )

    def _size(self) -> str:
        return f"{self.path}: {self.dimensions[0]} x {self.dimensions[1]} px"

    def read_region(self, location_px: tuple[int, int], level: int, size_px: tuple[int, int]) -> Pixels:
        try:
            if self._is_large:
                return self._large().region(location_px, size_px)
            (x, y), (w, h) = location_px, size_px
            return np.array(self._whole().crop((x, y, x + w, y + h)))
        except (OSError, SyntaxError, ValueError) as error:
            raise RegionError(region_message(self.path, location_px, level, error)) from error

    def _large(self) -> PixelRows:
        if self._rows is None:
            self._rows = self._first_time(self._open_rows)
        return self._rows

    def _whole(self) -> Image.Image:
        if self._image is None:
            self._image = self._first_time(self._decoded)
        return self._image

    def _first_time(self, function: Callable[[], T]) -> T:
        """Remembers a failure: every other region would be decoded from the start only to fail in the same way."""
        if self._fault:
            raise OSError(self._fault)
        try:
            return function()
        except (OSError, SyntaxError, ValueError) as error:
            self._fault = str(error)
            raise

    def _open_rows(self) -> PixelRows:
        if self._layout is not None:
            return PixelRows(os.open(self.path, os.O_RDONLY), self._layout)
        if fault := damage(self.path, SPOOLED_FORMATS[self._format]):
            raise OSError(fault)
        return spool(self.path, self.dimensions, self._alpha)

    def _decoded(self) -> Image.Image:
        with Image.open(self.path) as image:
            if self._alpha:
                rgba = image.convert("RGBA")
                seen = rgba.getchannel("A").point([0] + [255] * 255)
                return Image.composite(rgba.convert("RGB"), Image.new("RGB", rgba.size), seen)
            return image.convert("RGB")

    def block_boxes(self, level: int, multiple_px: int) -> Iterator[Box]:
        """Bands over the whole width of a large image, as its rows lie in the file."""
        if not self._is_large:
            return super().block_boxes(level, multiple_px)
        rows = max(1, BAND_PX // self.dimensions[0] // multiple_px) * multiple_px
        return boxes(self.dimensions, (self.dimensions[0], rows))

    def release(self) -> None:
        self._image = None

    def close(self) -> None:
        self._image = None
        if self._rows is not None:
            self._rows.close()
        self._rows = None


def _count(image: Image.Image) -> int:
    return image.size[0] * image.size[1]


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def raw_layout(image: Image.Image) -> Layout | None:
    """Where the pixels of an uncompressed image lie in its file (BMP, PPM, TGA); None for other images.

    Pillow describes them as one tile of the codec ``raw``, with the order of the bytes, the bytes of a row and -1
    where the last row comes first.
    """
    tiles = getattr(image, "tile", [])
    if len(tiles) != 1 or tiles[0][0] != "raw" or "transparency" in image.info:
        return None
    _, box, offset, args = tiles[0]
    order, stride, direction = (*((args,) if isinstance(args, str) else args), 0, 1)[:3]
    width, height = image.size
    if order not in ORDERS or tuple(box or ()) != (0, 0, width, height):
        return None
    if image.mode != {"L": "L", "RGBA": "RGBA", "BGRA": "RGBA"}.get(order, "RGB"):
        return None
    layout = Layout(width, height, order, offset, stride or width * len(order))
    if direction == -1:
        layout = layout._replace(offset=offset + (height - 1) * layout.stride, stride=-layout.stride)
    return layout
