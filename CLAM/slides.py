"""Opens slides: whatever OpenSlide opens, and ordinary images as one-level slides.

with open_slide("a.svs") as slide:
pixels = slide.read_region((x, y), level, (w, h))  # uint8 (h, w, 3), RGB
"""

from __future__ import annotations

from pathlib import Path

import openslide
from flat_tiff import FlatTiffSlide
from PIL import Image, UnidentifiedImageError
from slide import Slide
from slide_image import ImageSlide
from slide_openslide import OpenSlideSlide

from utils.errors import UserError


def open_slide(path: str | Path) -> Slide:
    """Opens a slide or an ordinary image.

    Raises:
        UserError: the file is missing, damaged, or of a kind that cannot be read; the message names it and the reason.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file. Check the slide folder and the file extension.")
    try:
        return _opened(path)
    except (
        openslide.OpenSlideError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        ValueError,
    ) as error:
        raise UserError(f"{path}: cannot be opened as a slide or an image: {error}") from error


def _opened(path: Path) -> Slide:
    if openslide.OpenSlide.detect_format(str(path)) is not None:
        return OpenSlideSlide(path)
    return FlatTiffSlide(path) if is_tiff(path) else ImageSlide(path)


def is_tiff(path: Path) -> bool:
    """Whether the file starts as a TIFF or BigTIFF of either byte order."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
