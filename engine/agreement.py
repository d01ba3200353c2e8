"""What several processes need of a run, and of each other, before any of them trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets.labels.report import fingerprint
from datasets.labels.types import Fold
from datasets.loaders import TrainStream
from engine.setup import Setup
from utils.config import Config
from utils.dist import Processes
from utils.errors import Faults, UserError

OF_A_MACHINE = {
    "dataset_root",
    "dataset_sub_root",
    "dataset_test_root",
    "csv_path",
    "h5_path",
    "h5_sub_path",
    "output_path",
    "checkpoint",
    "stage_to",
    "num_workers",
    "num_workers_test",
    "prefetch_factor",
    "pin_memory",
    "persistence",
}
"""Options that may differ between the machines of a run: where data lie and how they are read."""


def check_processes(setup: Setup, world: int) -> None:
    """Refuses what depends on the number of processes, for every fold, before any is trained.

    Args:
        setup: options and folds.
        world: number of processes.

    Raises:
        UserError: when a training split is too small, or a process would have no bag where it needs one.
    """
    faults = Faults(f"{world} process{'es' if world > 1 else ''}")
    for fold in setup.cohort.folds:
        for fault in _process_faults(setup.config, fold, world):
            faults.add(f"fold {fold.index}: {fault}")
    faults.raise_if_any()


def _process_faults(config: Config, fold: Fold, world: int) -> Iterator[str]:
    options, count = config.train, len(fold.train)
    try:
        stream = TrainStream(count, options.batch_size, world=world, drop_last=options.drop_last)
    except UserError as error:
        yield str(error)
        return
    least = min(stream.counts(stream.steps_per_epoch - 1))
    if options.sync_bn and world > 1 and least == 0:
        yield (
            f"the last step of an epoch has {count % (options.batch_size * world)} of {count} bags, fewer than there "
            "are processes, and sync_bn needs a bag in each. Give --drop_last or --no_sync_bn, or start fewer "
            "processes."
        )


def check_same_input(setup: Setup, processes: Processes) -> None:
    """Refuses processes that would not train the same: they would wait for each other, or learn nonsense.

    Raises:
        UserError: on every process, naming what differs.
    """
    if processes.world == 1:
        return
    seen = processes.gather(_input_of(setup))
    faults = Faults("processes")
    for rank, facts in enumerate(seen):
        other = [f"{name} ({seen[0].get(name)} -> {facts.get(name)})" for name in facts if facts[name] != seen[0][name]]
        if other:
            faults.add(
                f"process {rank} has other values than process 0 of {', '.join(other)}. Start all with the same "
                "command, and give all machines the same label file and data."
            )
    faults.raise_if_any()


def _input_of(setup: Setup) -> dict[str, Any]:
    """What must be the same everywhere."""
    options = {name: value for name, value in setup.config.flat().items() if name not in OF_A_MACHINE}
    labels = fingerprint(setup.cohort)[:12]
    return {**options, "labels and splits": labels, "stores": list(setup.sources.fingerprints.values())}
