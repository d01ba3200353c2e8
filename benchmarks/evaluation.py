"""How long a slide takes from the store to its logits, next to what decoding alone and the model alone would take.

    python -m benchmarks.evaluation [--patches 10000] [--slides 12] [--workers 14] [--encoder r18]

Builds a store of 256 px JPEGs of about 15 kB and evaluates it with the program's own reader and loop: R18 and ABMILX in
mixed precision on a GPU. In one run it measures

* decode only: the same reader, its parts thrown away;
* model only: rendering, encoder and head on patches that are on the device already;
* the first slide, processes and buffers not there yet; one slide with them; many slides in steady state;
* peak memory of the device and of the host for slides of different size.

``--jpeg_decoder`` says who decodes; what ``auto`` makes of it is printed.

Without a GPU it runs a tiny version that only shows that it works.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.training import DISTINCT, make_learner, tissue_like, who_decodes
from datasets.bags import Bags
from datasets.eval_parts import CODED_READ, READ, EvalParts, PartPlan
from datasets.eval_reading import EvalReader
from datasets.gpu_jpeg.coded import GpuDecoder
from datasets.instances import PixelSource, Source
from datasets.jpeg import encode
from datasets.labels import Sample
from datasets.loaders import LoaderOptions
from datasets.store import PatchStore, StoreHeader, StoreWriter
from engine.decoding import coded, gpu_decoder
from engine.evaluate import predict
from engine.learner import Learner
from engine.timing import wait_for
from utils.config import DataConfig
from utils.dist import Processes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    args: argparse.Namespace
    learner: Learner
    source: PixelSource
    device: torch.device
    decoder: GpuDecoder | None

    def parts(self, slides: Sequence[str]) -> EvalParts:
        """The parts of an evaluation of ``slides``; a slide may be named more than once."""
        read: int = self.args.read
        source: Source = self.source
        if self.decoder is not None:
            read, (source,) = CODED_READ, coded([source])
        samples = [Sample(f"{s}-{i}", s, (s,), {"label": i % 6}) for i, s in enumerate(slides)]
        return EvalParts(samples, source, PartPlan(self.args.run, self.args.call, read), range(len(samples)))

    def reader(self, **splits: Sequence[str]) -> EvalReader:
        pin = self.device.type == "cuda"
        options = LoaderOptions(self.args.workers, self.args.prefetch, pin=pin, decoder=self.decoder)
        return EvalReader({name: self.parts(slides) for name, slides in splits.items()}, options, self.device)

    def evaluate(self, calls: Iterable[Bags]) -> float:
        """Seconds from asking for the first patches to having the last logits in host memory."""
        begin = time.perf_counter()
        learner = self.learner
        predict(learner.model, calls, learner.renderer, learner.precision, Processes(0, 1, self.device))
        return time.perf_counter() - begin


def write_store(path: Path, counts: dict[str, int], side_px: int) -> float:
    """Writes a store of slides with so many repeated random patches; returns the mean JPEG size in kB."""
    rng = np.random.default_rng(0)
    jpegs = [encode(tissue_like(rng, side_px), 80) for _ in range(DISTINCT)]
    header = StoreHeader(mpp=0.5, level=0, patch_size_px=side_px, image_size_px=side_px, jpeg_quality=80)
    with StoreWriter(path, header) as writer:
        for slide, count in counts.items():
            images = [jpegs[i] for i in rng.integers(0, DISTINCT, count)]
            writer.put_slide(slide, images, np.zeros((count, 2), np.int64))
    return float(np.mean([len(j) for j in jpegs])) / 1000


def model_only(bench: Bench, slide: str) -> float:
    """Seconds of a slide whose encoder calls are on the device already."""
    parts = dataclasses.replace(bench, decoder=None).parts([slide])
    first: dict[int, Bags] = {}
    calls = []
    plan = PartPlan(bench.args.run, bench.args.call)
    for size in plan.calls(bench.source.count(slide)):
        if size not in first:
            part = parts[0]
            repeated = part.instances.repeat(-(-size // len(part.instances)), 1, 1, 1)[:size]
            first[size] = dataclasses.replace(part, instances=repeated.to(bench.device), sizes=[size], call=size)
        calls.append(dataclasses.replace(first[size], last=False))
    calls[-1] = dataclasses.replace(calls[-1], last=True)
    return min(bench.evaluate(calls) for _ in range(3))


def decode_only(reader: EvalReader, split: str) -> float:
    """Seconds in which the processes read and decode a split, and nobody uses it."""
    device, reader.device = reader.device, torch.device("meta")
    begin = time.perf_counter()
    for _ in reader.read(split):
        pass
    reader.device = device
    return time.perf_counter() - begin


def memory(bench: Bench, slide: str) -> tuple[float, float]:
    """Peak of the device in GiB, and of this process in host memory in GiB, of an evaluation of one slide."""
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bench.evaluate(bench.reader(one=[slide]).read("one"))
    device = torch.cuda.max_memory_allocated() / GIB if bench.device.type == "cuda" else 0.0
    return device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def measure(bench: Bench) -> Iterable[str]:
    """Lines of the report."""
    args = bench.args
    alone = model_only(bench, "s0")
    yield f"model only, rendering included           {alone:7.3f} s/slide  {args.patches / alone:8.0f} patches/s"
    reader = bench.reader(one=["s0"], many=["s0"] * args.slides)
    yield f"first slide, nothing started yet         {bench.evaluate(reader.read('one')):7.3f} s"
    singles = [bench.evaluate(reader.read("one")) for _ in range(4)]
    yield f"one slide, processes there               {min(singles):7.3f} s  (slowest of 4: {max(singles):.3f})"
    for name, seconds in (
        ("decode only, processes there", decode_only(reader, "many")),
        ("steady state, all included", bench.evaluate(reader.read("many"))),
    ):
        each = seconds / args.slides
        yield f"{name:40} {each:7.3f} s/slide  {args.patches / each:8.0f} patches/s"
    yield "patches on a slide, peak GiB of the device, of the host: " + ", ".join(
        f"{bench.source.count(slide)}: {gpu:.2f}, {host:.2f}"
        for slide in ("small", "s0", "large")
        for gpu, host in (memory(bench, slide),)
    )


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=14 if gpu else 1)
    parser.add_argument("--prefetch", type=int, default=2)
    parser.add_argument("--patches", type=int, default=10_000 if gpu else 40)
    parser.add_argument("--slides", type=int, default=12 if gpu else 2)
    parser.add_argument("--read", type=int, default=READ if gpu else 8, help="patches per part")
    parser.add_argument("--run", type=int, default=2048, help="p_batch_size_v")
    parser.add_argument("--call", type=int, default=512, help="p_batch_size")
    parser.add_argument("--stored", type=int, default=256 if gpu else 64)
    parser.add_argument("--crop", type=int, default=224 if gpu else 56)
    parser.add_argument("--jpeg_decoder", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--encoder", default="r18")
    args = parser.parse_args()
    args.compile, args.sync_bn, args.plain_stem, args.chunk = False, False, False, args.call
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if gpu else "cpu")
    with tempfile.TemporaryDirectory() as name:
        counts = {"small": args.patches // 5, "s0": args.patches, "large": args.patches * 5}
        kilobytes = write_store(Path(name) / "high.lmdb", counts, args.stored)
        learner, source = make_learner(args, Processes(0, 1, device)), PixelSource(PatchStore(Path(name) / "high.lmdb"))
        decoder = gpu_decoder(DataConfig(jpeg_decoder=args.jpeg_decoder), source, learner.processes, args.workers)
        bench = Bench(args, learner, source, device, decoder)
        place = torch.cuda.get_device_name() if gpu else "CPU"
        print(
            f"{args.encoder}, {args.patches} patches of {kilobytes:.1f} kB, {args.workers} reading processes, {place}, "
            f"{who_decodes(decoder)}"
        )
        wait_for(device)
        for line in measure(bench):
            print(line, flush=True)


if __name__ == "__main__":
    main()
