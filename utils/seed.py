"""Seeds as functions of the position in a run, so that nothing random depends on what ran before."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seeds Python, NumPy and torch (CPU and GPUs)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """The seed of dropout in one step of one process."""
    digest = hashlib.blake2b(f"{seed},{epoch},{step},{rank}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
