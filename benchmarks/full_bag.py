"""What ``--full_bag`` costs: memory and time of the exact gradient of a whole slide, beside the plain step.

    python -m benchmarks.full_bag [--patches 10000 50000] [--chunk 512] [--keep 16384] [--encoder r18] [--compile]
                                  [--jpeg_decoder gpu]

Builds a store of 256 px JPEGs of about 15 kB, then measures one after the other, each with a fresh model:

* plain: the plain step on a bag of ``--plain`` patches, as many encoder calls of ``--chunk`` patches as that takes;
* checkpointing: the same with ``--grad_checkpointing``, on the plain bag and on the smallest of ``--patches``;
* full bag, computing: the step in two passes on bags of ``--patches``, on patches that need not be read;
* full bag, whole: the same with reading and decoding from the store, as in training.

The ratio is the time per patch in units of the plain step's, measured in the same run. Memory is the peak of what
tensors take on the GPU, and in brackets of what torch has reserved. A row that does not fit says so. Without a GPU it
runs a tiny version that only shows that it works.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.training import who_decodes, write_store
from datasets.bags import SamplingPlan, TrainBags
from datasets.full_bags import ChunkPlan, full_bag_batches, rehearsal
from datasets.instances import PixelSource, Source
from datasets.labels import Sample
from datasets.loaders import LoaderOptions, TrainStream
from datasets.store import PatchStore
from datasets.views import Renderer, ViewPlan
from engine.decoding import coded, gpu_decoder
from engine.full_bag import FullBagLearner
from engine.learner import Learner
from engine.tasks import ClassificationTask
from engine.timing import seconds_per_call
from modules.encoders import build_encoder
from modules.heads import build_mil
from modules.model import SlideModel
from utils.config import DataConfig, ModelConfig, TrainConfig
from utils.dist import Processes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
MANY = 20_000
"""Bags of more patches are timed once."""


@dataclass(frozen=True)
class Row:
    """One line of the table; no seconds: it did not fit."""

    name: str
    patches: int
    seconds: float | None
    gib: tuple[float, float] | None

    def text(self, plain: Row) -> str:
        if self.seconds is None or plain.seconds is None:
            return f"{self.name:28} {self.patches:7}   out of memory"
        rate = self.patches / self.seconds
        ratio = plain.patches / plain.seconds / rate
        memory = "-" if self.gib is None else f"{self.gib[0]:.1f} ({self.gib[1]:.1f})"
        return f"{self.name:28} {self.patches:7} {self.seconds:9.2f} {rate:11.0f} {ratio:7.2f}   {memory}"


def make_learner(args: argparse.Namespace, kind: type[Learner], recompute: bool = False) -> Learner:
    """The PANDA recipe: ABMILX with four heads and FFN, Adam, EMA, mixed precision on a GPU."""
    torch.manual_seed(0)
    encoder = build_encoder(args.encoder, pretrained=False)
    head = ModelConfig(inner_dim=512, n_heads=4, ffn=True, act="gelu", mil_norm="ln", mil_bias=False)
    model = SlideModel(build_mil("abmilx", encoder.width, 6, head), encoder, args.chunk, recompute=recompute)
    if GPU:
        model.encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    renderer = Renderer(args.crop, encoder.mean, encoder.std, channels_last=GPU)
    train = TrainConfig(amp=GPU, amp_dtype=args.amp_dtype, torchcompile=args.compile, mm=0.9999)
    task = ClassificationTask(tuple("012345"), "accuracy_macro")
    learner = kind(model.to(DEVICE), task, renderer, train, Processes(0, 1, DEVICE), with_ema=True)
    learner.model.train()
    return learner


def source_of(args: argparse.Namespace, folder: Path, patches: int) -> Source:
    """A slide of ``patches``."""
    store = folder / f"{patches}.lmdb"
    if not store.exists():
        write_store(store, 1, patches, args.stored)
    return PixelSource(PatchStore(store))


def bags_of(args: argparse.Namespace, source: Source) -> TrainBags:
    """Training bags of all patches of the slide."""
    samples = [Sample(f"bag{i}", f"bag{i}", ("s0",), {"label": i % 6}) for i in range(4)]
    views = ViewPlan("strong", 0.08, args.stored, args.crop)
    return TrainBags(samples, [source], SamplingPlan(0), views, seed=0)


def measure(name: str, patches: int, prepare: Callable[[], Callable[[], object]]) -> Row:
    """Time and memory of the step that ``prepare`` makes; what it made is gone after it."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = seconds_per_call(prepare(), DEVICE, 1 if patches > MANY or not GPU else 3)
    except torch.OutOfMemoryError:
        return Row(name, patches, None, None)
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if GPU else None
    return Row(name, patches, seconds, None if peaks is None else (peaks[0] / 2**30, peaks[1] / 2**30))


