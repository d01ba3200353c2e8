"""A few steps on the largest bags before a long run: does it fit, how long will it take, how much disk will it need."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from datasets.bags import Bags, TrainBags
from datasets.eval_parts import EvalParts
from datasets.eval_reading import on_device
from datasets.full_bags import rehearsal, size_of
from datasets.labels.types import Fold, Sample
from datasets.sampling import bag_limit
from engine import memory
from engine.evaluate import predict
from engine.fold import EVALUATED, build_learner
from engine.learner import Learner
from engine.run_names import run_folder
from engine.setup import Setup
from engine.tasks import task_builder
from engine.timing import seconds_per_call
from engine.validation import part_plan
from modules.model import bare_state_dict
from utils.dist import Processes
from utils.files import free_bytes
from utils.log import duration

log = logging.getLogger(__name__)

STEPS = 3
"""Timed steps, after one that does not count because kernels are chosen and memory is reserved in it."""


@dataclass(frozen=True)
class Rates:
    """Instances per second and process: trained on, evaluated, and read and decoded by one reading process."""

    train: float
    evaluate: float
    read: float


def dry_run(setup: Setup, processes: Processes) -> None:
    """Trains on the largest training bags and evaluates the largest other one, and logs what the whole run needs.

    Raises:
        UserError: when the device has too little memory, with the options that save some.
    """
    fold = setup.cohort.folds[0]
    task = task_builder.build(setup.config, setup.cohort, fold, processes.world)
    learner = build_learner(setup, fold, task, processes)
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train, read = _train_rate(setup, fold, learner, processes)
    trained_gib = _memory_gib(processes.device)
    rates = Rates(train, _evaluation_rate(setup, fold, learner, processes), read)
    log.info(
        "dry run: peak memory %.1f GiB in training, %.1f GiB with evaluation",
        trained_gib,
        _memory_gib(processes.device),
    )
    log.info(
        "dry run: %.0f instances/s trained, %.0f evaluated, %.0f read by each reading process; all by %d process(es)",
        rates.train,
        rates.evaluate,
        rates.read,
        processes.world,
    )
    seconds = sum(_seconds(setup, f, rates, processes) for f in setup.cohort.folds)
    log.info("dry run: about %s for %d epoch(s) of %d fold(s), if none stops early", *_plan(setup, seconds))
    _report_disk(setup, learner)


def _plan(setup: Setup, seconds: float) -> tuple[str, int, int]:
    return duration(seconds), setup.config.train.num_epoch, len(setup.cohort.folds)


def _count(setup: Setup, sample: Sample) -> int:
    return sum(setup.sources.slides[slide] for slide in sample.slides)


def _train_rate(setup: Setup, fold: Fold, learner: Learner, processes: Processes) -> tuple[float, float]:
    """Instances per second of steps on the largest bags, and of reading them."""
    pin = setup.config.data.pin_memory and processes.device.type == "cuda"
    bags, reading = _largest_batch(setup, fold, pin)
    names, read = [fold.train[i].id for i in bags.index], sum(bags.sizes) / reading
    log.info("dry run: %d steps on %s (%d instances)", STEPS + 1, ", ".join(names), sum(bags.sizes))
    learner.model.train()
    with memory.explained(memory.Load(names, sum(bags.sizes)), setup.config, training=True):
        seconds = seconds_per_call(lambda: learner.step(bags, divide_by=1, update=True), processes.device, STEPS)
    return sum(bags.sizes) / seconds, read


def _largest_batch(setup: Setup, fold: Fold, pin: bool) -> tuple[Bags, float]:
    """The largest training bags, and the seconds that one process takes to read them."""
    data = TrainBags(fold.train, setup.sources.train, setup.plan, setup.views, fold.seed)
    order = sorted(range(len(data)), key=lambda i: -size_of(data, i))
    keys = [(0, i) for i in order[: setup.config.train.batch_size]]
    if setup.chunks is not None:
        return rehearsal(data, keys, setup.chunks, pin)
    begin = time.perf_counter()
    return data[keys], time.perf_counter() - begin


def _evaluation_rate(setup: Setup, fold: Fold, learner: Learner, processes: Processes) -> float:
    samples = (*fold.val, *fold.test)
    largest = max(range(len(samples)), key=lambda i: _count(setup, samples[i]))
    data = EvalParts(samples, setup.sources.test, part_plan(setup), [largest])
    parts: Sequence[Bags] = [data[i] for i in range(len(data))]
    count = _count(setup, samples[largest])
    alone = Processes(0, 1, processes.device)

    def evaluate() -> None:
        calls = on_device(parts, processes.device)
        predict(learner.model, calls, learner.renderer, learner.precision, alone)

    with memory.explained(memory.Load([samples[largest].id], count), setup.config, training=False):
        return count / seconds_per_call(evaluate, processes.device, 1)


def _memory_gib(device: torch.device) -> float:
    """Peak of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _seconds(setup: Setup, fold: Fold, rates: Rates, processes: Processes) -> float:
    """How long a fold takes: the slower one of computing and reading, in training and in evaluation."""
    config, data, world = setup.config, setup.config.data, processes.world
    workers = data.test_workers
    train_rate = min(rates.train, rates.read * max(data.num_workers, 1)) * world
    models = len(EVALUATED[config.eval.test_type])  # they share what is read
    eval_rate = min(rates.evaluate / models, rates.read * max(workers, 1)) * world
    limit = 0 if data.sel_type == "ema" else bag_limit(data)
    trained = sum(min(_count(setup, s), limit or sys.maxsize) for s in fold.train)
    val, test = (sum(_count(setup, s) for s in samples) for samples in (fold.val, fold.test))
    evaluated = config.train.num_epoch * (val + (test if config.eval.always_test else 0)) + test
    return config.train.num_epoch * trained / train_rate + evaluated / eval_rate


def _report_disk(setup: Setup, learner: Learner) -> None:
    config, folds = setup.config, len(setup.cohort.folds)
    last = _bytes(learner.state_dict())
    weights = sum(_bytes(bare_state_dict(m)) for m in learner.weights().values())
    copies = config.train.num_epoch // config.run.save_iter if config.run.save_iter > 0 else 0
    names = len(EVALUATED[config.eval.test_type])
    needed = folds * (last * (1 + copies) + weights * names) + last  # + last: it is complete before the old one goes
    folder = run_folder(config.run).absolute()
    free = free_bytes(folder)
    log.info("dry run: %.2f GiB of checkpoints in %s, where %.1f GiB are free", needed / 2**30, folder, free / 2**30)
    if needed > free:
        log.warning("dry run: the checkpoints do not fit. Choose another --output_path, or a larger --save_iter.")


def _bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(_bytes(v) for v in state.values())
    return sum(_bytes(v) for v in state) if isinstance(state, (list, tuple)) else 0
