"""The processes of one run: rank, device, and the few collectives that the engine needs."""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from utils.errors import UserError
from utils.host_copy import HostCopy
from utils.stop import LAUNCHER, MARK, StopRequest


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    Attributes:
        rank: 0 .. world - 1; rank 0 logs and writes.
        world: number of processes; 1 without torchrun.
        device: where this process computes.
        stop: whether somebody asked this process to stop.
        local_rank: number of this process on its machine, from 0.
        local_world: number of processes on this machine.
    """

    rank: int
    world: int
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    local_rank: int = 0
    local_world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this process does what is done once per machine."""
        return self.local_rank == 0

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


class Poll:
    """The largest wish of all ranks, known one question late so that no device waits for the answer."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._pending: HostCopy | None = None

    def ask(self, wish: int) -> int:
        """States this rank's wish; gives the largest one of the question before, the same number on every rank.

        With one process the answer is its own wish. Every rank must ask equally often.
        """
        if self._processes.world == 1:
            return wish
        answer = 0 if self._pending is None else int(self._pending.value())
        question = torch.full((), wish, device=self._processes.device)
        dist.all_reduce(question, dist.ReduceOp.MAX)
        self._pending = HostCopy(question)
        return answer

    def forget(self) -> None:
        """Drops the question that is under way, because its wish has been granted."""
        self._pending = None


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
    if MARK in os.environ:
        _end_with_the_launcher()
    place = _place(device, local_rank)
    if world > 1:
        cuda = place.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=place if cuda else None,
        )
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = Processes(rank, world, place, local_rank=local_rank, local_world=local_world)
    with own.stop.listening():
        try:
            yield own
        except BaseException:  # readers that wait for a buffer would keep the program alive; raised again
            _end_reading_processes()
            raise
    if world > 1:  # not after an exception: the peers would be waited for, and torchrun is about to end them
        dist.destroy_process_group()


def planned_processes(argv: Sequence[str]) -> tuple[int, list[str]]:
    """How many processes a run will have, and the other words of the command line.

    Args:
        argv: a command line, perhaps with ``--processes=N``; default: what torchrun says in the environment, else 1.

    Raises:
        UserError: for something else than a number of 1 or more.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", nargs="?", default=os.environ.get("WORLD_SIZE", "1"))
    own, rest = parser.parse_known_args(list(argv))
    text = str(own.processes)
    if not text.isdecimal() or int(text) < 1:
        given = "is without a number" if own.processes is None else f"is {text!r}"
        raise UserError(f"processes {given}, but must be a number of 1 or more. Give --processes=4, for example.")
    return int(text), rest


def _end_reading_processes() -> None:
    """They ignore SIGTERM, with which Python ends them when it exits: after an error it would wait for ever."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error of its own about their end
    for child in multiprocessing.active_children():
        child.kill()


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` is about another process that ended, which has said why itself."""
    said = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _end_with_the_launcher() -> None:
    """Linux kills this process when the one that started it is killed: nobody would end a hanging one any more."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):  # it was killed before this was set
            os.kill(os.getpid(), signal.SIGKILL)


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
