"""Which bags go where, in which order: the training stream and the evaluation shards."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from datasets.ahead import in_threads
from datasets.bags import Bags, TrainBags
from datasets.gpu_jpeg.coded import decoded
from datasets.instances import FeatureSource, Source, bag_size, common_form
from datasets.ring import BatchRing, ring_for, size_of_form
from utils.errors import UserError
from utils.stop import ignore_stop_signals


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are prepared.

    Attributes:
        workers: reading processes, or reading threads (``read_by_threads``); 0 reads in the training process.
        prefetch: batches that each worker keeps ready.
        pin: page-locked memory for copies to a GPU.
        decoder: turns coded patches into pixels; for sources that hand on JPEGs (datasets.gpu_jpeg.coded).
    """

    workers: int = 0
    prefetch: int = 2
    pin: bool = False
    decoder: Callable[[Tensor], Tensor] | None = None


class TrainStream(Sampler[list[tuple[int, int]]]):
    """The batches of all epochs of one rank, as lists of (epoch, position).

    An epoch is one shuffle of the samples, a function of (seed, epoch). Step k takes the k-th run of
    ``world * batch_size`` samples; each rank takes its slice of it, so one process with batch N * b sees what N
    processes with batch b see. The stream does not end between epochs: workers prepare the next epoch while the
    device evaluates.

    Args:
        count: training samples.
        batch_size: bags per process and step.
        rank, world: this process among its peers.
        seed: base of the shuffles.
        drop_last: leave out the last incomplete batch; otherwise it is shared out as evenly as it can be, and a
            process that gets none of it repeats the first sample of the epoch, which must not count (``counts``).
        epochs: first epoch and the one after the last.
        start_step: steps of the first epoch that were done already.
        strata: class of each sample; an epoch then draws ``count`` samples with replacement, every class equally
            often. None: every sample once.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        drop_last: bool = True,
        epochs: tuple[int, int] = (0, 1),
        start_step: int = 0,
        strata: Sequence[int] | None = None,
    ) -> None:
        self.count, self.batch_size, self.rank, self.world, self.seed = count, batch_size, rank, world, seed
        self.drop_last, self.epochs, self.start_step, self.strata = drop_last, epochs, start_step, strata
        if self.steps_per_epoch == 0:
            raise UserError(
                f"the training split has {count} bags, fewer than one step takes ({world} process(es) x batch_size "
                f"{batch_size}). Lower --batch_size or the number of processes, or give --no_drop_last."
            )

    @property
    def steps_per_epoch(self) -> int:
        step = self.batch_size * self.world
        return self.count // step if self.drop_last else -(-self.count // step)

    def __len__(self) -> int:
        return self.steps_per_epoch * (self.epochs[1] - self.epochs[0]) - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(*self.epochs):
            order = self.shuffle(epoch)
            begin = self.start_step if epoch == self.epochs[0] else 0
            for step in range(begin, self.steps_per_epoch):
                yield [(epoch, p) for p in self._slice(order, step)]

    def shuffle(self, epoch: int) -> list[int]:
        """The order of the samples in ``epoch``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.strata is not None:
            return balanced_draw(self.strata, generator)
        return torch.randperm(self.count, generator=generator).tolist()

    def _slice(self, order: list[int], step: int) -> list[int]:
        size = self.batch_size * self.world
        batch = order[step * size : (step + 1) * size]
        own = [batch[i] for i in shard(len(batch), self.rank, self.world)]
        return own or order[:1]

    def counts(self, step: int) -> list[int]:
        """How many bags of step ``step`` of an epoch each process has; they differ in the last one only."""
        size = self.batch_size * self.world
        present = min(size, self.count - step * size)
        return [len(shard(present, rank, self.world)) for rank in range(self.world)]


