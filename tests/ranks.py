"""Work done by several processes that are joined through gloo, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import killing
import torch


def results_of(
    function: Callable[..., Any], world: int, folder: Path, *arguments: Any, device: str = "cpu"
) -> list[Any]:
    """What ``function(processes, *arguments)``, which can be imported, gives on every rank: tensors, lists, dicts."""
    folder.mkdir(parents=True)
    codes = wait(start(_call, world, folder, function, folder, arguments, device))
    assert codes == [0] * world, said(folder, world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def train(options: Sequence[str], world: int, folder: Path) -> Path:
    """A run of main.py that must succeed; returns the run's folder."""
    (folder / "said").mkdir(parents=True)
    codes = wait(start(_main, world, folder / "said", [*options, f"--output_path={folder}"], None))
    assert codes == [0] * world, said(folder / "said", world)
    return folder / "default" / "default"


def train_with_fault(
    options: Sequence[str], folder: Path, fault: Callable[[int], None]
) -> tuple[list[int | None], str]:
    """A run of two processes in each of which ``fault(rank)`` is called first: exit statuses, and what they said."""
    (folder / "said").mkdir(parents=True)
    codes = wait(start(_main, 2, folder / "said", [*options, f"--output_path={folder}"], fault), seconds=60)
    return codes, said(folder / "said", 2)


def start(body: Callable[..., None], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """Processes that call ``body(*arguments)`` with torchrun's environment and write what they say to ``folder``."""
    killing._start_server()
    port = killing._free_port()
    jobs = []
    for rank in range(world):
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in facts.items()}
        job = killing._context.Process(target=_rank, args=(environment, folder / f"{rank}.txt", body, arguments))
        job.start()
        jobs.append(job)
    return jobs


def wait(jobs: list[Any], seconds: float = 300) -> list[int | None]:
    """Exit statuses; None, and the process is killed, where it has not ended in time."""
    end = time.monotonic() + seconds
    for job in jobs:
        job.join(max(end - time.monotonic(), 0))
    codes = [job.exitcode for job in jobs]
    for job in jobs:
        if job.exitcode is None:
            job.kill()
            job.join()
    return codes


def said(folder: Path, world: int) -> str:
    return "\n".join(f"rank {rank}:\n{(folder / f'{rank}.txt').read_text()[-3000:]}" for rank in range(world))


def _rank(environment: dict[str, str], output: Path, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of reading processes, as in a process started by torchrun
    torch.set_num_threads(1)  # sums depend on the number of threads
    body(*arguments)


def _main(options: Sequence[str], fault: Callable[[int], None] | None) -> None:
    import main

    if fault is not None:
        fault(int(os.environ["RANK"]))
    sys.exit(main.main(options))


def _call(function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...], device: str) -> None:
    from utils.dist import processes

    with processes(device) as own:
        torch.save(function(own, *arguments), folder / f"{own.rank}.pt")
