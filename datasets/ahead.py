"""Work that threads do in advance."""

from __future__ import annotations

import atexit
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")

PATIENCE = 20.0
"""Seconds that the end of the program waits for what threads are about: parts of a bag, or decoding a batch."""


class _Failed:
    """An error of a thread, on its way to where the items are used."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    """After the last item."""


def in_threads(function: Callable[[S], T], items: Iterable[S], threads: int, ahead: int) -> Generator[T, None, None]:
    """``function`` of each of ``items``, in their order, made by ``threads`` threads of this process.

    Worth it where ``function`` releases the interpreter's lock for most of its time, as copying tensors does. When the
    iterator is closed, the threads end with what they are about, and are waited for.

    Args:
        function: is called by several threads at the same time.
        items: are asked for by whoever takes the results.
        threads: how many; torch's own threads are divided among them.
        ahead: results that are under way or ready, besides the one that was taken last.

    Raises:
        Exception: what ``function`` raised, in the place of its result.
    """
    return _made(_Crew(function, threads), items, ahead, PATIENCE)


def in_thread(items: Iterable[T], ahead: int) -> Iterator[T]:
    """``items``, made by a thread, at most ``ahead`` of them ready; its errors are raised where they are used.

    When the iterator is closed, the thread ends with the item that it is about, which may wait for other processes;
    nobody waits for the thread.
    """
    source, end = iter(items), _End()
    crew: _Crew[None, T | _End] = _Crew(lambda _: next(source, end), 1)
    for item in _made(crew, itertools.repeat(None), ahead + 1, 0.0):
        if isinstance(item, _End):
            return
        yield item


def _made(crew: _Crew[S, T], items: Iterable[S], ahead: int, patience: float) -> Generator[T, None, None]:
    source = iter(items)
    try:
        crew.begin()
        under_way = deque(crew.ask(item) for item in itertools.islice(source, ahead))
        while under_way:
            made = under_way.popleft().get()
            under_way.extend(crew.ask(item) for item in itertools.islice(source, 1))
            if isinstance(made, _Failed):
                raise made.error
            yield made
    finally:
        crew.tell()
        crew.wait(patience)


class _Crew(Generic[S, T]):
    """Threads that do what they are asked for, first come, first served.

    Args:
        function: what is done.
        count: threads.
    """

    def __init__(self, function: Callable[[S], T], count: int) -> None:
        self._function = function
        self._asked: SimpleQueue[tuple[S, SimpleQueue[Any]] | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._begun: SimpleQueue[None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="reading ahead", daemon=True) for _ in range(count)]

    def begin(self) -> None:
        """Starts the threads; torch's own threads are divided among them.

        Each of them would otherwise have as many as there are cores. Torch also keeps the last number that was set, for
        threads that begin later, so it is set again at the end.
        """
        cores = torch.get_num_threads()
        self._share = max(1, cores // len(self._threads))
        _alive.add(self)
        for thread in self._threads:
            _running.add(thread)
            thread.start()
        for _ in self._threads:
            self._begun.get()
        torch.set_num_threads(cores)

    def ask(self, item: S) -> SimpleQueue[Any]:
        """Where the result, or what was raised, will be."""
        answer: SimpleQueue[Any] = SimpleQueue()
        self._asked.put((item, answer))
        return answer

    def tell(self) -> None:
        """Tells the threads that nobody takes results any more."""
        self._stopped.set()
        for _ in self._threads:
            self._asked.put(None)

    def wait(self, patience: float) -> None:
        """Waits at most ``patience`` seconds for the threads to end."""
        until = time.monotonic() + patience
        for thread in self._threads:
            _wait(thread, until)

    def _work(self) -> None:
        torch.get_num_threads()  # takes the number of the process over, which would replace ours later
        torch.set_num_threads(self._share)
        self._begun.put(None)
        while (asked := self._asked.get()) is not None and not self._stopped.is_set():
            item, answer = asked
            try:
                answer.put(self._function(item))
            except Exception as error:  # noqa: BLE001 - raised again by whoever takes the results
                answer.put(_Failed(error))


_alive: weakref.WeakSet[_Crew[Any, Any]] = weakref.WeakSet()
"""Those whose threads may work."""

_running: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
"""Threads that were begun. The last one of a crew outlives it: it clears away what the crew read from."""


@atexit.register
def _end_threads() -> None:
    """Ends threads of iterators that nobody closed: one that is inside of torch when Python ends aborts the program."""
    for crew in list(_alive):
        crew.tell()
    until = time.monotonic() + PATIENCE
    for thread in list(_running):
        _wait(thread, until)


def _wait(thread: threading.Thread, until: float) -> None:
    """Waits for the end of ``thread`` until then at most."""
    if thread.is_alive() and thread is not threading.current_thread():  # where garbage is collected
        thread.join(max(until - time.monotonic(), 0.0))
