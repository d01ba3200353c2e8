"""Numbers that come from a device which is not waited for."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A number on its way from the device: asking for it waits for what was queued before it, not for what came after.

    ``float(tensor)`` would wait for all work that is queued, and the device would idle while the next step is launched.

    Args:
        number: the first one; others may follow in the same memory (``take``).
    """

    def __init__(self, number: Tensor) -> None:
        self._number = number
        self._there: torch.cuda.Event | None = None
        self.take(number)

    def take(self, number: Tensor) -> None:
        """Another number, once the one before is not asked for any more; making room anew costs every step time."""
        if not number.is_cuda:
            self._number, self._there = number, None
            return
        if self._there is None or self._number.dtype != number.dtype:
            self._number = torch.empty_like(number, device="cpu", pin_memory=True)
            self._there = torch.cuda.Event()
        self._number.copy_(number, non_blocking=True)
        self._there.record()

    def value(self) -> float:
        if self._there is not None:
            self._there.synchronize()
        return float(self._number)
