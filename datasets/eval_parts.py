"""The instances of every bag of a split, in parts: what is read at a time, and what is encoded at a time.

Shapes: P instances, S stored size in px, D feature width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.bags import Bags, joined_targets
from datasets.instances import (
    FeatureSource,
    Source,
    bag_size,
    common_form,
    load_positions,
    load_segments,
)
from datasets.labels import Sample
from datasets.ring import BatchRing, Form, size_of_form
from utils.chunks import split_sizes

READ = 128
"""Patches that a reading process decodes in one go: 0.04 s of one core, and 25 MB of 256 px.

Small, so that all processes work on the same slide; not tiny, so that handing a part on (0.1 ms) costs little.
"""


CODED_READ = 1024
"""Patches of a part that the GPU decodes: as many stacks (datasets.gpu_jpeg.stacks) as it decodes at once, and more."""


@dataclass(frozen=True)
class PartPlan:
    """How a bag is taken apart.

    Attributes:
        run: a new encoder call begins after so many instances (``p_batch_size_v``).
        call: instances per encoder call at most; a longer run is divided (``p_batch_size``).
        read: instances that are read at a time at most.
    """

    run: int
    call: int
    read: int = READ

    def calls(self, count: int) -> list[int]:
        """Instances of each encoder call of a bag."""
        runs = [min(self.run, count - begin) for begin in range(0, count, self.run)]
        return [size for run in runs for size in split_sizes(run, self.call)]


WHOLE = PartPlan(1 << 40, 1 << 40, 1 << 40)
"""Bags in one part: features."""


@dataclass(frozen=True)
class Part:
    """Instances ``begin`` .. ``end`` of the bag at ``position``.

    Attributes:
        call: instances of the encoder call that they belong to.
        last: whether they are the last ones of their bag.
    """

    position: int
    begin: int
    end: int
    call: int
    last: bool


class EvalParts(Dataset[Bags]):
    """All instances of every bag, in order, in parts of bounded size: memory does not grow with the bag.

    Args:
        samples: a split.
        source: the high magnification.
        plan: sizes of the parts.
        positions: the samples that this process evaluates.

    Attributes:
        ring: buffers for the parts of readers; None: fresh memory for each part.
    """

    ring: BatchRing | None = None

    def __init__(self, samples: Sequence[Sample], source: Source, plan: PartPlan, positions: Sequence[int]) -> None:
        self.samples, self.source = samples, source
        self.parts = [part for position in positions for part in self._parts_of(position, plan)]
        self._cells: tuple[int, Tensor | None] = (-1, None)  # of the last bag

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Bags:
        part = self.parts[i]
        sample, picks, form = self.samples[part.position], np.arange(part.begin, part.end), self._form(part)
        slot = self.ring.take() if self.ring is not None and self.ring.fits(len(picks), form) else None
        out = None if self.ring is None or slot is None else self.ring.view(slot, len(picks), form)
        instances = load_segments([(self.source, sample.slides, picks)], out)
        cells = self._positions(part.position)
        return Bags(
            instances=instances if slot is None else torch.empty(0),  # the training process knows the buffer
            sizes=[len(picks)],
            index=[part.position],
            target=joined_targets([sample.target]),
            last=part.last,
            call=part.call,
            pos=None if cells is None else cells[part.begin : part.end],
            slot=slot,
            form=None if slot is None else form,
        )

    @property
    def in_memory(self) -> bool:
        """Whether every part lies in RAM as it is to be handed on."""
        samples = [self.samples[part.position] for part in self.parts]
        return isinstance(self.source, FeatureSource) and all(
            len(sample.slides) == 1 and self.source.folder.holds_in_memory(sample.slides) for sample in samples
        )

    def largest_bytes(self) -> int:
        """What the largest part takes in memory."""
        largest: dict[int, Part] = {}
        for part in self.parts:
            other = largest.get(part.position, part)
            largest[part.position] = max(part, other, key=lambda p: p.end - p.begin)
        return max((p.end - p.begin) * size_of_form(self._form(p)) for p in largest.values())

    def _parts_of(self, position: int, plan: PartPlan) -> Iterator[Part]:
        count = bag_size(self.source, self.samples[position].slides)
        calls = plan.calls(count)
        reads = [(size, call) for call in calls for size in split_sizes(call, plan.read)]
        ends = itertools.accumulate(size for size, _ in reads)
        for (size, call), end in zip(reads, ends, strict=True):
            yield Part(position, end - size, end, call, end == count)

    def _form(self, part: Part) -> Form:
        return common_form(self.source.form(slide) for slide in self.samples[part.position].slides)

    def _positions(self, position: int) -> Tensor | None:
        known, cells = self._cells  # one look, as threads may read other bags meanwhile
        if self.source.grid is not None and known != position:
            slides = self.samples[position].slides
            cells = load_positions(self.source, slides, np.arange(bag_size(self.source, slides)))
            self._cells = position, cells
        return cells
