"""``main.py bench``: measures on the user's own data whether disk, decoding or the device limits training.

The same data, model and step as training, one stage after another in one run: reading alone, decoding alone, the step
on batches that are on the device already, batches that nobody uses, and everything together. ``verdict`` turns
the figures into advice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from datasets.gpu_jpeg.stacks import pack
from datasets.labels.types import Fold
from engine.agreement import check_processes, check_same_input
from engine.bench.figures import Figures, Setting, table
from engine.bench.steps import TrainingStages, begin_stage, evaluation_rate
from engine.bench.supply import (
    Decoding,
    Rate,
    Reading,
    Supply,
    by_processes,
    by_readers,
    bytes_to_read,
    first_and_again,
    sample_jpegs,
)
from engine.bench.verdict import limit_of, verdict
from engine.experiment import set_precision
from engine.fold import build_learner, training_batches, training_decoder, training_stream
from engine.records import Records, environment, open_folder
from engine.setup import Setup, prepare
from engine.staging import staged
from engine.tasks import task_builder
from engine.timing import seconds_per_call
from engine.trained import need_training_rows
from engine.validation import loader_options
from utils.config import Config
from utils.cores import usable_cores
from utils.dist import Processes
from utils.errors import UserError

log = logging.getLogger(__name__)

SECONDS = 40.0
"""What all stages take together by default; starting processes and compiling come on top."""

SHARES = {"read": 0.15, "decode": 0.15, "step": 0.2, "loader": 0.15, "loop": 0.25, "evaluate": 0.1}
"""How the time is divided. The loop has most: it has to show how a queue runs empty."""

GPU_BATCH = 1024
"""Patches that a GPU decodes at a time, as in the published recipes: 8 bags of 128."""

GPU_TIMES = 5
"""Batches decoded: 0.2 s where a GPU decodes 25,000 patches a second."""

BETWEEN = 3
"""Batches that may be ready in the thread that lets the GPU decode, besides those of the readers."""

ENDLESS = 1_000_000
"""Epochs in the stream of batches; the measuring stops it."""


def split_arguments(argv: Sequence[str]) -> tuple[float, list[str]]:
    """``--seconds`` of the command line, which training does not know, and the options that it does.

    Raises:
        UserError: for anything but a positive number.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seconds", default=str(SECONDS))
    own, rest = parser.parse_known_args(list(argv))
    with contextlib.suppress(ValueError):
        if 0 < float(own.seconds) < float("inf"):
            return float(own.seconds), rest
    raise UserError(f"--seconds={own.seconds}: the time for all measurements is a number above 0, such as 40.")


def bench(config: Config, processes: Processes, seconds: float = SECONDS) -> Figures:
    """Measures, logs the table and the verdict, and writes ``bench.json`` into the run's folder; keeps no weights.

    Raises:
        UserError: for faults in what the user gave, or too little memory.
    """
    set_precision(config)
    setup = prepare(config)
    need_training_rows(setup.cohort, "bench")
    check_processes(setup, processes.world)
    check_same_input(setup, processes)
    with open_folder(config.run, processes) as records:
        return _measured(staged(setup, processes), processes, records, seconds)


def _measured(setup: Setup, processes: Processes, records: Records, seconds: float) -> Figures:
    figures = measure(setup, setup.cohort.folds[0], processes, seconds)
    sentences = verdict(figures)
    for line in (*table(figures), *sentences):
        log.info("%s", line)
    if processes.is_main:
        report: dict[str, Any] = {"limit": limit_of(figures), "verdict": sentences}
        report |= {"figures": dataclasses.asdict(figures), "seconds": seconds}
        records.json("bench.json", report | {"config": setup.config.flat(), "environment": environment()})
        log.info("The figures are in %s.", records.folder / "bench.json")
    return figures


