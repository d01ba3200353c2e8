"""Bags: what one slide (or case) gives to one training step or one evaluation, from pixels or from features.

A source knows how many instances a bag has and loads some of them. ``TrainBags`` samples instances at random from one
or two magnifications (multi-scale random instance sampling, paper section 2, Eq. 2); ``EvalParts`` walks through all
instances of the high magnification in pieces of bounded size. Every draw is a function of (seed, epoch, sample), so
workers, ranks and restarts do not change it.

Shapes: B bags, P instances of all bags one behind another, S stored size in px, D feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.jpeg import JpegError, decode
from datasets.labels import Sample
from datasets.sampling import Regions, regional_order
from datasets.store import PatchStore
from datasets.views import ViewPlan, share_per_chunk
from utils.errors import UserError

if TYPE_CHECKING:
    from datasets.features import FeatureFolder
    from datasets.positions import Grid


@dataclass
class Bags:
    """One batch of bags.

    Attributes:
        instances: (P, S, S, 3) uint8 patches or (P, D) float features, bag by bag.
        sizes: instances per bag.
        index: position of each bag's sample in its split.
        target: (B,) tensors by name, as the task needs them.
        draws: (P, 8) views of training patches, on the CPU (see datasets.views); None: whole patches.
        keep: (P,) bool in host memory, False for duplicates that only the encoder sees; None: all take part.
        last: in evaluation, whether this part completes its bag.
        pos: (P, 2) columns and rows of the patch grid, for heads that use them; None: not asked for.
    """

    instances: Tensor
    sizes: list[int]
    index: list[int]
    target: dict[str, Tensor]
    draws: Tensor | None = None
    keep: Tensor | None = None
    last: bool = True
    pos: Tensor | None = None

    def to(self, device: torch.device) -> Bags:
        """A copy with what the model takes on ``device``; draws and keep stay in host memory, where they are read."""
        return dataclasses.replace(
            self,
            instances=self.instances.to(device, non_blocking=True),
            target={k: v.to(device, non_blocking=True) for k, v in self.target.items()},
            pos=None if self.pos is None else self.pos.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Bags:
        """Called by the DataLoader: page-locked copies, so that transfers overlap with computing."""
        return dataclasses.replace(
            self,
            instances=self.instances.pin_memory(),
            target={k: v.pin_memory() for k, v in self.target.items()},
            draws=None if self.draws is None else self.draws.pin_memory(),
            pos=None if self.pos is None else self.pos.pin_memory(),
        )


class Source(Protocol):
    """Where the instances of a bag come from."""

    @property
    def grid(self) -> Grid | None:
        """Positions of the instances; None where no head asks for them."""
        ...

    def count(self, slide: str) -> int:
        """Instances of one slide."""
        ...

    def load(self, slide: str, picks: np.ndarray) -> Tensor:
        """The instances ``picks`` of one slide, in that order."""
        ...


@dataclass(frozen=True)
class PixelSource:
    """Patches of a store, decoded to (n, S, S, 3) uint8."""

    store: PatchStore
    order: str = "rgb"
    grid: Grid | None = None

    def count(self, slide: str) -> int:
        return self.store.counts[slide]

    def load(self, slide: str, picks: np.ndarray) -> Tensor:
        side = self.store.image_size_px
        patches = np.empty((len(picks), side, side, 3), np.uint8)
        for row, (pick, data) in enumerate(zip(picks, self.store.read(slide, picks.tolist()), strict=True)):
            try:
                image = decode(data, order=self.order)
            except JpegError as error:
                raise UserError(
                    f"{self.store.path}: patch {pick} of slide {slide!r} is no readable JPEG ({error}). "
                    "Run 'python -m datasets.store verify' on the store and write the slide anew."
                ) from error
            if image.shape != (side, side, 3):
                raise UserError(
                    f"{self.store.path}: patch {pick} of slide {slide!r} is {image.shape[1]} x {image.shape[0]} px, "
                    f"the store's size is {side} px. Write the store with one --img_size for all slides."
                )
            patches[row] = image
        return torch.from_numpy(patches)


@dataclass(frozen=True)
class FeatureSource:
    """Pre-extracted features, (n, D) in the precision of the files."""

    folder: FeatureFolder
    grid: Grid | None = None

    def count(self, slide: str) -> int:
        return self.folder.counts[slide]

    def load(self, slide: str, picks: np.ndarray) -> Tensor:
        features = self.folder.read(slide)
        whole = len(picks) == len(features) and bool((picks == np.arange(len(features))).all())
        return features if whole else features[torch.from_numpy(picks)]


def bag_size(source: Source, slides: Sequence[str]) -> int:
    """Instances of a bag made of ``slides``."""
    return sum(source.count(slide) for slide in slides)


def load_instances(source: Source, slides: Sequence[str], picks: np.ndarray) -> Tensor:
    """Instances ``picks`` of a bag, numbered through its slides in order; the result keeps the order of ``picks``."""
    if len(slides) == 1:
        return source.load(slides[0], picks)
    ends = np.cumsum([source.count(slide) for slide in slides])
    owner = np.searchsorted(ends, picks, side="right")
    rows = [np.flatnonzero(owner == s) for s in range(len(slides))]
    begins = np.concatenate([[0], ends[:-1]])
    parts = [source.load(slides[s], picks[r] - begins[s]) for s, r in enumerate(rows) if len(r)]
    back = np.argsort(np.concatenate([r for r in rows if len(r)]))
    return torch.cat(parts)[torch.from_numpy(back)]


def load_positions(source: Source, slides: Sequence[str], picks: np.ndarray) -> Tensor | None:
    """(n, 2) grid positions of the instances ``picks`` of a bag; slides of one bag lie side by side."""
    if source.grid is None:
        return None
    cells, left = [], 0
    for slide in slides:
        cells.append(source.grid.cells(slide) + (left, 0))
        left += source.grid.columns(slide)
    return torch.from_numpy(np.concatenate(cells)[picks])


@dataclass(frozen=True)
class SamplingPlan:
    """How many instances a training bag takes from each magnification.

    Attributes:
        total: instances per bag; 0 takes all.
        low_ratio: with two magnifications, floor(total / low_ratio) come from the low one, the rest from the high one.
        pad: extend a magnification that is too short with random duplicates.
        duplicates_in_head: whether those duplicates reach the MIL head or only the encoder.
        shuffle: a random order also where all instances are taken.
        regions: regions of the bag of which each gives one instance before any gives a second; None: uniform draws.
    """

    total: int
    low_ratio: float = 2.0
    pad: bool = False
    duplicates_in_head: bool = True
    shuffle: bool = False
    regions: Regions | None = None

    def wanted(self, scales: int) -> list[int | None]:
        """Instances per magnification, low first; None takes all."""
        if self.total == 0:
            return [None] * scales
        if scales == 1:
            return [self.total]
        low = int(self.total // self.low_ratio)
        return [low, self.total - low]


def pick(
    count: int, wanted: int | None, pad: bool, rng: np.random.Generator, regions: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Draws ``wanted`` of ``count`` instances without replacement, from each of ``regions`` (count,) first.

    Returns:
        The drawn positions, duplicates last, and how many of them are no duplicates.
    """
    if wanted is None:
        return np.arange(count), count
    chosen = (rng.permutation(count) if regions is None else regional_order(regions, rng))[:wanted]
    if not pad or len(chosen) == wanted:
        return chosen, len(chosen)
    return np.concatenate([chosen, rng.integers(0, count, wanted - len(chosen))]), len(chosen)


