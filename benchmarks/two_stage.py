"""Two-stage training on features: the share of time that training waits for data, and what reading alone can give.

    python benchmarks/two_stage.py --slides 200 --patches 5000 --width 1024

writes a cohort of random features in the CLAM layout to a temporary folder, reads one epoch of it in every way without
a model (every value is looked at once), and trains one epoch of abmil in every way.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import main as program
from datasets.bags import FeatureSource, SamplingPlan, TrainBags
from datasets.features import FeatureFolder
from datasets.label_types import Sample
from datasets.loaders import LoaderOptions, TrainStream, train_batches

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def write_cohort(root: Path, options: argparse.Namespace) -> list[str]:
    """pt_files/ of random features, and labels.csv in four columns; 70 % of the slides train."""
    folder = root / "pt_files"
    folder.mkdir(parents=True)
    values = torch.randn(options.patches, options.width).to(DTYPES[options.dtype])
    names = [f"S{i:04d}" for i in range(options.slides)]
    split = ["train"] * (options.slides * 7 // 10) + ["val"] * max(2, options.slides // 10)
    split += ["test"] * (options.slides - len(split))
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "slide", "label", "fold"])
        for i, name in enumerate(names):
            torch.save(values + i % 2, folder / f"{name}.pt")
            writer.writerow([name, name, i % 2, split[i]])
    return names


WAYS = (
    ("mapped files, read by the training process", False, 0),
    ("mapped files, 2 reading processes", False, 2),
    ("in RAM (--persistence)", True, 0),
)
"""Name, features in RAM, reading processes."""


def read_epoch(root: Path, names: list[str], kept: bool, workers: int, same_psize: int) -> float:
    """Bags per second of one epoch of reading, without a model."""
    folder = FeatureFolder(root)
    if kept:
        folder.keep_in_memory(names)
    samples = [Sample(name, name, (name,), {"label": 0}) for name in names]
    bags = TrainBags(samples, [FeatureSource(folder)], SamplingPlan(same_psize))
    batches = train_batches(bags, TrainStream(len(samples), 1), LoaderOptions(workers))
    total = next(batches).instances.sum()  # the processes have started
    begin = time.perf_counter()
    for batch in batches:
        total += batch.instances.sum()  # so that every page of a mapped file is read
    return (len(names) - 1) / (time.perf_counter() - begin)


def train_epoch(root: Path, out: Path, kept: bool, workers: int, options: argparse.Namespace) -> dict[str, float]:
    """What metrics.jsonl says of one epoch of training."""
    words = [f"--dataset_root={root}", f"--csv_path={root / 'labels.csv'}", f"--output_path={out}", "--datasets=bench"]
    words += ["--model=abmil", "--cv_fold=1", "--num_epoch=1", f"--num_workers={workers}", "--num_bootstrap=0"]
    words += [f"--same_psize={options.same_psize}", "--pin_memory", *(["--persistence"] if kept else [])]
    if program.main(words) != 0:
        raise SystemExit("the run failed")
    return json.loads((out / "default" / "default" / "metrics.jsonl").read_text().splitlines()[-1])


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        root = Path(temporary)
        names = write_cohort(root, options)
        mib = options.patches * options.width * DTYPES[options.dtype].itemsize / 2**20
        print(f"{options.slides} slides x {options.patches} x {options.width} {options.dtype}: {mib:.1f} MiB a bag")
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.cuda.is_available()}\n")
        print("| features | reading alone, bags/s | training, bags/s | data wait |")
        print("| --- | --- | --- | --- |")
        for number, (name, kept, workers) in enumerate(WAYS):
            rate = read_epoch(root, names, kept, workers, options.same_psize)
            line = train_epoch(root, root / f"out{number}", kept, workers, options)
            trained = line["patches_per_s"] / (options.same_psize or options.patches)
            print(f"| {name} | {rate:.0f} | {trained:.1f} | {line['data_wait']:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200)
    parser.add_argument("--patches", type=int, default=5000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--same_psize", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
