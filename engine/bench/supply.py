"""How fast the data come without a model: reading from the files, and decoding, by one reader and by many."""

from __future__ import annotations

import contextlib
import itertools
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from datasets.ahead import in_threads
from datasets.bags import SamplingPlan
from datasets.instances import FeatureSource, PixelSource, Source
from datasets.jpeg import decode
from datasets.labels.types import Sample
from datasets.loaders import quiet_worker, read_by_threads

PIECE = 64
"""Patches between two looks at the clock: 20 ms of decoding on one core, a second or two on the slowest disks."""

PAGE_BYTES = 4096
"""One value of every page is looked at, so that a mapped file is read indeed."""


@dataclass(frozen=True)
class Amount:
    """What one piece of work handled: instances, their bytes, and those of them that had to come from the disk."""

    instances: float
    bytes: int
    fetched: int = 0


@dataclass(frozen=True)
class Rate:
    """How fast instances came.

    Attributes:
        per_s: instances per second.
        mb_s: their 10^6 bytes per second, as they lie in the files.
        from_disk: share of them, 0 to 1, that the system had to fetch a page for. 0 also where it does not say.
    """

    per_s: float
    mb_s: float = 0.0
    from_disk: float = 0.0

    @classmethod
    def of(cls, amounts: Sequence[Amount], seconds: float) -> Rate:
        instances = sum(a.instances for a in amounts)
        fetched = sum(a.fetched for a in amounts)
        mega = sum(a.bytes for a in amounts) / 1e6
        return cls(instances / max(seconds, 1e-9), mega / max(seconds, 1e-9), fetched / max(instances, 1))

    @classmethod
    def joined(cls, rates: Sequence[Rate]) -> Rate:
        """What several processes do together."""
        total = sum(r.per_s for r in rates)
        fetched = sum(r.from_disk * r.per_s for r in rates)
        return cls(total, sum(r.mb_s for r in rates), fetched / max(total, 1e-9))


@dataclass(frozen=True)
class Supply:
    """What comes without a model; all processes together.

    Attributes:
        read_first: one process reading what it had not read before.
        read_again: the same once more.
        read_all: all readers, other instances.
        decode_one, decode_all: one process and all, on CPU cores; None for features.
        decode_gpu: the GPUs, which do nothing else; None where they do not decode in this run.
    """

    read_first: Rate
    read_again: Rate
    read_all: Rate
    decode_one: Rate | None
    decode_all: Rate | None
    decode_gpu: Rate | None = None


class Reading(Dataset[Amount]):
    """Random instances of random training bags, read and not decoded. Piece k is a function of (seed, k).

    Args:
        samples: the training split.
        sources: one source, or (low, high) magnification.
        plan: how many instances a bag takes from each.
        seed: base of every draw.
    """

    def __init__(
        self, samples: Sequence[Sample], sources: Sequence[Source], plan: SamplingPlan, seed: Sequence[int]
    ) -> None:
        self.samples, self.sources, self.plan, self.seed = samples, sources, plan, list(seed)

    def __getitem__(self, number: int) -> Amount:
        before, read = _faults(), [_read(*draw) for draw in self.draws(number)]
        instances, size = sum(n for n, _ in read), sum(b for _, b in read)
        return Amount(instances, size, min(_faults() - before, instances))

    def draws(self, number: int) -> Iterator[tuple[Source, str, np.ndarray]]:
        """Source, slide and instances that piece ``number`` reads: ``PIECE`` patches or more, or a bag of features."""
        rng, drawn = np.random.default_rng([*self.seed, number]), 0
        for _ in range(PIECE):  # bags, at most: some may be all but empty
            sample = self.samples[int(rng.integers(len(self.samples)))]
            slide = sample.slides[int(rng.integers(len(sample.slides)))]
            for source, wanted in zip(self.sources, self.plan.wanted(len(self.sources)), strict=True):
                picks = self._picks(source, slide, wanted, rng)
                drawn += len(picks) if isinstance(source, PixelSource) else PIECE
                yield source, slide, picks
            if drawn >= PIECE:
                return

    @staticmethod
    def _picks(source: Source, slide: str, wanted: int | None, rng: np.random.Generator) -> np.ndarray:
        count = source.count(slide)
        most = count if wanted is None else min(wanted, count)
        if isinstance(source, PixelSource):
            most = min(most, PIECE)
        return np.arange(count) if most == count else rng.permutation(count)[:most]


