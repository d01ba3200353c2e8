"""Copies from page-locked host memory that run beside the computing."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """``host`` on ``device``; what is queued on the current stream after this call waits for the copy.

    A copy on the current stream would begin when everything queued before it has ended: for a batch of patches that is
    a pause of several milliseconds in every step. On a stream of its own the copy runs during the step before.
    """
    if device.type != "cuda" or host.is_cuda or not host.is_pinned():
        return host.to(device, non_blocking=True)
    beside, current = _copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        copy = host.to(device, non_blocking=True)
    current.wait_stream(beside)
    copy.record_stream(current)
    return copy


@functools.lru_cache(maxsize=8)
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
