"""Seconds that work takes on a device which computes behind the program's back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Seconds that ``work`` takes, once warm; the first call does not count."""
    work()
    wait_for(device)
    begin = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (time.perf_counter() - begin) / times
