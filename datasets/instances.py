"""Instances of bags: where they come from, and how some of them are loaded.

Shapes: S stored size in px, D feature width.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from datasets.gpu_jpeg.stacks import pack
from datasets.jpeg import JpegError, decode, image_size
from datasets.ring import Form
from datasets.store import PatchStore
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.features import FeatureFolder
    from datasets.positions import Grid


class Source(Protocol):
    """Where the instances of a bag come from."""

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


@dataclass(frozen=True)
class PixelSource:
    """Patches of a store, decoded to (n, S, S, 3) uint8."""

    store: PatchStore
    order: str = "rgb"
    grid: Grid | None = None

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
class CodedSource(PixelSource):
    """Patches of a store as they are stored, for a GPU that decodes them (datasets.gpu_jpeg.coded)."""

    def room(self, count: int) -> None:
        """Nothing is decoded here."""

    def jpegs(self, slides: Sequence[str], picks: np.ndarray) -> list[bytes]:
        """The instances ``picks`` of a bag.

        Raises:
            UserError: for what is no JPEG of the store's size.
        """
        found: dict[int, bytes] = {}
        for slide, rows, own in by_slide(self, slides, picks):
            for row, pick, jpeg in zip(rows, own, self.store.read(slide, own.tolist()), strict=True):
                self._check(slide, pick, jpeg)
                found[int(row)] = jpeg
        return [found[row] for row in range(len(picks))]

    def _check(self, slide: str, pick: int, jpeg: bytes) -> None:
        wanted = (self.store.image_size_px, self.store.image_size_px)
        try:
            size = image_size(jpeg)  # the GPU's decoder writes as much as the JPEG says
        except JpegError as error:
            raise broken_patch(self.store, slide, pick, error) from error
        if size != wanted:
            raise broken_patch(self.store, slide, pick, f"it holds {size[0]} x {size[1]} px")


@dataclass(frozen=True)
class FeatureSource:
    """Pre-extracted features, (n, D) in the precision of the files."""

    folder: FeatureFolder
    grid: Grid | None = None

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
    if len(slides) == 1 or len(picks) == 0:
        return source.load(slides[0], picks, out)
    shares = list(by_slide(source, slides, picks))
    back = np.argsort(np.concatenate([rows for _, rows, _ in shares]))
    joined = join([source.load(slide, own) for slide, _, own in shares])[torch.from_numpy(back)]
    return joined if out is None else out.copy_(joined)


def by_slide(source: Source, slides: Sequence[str], picks: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each slide that ``picks`` take from, which of them those are, and their numbers on the slide."""
    ends = np.cumsum([source.count(slide) for slide in slides])
    owner = np.searchsorted(ends, picks, side="right")
    for number, slide in enumerate(slides):
        rows = np.flatnonzero(owner == number)
        if len(rows):
            yield slide, rows, picks[rows] - (ends[number - 1] if number else 0)


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


def load_segments(segments: Sequence[Segment], room: Tensor | None = None) -> Tensor:
    """The instances of ``segments`` one after another, in ``room`` where it is given; JPEGs are packed.

    The sources of all segments are of one kind.
    """
    coded = [s.jpegs(slides, picks) for s, slides, picks in segments if isinstance(s, CodedSource)]
    if coded:
        return pack(list(itertools.chain(*coded)))
    parts, begin = [], 0
    for source, slides, picks in segments:
        out = None if room is None else room[begin : begin + len(picks)]
        parts.append(load_instances(source, slides, picks, out))
        begin += len(picks)
    return join(parts) if room is None else room


def join(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` one after another; a single part is passed on without a copy, as bags may be large."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
