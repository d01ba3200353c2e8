"""Where on the slide the instances of a bag lie: columns and rows of the patch grid, for heads that use them.

Coordinates are level-0 px corners from a store, from feature files or from ``<slide>.h5`` files. One cell of the grid
is one step of the high magnification, so patches of the low one lie on the same grid. The published program divides by
the patch size and rounds down; here the step is the spacing found in the coordinates themselves, which needs no
attributes and fits overlapping patches, and rounding is to the nearest cell, so that slides whose downsampling is not
a whole number do not fill a cell twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError, did_you_mean

Cells = NDArray[np.int64]


class Coordinates(Protocol):
    """A store, a feature folder, or a folder of coordinate files."""

    def coords(self, slide: str) -> NDArray[np.int64] | None:
        """(N, 2) level-0 px corners (x, y) of a slide's instances; None when they are not known."""
        ...


class CoordinateFolder:
    """A folder of ``<slide>.h5`` files with a dataset ``coords``, as CLAM and TRIDENT write them.

    Args:
        path: the folder, or the output folder of patching, whose files lie in ``patches/``.

    Raises:
        UserError: no such folder, or no .h5 file in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{self.path}: there is no such folder of coordinates; correct --h5_path or --h5_sub_path.")
        for folder in (self.path, self.path / "patches"):
            self._files = {file.stem: file for file in sorted(folder.glob("*.h5"))}
            if self._files:
                return
        raise UserError(f"{self.path}: holds no <slide>.h5, neither itself nor in patches/. Give the folder of them.")

    def coords(self, slide: str) -> NDArray[np.int64]:
        """The corners of one slide; its file may be named with or without the slide's extension.

        Raises:
            UserError: no such file, or no dataset ``coords`` in it.
        """
        from datasets.features import read_coords  # h5py is needed for coordinate files only

        file = self._files.get(slide) or self._files.get(Path(slide).stem)
        if file is None:
            raise UserError(f"{self.path}: there is no {slide}.h5.{did_you_mean(slide, self._files)}")
        corners = read_coords(file)
        if corners is None:
            raise UserError(f"{file}: has no dataset 'coords'.")
        return corners


@dataclass(frozen=True)
class Grid:
    """The grid positions of one source's instances.

    Attributes:
        own: coordinates of the instances.
        unit: coordinates whose spacing is one cell: those of the high magnification.
    """

    own: Coordinates
    unit: Coordinates

    def cells(self, slide: str) -> Cells:
        """(N, 2) columns and rows of a slide's instances; raises UserError where they are not known."""
        step_px = grid_step_px(_known(self.unit, slide))
        return np.rint(_known(self.own, slide) / step_px).astype(np.int64)

    def columns(self, slide: str) -> int:
        """Width in cells that keeps slides apart which lie side by side, the same for both magnifications."""
        corners = _known(self.unit, slide)
        return int(corners[:, 0].max() // grid_step_px(corners)) + 4 if len(corners) else 1


def _known(source: Coordinates, slide: str) -> NDArray[np.int64]:
    corners = source.coords(slide)
    if corners is None:
        raise UserError(
            f"{getattr(source, 'path', source)}: the coordinates of slide {slide!r} are not known. Give the folder of "
            "<slide>.h5 files as --h5_path (and --h5_sub_path for the low magnification)."
        )
    return corners


def grid_step_px(corners: NDArray[np.int64]) -> int:
    """The most frequent distance in px between neighbours in a row or column; 1 for patches without neighbours.

    >>> grid_step_px(np.array([[0, 0], [256, 0], [1024, 0], [0, 256]]))
    256
    """
    gaps = np.concatenate([_gaps(corners, along=0), _gaps(corners, along=1)])
    values, counts = np.unique(gaps[gaps > 0], return_counts=True)
    return int(values[counts.argmax()]) if len(values) else 1


def _gaps(corners: NDArray[np.int64], along: int) -> NDArray[np.int64]:
    across = 1 - along
    rows = corners[np.lexsort((corners[:, along], corners[:, across]))]
    same = rows[1:, across] == rows[:-1, across]
    return (rows[1:, along] - rows[:-1, along])[same]
