"""Instances of bags: where they come from, and how some of them are loaded.

Shapes: S stored size in px, D feature width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from datasets.jpeg import JpegError, decode
from datasets.ring import Form
from datasets.store import PatchStore
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.features import FeatureFolder
    from datasets.positions import Grid


class Source(Protocol):
    """Where the instances of a bag come from."""

    coded: ClassVar[bool]
    """Whether instances are JPEGs that somebody has to decode (datasets.coded)."""

    @property
    def grid(self) -> Grid | None:
        """Positions of the instances; None where no head asks for them."""
        ...

    def count(self, slide: str) -> int:
        """Instances of one slide."""
        ...

    def form(self, slide: str) -> Form:
        """Shape and type of the instances of one slide."""
        ...

    def room(self, count: int) -> Tensor | None:
        """Memory for ``count`` instances to be loaded into; None where they are not copied one by one."""
        ...

    def load(self, slide: str, picks: np.ndarray, out: Tensor | None = None) -> Tensor:
        """The instances ``picks`` of one slide, in that order; in ``out``, where it is given."""
        ...

    def at(self, *place: int) -> Source:
        """What is read from for the batch that begins with (epoch, position), or the part of an evaluation."""
        ...


@dataclass(frozen=True)
class PixelSource:
    """Patches of a store, decoded to (n, S, S, 3) uint8."""

    store: PatchStore
    order: str = "rgb"
    grid: Grid | None = None
    coded: ClassVar[bool] = False

    def at(self, *place: int) -> PixelSource:
        return self

    def count(self, slide: str) -> int:
        return self.store.counts[slide]

    def form(self, slide: str) -> Form:
        return (self.store.image_size_px, self.store.image_size_px, 3), torch.uint8

    def room(self, count: int) -> Tensor | None:
        return _patch_memory((count, self.store.image_size_px, self.store.image_size_px, 3))

    def load(self, slide: str, picks: np.ndarray, out: Tensor | None = None) -> Tensor:
        side_px = self.store.image_size_px
        patches = _patch_memory((len(picks), side_px, side_px, 3)) if out is None else out
        rows = patches.numpy()
        for row, (pick, data) in enumerate(zip(picks, self.store.read(slide, picks.tolist()), strict=True)):
            try:
                decode(data, order=self.order, out=rows[row])
            except JpegError as error:
                raise broken_patch(self.store, slide, pick, error) from error
        return patches


def _patch_memory(shape: tuple[int, ...]) -> Tensor:
    """Uint8; in a reading process in shared memory, from where the training process takes it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def broken_patch(store: PatchStore, slide: str, pick: int, reason: object) -> UserError:
    """What to say about a stored patch that cannot be used."""
    return UserError(
        f"{store.path}: patch {pick} of slide {slide!r} is no JPEG of the store's size, {store.image_size_px} px: "
        f"{reason}. Run 'python -m datasets.store verify' on the store and write the slide anew, all slides with one "
        "--img_size."
    )


@dataclass(frozen=True)
class FeatureSource:
    """Pre-extracted features, (n, D) in the precision of the files."""

    folder: FeatureFolder
    grid: Grid | None = None
    coded: ClassVar[bool] = False

    def at(self, *place: int) -> FeatureSource:
        return self

    def count(self, slide: str) -> int:
        return self.folder.counts[slide]

    def form(self, slide: str) -> Form:
        _, width, dtype = self.folder.layout(slide)
        return (width,), dtype

    def room(self, count: int) -> None:
        """Features are picked in one go, or passed on as they are mapped into memory."""

    def load(self, slide: str, picks: np.ndarray, out: Tensor | None = None) -> Tensor:
        features = self.folder.read(slide)
        whole = len(picks) == len(features) and bool((picks == np.arange(len(features))).all())
        if not whole and out is not None and out.dtype == features.dtype:
            return torch.index_select(features, 0, torch.from_numpy(picks), out=out)
        chosen = features if whole else features[torch.from_numpy(picks)]
        return chosen if out is None else out.copy_(chosen)


def bag_size(source: Source, slides: Sequence[str]) -> int:
    """Instances of a bag made of ``slides``."""
    return sum(source.count(slide) for slide in slides)


def load_instances(source: Source, slides: Sequence[str], picks: np.ndarray, out: Tensor | None = None) -> Tensor:
    """Instances ``picks`` of a bag, numbered through its slides in order; the result keeps the order of ``picks``."""
    if len(slides) == 1:
        return source.load(slides[0], picks, out)
    ends = np.cumsum([source.count(slide) for slide in slides])
    owner = np.searchsorted(ends, picks, side="right")
    rows = [np.flatnonzero(owner == s) for s in range(len(slides))]
    begins = np.concatenate([[0], ends[:-1]])
    parts = [source.load(slides[s], picks[r] - begins[s]) for s, r in enumerate(rows) if len(r)]
    back = np.argsort(np.concatenate([r for r in rows if len(r)]))
    joined = join(parts)[torch.from_numpy(back)]
    return joined if out is None else out.copy_(joined)


def common_form(forms: Iterable[Form]) -> Form:
    """The form of instances that are joined: of one shape, in a type that holds all of them exactly."""
    shapes, types = zip(*forms, strict=True)
    return shapes[0], functools.reduce(torch.promote_types, types)


def load_positions(source: Source, slides: Sequence[str], picks: np.ndarray) -> Tensor | None:
    """(n, 2) grid positions of the instances ``picks`` of a bag; slides of one bag lie side by side."""
    if source.grid is None:
        return None
    cells, left = [], 0
    for slide in slides:
        cells.append(source.grid.cells(slide) + (left, 0))
        left += source.grid.columns(slide)
    return torch.from_numpy(np.concatenate(cells)[picks])


Segment = tuple[Source, Sequence[str], np.ndarray]
"""A source, the slides of a bag, and the instances that are taken from them."""


def join(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` one behind another, rows of bytes filled up to the longest.

    A single part is passed on without a copy, as bags may be large.
    """
    if len(parts) == 1:
        return parts[0]
    widths = {part.shape[1:] for part in parts}
    if len(widths) > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts]
    return torch.cat(list(parts))
