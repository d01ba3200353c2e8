"""Logging for people: rank 0 speaks, times are short, a progress bar only on a terminal."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

_own_handlers: list[logging.Handler] = []


def set_up_logging(rank: int = 0, file: Path | None = None) -> None:
    """Sends INFO and above of rank 0 (warnings of the others) to stderr, and to ``file`` when given."""
    root = logging.getLogger()
    for handler in _own_handlers:
        root.removeHandler(handler)
        handler.close()
    _own_handlers.clear()
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    layout = logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None and rank == 0:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(layout)
        root.addHandler(handler)
        _own_handlers.append(handler)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m05s, 1h12m, 2d03h."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
