"""How many CPU cores this process may use, which is often less than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Quota and period in microseconds, or "max": what a container or a batch system grants (cgroup v2)."""


def usable_cores(quota: Path = QUOTA) -> int:
    """Cores of the machine, less those that the scheduler's mask or the container's quota takes away; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        granted, period = quota.read_text(encoding="ascii").split()
        return max(min(allowed, int(granted) // int(period)), 1)
    except (OSError, ValueError):  # no such file, or "max"
        return allowed
