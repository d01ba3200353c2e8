"""Training batches of whole bags, however large: their patches come in chunks, and most chunks come twice.

``--full_bag`` encodes a batch chunk by chunk without a graph, runs the head, and encodes the chunks again with one
(engine.full_bag). A batch is here a ``FullBags``: all that ``Bags`` holds but the patches, which ``fill`` hands on in
order, those of the first pass and then those of the second. Reading processes decode them in parts of at most
``PART`` patches, so host memory does not grow with the bag. The first ``keep`` patches of a batch stay on the device
between the passes and are read once; so is the last chunk, whose graph the first pass keeps.

Shapes: P patches of a batch, S stored size in px.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.bags import Bags, TrainBags
from datasets.gpu_jpeg.coded import decoded
from datasets.instances import Segment, bag_size
from datasets.loaders import LoaderOptions, TrainStream, emptied, quiet_worker
from datasets.ring import BatchRing
from utils.chunks import split_sizes

PART = 512
"""Patches that a reading process decodes in one go; 512 patches of 256 px are 100 MB."""

Keys = Sequence[tuple[int, int]]
"""The bags of a batch, each an (epoch, position)."""


@dataclass(frozen=True)
class ChunkPlan:
    """How a batch of whole bags is taken apart.

    Attributes:
        chunk: patches per encoder call.
        keep: patches of a batch that stay on the device between the two passes.
        twice: whether there is a second pass; there is none for an encoder that is not trained.
    """

    chunk: int
    keep: int
    twice: bool = True

    def sizes(self, count: int) -> list[int]:
        """Patches of each encoder call of a batch of ``count``, as in ``SlideModel.encode``."""
        return split_sizes(count, self.chunk)

    def kept(self, sizes: Sequence[int]) -> int:
        """How many chunks, from the first on, stay on the device; the last one never has to."""
        if not self.twice:
            return 0
        ends = itertools.accumulate(sizes[:-1])
        return sum(end <= self.keep for end in ends)

    def spans(self, count: int) -> Iterator[tuple[int, int]]:
        """First patch and the one after the last of every part that is read for a batch, in order."""
        sizes = self.sizes(count)
        ends = list(itertools.accumulate(sizes))
        again = range(self.kept(sizes), len(sizes) - 1) if self.twice else ()
        for number in (*range(len(sizes)), *again):
            begin = ends[number] - sizes[number]
            for size in split_sizes(sizes[number], PART):
                yield begin, begin + size
                begin += size

    def read(self, count: int) -> int:
        """How many patches are read and decoded for a batch of ``count``."""
        return sum(end - begin for begin, end in self.spans(count))


@dataclass
class FullBags(Bags):
    """A batch whose patches come by and by; ``instances`` is empty.

    Attributes:
        chunks: patches of each encoder call; they add up to P.
        kept: how many chunks, from the first on, come once only and are to be kept.
        room: patches that the kept chunks of any batch of the run take at most.
        side_px: S.
        parts: where the patches come from: for each chunk in order, then for all but the kept ones and the last again.
    """

    chunks: list[int] = field(default_factory=list)
    kept: int = 0
    room: int = 0
    side_px: int = 0
    parts: Iterator[Bags] = field(default_factory=lambda: iter(()))

    def span(self, number: int) -> tuple[int, int]:
        """First patch of a chunk, and the one after its last."""
        begin = sum(self.chunks[:number])
        return begin, begin + self.chunks[number]

    def fill(self, out: Tensor) -> None:
        """Copies the next ``len(out)`` patches, a whole chunk, into ``out`` (n, S, S, 3) uint8, on any device."""
        done = 0
        while done < len(out):
            part = next(self.parts)
            self.waited += part.waited
            size = len(part.instances)
            out[done : done + size].copy_(part.instances, non_blocking=True)
            done += size


class _Item(NamedTuple):
    """What a reading process is asked for: a part of a batch, or, without a span, all but its patches."""

    keys: Keys
    span: tuple[int, int] | None


class _Items(Sampler[_Item]):
    """What a batch needs, batch after batch."""

    def __init__(self, bags: TrainBags, stream: Iterable[Keys], plan: ChunkPlan) -> None:
        self.bags, self.stream, self.plan = bags, stream, plan

    def __iter__(self) -> Iterator[_Item]:
        for keys in self.stream:
            yield _Item(keys, None)
            for span in self.plan.spans(sum(size_of(self.bags, position) for _, position in keys)):
                yield _Item(keys, span)


class _Parts(Dataset[Bags]):
    """Reads what ``_Items`` asks for."""

    def __init__(self, bags: TrainBags) -> None:
        self.bags = bags

    def __getitem__(self, item: _Item) -> Bags:
        if item.span is None:
            return self.bags.described(item.keys)
        return read_part(self.bags, item.keys, *item.span)


def size_of(bags: TrainBags, position: int) -> int:
    """Patches of the bag at ``position``, of all magnifications."""
    slides = bags.samples[position].slides
    return sum(bag_size(source, slides) for source in bags.sources)


def read_part(bags: TrainBags, keys: Keys, begin: int, end: int) -> Bags:
    """The patches ``begin`` .. ``end`` of a batch, counted through its bags and their magnifications, low first."""
    segments: list[Segment] = []
    offset = 0
    for _, position in keys:
        slides = bags.samples[position].slides
        for source in bags.sources:
            count = bag_size(source, slides)
            first, last = max(begin - offset, 0), min(end - offset, count)
            if first < last:
                segments.append((source, slides, np.arange(first, last)))
            offset += count
    slot = None if bags.ring is None else bags.ring.take()
    return Bags(bags.load(segments, slot), sizes=[end - begin], index=[], target={}, slot=slot)


def full_bag_batches(
    bags: TrainBags, stream: TrainStream, options: LoaderOptions, plan: ChunkPlan
) -> Iterator[FullBags]:
    """The batches of ``stream``; patches that a batch still holds when the next one is asked for are passed over.

    Reading processes live as long as the iterator, and read ahead into the second pass and the next batch.
    """
    ring = None
    if options.workers > 0 and options.decoder is None:
        shape = (min(plan.chunk, PART), _side_px(bags), _side_px(bags), 3)
        ring = bags.ring = BatchRing(options.workers, options.prefetch, shape, options.pin)
    loader: DataLoader[Bags] = DataLoader(
        _Parts(bags),
        sampler=_Items(bags, stream, plan),
        batch_size=None,  # an item is a part already
        num_workers=options.workers,
        prefetch_factor=options.prefetch if options.workers else None,
        pin_memory=options.pin and options.decoder is None,
        worker_init_fn=quiet_worker,
    )
    sizes = sorted((size_of(bags, i) for i in range(len(bags))), reverse=True)
    largest = sum(sizes[: stream.batch_size])
    parts = timed(decoded(loader, options.decoder))
    parts = parts if ring is None else emptied(parts, ring)
    for described in parts:
        full = _full(described, parts, plan, min(plan.keep, largest), _side_px(bags))
        yield full
        for _ in full.parts:  # what nobody asked for
            pass


def timed(parts: Iterable[Bags]) -> Iterator[Bags]:
    """``parts``, each with the seconds that were spent waiting for it."""
    source = iter(parts)
    while True:
        begin = time.perf_counter()
        try:
            part = next(source)
        except StopIteration:
            return
        yield dataclasses.replace(part, waited=time.perf_counter() - begin)


def rehearsal(bags: TrainBags, keys: Keys, plan: ChunkPlan, pin: bool = False) -> tuple[FullBags, float]:
    """The batch of ``keys`` with the patches of its first part over and over, for any number of steps.

    It takes a device as much as the real batch, and the host neither its time nor its memory.

    Args:
        bags: the training bags.
        keys: those of the batch.
        plan: how it is taken apart.
        pin: page-locked memory, as reading processes have it.

    Returns:
        The batch, and the seconds that one reading process would take for the real one.
    """
    described = bags.described(keys)
    count = sum(described.sizes)
    spans = list(plan.spans(count))
    begin = time.perf_counter()
    first = read_part(bags, keys, *spans[0])  # no part is larger
    seconds = (time.perf_counter() - begin) / spans[0][1] * plan.read(count)
    first = first.pin_memory() if pin else first
    parts = [dataclasses.replace(first, instances=first.instances[: end - begin]) for begin, end in spans]
    full = _full(described, iter(()), plan, min(plan.keep, count), _side_px(bags))
    return dataclasses.replace(full, parts=itertools.cycle(parts)), seconds


def _full(described: Bags, parts: Iterator[Bags], plan: ChunkPlan, room: int, side_px: int) -> FullBags:
    count = sum(described.sizes)
    chunks, spans = plan.sizes(count), sum(1 for _ in plan.spans(count))
    own = {f.name: getattr(described, f.name) for f in dataclasses.fields(Bags) if f.name != "waited"}
    its_parts = itertools.islice(parts, spans)
    return FullBags(**own, chunks=chunks, kept=plan.kept(chunks), room=room, side_px=side_px, parts=its_parts)


def _side_px(bags: TrainBags) -> int:
    assert bags.views is not None  # whole bags in chunks are bags of patches
    return bags.views.stored_px
