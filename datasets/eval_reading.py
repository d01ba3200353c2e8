"""Reading for evaluation: parts of bags come from reading processes and go to the device as encoder calls.

The reading processes and their buffers live as long as the reader, for every split and epoch, so only the first
evaluation waits for them to start. Mapped features are read by threads, which start at once. Readers go on with the
next bag while the device is busy with this one. Copies to the device run beside the computing: an encoder call is put
together in one of two rooms on the device, while the model works on the other one.

Shapes: P instances of an encoder call, S stored size in px, D feature width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from datasets.ahead import in_threads
from datasets.bags import Bags
from datasets.eval_parts import EvalParts
from datasets.gpu_jpeg.coded import decoded
from datasets.loaders import LoaderOptions, copied, lead, quiet_worker, read_by_threads
from datasets.ring import BatchRing, ring_for

IN_FLIGHT = 2
"""Copies to the device that are not waited for. A reader has two buffers to spare, or one where there are several."""


class _Keys(Sampler[tuple[str, int]]):
    """The parts of the split that is evaluated now."""

    def __init__(self) -> None:
        self.split, self.count = "", 0

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter([(self.split, i) for i in range(self.count)])

    def __len__(self) -> int:
        return self.count


class _Splits(Dataset[Bags]):
    """The parts of all splits, so that one set of processes reads them."""

    def __init__(self, splits: Mapping[str, EvalParts]) -> None:
        self.splits = splits

    def __getitem__(self, key: tuple[str, int]) -> Bags:
        split, number = key
        return self.splits[split][number]


class EvalReader:
    """Reads the bags of some splits, again and again.

    Args:
        splits: the parts of each split.
        options: reading processes or threads; page-locked buffers.
        device: where the instances are wanted.
    """

    def __init__(self, splits: Mapping[str, EvalParts], options: LoaderOptions, device: torch.device) -> None:
        self.splits, self.options, self.device = splits, options, device
        self._keys = _Keys()
        self._loader: DataLoader[Bags] | None = None
        self._ring: BatchRing | None = None
        self._started = False

    def read(self, split: str) -> Iterator[Bags]:
        """The encoder calls of all bags of a split, on the device; each is good until the next one is asked for."""
        parts = self.splits[split]
        if len(parts) == 0:
            return
        direct = self.options.workers == 0 and (not self.options.pin or parts.in_memory)
        if not direct and not self._started:
            self._start()
        with contextlib.closing(self._parts(split, direct)) as read:
            try:
                yield from on_device(read, self.device, self._ring)
            except BaseException:  # Ctrl-C, and a caller that takes no more, too; raised again
                self._stop()  # parts are under way in buffers that nobody would give back
                raise

    def _parts(self, split: str, direct: bool) -> Generator[Bags, None, None]:
        """Parts as their readers prepare them; closing it ends reading threads."""
        parts = self.splits[split]
        numbers = range(len(parts))
        source: Iterable[Bags] = map(parts.__getitem__, numbers)
        if self._loader is not None:
            self._keys.split, self._keys.count = split, len(parts)
            source = self._loader
        elif not direct:
            mapped = read_by_threads([parts.source])
            source = in_threads(lambda i: copied(parts[i]) if mapped else parts[i], numbers, *lead(self.options))
        yield from decoded(source, self.options.decoder)

    def _start(self) -> None:
        self._started = True
        workers = 0 if read_by_threads(parts.source for parts in self.splits.values()) else self.options.workers
        prefetch = self.options.prefetch if workers else lead(self.options)[1]
        if self.options.decoder is None:  # JPEGs are small and of every size
            largest = max(parts.largest_bytes() for parts in self.splits.values() if len(parts))
            self._ring = ring_for(workers, prefetch, largest, self.options.pin)
            self._close = weakref.finalize(self, self._ring.close)
            for parts in self.splits.values():
                parts.ring = self._ring
        if workers > 0:
            self._loader = DataLoader(
                _Splits(self.splits),
                sampler=self._keys,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch,
                worker_init_fn=quiet_worker,
                persistent_workers=True,
            )

    def _stop(self) -> None:
        if self._ring is not None:
            self._close()
        for parts in self.splits.values():
            parts.ring = None
        processes = None if self._loader is None else self._loader._iterator
        if isinstance(processes, _MultiProcessingDataLoaderIter):
            # When left to the garbage collector after an error, torch closes the queues first and the processes, which
            # do not hear that they should end, are waited for (5 s each).
            processes._shutdown_workers()
        self._loader = self._ring = None
        self._started = False


def on_device(parts: Iterable[Bags], device: torch.device, ring: BatchRing | None = None) -> Iterator[Bags]:
    """Puts parts together to encoder calls.

    Args:
        parts: in order; those with a slot have their instances in ``ring``.
        device: where the calls are wanted.
        ring: gets its buffers back.

    Yields:
        Calls with instances and positions on the device; each is good until the next one is asked for.
    """
    rooms, under_way, pos = _Rooms(device), deque[tuple[int, Any]](), []
    try:
        for part in parts:
            content, size = _content(part, ring), sum(part.sizes)
            call = size if part.call is None else part.call
            pos += [] if part.pos is None else [part.pos]
            if device.type == "cpu" and part.slot is None and call == size:
                whole: Tensor | None = content
            else:
                copied, whole = rooms.add(content, call)
                if part.slot is not None and ring is not None:
                    under_way.append((part.slot, copied))
                    _give_back(ring, under_way, IN_FLIGHT)
            if whole is None:
                continue
            cells = torch.cat(pos).to(device, non_blocking=True) if pos else None
            pos.clear()
            yield dataclasses.replace(part, instances=whole, sizes=[call], pos=cells, slot=None, form=None)
            rooms.leave()
        if ring is not None:
            _give_back(ring, under_way, 0)
    finally:
        rooms.close()


def _content(part: Bags, ring: BatchRing | None) -> Tensor:
    if part.slot is None or part.form is None or ring is None:
        return part.instances
    return ring.view(part.slot, sum(part.sizes), part.form)


def _give_back(ring: BatchRing, under_way: deque[tuple[int, Any]], most: int) -> None:
    """Waits until at most ``most`` copies are under way, and gives the buffers of the others back."""
    while under_way and (under_way[0][1] is None or len(under_way) > most):
        slot, copied = under_way.popleft()
        if copied is not None:
            copied.synchronize()
        ring.give_back(slot)


class _Rooms:
    """Two places on the device: one is filled while the model works on the other one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rooms: list[Tensor] = [torch.empty(0, device=device) for _ in range(2)]
        self._left: list[Any] = [None, None]
        self._turn = self._filled = 0

    def add(self, content: Tensor, call: int) -> tuple[Any, Tensor | None]:
        """Queues the copy of ``content`` after what is there of an encoder call of ``call`` instances.

        Returns:
            The event of the copy (None on a CPU), and the call where it is complete.
        """
        if self._filled == 0:
            self._enter(content, call)
        room, copied = self._rooms[self._turn], None
        if content.is_cuda and self.beside is not None:  # decoded there; its memory must outlive the copy
            content.record_stream(self.beside)
        with torch.cuda.stream(self.beside):
            room[self._filled : self._filled + len(content)].copy_(content, non_blocking=True)
            if self.beside is not None:
                copied = torch.cuda.Event()
                copied.record()
        self._filled += len(content)
        if self._filled < call:
            return copied, None
        if self.beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.beside)
        self._filled = 0
        return copied, room[:call]

    def leave(self) -> None:
        """What works on the last call is queued."""
        if self.beside is not None:
            self._left[self._turn] = torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        """Waits for copies, so that nothing writes to the rooms when they are gone."""
        if self.beside is not None:
            self.beside.synchronize()

    def _enter(self, content: Tensor, call: int) -> None:
        self._turn = 1 - self._turn
        room, left = self._rooms[self._turn], self._left[self._turn]
        if len(room) < call or room.shape[1:] != content.shape[1:] or room.dtype != content.dtype:
            shape = (call, *content.shape[1:])
            self._rooms[self._turn] = torch.empty(shape, dtype=content.dtype, device=self.device)
            if self.beside is not None:  # the memory may have been somebody's whose work is still queued
                self.beside.wait_stream(torch.cuda.current_stream(self.device))
        elif self.beside is not None and left is not None:
            self.beside.wait_event(left)
