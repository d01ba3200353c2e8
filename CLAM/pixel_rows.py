"""Uncompressed pixels in a file, read and written row by row.

``pread`` instead of a memory map: pages of a map that were touched count as memory of the process until the kernel
takes them back, and a whole level would.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import cv2
import numpy as np
from slide import Pixels


class Layout(NamedTuple):
    """Where the pixels lie.

    ``order`` names the bytes of a pixel: RGB, BGR, RGBX, BGRX, RGBA, BGRA or L; ``stride`` is the distance in bytes
    from a row to the one below it, which is negative where the last row comes first in the file.
    """

    width: int
    height: int
    order: str
    offset: int = 0
    stride: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's pixels."""
        return self.width * len(self.order)


CONVERSIONS = {
    "BGR": cv2.COLOR_BGR2RGB,
    "RGBX": cv2.COLOR_RGBA2RGB,
    "RGBA": cv2.COLOR_RGBA2RGB,
    "BGRX": cv2.COLOR_BGRA2RGB,
    "BGRA": cv2.COLOR_BGRA2RGB,
    "L": cv2.COLOR_GRAY2RGB,
}
"""How an order becomes RGB."""

ORDERS = ("RGB", *CONVERSIONS)


class PixelRows:
    """Reads boxes of an image that lies uncompressed in a file.

    Args:
        descriptor: an open file; it is closed by ``close``.
        layout: where its pixels lie.
    """

    def __init__(self, descriptor: int, layout: Layout) -> None:
        self._descriptor = descriptor
        self.layout = layout._replace(stride=layout.stride or layout.row_bytes)

    def region(self, corner_px: tuple[int, int], size_px: tuple[int, int]) -> Pixels:
        """(h, w, 3) uint8 RGB; black outside the image and where it is transparent.

        Raises:
            OSError: the file is shorter than its pixels.
        """
        (x, y), (w, h) = corner_px, size_px
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + w, self.layout.width), min(y + h, self.layout.height)
        if x1 <= x0 or y1 <= y0:
            return np.zeros((h, w, 3), np.uint8)
        found = self._box(x0, y0, x1, y1)
        if (w, h) == (x1 - x0, y1 - y0):
            return found
        result = np.zeros((h, w, 3), np.uint8)
        result[y0 - y : y1 - y, x0 - x : x1 - x] = found
        return result

    def _box(self, x0: int, y0: int, x1: int, y1: int) -> Pixels:
        order, stride = self.layout.order, self.layout.stride
        raw = np.empty((y1 - y0, x1 - x0, len(order)), np.uint8)
        wanted = raw.shape[1] * raw.shape[2]
        place = self.layout.offset + y0 * stride + x0 * len(order)
        view = raw.reshape(-1).data
        for start in range(0, len(view), wanted):
            if os.preadv(self._descriptor, [view[start : start + wanted]], place) != wanted:
                raise OSError("the file ends before its pixels do")
            place += stride
        if order == "RGB":
            return raw
        rgb = np.asarray(cv2.cvtColor(raw, CONVERSIONS[order]), np.uint8)
        if order.endswith("A"):
            rgb[raw[..., 3] == 0] = 0
        return rgb

    def write(self, corner_px: tuple[int, int], pixels: Pixels) -> None:
        """Puts (h, w, channels) pixels, in the order of the layout, into their place; what lies beyond is cut off."""
        (x, y), stride = corner_px, self.layout.stride
        part = np.ascontiguousarray(pixels[: self.layout.height - y, : self.layout.width - x])
        place = self.layout.offset + y * stride + x * len(self.layout.order)
        if part.shape[1] == self.layout.width and stride == self.layout.row_bytes:
            self._put(part, place)
            return
        for number, row in enumerate(part):
            self._put(row, place + number * stride)

    def _put(self, data: Pixels, place: int) -> None:
        if os.pwrite(self._descriptor, data.reshape(-1).data, place) != data.nbytes:
            raise OSError("the temporary file cannot be written")

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
