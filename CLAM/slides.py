"""Slides behind one small interface: whatever OpenSlide opens, and ordinary images as one-level slides.

    with open_slide("a.svs") as slide:
        pixels = slide.read_region((x, y), level, (w, h))  # uint8 (h, w, 3), RGB

Locations are level-0 pixels (px), sizes are pixels of the level read. Outside the slide, and where a slide is
transparent, pixels are black, as OpenSlide's RGBA gives them when alpha is dropped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import openslide
from patch_tiles import JpegTiles, TileError
from PIL import Image, UnidentifiedImageError

from utils.errors import UserError

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

PLAUSIBLE_MPP = (0.04, 20.0)
"""Files claim 72 dpi (353 um/px) or 0: outside these um/px the entry is a placeholder and counts as
missing."""

MAX_WHOLE_PX = 178_000_000
"""PNG, JPEG and WebP can only be decoded whole, at 4 bytes a pixel: 710 MB. Pillow itself refuses more."""

MUCH_WHOLE_PX = 60_000_000
"""Above this an image takes more than the 500 MB that a worker otherwise stays under, which is said."""

BLOCK_PX = 2048
"""Edge of the blocks in which a whole level is read: 16 MB of RGBA, a multiple of the usual tile sizes."""

WHOLE_LEVEL_PX = 60_000_000
"""Levels up to here are read by one call where tiles cannot be read directly: 240 MB of RGBA."""


TRIAL_PX = 256
"""Edge of the region that direct decoding must reproduce before it is trusted with a slide."""


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
        return open_slide, (str(self.path),)


class OpenSlideSlide(Slide):
    """A file that OpenSlide opens."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._handle = openslide.OpenSlide(str(path))
        self.level_dimensions = self._handle.level_dimensions
        self.mpp, self.mpp_source = openslide_mpp(dict(self._handle.properties))
        self.objective_power = _positive(self._handle.properties.get("openslide.objective-power"))

    def best_level(self, downsample: float) -> int:
        return int(self._handle.get_best_level_for_downsample(downsample))

    def read_region(self, location_px: tuple[int, int], level: int, size_px: tuple[int, int]) -> Pixels:
        return _rgb(self._read(location_px, level, size_px))

    def _read(self, location_px: tuple[int, int], level: int, size_px: tuple[int, int]) -> Image.Image:
        x, y = int(location_px[0]), int(location_px[1])
        try:
            return self._handle.read_region((x, y), level, (int(size_px[0]), int(size_px[1])))
        except openslide.OpenSlideError as error:
            # OpenSlide refuses everything after an error: only a new handle reads the rest of the slide.
            self._handle.close()
            self._handle = openslide.OpenSlide(str(self.path))
            raise RegionError(_region_message(self.path, (x, y), level, error)) from error

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
        """A reader of the level's JPEG tiles, if it gives OpenSlide's pixels for a tile in the middle of
        level 0.
        """
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
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise RegionError(_region_message(self.path, (0, 0), 0, error)) from error

    def release(self) -> None:
        self._image = None

    def close(self) -> None:
        self._image = None


def open_slide(path: str | Path) -> Slide:
    """Opens a slide or an ordinary image.

    Raises:
        UserError: the file is missing, damaged, or of a kind that cannot be read; the message names it and
        the reason.
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
    if is_tiff(path):
        from flat_tiff import FlatTiffSlide

        return FlatTiffSlide(path)
    return ImageSlide(path)


def is_tiff(path: Path) -> bool:
    """Whether the file starts as a TIFF or BigTIFF of either byte order."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _rgb(image: Image.Image) -> Pixels:
    """An RGBA image's colours, (h, w, 3)."""
    return np.asarray(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGBA2RGB), np.uint8)


def boxes(size_px: tuple[int, int], block_px: tuple[int, int]) -> Iterator[Box]:
    """Boxes (x, y, width, height) that cover an image row by row; sizes are (width, height)."""
    (width, height), (step_x, step_y) = size_px, block_px
    for y in range(0, height, step_y):
        for x in range(0, width, step_x):
            yield x, y, min(step_x, width - x), min(step_y, height - y)


def openslide_mpp(properties: dict[str, str]) -> tuple[float | None, str | None]:
    """The mean um/px of x and y in OpenSlide's properties and where it stands; None where nothing
    plausible does.
    """
    x, y = (_positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x and y and _plausible((x + y) / 2):
        return (x + y) / 2, "openslide.mpp"
    unit = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", ""))
    resolution = _positive(properties.get("tiff.XResolution"))
    if unit and resolution and _plausible(unit / resolution):
        return unit / resolution, "tiff.XResolution"
    return None, None


def _plausible(mpp: float) -> bool:
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def _positive(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _region_message(path: Path, location_px: tuple[int, int], level: int, error: Exception) -> str:
    return f"{path}: the region at {location_px} (level-0 px), level {level}, cannot be decoded: {error}"
