"""Ordinary images as one-level slides, through Pillow."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from slides import Pixels, RegionError, Slide, region_message

from utils.errors import UserError

log = logging.getLogger(__name__)

MAX_WHOLE_PX = 178_000_000
"""PNG, JPEG and WebP can only be decoded whole, at 4 bytes a pixel: 710 MB. Pillow itself refuses more."""

MUCH_WHOLE_PX = 60_000_000
"""Above this an image takes more than the 500 MB that a worker otherwise stays under, which is said."""


class ImageSlide(Slide):
    """PNG, JPEG, WebP and other images that Pillow decodes; one level, decoded whole at the first read."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(self.path) as image:
                size, mode = image.size, image.mode
        if mode.startswith(("I", "F")):
            raise UserError(f"{path}: has pixels of mode {mode}; images must have 8 bits a sample. Convert it.")
        if size[0] * size[1] > MAX_WHOLE_PX:
            raise UserError(
                f"{path}: {size[0]} x {size[1]} px, and this format can only be decoded whole; the limit is "
                f"{MAX_WHOLE_PX / 1e6:.0f} Mpx. Convert it to a tiled TIFF."
            )
        self.level_dimensions = (size,)
        self._image: Image.Image | None = None

    def read_region(self, location_px: tuple[int, int], level: int, size_px: tuple[int, int]) -> Pixels:
        if self._image is None:
            self._image = self._decoded()
        x, y = location_px
        return np.array(self._image.crop((x, y, x + size_px[0], y + size_px[1])))

    def _decoded(self) -> Image.Image:
        width, height = self.dimensions
        if width * height > MUCH_WHOLE_PX:
            log.warning("%s: decoding it whole takes %d MB", self.path, width * height * 4 // 1_000_000)
        try:
            with Image.open(self.path) as image:
                if "A" in image.getbands() or "transparency" in image.info:
                    rgba = image.convert("RGBA")
                    seen = rgba.getchannel("A").point([0] + [255] * 255)
                    return Image.composite(rgba.convert("RGB"), Image.new("RGB", rgba.size), seen)
                if image.mode == "RGB":
                    # Not convert(), which would hold a second copy of the largest images.
                    image.load()
                    return image
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise RegionError(region_message(self.path, (0, 0), 0, error)) from error

    def release(self) -> None:
        self._image = None

    def close(self) -> None:
        self._image = None
