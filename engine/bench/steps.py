"""The stages of ``main.py bench`` that train: step, batches, loop; and evaluation. What is learned is not kept."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from datasets.bags import Bags, TrainBags
from datasets.eval_parts import PartPlan
from datasets.full_bags import FullBags, rehearsal
from datasets.labels.types import Fold
from engine import memory
from engine.bench.supply import Amount, flow
from engine.evaluate import predict
from engine.learner import Learner
from engine.progress import Meter
from engine.setup import Setup
from engine.timing import seconds_per_call, wait_for
from engine.validation import eval_reader, loader_options, part_plan
from utils.dist import Processes
from utils.host_copy import HostCopy
from utils.seed import seed_all, step_seed

log = logging.getLogger(__name__)

HELD = 2
"""Batches kept on the device for the bare step: two, as bags may differ in size; more would take the model's room."""

BAGS = 1000
"""Bags of a process in evaluation, some of them again where there are fewer, so that its time is never too short."""

LEAST_PART = 16
"""Patches that evaluation takes at a time, at least, on a device that does fewer in a second."""


@dataclass(frozen=True)
class Step:
    """The device's part, instances per second of this process.

    Attributes:
        rate: the bare step.
        copy: host memory to GPU; None on a CPU.
        render_share, ema_share: shares of the step; None where nothing is rendered in one go.
    """

    rate: float
    copy: float | None
    render_share: float | None
    ema_share: float


def begin_stage(processes: Processes, what: str) -> None:
    """Says what comes next, once every process is there; a wish to stop ends the program here."""
    if any(processes.gather(processes.stop.by)):
        raise KeyboardInterrupt
    log.info("bench: %s", what)


