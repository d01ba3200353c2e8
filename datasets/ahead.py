"""Work that a thread does in advance."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 3.0
"""Seconds that the end of the program waits for what a thread is about: a part of a bag, or decoding a batch."""

_alive: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()
"""Threads, and what tells each of them that nobody takes items any more."""


class _Failed:
    """An error of the thread, on its way to where the items are used."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    """Behind the last item."""


def in_thread(items: Iterable[T], ahead: int) -> Iterator[T]:
    """``items``, made by a thread, at most ``ahead`` of them in advance; its errors are raised where they are used.

    Worth it where making an item releases the interpreter's lock, as reading files and copying tensors do.
    """
    ready: queue.Queue[T | _Failed | _End] = queue.Queue(ahead)
    stopped = threading.Event()

    def work() -> None:
        try:
            for item in items:
                if not _put(ready, item, stopped):
                    return
        except Exception as error:  # noqa: BLE001 - raised again by whoever takes the items
            _put(ready, _Failed(error), stopped)
        else:
            _put(ready, _End(), stopped)

    thread = threading.Thread(target=work, name="reading ahead", daemon=True)
    thread.start()
    _alive[thread] = stopped
    try:
        while not isinstance(item := ready.get(), _End):
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()


@atexit.register
def _end_threads() -> None:
    """Ends threads of iterators that nobody closed: one that is inside of torch when Python ends aborts the program."""
    threads = list(_alive.items())
    for _, stopped in threads:
        stopped.set()
    for thread, _ in threads:
        thread.join(PATIENCE)


def _put(ready: queue.Queue[T], item: T, stopped: threading.Event) -> bool:
    """Waits for room; gives up when nobody takes items any more."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
