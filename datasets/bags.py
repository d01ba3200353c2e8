"""Bags: what one slide (or case) gives to one training step or one evaluation, from pixels or from features.

``TrainBags`` samples instances at random from one or two magnifications (multi-scale random instance sampling, paper
section 2, Eq. 2). Every draw is a function of (seed, epoch, sample), so workers, ranks and restarts do not change it.
For evaluation see ``datasets.eval_parts``.

Shapes: B bags, P instances of all bags one after another, S stored size in px, D feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.instances import (
    Segment,
    Source,
    bag_size,
    common_form,
    join,
    load_positions,
    load_segments,
)
from datasets.labels import Sample
from datasets.ring import BatchRing, Form
from datasets.sampling import Regions, regional_order
from datasets.upload import upload
from datasets.views import ViewPlan, share_per_chunk

BY_VALUE = 1 << 20
"""Bytes up to which a tensor is copied between processes: taking a shared one over costs the receiver 0.2 ms."""

UNUSED = np.random.default_rng(0)
"""For bags that draw nothing: seeding a generator takes as long as all else about a bag of features."""


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
        call: in evaluation, instances of the encoder call that these belong to; None: they are a call of their own.
        pos: (P, 2) columns and rows of the patch grid, for heads that use them; None: not asked for.
        slot: on its way from a reader, the buffer of datasets.ring that holds the instances.
        form: with a slot, shape and type of an instance; None: that of the buffer.
        waited: seconds that were spent waiting for instances that came later than the bags (datasets.full_bags).
    """

    instances: Tensor
    sizes: list[int]
    index: list[int]
    target: dict[str, Tensor]
    draws: Tensor | None = None
    keep: Tensor | None = None
    last: bool = True
    call: int | None = None
    pos: Tensor | None = None
    slot: int | None = None
    form: Form | None = None
    waited: float = 0.0

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "target": {k: _sent(v) for k, v in self.target.items()}}
        return {k: _sent(v) if isinstance(v, Tensor) else v for k, v in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({k: _received(v) for k, v in state.items()})
        self.target = {k: _received(v) for k, v in self.target.items()}

    def to(self, device: torch.device) -> Bags:
        """A copy with what the model takes on ``device``; draws and keep stay in host memory, where they are read."""
        return dataclasses.replace(
            self,
            instances=upload(self.instances, device),
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


def _sent(value: Tensor) -> Tensor | np.ndarray:
    small = value.nbytes <= BY_VALUE and value.device.type == "cpu" and value.dtype != torch.bfloat16
    return value.numpy() if small else value


def _received(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


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


@dataclass(frozen=True)
class _Drawn:
    """What one bag of a batch takes: instances of each source, how many of them are no duplicates, what was drawn."""

    sample: Sample
    position: int
    picks: list[np.ndarray]
    fresh: list[int]
    draws: Tensor | None
    pos: Tensor | None

    @property
    def size(self) -> int:
        return sum(len(picks) for picks in self.picks)

    @property
    def duplicates(self) -> int:
        return self.size - sum(self.fresh)


class TrainBags(Dataset[Bags]):
    """Training bags, a batch at a time, so that patches are decoded to where the batch needs them.

    A bag is addressed by (epoch, position), so that workers need not be told the epoch.

    Args:
        samples: the training split.
        sources: one source, or (low, high) magnification.
        plan: how many instances a bag takes.
        views: random views of patches; None for features.
        seed: base of every draw.

    Attributes:
        ring: buffers for the batches of reading processes; None: fresh memory for each batch.
    """

    ring: BatchRing | None = None

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

    def __getitem__(self, keys: Sequence[tuple[int, int]]) -> Bags:
        """The batch of the bags at ``keys``, each an (epoch, position)."""
        bags = [self._draw(epoch, position) for epoch, position in keys]
        segments = [
            (source, bag.sample.slides, picks)
            for bag in bags
            for source, picks in zip(self.sources, bag.picks, strict=True)
        ]
        batch, slot, form = self._described(bags), None, None
        if self.ring is not None:
            form = common_form(source.form(slide) for source, slides, _ in segments for slide in slides)
            slot = self.ring.take() if self.ring.fits(sum(batch.sizes), form) else None
        batch.instances, batch.slot, batch.form = self.load(segments, slot, form), slot, form
        return batch

    def described(self, keys: Sequence[tuple[int, int]]) -> Bags:
        """The same without its instances, for those who load them by and by."""
        return self._described([self._draw(epoch, position) for epoch, position in keys])

    def _described(self, bags: Sequence[_Drawn]) -> Bags:
        return Bags(
            instances=torch.empty(0),
            sizes=[bag.size for bag in bags],
            index=[bag.position for bag in bags],
            target=joined_targets([bag.sample.target for bag in bags]),
            draws=self._views(bags),
            keep=self._keep(bags),
            pos=join([bag.pos for bag in bags if bag.pos is not None]) if bags[0].pos is not None else None,
        )

    def _draw(self, epoch: int, position: int) -> _Drawn:
        sample = self.samples[position]
        drawn = self.views is not None or self.plan.total > 0 or self.plan.shuffle
        rng = np.random.default_rng([self.seed, epoch, position]) if drawn else UNUSED
        chosen, fresh_ones, pos = [], [], []
        for source, wanted in zip(self.sources, self.plan.wanted(len(self.sources)), strict=True):
            count = bag_size(source, sample.slides)
            regions = self._regions(source, sample, count)
            wanted = count if wanted is None and self.plan.shuffle else wanted
            picks, fresh = pick(count, wanted, self.plan.pad, rng, regions)
            chosen.append(picks)
            fresh_ones.append(fresh)
            pos.append(load_positions(source, sample.slides, picks))
        draws = None if self.views is None else torch.from_numpy(self.views.draw(sum(map(len, chosen)), rng))
        known = [p for p in pos if p is not None]
        return _Drawn(sample, position, chosen, fresh_ones, draws, join(known) if known else None)

    def load(self, segments: Sequence[Segment], slot: int | None = None, form: Form | None = None) -> Tensor:
        """The instances of ``segments`` one after another; in buffer ``slot`` of the ring, where one is given."""
        total = sum(len(picks) for _, _, picks in segments)
        if self.ring is None or slot is None:
            return load_segments(segments, segments[0][0].room(total))
        room = self.ring.buffers[slot][:total] if form is None else self.ring.view(slot, total, form)
        return load_segments(segments, room)[:0].clone()  # the training process knows the buffer

    def _views(self, bags: Sequence[_Drawn]) -> Tensor | None:
        draws = [bag.draws for bag in bags if bag.draws is not None]
        return None if self.views is None else share_per_chunk(torch.cat(draws), self.views.crop_groups)

    def _keep(self, bags: Sequence[_Drawn]) -> Tensor | None:
        if self.plan.duplicates_in_head or not any(bag.duplicates for bag in bags):
            return None
        return torch.cat([torch.arange(len(p)) < f for bag in bags for p, f in zip(bag.picks, bag.fresh, strict=True)])

    def _regions(self, source: Source, sample: Sample, count: int) -> np.ndarray | None:
        if self.plan.regions is None:
            return None
        where = load_positions(source, sample.slides, np.arange(count)) if self.plan.regions.grid else None
        return self.plan.regions.of(count, None if where is None else where.numpy())


def joined_targets(targets: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    """(B,) tensors by name: int64 for labels and events, float64 for times and values."""
    real = ("time", "value")
    return {
        name: torch.tensor([t[name] for t in targets], dtype=torch.float64 if name in real else torch.int64)
        for name in targets[0]
    }
