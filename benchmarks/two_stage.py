"""Two-stage training on features: the share of time that training waits for data, and how busy the device is.

    python benchmarks/two_stage.py [--slides 200] [--patches 5000] [--width 1024] [--epochs 3]

writes a cohort of random features in the CLAM layout to a temporary folder, in float32 and in float16, and trains
``abmil`` on it with the program itself, with the features in every place that it knows. The limit of the same run is
the training step on a bag that is on the device already. ``launch-bound`` is the share of that step in which the device
has nothing to do because the program has not said yet what comes next. Without a GPU it runs a tiny version.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

import main as program
from engine.experiment import set_precision
from engine.fold import build_learner, training_batches, training_stream
from engine.setup import prepare
from engine.tasks.task_builder import build
from engine.timing import seconds_per_call, wait_for
from utils.config import Config, DataConfig, ModelConfig
from utils.dist import Processes

DTYPES = {"float32": torch.float32, "float16": torch.float16}

WAYS = (
    ("in RAM (--persistence)", ("--persistence",)),
    ("mapped, one thread (--num_workers=0)", ("--num_workers=0",)),
    ("mapped, 2 threads", ("--num_workers=2",)),
    ("mapped, 6 threads (default)", ()),
)
"""Name, options."""


def write_cohort(root: Path, options: argparse.Namespace, dtype: str) -> None:
    """pt_files/ of random features, and labels.csv in four columns; 70 % of the slides train."""
    folder = root / "pt_files"
    folder.mkdir(parents=True)
    values = torch.randn(options.patches, options.width).to(DTYPES[dtype])
    split = ["train"] * (options.slides * 7 // 10) + ["val"] * max(2, options.slides // 10)
    split += ["test"] * (options.slides - len(split))
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "slide", "label", "fold"])
        for i in range(options.slides):
            torch.save(values + i % 2, folder / f"S{i:04d}.pt")
            writer.writerow([f"S{i:04d}", f"S{i:04d}", i % 2, split[i]])


def train(root: Path, out: Path, extra: tuple[str, ...], options: argparse.Namespace) -> list[dict[str, float]]:
    """What metrics.jsonl says of each epoch of training."""
    words = [f"--dataset_root={root}", f"--csv_path={root / 'labels.csv'}", f"--output_path={out}", "--datasets=bench"]
    words += ["--model=abmil", "--cv_fold=1", f"--num_epoch={options.epochs}", "--num_bootstrap=0"]
    words += [f"--same_psize={options.same_psize}", *extra]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = program.main(words)
    if status != 0:
        raise SystemExit(f"the run failed:\n{said.getvalue()}")
    lines = (out / "default" / "default" / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "data_wait" in line]


def bare_step(root: Path, same_psize: int) -> tuple[float, float | None]:
    """Seconds of a training step on a bag that is on the device, and the seconds of it that the device works."""
    data = DataConfig(
        dataset_root=str(root),
        csv_path=str(root / "labels.csv"),
        datasets="bench",
        cv_fold=1,
        same_psize=same_psize,
        num_workers=0,
        pin_memory=False,
    )
    config = Config(data=data, model=ModelConfig(model="abmil"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_precision(config)
    setup, processes = prepare(config), Processes(0, 1, device)
    fold = setup.cohort.folds[0]
    learner = build_learner(setup, fold, build(config, setup.cohort, fold, 1), processes)
    stream = training_stream(setup, fold, processes, (0, 1))
    bags = next(training_batches(setup, fold, processes, stream)).to(device)
    learner.model.train()

    def step() -> None:
        learner.step(bags, divide_by=1, update=True)

    seconds = min(seconds_per_call(step, device, 100 if device.type == "cuda" else 2) for _ in range(3))
    if device.type != "cuda":
        return seconds, None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(20):
            step()
        wait_for(device)
    return seconds, sum(event.self_device_time_total for event in seen.key_averages()) / 20e6


def measure(dtype: str, options: argparse.Namespace) -> Iterator[str]:
    """Rows of the table for one type of feature."""
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        write_cohort(root, options, dtype)
        seconds, busy = bare_step(root, options.same_psize)
        idle = "" if busy is None else f", {max(1 - busy / seconds, 0):.0%} launch-bound"
        yield f"| {dtype} | on the device: the step alone{idle} | {1 / seconds:.0f} | | |"
        for number, (name, extra) in enumerate(WAYS):
            begin = time.perf_counter()
            epochs = train(root, root / f"out{number}", extra, options)
            per_bag = options.same_psize or options.patches
            rates = [e["patches_per_s"] / per_bag for e in epochs]
            waits = [e["data_wait"] for e in epochs]
            first = f"{rates[0]:.0f}, {waits[0]:.1%}; {time.perf_counter() - begin:.1f} s"
            yield f"| {dtype} | {name} | {rates[-1]:.0f} | {waits[-1]:.1%} | {first} |"


def main() -> None:
    gpu, begin = torch.cuda.is_available(), time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200 if gpu else 12)
    parser.add_argument("--patches", type=int, default=5000 if gpu else 200)
    parser.add_argument("--width", type=int, default=1024 if gpu else 64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="default: each of them")
    parser.add_argument("--same_psize", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    parser.add_argument("--seconds", type=float, default=600, help="no new row is begun after so many")
    options = parser.parse_args()
    place = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"{options.slides} slides x {options.patches} x {options.width}, abmil, {place}, torch {torch.__version__}\n")
    print("| features | where | bags/s, last epoch | data wait | first epoch; whole run |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for dtype in options.dtype or DTYPES:
        for row in measure(dtype, options):
            print(row, flush=True)
            if time.perf_counter() - begin > options.seconds:
                return


if __name__ == "__main__":
    main()