def balanced_draw(strata: Sequence[int], generator: torch.Generator) -> list[int]:
    """As many samples as there are, with replacement, in random order.

    The numbers of draws of two strata differ by one at most, whatever their sizes; which ones get one more is drawn.
    """
    present = sorted(set(strata))
    members = [[i for i, own in enumerate(strata) if own == stratum] for stratum in present]
    first = torch.randperm(len(present), generator=generator).tolist()
    quota = [len(strata) // len(present) + (place < len(strata) % len(present)) for place in range(len(present))]
    drawn: list[int] = []
    for stratum, size in zip(first, quota, strict=True):
        picks = torch.randint(len(members[stratum]), (size,), generator=generator)
        drawn += [members[stratum][p] for p in picks.tolist()]
    return [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]


def train_batches(bags: TrainBags, stream: TrainStream, options: LoaderOptions) -> Iterator[Bags]:
    """Batches of the training stream; reading processes live as long as the iterator.

    The instances of a batch are good until the next one is asked for: reading processes fill their memory again.
    """
    if bags.views is None:
        return feature_batches(bags, stream, options)
    if options.workers > 0 and bags.plan.total > 0 and options.decoder is None:
        side_px = bags.views.stored_px
        shape = (stream.batch_size * bags.plan.total, side_px, side_px, 3)
        bags.ring = BatchRing(options.workers, options.prefetch, shape, options.pin)
    loader: DataLoader[Bags] = DataLoader(
        bags,
        sampler=stream,
        batch_size=None,  # the dataset takes a whole batch of keys
        num_workers=options.workers,
        prefetch_factor=options.prefetch if options.workers else None,
        pin_memory=options.pin and options.decoder is None,
        worker_init_fn=quiet_worker,
    )
    batches = decoded(loader, options.decoder)
    return batches if bags.ring is None else emptied(batches, bags.ring)


def feature_batches(bags: TrainBags, stream: TrainStream, options: LoaderOptions) -> Iterator[Bags]:
    """Batches of features. A bag is 20 MB: readers copy it from the mapped file to where the device takes it from.

    Threads do that where copying is all there is to do, and processes elsewhere. Without workers it is the training
    thread, or, where the device copies by itself, one thread. Whole bags that lie in RAM are handed on as they are.
    """
    if options.workers == 0 and (not options.pin or _ready(bags, stream.batch_size)):
        return map(bags.__getitem__, stream)
    largest = _batch_bytes(bags, stream.batch_size)
    if options.workers == 0 or read_by_threads(bags.sources):
        threads, ahead = lead(options)
        bags.ring = ring_for(0, ahead, largest, options.pin)
        return emptied(in_threads(lambda keys: copied(bags[keys]), stream, threads, ahead), bags.ring)
    bags.ring = ring_for(options.workers, options.prefetch, largest, options.pin)
    loader: DataLoader[Bags] = DataLoader(
        bags,
        sampler=stream,
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=options.prefetch,
        worker_init_fn=quiet_worker,
    )
    return emptied(loader, bags.ring)


def read_by_threads(sources: Iterable[Source]) -> bool:
    """Whether threads read as well as processes: copying mapped features leaves the interpreter to others.

    Reading .h5 files and finding grid positions does not.
    """
    return all(isinstance(source, FeatureSource) and source.folder.mapped and source.grid is None for source in sources)


def lead(options: LoaderOptions) -> tuple[int, int]:
    """Reading threads, and the batches that they have under way or ready: ``prefetch`` for each, and one that waits."""
    threads = max(options.workers, 1)
    return threads, threads * options.prefetch + 1


def copied(bags: Bags) -> Bags:
    """In memory of their own, where they were too large for a buffer: reading a mapped bag is left to nobody else."""
    return bags if bags.slot is not None else dataclasses.replace(bags, instances=bags.instances.clone())


def _ready(bags: TrainBags, batch_size: int) -> bool:
    """Whether each batch lies in RAM already, as it is to be handed on."""
    source, plan = bags.sources[0], bags.plan
    if (
        batch_size > 1
        or len(bags.sources) > 1
        or plan.total > 0
        or plan.shuffle
        or not isinstance(source, FeatureSource)
    ):
        return False
    return all(len(s.slides) == 1 and source.folder.holds_in_memory(s.slides) for s in bags.samples)


def _batch_bytes(bags: TrainBags, batch_size: int) -> int:
    """What the largest batch takes, in the type that holds the features of any two slides."""
    wanted = bags.plan.wanted(len(bags.sources))
    counts = []
    for sample in bags.samples:
        own = [bag_size(source, sample.slides) for source in bags.sources]
        most = [n if w is None else w if bags.plan.pad else min(w, n) for n, w in zip(own, wanted, strict=True)]
        counts.append(sum(most))
    form = common_form(s.form(slide) for s in bags.sources for sample in bags.samples for slide in sample.slides)
    return sum(sorted(counts)[-batch_size:]) * size_of_form(form)


def emptied(batches: Iterable[Bags], ring: BatchRing) -> Iterator[Bags]:
    """The batches with their instances, which lie in ``ring`` and are good until the next batch is asked for."""
    used: deque[tuple[int, torch.cuda.Event | None]] = deque()
    try:
        for bags in batches:
            slot = bags.slot
            if slot is None:
                yield bags
                continue
            count = sum(bags.sizes)
            content = ring.buffers[slot][:count] if bags.form is None else ring.view(slot, count, bags.form)
            yield dataclasses.replace(bags, instances=content)
            event = None
            if ring.pinned:  # the copy to the device was queued before this event, on the same stream
                event = torch.cuda.Event()
                event.record()
            used.append((slot, event))
            while len(used) > (event is not None):
                done, copied = used.popleft()
                if copied is not None:
                    copied.synchronize()
                ring.give_back(done)
    finally:
        ring.close()


def quiet_worker(number: int) -> None:
    """Leaves log and signals to the training process: a reading process says only what is wrong."""
    logging.disable(logging.INFO)
    ignore_stop_signals()


def shard(count: int, rank: int, world: int) -> Sequence[int]:
    """The contiguous share of ``count`` bags that one rank evaluates: every bag once, no padding."""
    return range(count * rank // world, count * (rank + 1) // world)
