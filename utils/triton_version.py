"""Which Triton our GPU kernels are written for."""

from __future__ import annotations

OLDEST = (3, 3)
"""Kernels pass in the interpreter from Triton 3.3 (torch 2.7) on; 3.1 and 3.2 do not run all of them."""


def require_triton() -> None:
    """Raises ImportError where Triton is missing or older: callers then take the path without own kernels."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(f"Triton is {triton.__version__}, and our kernels need {OLDEST[0]}.{OLDEST[1]} or newer")
