"""What a slide is, whatever it is read with.

Locations are level-0 pixels (px), sizes are pixels of the level read. Outside the slide, and where a slide is
transparent, pixels are black, as OpenSlide's RGBA gives them when alpha is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from utils.errors import UserError

log = logging.getLogger(__name__)

# Work is split over slides and processes. OpenCV's own threads would fight over the same cores, and a process forked
# after they have started hangs in its first call of OpenCV.
cv2.setNumThreads(1)

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

BLOCK_PX = 2048
"""Edge of the blocks in which a whole level is read: 16 MB of RGBA, a multiple of the usual tile sizes."""


class RegionError(UserError):
    """A region of a readable slide could not be decoded. The slide stays usable for other regions."""


class Block(NamedTuple):
    """A rectangle of a level: its corner and size in px of that level, and its pixels (None: corrupt)."""

    x: int
    y: int
    width: int
    height: int
    pixels: Pixels | None


class Slide:
    """A slide of one or more levels. Subclasses fill the fields and read regions.

    Pickling keeps the path only: the copy opens the file again, in whichever process it arrives.
    """

    path: Path
    name: str
    level_dimensions: tuple[tuple[int, int], ...]
    mpp: float | None = None
    mpp_source: str | None = None
    objective_power: float | None = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = self.path.stem

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) of level 0 in px."""
        return self.level_dimensions[0]

    @property
    def level_downsamples(self) -> tuple[tuple[float, float], ...]:
        """(W0 / Wl, H0 / Hl) of every level."""
        width, height = self.dimensions
        return tuple((width / w, height / h) for w, h in self.level_dimensions)

    def best_level(self, downsample: float) -> int:
        """The coarsest level that is not coarser than ``downsample``."""
        means = [(x + y) / 2 for x, y in self.level_downsamples]
        return max((i for i, mean in enumerate(means) if mean <= downsample), default=0)

    def read_region(self, location_px: tuple[int, int], level: int, size_px: tuple[int, int]) -> Pixels:
        """The pixels of a region.

        Args:
            location_px: (x, y) of its corner in level-0 px.
            level: level to read from.
            size_px: (width, height) in px of that level.

        Returns:
            (height, width, 3) uint8, RGB.

        Raises:
            RegionError: the file is damaged there.
        """
        raise TypeError(f"{type(self).__name__} does not read regions.")

    def blocks(self, level: int, multiple_px: int = 1) -> Iterator[Block]:
        """The whole level, block by block.

        Corners lie on multiples of ``multiple_px``. A damaged block comes with ``pixels`` None and a warning.
        """
        for box in self.block_boxes(level, multiple_px):
            yield self._block(level, box)

    def block_boxes(self, level: int, multiple_px: int) -> Iterator[Box]:
        """Boxes that cover a level row by row, of a size that the file reads well."""
        edge = max(1, BLOCK_PX // multiple_px) * multiple_px
        return boxes(self.level_dimensions[level], (edge, edge))

    def _block(self, level: int, box: Box) -> Block:
        x, y, w, h = box
        scale_x, scale_y = self.level_downsamples[level]
        try:
            pixels = self.read_region((round(x * scale_x), round(y * scale_y)), level, (w, h))
        except RegionError as error:
            log.warning("%s", error)
            return Block(*box, None)
        return Block(*box, pixels)

    def release(self) -> None:
        """Forgets decoded pixels; a later read decodes them again."""

    def close(self) -> None:
        """Releases the file."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[str], Slide], tuple[str]]:
        return type(self), (str(self.path),)


def boxes(size_px: tuple[int, int], block_px: tuple[int, int]) -> Iterator[Box]:
    """Boxes (x, y, width, height) that cover an image row by row; sizes are (width, height)."""
    (width, height), (step_x, step_y) = size_px, block_px
    for y in range(0, height, step_y):
        for x in range(0, width, step_x):
            yield x, y, min(step_x, width - x), min(step_y, height - y)


def region_message(path: Path, location_px: tuple[int, int], level: int, error: Exception) -> str:
    """The sentence of a RegionError."""
    return f"{path}: the region at {location_px} (level-0 px), level {level}, cannot be decoded: {error}"
