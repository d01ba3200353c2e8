"""Worker processes that read patches, and the one process that takes their results.

Every worker has a pipe of its own and shares no lock with the others, so that one that dies (out of memory,
say) harms nobody: its task fails and the others go on.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from patch_reading import Images, PatchReader, Task, perform
from patch_resize import warm_up

from datasets import jpeg
from utils.errors import UserError, told

TASKS_AHEAD = 2
"""Tasks that a worker has received: the one in work and the next, so that it never waits for the writer."""

MESSAGES_AHEAD = 8
"""Messages (of about 1 MB) per worker that wait for the writer before the worker is held up."""

ORPHAN_CHECK_S = 5.0

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Forked processes start at once and share what is imported; elsewhere system libraries do not survive a fork."""


@dataclass(frozen=True)
class Ended:
    """A task is over; ``error`` is None when all its images were sent."""

    number: int
    error: str | None = None


@dataclass(frozen=True)
class _Lost:
    worker: int


class _Worker:
    """One process with its pipe, and the thread that empties the pipe into the common queue."""

    def __init__(self, index: int, results: queue.Queue[tuple[int, Images | Ended | _Lost]]) -> None:
        self.index = index
        self.results = results
        self.tasks: deque[int] = deque()
        self.alive = True
        self.pipe: Connection
        self.process: BaseProcess

    def start(self, context: multiprocessing.context.BaseContext, inherited: list[Connection]) -> None:
        self.pipe, theirs = context.Pipe()
        forked = context.get_start_method() == "fork"
        closing = [*inherited, self.pipe] if forked else []
        self.process = context.Process(target=_work, args=(theirs, closing), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()

    def listen(self) -> None:
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        try:
            while True:
                self.results.put((self.index, self.pipe.recv()))
        except (EOFError, OSError):
            self.results.put((self.index, _Lost(self.index)))

    def give(self, task: Task) -> None:
        self.tasks.append(task.number)
        try:
            self.pipe.send(task)
        except OSError:
            # The receiving thread sees the same broken pipe and reports the tasks as lost.
            return

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(timeout=10)
        self.pipe.close()


class ReaderPool:
    """Processes that perform tasks. Make it before LMDB files are opened and threads started: it forks."""

    def __init__(self, workers: int, kernel: str = "pillow") -> None:
        warm_up(kernel)
        jpeg.backend()
        context = multiprocessing.get_context(START_METHOD)
        self._results: queue.Queue[tuple[int, Images | Ended | _Lost]] = queue.Queue(MESSAGES_AHEAD * workers)
        self._workers: list[_Worker] = []
        for index in range(workers):
            worker = _Worker(index, self._results)
            worker.start(context, [other.pipe for other in self._workers])
            self._workers.append(worker)
        for worker in self._workers:
            worker.listen()

    def run(self, tasks: Iterable[Task]) -> Iterator[Images | Ended]:
        """Performs tasks, started in their order; yields their results as they come, each task's ``Ended``
        last.

        Raises:
            UserError: no worker is left.
        """
        waiting = iter(tasks)
        self._hand_out(waiting)
        while any(worker.tasks for worker in self._workers):
            index, message = self._results.get()
            worker = self._workers[index]
            if isinstance(message, _Lost):
                yield from self._bury(worker)
            else:
                yield message
                if isinstance(message, Ended):
                    worker.tasks.remove(message.number)
            self._hand_out(waiting)

    def _hand_out(self, waiting: Iterator[Task]) -> None:
        alive = [worker for worker in self._workers if worker.alive]
        while True:
            worker = min(alive, key=lambda w: len(w.tasks), default=None)
            if worker is None or len(worker.tasks) >= TASKS_AHEAD:
                return
            task = next(waiting, None)
            if task is None:
                return
            worker.give(task)

    def _bury(self, worker: _Worker) -> Iterator[Ended]:
        worker.alive = False
        worker.process.join(timeout=10)
        status = f"status {worker.process.exitcode} (-9: killed, often for lack of memory)"
        while worker.tasks:
            yield Ended(worker.tasks.popleft(), f"its worker process ended with {status}")
        if not any(other.alive for other in self._workers):
            raise UserError(
                f"All {len(self._workers)} worker processes ended, the last with {status}. "
                "Finished slides are kept: run again with fewer --workers."
            )

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.stop()


def _work(pipe: Connection, inherited: list[Connection]) -> None:
    """A worker's life: performs tasks until the pipe closes."""
    # A forked copy of the other ends would keep the pipes open after the parent is gone.
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _one_thread()
    parent = os.getppid()
    reader: PatchReader | None = None
    try:
        while True:
            while not pipe.poll(ORPHAN_CHECK_S):
                if os.getppid() != parent:
                    return
            reader = _perform(pipe, pipe.recv(), reader)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _perform(pipe: Connection, task: Task, reader: PatchReader | None) -> PatchReader | None:
    """Does a task with the reader of the last one, if the slide is the same; gives the reader to keep."""
    try:
        if reader is None or reader.path != task.slide:
            if reader is not None:
                reader.close()
            reader = PatchReader(task.slide)
        for images in perform(task, reader):
            pipe.send(images)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:  # noqa: BLE001
        # Libraries raise whatever they like over odd files, and a worker that ends takes healthy slides with it.
        pipe.send(Ended(task.number, told(error)))
        return None
    pipe.send(Ended(task.number))
    return reader


def _one_thread() -> None:
    """There is a worker per core already."""
    import cv2

    cv2.setNumThreads(1)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