def measure(setup: Setup, fold: Fold, processes: Processes, seconds: float) -> Figures:
    """All stages, one after another. Every process takes part and gets the same figures."""
    share = {stage: part * seconds for stage, part in SHARES.items()}
    supply = _measure_supply(setup, fold, processes, share)
    task = task_builder.build(setup.config, setup.cohort, fold, processes.world)
    learner = build_learner(setup, fold, task, processes)
    learner.model.train()
    begin_stage(processes, "starting the reading processes")
    begin = time.perf_counter()
    batches = training_batches(setup, fold, processes, training_stream(setup, fold, processes, (0, ENDLESS)))
    first = next(batches)
    started = time.perf_counter() - begin
    ready = _readers(setup, processes) * setup.config.data.prefetch_factor
    ready += BETWEEN if supply.decode_gpu is not None else 0
    stages = TrainingStages(setup, fold, learner, batches, ready)
    step = stages.step(first, share["step"])
    loader = stages.loader(share["loader"])
    expected = min(step.rate, loader) if stages.workers else 1 / (1 / step.rate + 1 / loader)
    loop, wait = stages.loop(share["loop"], expected)
    del stages, batches, first  # their reading processes end here
    evaluated = evaluation_rate(setup, fold, learner, share["evaluate"], step.rate)
    return Figures(
        setting=_setting(setup, fold, processes),
        supply=supply,
        start_seconds=max(processes.gather(started)),
        loader=_total(processes, loader),
        copy=None if step.copy is None else _total(processes, step.copy),
        step=_total(processes, step.rate),
        render_share=step.render_share,
        ema_share=step.ema_share,
        loop=_total(processes, loop),
        data_wait=max(processes.gather(wait)),
        evaluate=None if evaluated is None else _total(processes, evaluated),
        memory_gib=torch.cuda.max_memory_reserved() / 2**30 if processes.device.type == "cuda" else None,
    )


def _readers(setup: Setup, processes: Processes) -> int:
    return loader_options(setup, processes, setup.config.data.num_workers).workers


def _total(processes: Processes, rate: float) -> float:
    return float(sum(processes.gather(rate)))


def _measure_supply(setup: Setup, fold: Fold, processes: Processes, share: dict[str, float]) -> Supply:
    """Reading and decoding by one process, while the others wait, and by all readers at once."""
    workers = _readers(setup, processes)
    seed, crowd = [fold.seed, processes.rank], f"{max(workers, 1) * processes.world} reader(s)"
    reading = Reading(fold.train, setup.sources.train, setup.plan, [*seed, 0])
    others = Reading(fold.train, setup.sources.train, setup.plan, [*seed, 1])
    begin_stage(processes, "reading, one process")
    alone = first_and_again(reading, share["read"] / 3) if processes.is_main else None
    first, again = processes.gather(alone)[0]
    begin_stage(processes, f"reading, {crowd}")
    read = Rate.joined(processes.gather(by_readers(others, workers, share["read"] / 3)))
    sample = sample_jpegs(reading)
    if sample is None:
        return Supply(first, again, read, None, None)
    decoding = Decoding(*sample)
    begin_stage(processes, "decoding, one process")
    one = by_processes(decoding, 0, share["decode"] / 2) if processes.is_main else None
    one = processes.gather(one)[0]
    begin_stage(processes, f"decoding, {crowd}")
    decoded = Rate.joined(processes.gather(by_processes(decoding, workers, share["decode"] / 2)))
    return Supply(first, again, read, one, decoded, _decoding_on_the_gpu(setup, processes, sample[0]))


def _decoding_on_the_gpu(setup: Setup, processes: Processes, jpegs: Sequence[bytes]) -> Rate | None:
    """What the GPUs decode when they do nothing else; None where the options leave decoding to the CPU."""
    decoder = training_decoder(setup, processes)
    if decoder is None:
        return None
    begin_stage(processes, "decoding, GPU")
    rows = pack((list(jpegs) * GPU_BATCH)[:GPU_BATCH])
    seconds = seconds_per_call(lambda: decoder(rows), processes.device, GPU_TIMES)
    return Rate.joined(processes.gather(Rate(GPU_BATCH / seconds)))


def _setting(setup: Setup, fold: Fold, processes: Processes) -> Setting:
    from datasets.features import free_memory  # h5py is needed for features only

    data, train = setup.config.data, setup.config.train
    nodes = max(processes.world // processes.local_world, 1)
    options = loader_options(setup, processes, data.num_workers)
    cuda = processes.device.type == "cuda"
    return Setting(
        device=processes.device.type,
        name=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        unit="features" if setup.encoder is None else "patches",
        processes=processes.world,
        nodes=nodes,
        cores=usable_cores() * nodes,
        workers=options.workers,
        stored_px=setup.sources.stored_px,
        crop_px=None if setup.encoder is None else data.crop_size,
        random_crop=setup.views is not None and setup.views.crops,
        amp=train.amp,
        channels_last=train.channels_last,
        compiled=train.torchcompile,
        determ=train.determ,
        pinned=options.pin,
        kept=data.persistence,
        data_bytes=bytes_to_read(fold.train, setup.sources.train),
        free_bytes=free_memory(),
        staged=data.stage_to is not None,
    )
