"""Buffers that reading processes fill and the training process empties, over and over.

A batch of patches is large (200 MB in the PANDA recipe). Fresh shared memory for each one costs more than decoding into
it: every page is mapped, zeroed and, for the copy to a GPU, locked anew. Here each reading process owns a few buffers
for the whole run. They are mapped once, page-locked once, and handed back when the device has taken their content.

Each process owns as many buffers as it may have batches under way, and one more for the batch in use, so none ever
waits for a buffer that cannot come back.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch.utils.data import get_worker_info


class BatchRing:
    """The buffers of all reading processes.

    Args:
        workers: reading processes.
        prefetch: batches that each may have under way.
        shape: of the largest batch, uint8.
        pin: lock the pages, so that copies to a GPU need no second one.
    """

    def __init__(self, workers: int, prefetch: int, shape: tuple[int, ...], pin: bool) -> None:
        self.workers, self.prefetch, self.each = workers, prefetch, prefetch + (2 if workers == 1 else 1)
        nothing = torch.empty(0, dtype=torch.uint8)
        storages = [torch.UntypedStorage._new_shared(math.prod(shape)) for _ in range(workers * self.each)]
        self.buffers = [nothing.new_empty(0).set_(storage).view(shape) for storage in storages]
        self.pinned = pin
        if pin:
            for buffer in self.buffers:
                torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
        self._free: list[Any] = [multiprocessing.SimpleQueue() for _ in range(workers)]
        for slot in range(len(self.buffers)):
            self.give_back(slot)

    def take(self) -> int:
        """In a reading process: one of its buffers that is free; waits for the device where none is."""
        worker = get_worker_info()
        return int(self._free[0 if worker is None else worker.id].get())

    def give_back(self, slot: int) -> None:
        """In the training process: the content of ``slot`` is not needed any more."""
        self._free[slot // self.each].put(slot)

    def close(self) -> None:
        """Lets waiting processes finish what they were asked for, and unlocks the pages."""
        for queue in self._free:
            for _ in range(self.prefetch):
                queue.put(0)
        if self.pinned:
            torch.cuda.synchronize()
            for buffer in self.buffers:
                torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
