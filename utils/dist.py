"""The processes of one run: rank, device, and the few collectives that the engine needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    Attributes:
        rank: 0 .. world - 1; rank 0 logs and writes.
        world: number of processes; 1 without torchrun.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes(device: str = "auto", timeout_minutes: int = 30) -> Iterator[Processes]:
    """Joins the process group that torchrun describes in the environment, and leaves it at the end.

    Args:
        device: "auto" (CUDA when there is one), "cpu" or "cuda".
        timeout_minutes: a collective that waits longer than this ends the run.

    Raises:
        UserError: for "cuda" without a GPU, or more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = _place(device, local_rank)
    if world > 1:
        cuda = place.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=place if cuda else None,
        )
    yield Processes(rank, world, place)
    if world > 1:  # not behind an exception: the peers would be waited for, and torchrun is about to end them
        dist.destroy_process_group()


def _place(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} on this machine needs a GPU of its own, but there are {count}. "
            f"Start {count or 1} process(es), or give --device=cpu."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