def plain_step(args: argparse.Namespace, folder: Path, patches: int, recompute: bool) -> Callable[[], object]:
    batch = bags_of(args, source_of(args, folder, patches))[[(0, 0)]]
    batch = batch.pin_memory() if GPU else batch
    learner = make_learner(args, Learner, recompute)
    return lambda: learner.step(batch, 1, True)


def computing_step(args: argparse.Namespace, folder: Path, patches: int) -> Callable[[], object]:
    plan = ChunkPlan(args.chunk, args.keep)
    batch, _ = rehearsal(bags_of(args, source_of(args, folder, patches)), [(0, 0)], plan, pin=GPU)
    learner = make_learner(args, FullBagLearner)
    return lambda: learner.step(batch, 1, True)


def whole_step(args: argparse.Namespace, folder: Path, patches: int) -> Callable[[], object]:
    stream, learner = TrainStream(4, 1, epochs=(0, 1000)), make_learner(args, FullBagLearner)
    source = source_of(args, folder, patches)
    data = DataConfig(jpeg_decoder=args.jpeg_decoder)
    decoder = gpu_decoder(data, source, learner.processes, args.workers)
    print(who_decodes(decoder))
    bags = bags_of(args, source if decoder is None else coded([source])[0])
    options = LoaderOptions(args.workers, 2, pin=GPU, decoder=decoder)
    batches = full_bag_batches(bags, stream, options, ChunkPlan(args.chunk, args.keep))
    return lambda: learner.step(next(batches), 1, True)


def rows(args: argparse.Namespace, folder: Path) -> list[Row]:
    least = min(args.patches)
    found = [
        measure("plain", args.plain, functools.partial(plain_step, args, folder, args.plain, False)),
        measure("checkpointing", args.plain, functools.partial(plain_step, args, folder, args.plain, True)),
        measure("checkpointing", least, functools.partial(plain_step, args, folder, least, True)),
    ]
    for n in args.patches:
        found.append(measure("full bag, computing", n, functools.partial(computing_step, args, folder, n)))
        found.append(measure("full bag, whole", n, functools.partial(whole_step, args, folder, n)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[10_000, 50_000] if GPU else [20, 50])
    parser.add_argument("--plain", type=int, default=2048 if GPU else 16)
    parser.add_argument("--chunk", type=int, default=512 if GPU else 8)
    parser.add_argument("--keep", type=int, default=16384 if GPU else 30)
    parser.add_argument("--stored", type=int, default=256 if GPU else 64)
    parser.add_argument("--crop", type=int, default=224 if GPU else 56)
    parser.add_argument("--workers", type=int, default=14 if GPU else 1)
    parser.add_argument("--encoder", default="r18")
    parser.add_argument("--amp_dtype", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--jpeg_decoder", choices=("auto", "cpu", "gpu"), default="auto")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    place = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"{args.encoder}, {args.chunk} patches per encoder call, {args.keep} kept, {args.workers} workers, {place}")
    with tempfile.TemporaryDirectory() as name:
        found = rows(args, Path(name))
    print(f"{'step':28} {'patches':>7} {'seconds':>9} {'patches/s':>11} {'ratio':>7}   peak GiB (reserved)")
    for row in found:
        print(row.text(found[0]))


if __name__ == "__main__":
    sys.exit(main())
