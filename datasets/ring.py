"""Buffers that readers fill and the training process empties, over and over.

A batch of patches is large (200 MB in the PANDA recipe). Fresh shared memory for each one costs more than decoding into
it: every page is mapped, zeroed and, for the copy to a GPU, locked anew. Here each reading process owns a few buffers
for the whole run. They are mapped once, page-locked once, and handed back when the device has taken their content.

Each reader owns as many buffers as it may have batches under way, and one more for the batch in use, so none ever waits
for a buffer that cannot come back. A reader is a process, or all reading threads of the training process together.
"""

from __future__ import annotations

import math
import queue
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils.data import get_worker_info

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of one instance."""

MOST_BYTES = 2 << 30
"""What the buffers of ``ring_for`` take together at most; larger batches go without."""


def size_of_form(form: Form) -> int:
    """Bytes of one instance."""
    return math.prod(form[0]) * form[1].itemsize


class BatchRing:
    """The buffers of all readers.

    Args:
        workers: reading processes; 0: threads of this process, which share the buffers.
        prefetch: batches that each process, or all threads together, may have under way or ready.
        shape: of the largest batch, uint8.
        pin: lock the pages, so that copies to a GPU need no second one.
    """

    def __init__(self, workers: int, prefetch: int, shape: tuple[int, ...], pin: bool) -> None:
        self.workers, self.prefetch, self.each = workers, prefetch, _each(workers, prefetch)
        nothing = torch.empty(0, dtype=torch.uint8)
        storages = [torch.UntypedStorage._new_shared(math.prod(shape)) for _ in range(max(workers, 1) * self.each)]
        self.buffers = [nothing.new_empty(0).set_(storage).view(shape) for storage in storages]
        self._views: dict[tuple[int, Form], Tensor] = {}
        self.pinned = pin
        if pin:
            for buffer in self.buffers:
                torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        processes: list[Any] = [multiprocessing.SimpleQueue() for _ in range(workers)]
        self._free = processes or [queue.SimpleQueue()]
        for slot in range(len(self.buffers)):
            self.give_back(slot)

    def fits(self, count: int, form: Form) -> bool:
        """Whether a buffer can hold ``count`` instances."""
        return count * size_of_form(form) <= self.buffers[0].numel()

    def view(self, slot: int, count: int, form: Form) -> Tensor:
        """The first ``count`` instances of a buffer."""
        whole = self._views.get((slot, form))  # each step from there to here would let go of the interpreter's lock
        if whole is None:
            most = self.buffers[slot].numel() // size_of_form(form)
            content = self.buffers[slot].view(-1)[: most * size_of_form(form)]
            whole = self._views[slot, form] = content.view(form[1]).view(most, *form[0])
        return whole[:count]

    def take(self) -> int:
        """In a reader: one of its buffers that is free; waits for the device where none is."""
        worker = get_worker_info()
        return int(self._free[0 if worker is None else worker.id].get())

    def give_back(self, slot: int) -> None:
        """In the training process: the content of ``slot`` is not needed any more."""
        self._free[slot // self.each].put(slot)

    def close(self) -> None:
        """Lets waiting readers finish what they were asked for, and unlocks the pages."""
        for free in self._free:
            for _ in range(self.prefetch):
                free.put(0)
        if self.pinned:
            self.pinned = False
            torch.cuda.synchronize()
            for buffer in self.buffers:
                torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())


def ring_for(workers: int, prefetch: int, largest: int, pin: bool) -> BatchRing:
    """Buffers for batches of up to ``largest`` bytes, or of as many as ``MOST_BYTES`` for all buffers allow.

    For ``workers`` and ``prefetch`` see BatchRing.
    """
    share = MOST_BYTES // (max(workers, 1) * _each(workers, prefetch))
    return BatchRing(workers, prefetch, (max(min(largest, share), 1),), pin)


def _each(workers: int, prefetch: int) -> int:
    """Besides those under way: the batch in use, and, for a single reader, the one whose copy may not have ended."""
    return prefetch + (2 if workers <= 1 else 1)
