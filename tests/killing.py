"""Runs of main.py that can be killed: processes forked from a server that has imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Starts the server of forks with our modules; before Python 3.13 it does not take over sys.path by itself."""
    _context.set_forkserver_preload(["main", "engine.experiment", "torch._dynamo", "sklearn.metrics", "killing"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _rank(options: Sequence[str], environment: dict[str, str]) -> None:
    import torch

    import main

    os.environ.update(environment)
    torch.set_num_threads(1)  # sums depend on the number of threads
    sys.exit(main.main(options))


class Job:
    """One run of ``world`` processes.

    Args:
        options: of main.py.
        world: processes; more than one are joined through gloo.
    """

    def __init__(self, options: Sequence[str], world: int = 1) -> None:
        _start_server()
        self.processes: list[BaseProcess] = []
        port = str(_free_port())
        for rank in range(world):
            facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            environment = {k: str(v) for k, v in facts.items()} | {"MASTER_PORT": port}
            process = _context.Process(target=_rank, args=(list(options), environment if world > 1 else {}))
            process.start()
            self.processes.append(process)

    def follow_saves(self, folder: Path, count: int) -> bool:
        """Waits until states to go on from were written ``count`` times; False when the run ended before that."""
        seen = states(folder)
        while count:
            if not self.processes[0].is_alive():
                return False
            time.sleep(0.002)
            now = states(folder)
            count, seen = count - (now != seen), now
        return True

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to every process."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def wait(self) -> list[int | None]:
        """The exit statuses of all ranks."""
        for process in self.processes:
            process.join(120)
        return [process.exitcode for process in self.processes]


def states(folder: Path) -> set[tuple[int, int]]:
    """What tells one state in ``folder`` from the next one written."""
    return {(s.st_ino, s.st_mtime_ns) for s in (p.stat() for p in folder.glob("fold_*_last.pt"))}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
