"""How training scales over the GPUs of one machine: the same step and the same loop on 1, 2, ... of them, in one run.

    python -m benchmarks.scaling --compile --gpus 1 2 [--bags 8 --patches 128] [--sync_bn] [--workers 14]

For each number of GPUs it starts as many processes, each with batches of the size that one GPU has, and measures

* compute: steps on patches that are on the device already, with the exchange of gradients;
* loop: reading, decoding, copies, everything.

Efficiency is the rate of N GPUs over N times that of one. ``decoding`` is the share of all CPU cores that the reading
processes used during the loop. ``--bags 3 --patches 512 --chunk 512`` is the BRCA recipe. On a CPU it runs tiny.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.training import batches_of, make_learner, make_parser, rate, whole_epochs, write_store
from utils.cores import usable_cores
from utils.dist import processes

SETTINGS = {"OMP_NUM_THREADS": "8", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""Those of train_dist.sh, unless the environment has others."""


def cpu_seconds() -> float:
    """CPU time that the reading processes of this one have used."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def scaling_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    return parser


def one_process(argv: list[str], folder: Path) -> None:
    """What each process of a run does; the first one writes the figures."""
    args = scaling_parser().parse_args(argv)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    with processes() as own:
        learner = make_learner(args, own)
        learner.model.train()
        batches, stream = batches_of(args, folder, own)
        on_device = next(batches).to(own.device)
        patches = args.bags * args.patches * own.world
        compute = rate(lambda: learner.step(on_device, 1, True), patches, args.steps, own.device)
        begin, used = time.perf_counter(), cpu_seconds()
        loop = patches * whole_epochs(learner, batches, args.steps, stream)
        cores = (cpu_seconds() - used) / (time.perf_counter() - begin)
        totals = own.gather({"compute": compute, "loop": loop, "cores": cores})
        if own.is_main:
            figures = {k: min(t[k] for t in totals) for k in ("compute", "loop")}
            figures["cores"] = sum(t["cores"] for t in totals)
            (folder / f"{own.world}.json").write_text(json.dumps(figures), encoding="utf-8")
        own.barrier()


def start(world: int, argv: list[str], folder: Path) -> dict[str, float]:
    """Runs ``world`` processes and returns their figures."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["-m", "benchmarks.scaling", "--child", str(folder), *argv]
    subprocess.run(command, check=True, env=SETTINGS | os.environ)
    figures: dict[str, float] = json.loads((folder / f"{world}.json").read_text(encoding="utf-8"))
    return figures


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        one_process(sys.argv[3:], Path(sys.argv[2]))
        return
    args = scaling_parser().parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = torch.cuda.is_available()
        kilobytes = write_store(folder / "high.lmdb", args.slides, 3 * args.patches if large else 20, args.stored)
        write_store(folder / "low.lmdb", args.slides, args.patches if large else 10, args.stored)
        found = {world: start(world, sys.argv[1:], folder) for world in args.gpus}
    report(args, kilobytes, found)


def report(args: argparse.Namespace, kilobytes: float, found: dict[int, dict[str, float]]) -> None:
    place = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    cores = usable_cores()
    print(f"{args.encoder}, {kilobytes:.1f} kB JPEGs, {place}, {cores} cores{', SyncBN' if args.sync_bn else ''}")
    print(f"a process: {args.bags} x {args.patches} patches a step, {args.workers} workers")
    least = min(found)
    for world, figures in found.items():
        shown = [f"{world} processes"]
        for name in ("compute", "loop"):
            efficiency = figures[name] * least / world / found[least][name]
            shown.append(f"{name} {figures[name]:.0f} patches/s ({efficiency:.3f})")
        print(", ".join([*shown, f"decoding took {figures['cores'] / cores:.2f} of the cores"]))


if __name__ == "__main__":
    main()