def _read(source: Source, slide: str, picks: np.ndarray) -> tuple[int, int]:
    """Reads instances of one slide; returns their number and bytes."""
    if isinstance(source, PixelSource):
        return len(picks), sum(map(len, source.store.read(slide, picks.tolist())))
    values = source.load(slide, picks)
    float(values.flatten()[:: PAGE_BYTES // values.element_size()].sum())
    return len(picks), values.nbytes


def _faults() -> int:
    """Pages that this reader had to wait for, from the disk, so far."""
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_majflt


class Decoding(Dataset[Amount]):
    """Decodes the same JPEGs over and over, a piece at a time, into memory that is kept."""

    def __init__(self, jpegs: Sequence[bytes], source: PixelSource) -> None:
        self.jpegs, self.order, self.side_px = jpegs, source.order, source.store.image_size_px
        self._room: np.ndarray | None = None

    def __getitem__(self, number: int) -> Amount:
        if self._room is None:
            self._room = np.empty((PIECE, self.side_px, self.side_px, 3), np.uint8)
        piece = [self.jpegs[(number * PIECE + i) % len(self.jpegs)] for i in range(PIECE)]
        for data, out in zip(piece, self._room, strict=True):
            decode(data, order=self.order, out=out)
        return Amount(PIECE, sum(map(len, piece)))


def sample_jpegs(reading: Reading, pieces: int = 4) -> tuple[list[bytes], PixelSource] | None:
    """JPEGs as training meets them, and the source of the last ones; None for features."""
    jpegs: list[bytes] = []
    last: PixelSource | None = None
    for source, slide, picks in (draw for number in range(pieces) for draw in reading.draws(number)):
        if isinstance(source, PixelSource):
            jpegs += source.store.read(slide, picks.tolist())
            last = source
    return None if last is None else (jpegs, last)


def first_and_again(reading: Reading, seconds: float) -> tuple[Rate, Rate]:
    """One process reads for ``seconds``, and then the same once more.

    The second time everything lies in the system's memory, unless it does not fit.
    """
    reading[0]  # opens the files
    amounts: list[Amount] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or not amounts:
        amounts.append(reading[1 + len(amounts)])
    first = Rate.of(amounts, time.perf_counter() - begin)
    begin = time.perf_counter()
    again = [reading[1 + number] for number in range(len(amounts))]
    return first, Rate.of(again, time.perf_counter() - begin)


def by_readers(reading: Reading, workers: int, seconds: float) -> Rate:
    """How fast ``workers`` read, threads where training reads with threads; 0: this process by itself."""
    if not read_by_threads(reading.sources):
        return by_processes(reading, workers, seconds)
    threads = max(workers, 1)
    pieces = in_threads(reading.__getitem__, itertools.count(), threads, 2 * threads)
    with contextlib.closing(pieces):
        return flow(pieces, 2 * threads, threads, seconds)


def by_processes(work: Dataset[Amount], workers: int, seconds: float) -> Rate:
    """How fast ``workers`` processes do pieces of ``work``; 0: this process by itself."""
    loader = DataLoader(
        work,
        sampler=range(1_000_000_000),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        worker_init_fn=quiet_worker,
    )
    return flow(iter(loader), max(2 * workers, 1), max(workers, 1), seconds)


def flow(pieces: Iterator[Amount], ready: int, together: int, seconds: float) -> Rate:
    """How fast ``pieces`` come.

    Args:
        pieces: endless.
        ready: so many may have been prepared beforehand; they do not count.
        together: pieces that are prepared side by side and so come in one burst; the clock is read after a burst.
        seconds: how long.
    """
    begin = time.perf_counter()
    for _ in range(ready):
        next(pieces)
        if time.perf_counter() - begin > 2 * seconds:
            break
    amounts: list[Amount] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or not amounts:
        amounts += [next(pieces) for _ in range(together)]
    return Rate.of(amounts, time.perf_counter() - begin)


def bytes_to_read(samples: Iterable[Sample], sources: Sequence[Source]) -> int:
    """Bytes of the files that an epoch may touch: those of the training slides."""
    slides = [slide for sample in samples for slide in sample.slides]
    total = 0.0
    for source in sources:
        if isinstance(source, PixelSource):
            share = sum(source.count(slide) for slide in slides) / max(len(source.store), 1)
            total += share * sum(file.stat().st_blocks * 512 for file in source.store.files)
        elif isinstance(source, FeatureSource):
            total += sum(source.folder.file(slide).stat().st_size for slide in slides)
    return int(total)