class TrainBags(Dataset[Bags]):
    """Training bags. An item is addressed by (epoch, position), so that workers need not be told the epoch.

    Args:
        samples: the training split.
        sources: one source, or (low, high) magnification.
        plan: how many instances a bag takes.
        views: random views of patches; None for features.
        seed: base of every draw.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        sources: Sequence[Source],
        plan: SamplingPlan,
        views: ViewPlan | None = None,
        seed: int = 0,
    ) -> None:
        self.samples, self.sources, self.plan, self.views, self.seed = samples, sources, plan, views, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Bags:
        epoch, position = key
        sample = self.samples[position]
        rng = np.random.default_rng([self.seed, epoch, position])
        parts, keep, pos = [], [], []
        for source, wanted in zip(self.sources, self.plan.wanted(len(self.sources)), strict=True):
            count = bag_size(source, sample.slides)
            regions = self._regions(source, sample, count)
            wanted = count if wanted is None and self.plan.shuffle else wanted
            picks, fresh = pick(count, wanted, self.plan.pad, rng, regions)
            parts.append(load_instances(source, sample.slides, picks))
            pos.append(load_positions(source, sample.slides, picks))
            keep.append(torch.arange(len(picks)) < fresh)
        instances = join(parts)
        kept = torch.cat(keep)
        return Bags(
            instances=instances,
            sizes=[len(instances)],
            index=[position],
            target=as_target(sample.target),
            draws=None if self.views is None else torch.from_numpy(self.views.draw(len(instances), rng)),
            keep=None if self.plan.duplicates_in_head or bool(kept.all()) else kept,
            pos=join([p for p in pos if p is not None]) if pos[0] is not None else None,
        )

    def _regions(self, source: Source, sample: Sample, count: int) -> np.ndarray | None:
        if self.plan.regions is None:
            return None
        where = load_positions(source, sample.slides, np.arange(count)) if self.plan.regions.grid else None
        return self.plan.regions.of(count, None if where is None else where.numpy())


class EvalParts(Dataset[Bags]):
    """All instances of every bag, in order, in parts of at most ``part_size``: memory does not grow with the bag."""

    def __init__(self, samples: Sequence[Sample], source: Source, part_size: int, positions: Sequence[int]) -> None:
        self.samples, self.source = samples, source
        self.parts = [
            (p, begin, min(begin + part_size, n), n)
            for p in positions
            for n in (bag_size(source, samples[p].slides),)
            for begin in range(0, n, part_size)
        ]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Bags:
        position, begin, end, size = self.parts[i]
        sample, picks = self.samples[position], np.arange(begin, end)
        return Bags(
            instances=load_instances(self.source, sample.slides, picks),
            sizes=[end - begin],
            index=[position],
            target=as_target(sample.target),
            last=end == size,
            pos=load_positions(self.source, sample.slides, picks),
        )


def as_target(target: Mapping[str, float]) -> dict[str, Tensor]:
    """(1,) tensors: int64 for labels and events, float64 for times and values."""
    real = ("time", "value")
    return {k: torch.tensor([v], dtype=torch.float64 if k in real else torch.int64) for k, v in target.items()}


def collate(items: Sequence[Bags], crop_groups: int = 0) -> Bags:
    """Joins bags into one batch.

    Args:
        items: bags of one batch.
        crop_groups: with n > 0, n consecutive groups of patches share one crop and shift (published behaviour).
    """
    draws = None if items[0].draws is None else torch.cat([b.draws for b in items if b.draws is not None])
    keep = None
    if any(b.keep is not None for b in items):
        keep = torch.cat([b.keep if b.keep is not None else torch.ones(sum(b.sizes), dtype=torch.bool) for b in items])
    return Bags(
        instances=join([b.instances for b in items]),
        sizes=[n for b in items for n in b.sizes],
        index=[i for b in items for i in b.index],
        target={k: torch.cat([b.target[k] for b in items]) for k in items[0].target},
        draws=None if draws is None else share_per_chunk(draws, crop_groups),
        keep=keep,
        last=items[-1].last,
        pos=join([b.pos for b in items if b.pos is not None]) if items[0].pos is not None else None,
    )


def join(parts: Sequence[Tensor]) -> Tensor:
    """``parts`` one behind another; a single one is passed on without a copy, as bags may be large."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
