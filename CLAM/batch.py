"""Many slides over all cores. A slide that kills its process costs that slide, not the batch."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from utils.parent import end_with_parent

J = TypeVar("J")
R = TypeVar("R")


def over_processes(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[tuple[int, R | None]]:
    """Yields (index, function(job)) as jobs finish; the result is None where the worker process died.

    With one worker the jobs run in this process. Otherwise processes are spawned, not forked: image
    libraries hold threads and handles that do not survive a fork. Jobs and results must be picklable.
    """
    if workers <= 1 or len(jobs) <= 1:
        for index, job in enumerate(jobs):
            yield index, function(job)
        return
    waiting = list(range(len(jobs)))[::-1]
    while waiting:
        suspects: list[int] = []
        yield from _until_broken(function, jobs, waiting, suspects, min(workers, len(jobs)))
        # A dead process breaks its pool: each slide that was in work then gets a process of its own.
        for index in suspects:
            yield index, _alone(function, jobs[index])


def _until_broken(
    function: Callable[[J], R], jobs: Sequence[J], waiting: list[int], suspects: list[int], workers: int
) -> Iterator[tuple[int, R | None]]:
    """Takes jobs from the end of ``waiting`` until none is left or the pool breaks; then fills ``suspects``."""
    running: dict[Future[R], int] = {}
    with _pool(workers) as pool:
        while (waiting and not suspects) or running:
            while waiting and len(running) < workers and not suspects:
                index = waiting.pop()
                try:
                    running[pool.submit(function, jobs[index])] = index
                except BrokenProcessPool:
                    suspects.append(index)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                index = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    suspects.append(index)
                else:
                    yield index, future.result()


def _alone(function: Callable[[J], R], job: J) -> R | None:
    with _pool(1) as pool:
        try:
            return pool.submit(function, job).result()
        except BrokenProcessPool:
            return None


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )


def _start_worker() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    end_with_parent()