class TrainingStages:
    """The stages that use training's own batches and step.

    Args:
        setup, fold: what is trained on.
        learner: model and step.
        batches: the training stream, which does not end.
        ready: batches of it that may be ready at most.
    """

    def __init__(self, setup: Setup, fold: Fold, learner: Learner, batches: Iterator[Bags], ready: int) -> None:
        self.setup, self.fold, self.learner, self.batches, self.ready = setup, fold, learner, batches, ready
        self.processes, self.device = learner.processes, learner.processes.device
        self.workers = loader_options(setup, self.processes, setup.config.data.num_workers).workers
        self._load, self._size = memory.Load(), 1

    def step(self, first: Bags, seconds: float) -> Step:
        """The training step on batches that are on the device already, its parts, and the copy of a batch."""
        begin_stage(self.processes, "training step, batches on the device (compiling and choosing kernels first)")
        copy = None
        if self.device.type == "cuda" and len(first.instances) and not first.instances.is_cuda:
            copy = sum(first.sizes) / seconds_per_call(lambda: first.to(self.device), self.device, 5)
        held = self._held(first)
        steps = itertools.cycle(held)
        self._warm_up(steps, len(held), seconds)
        took, done = self._timed(steps, 1)
        if self._agreed(seconds / took) > 1:
            took, done = self._timed(steps, self._agreed(seconds / took))
        return Step(done / took, copy, *self._parts(held[0], took / done))

    def _held(self, first: Bags) -> list[Bags]:
        """Batches on the device, in memory of their own: that of a batch is filled again."""
        if self.setup.chunks is not None:
            return [self._rehearsed(first)]
        held = []
        for bags in (first, *itertools.islice(self.batches, HELD - 1)):
            instances = bags.instances.to(self.device, copy=True)
            held.append(dataclasses.replace(bags.to(self.device), instances=instances))
            wait_for(self.device)
        return held

    def _rehearsed(self, first: Bags) -> Bags:
        """A batch of whole bags whose patches are those of one part over and over, on the device."""
        setup, fold = self.setup, self.fold
        assert isinstance(first, FullBags)
        assert setup.chunks is not None
        data = TrainBags(fold.train, setup.sources.train, setup.plan, setup.views, fold.seed)
        bags, _ = rehearsal(data, [(0, i) for i in first.index], setup.chunks)
        sizes = [end - begin for begin, end in setup.chunks.spans(sum(bags.sizes))]
        part = next(bags.parts)  # the first; no other one is larger
        patches = part.instances.to(self.device)
        parts = [dataclasses.replace(part, instances=patches[:size]) for size in sizes]
        for _ in self._pieces_of(first):
            pass  # the stream goes on after this batch
        return dataclasses.replace(bags, parts=itertools.cycle(parts))

    def _warm_up(self, batches: Iterator[Bags], count: int, seconds: float) -> None:
        """A few steps that do not count; fewer on a device on which one takes longer than ``seconds``."""
        begin = time.perf_counter()
        for _ in range(count):
            self._train(next(batches))
            wait_for(self.device)
            if self.processes.gather(time.perf_counter() - begin > seconds)[0]:
                return

    def _timed(self, batches: Iterator[Bags], count: int) -> tuple[float, int]:
        """Seconds and instances of ``count`` steps."""
        wait_for(self.device)
        begin, done = time.perf_counter(), 0
        for k in range(count):
            bags = next(batches)
            self._train(bags, k, last=k + 1 == count)
            done += sum(bags.sizes)
        wait_for(self.device)
        self._size = max(done // count, 1)
        return time.perf_counter() - begin, done

    def _train(self, bags: Bags, number: int = 0, last: bool = True) -> torch.Tensor:
        """Step ``number``; the weights are updated as often as in training. Returns the loss, on the device."""
        group = self.setup.config.train.accumulation_steps
        self._load.now([self.fold.train[i].id for i in bags.index], sum(bags.sizes))
        with memory.explained(self._load, self.setup.config, training=True):
            return self.learner.step(bags, divide_by=group, update=last or (number + 1) % group == 0)

    def _agreed(self, count: float) -> int:
        """Steps that every process does, as the first one says: they wait for each other in each one."""
        return max(int(self.processes.gather(count)[0]), 1)

    def _parts(self, bags: Bags, seconds_each: float) -> tuple[float | None, float]:
        """Shares of the step that rendering and the moving average of the weights take."""
        whole, group = sum(bags.sizes) * seconds_each, self.setup.config.train.accumulation_steps
        renderer, ema = self.learner.renderer, self.learner.ema
        rendering, averaging = None, 0.0
        if renderer is not None and len(bags.instances):
            rendering = seconds_per_call(lambda: renderer(bags.instances, bags.draws), self.device, 3) / whole
        if ema is not None:
            averaging = seconds_per_call(lambda: ema.update(self.learner.model), self.device, 3) / group
        return rendering, averaging / whole

    def loader(self, seconds: float) -> float:
        """Batches as training makes them, which nobody uses: instances per second. None is left ready after it."""
        begin_stage(self.processes, "batches, nobody using them")
        rest: Iterator[Amount] = iter(())

        def pieces() -> Iterator[Amount]:
            nonlocal rest
            for bags in self.batches:
                rest = self._pieces_of(bags)
                yield from rest

        rate = flow(pieces(), self.ready, max(self.workers, 1), seconds).per_s
        for _ in rest:
            pass  # the loop begins with a new batch
        return rate

    def _pieces_of(self, bags: Bags) -> Iterator[Amount]:
        """What a batch comes in, one after another: itself, or parts of whole bags, of which some come twice."""
        count = sum(bags.sizes)
        if not isinstance(bags, FullBags) or self.setup.chunks is None:
            yield Amount(count, 0)
            return
        left = read = self.setup.chunks.read(count)
        while left > 0:
            size = len(next(bags.parts).instances)
            left -= size
            yield Amount(size * count / read, 0)

    def loop(self, seconds: float, expected: float) -> tuple[float, float]:
        """Everything together.

        Args:
            seconds: about how long.
            expected: instances per second; more or less changes how long it takes, not what is measured.

        Returns:
            Instances per second, and the share of the time spent waiting for data.
        """
        begin_stage(self.processes, "everything together")
        self._warm_up(self.batches, 2, seconds)
        count = self._agreed(seconds * expected / self._size)
        meter, before = Meter(), None
        for k in range(count):
            bags = meter.wait(self.batches)
            seed_all(step_seed(self.fold.seed, 0, k, self.processes.rank))
            loss = self._train(bags, k, last=k + 1 == count)
            meter.waited += bags.waited
            if before is not None:
                before.value()  # training, too, looks at each loss one step later
            before = HostCopy(loss)
        wait_for(self.device)
        return meter.rate, meter.data_share


def evaluation_rate(setup: Setup, fold: Fold, learner: Learner, seconds: float, trained: float) -> float | None:
    """Instances per second of this process in evaluation, reading included; None where there is nothing to evaluate.

    Args:
        setup: options and sources.
        fold: validation and test bags, one after another.
        learner: the model.
        seconds: about how long; the bag under way is cut off.
        trained: instances per second of training, by which slow devices get smaller parts.
    """
    samples, processes = (*fold.val, *fold.test), learner.processes
    if not samples:
        return None
    begin_stage(processes, "evaluation")
    plan = part_plan(setup)
    if setup.encoder is not None:
        most = max(int(trained), LEAST_PART)
        plan = PartPlan(min(plan.run, most), min(plan.call, most), plan.read)
    often = samples * (-(-BAGS * processes.world // len(samples)))
    reader = eval_reader(setup, processes, {"all": often}, plan)
    timed = _Timed(reader.read("all"), seconds, processes.device)
    alone = Processes(0, 1, processes.device)
    with memory.explained(memory.Load(), setup.config, training=False):
        predict(learner.model, timed, learner.renderer, learner.precision, alone)
    return timed.rate


class _Timed:
    """Encoder calls of an evaluation until the time is up; the first does not count, as kernels are chosen in it."""

    def __init__(self, calls: Iterable[Bags], seconds: float, device: torch.device) -> None:
        self.calls, self.seconds, self.device = calls, seconds, device
        self.rate = 0.0

    def __iter__(self) -> Iterator[Bags]:
        calls, count = iter(self.calls), 0
        yield dataclasses.replace(next(calls), last=True)
        wait_for(self.device)
        begin = time.perf_counter()
        for bags in calls:
            over = time.perf_counter() - begin > self.seconds
            count += sum(bags.sizes)
            yield dataclasses.replace(bags, last=bags.last or over)
            if over:
                break
        wait_for(self.device)
        self.rate = count / (time.perf_counter() - begin)
