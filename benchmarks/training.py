"""How near the training loop comes to the bare step: reading, decoding, views, EMA and all, in one run.

    python -m benchmarks.training --compile [--workers 14] [--bags 8] [--patches 128] [--encoder r18] [--cores 4 2]

Builds two stores of 256 px JPEGs of about 15 kB (the PANDA recipe's sizes), then measures, one after the other:

* bare: the training step on patches that are on the device already, rendered and normalised;
* step: the same with rendering (crops, flips) from uint8 on the device, and EMA;
* loader: batches from the store, nobody using them; where the GPU decodes they are still JPEGs;
* loop: everything together, epoch boundaries included; for each number of ``--cores`` once more with so many CPU cores.

``--jpeg_decoder`` says who decodes; what ``auto`` makes of it is printed.

The ratio loop / bare is what the data path costs. Without a GPU it runs a tiny version that only shows that it works.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.bags import Bags, SamplingPlan, TrainBags
from datasets.gpu_jpeg.coded import GpuDecoder
from datasets.instances import PixelSource, Source
from datasets.jpeg import encode
from datasets.labels import Sample
from datasets.loaders import LoaderOptions, TrainStream, train_batches
from datasets.store import PatchStore, StoreHeader, StoreWriter
from datasets.views import Renderer, ViewPlan
from engine.decoding import coded, gpu_decoder
from engine.learner import Learner
from engine.tasks import ClassificationTask
from engine.timing import wait_for
from modules.encoders import build_encoder
from modules.heads import build_mil
from modules.model import SlideModel
from utils.config import DataConfig, ModelConfig, TrainConfig
from utils.dist import Processes

DISTINCT = 64


def tissue_like(rng: np.random.Generator, side_px: int) -> np.ndarray:
    """An RGB patch whose JPEG at quality 80 has about 15 kB at 256 px: smooth colour and grain."""
    coarse = rng.normal(0, 40, (side_px // 8, side_px // 8, 3)).repeat(8, 0).repeat(8, 1)
    grain = rng.normal(0, 6, (side_px, side_px, 1))
    return np.clip(np.array([200, 130, 180]) + coarse + grain, 0, 255).astype(np.uint8)


def write_store(path: Path, slides: int, patches: int, side_px: int) -> float:
    """Writes a store of repeated random patches; returns the mean JPEG size in kB."""
    rng = np.random.default_rng(0)
    jpegs = [encode(tissue_like(rng, side_px), 80) for _ in range(DISTINCT)]
    header = StoreHeader(mpp=0.5, level=0, patch_size_px=side_px, image_size_px=side_px, jpeg_quality=80)
    coords = np.zeros((patches, 2), np.int64)
    with StoreWriter(path, header) as writer:
        for slide in range(slides):
            writer.put_slide(f"s{slide}", [jpegs[i] for i in rng.integers(0, DISTINCT, patches)], coords)
    return float(np.mean([len(j) for j in jpegs])) / 1000


def rate(step: Callable[[], object], patches: int, steps: int, device: torch.device) -> float:
    """Patches per second of ``steps`` calls, after a warm-up of a third as many."""
    for _ in range(max(steps // 3, 2)):
        step()
    wait_for(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    wait_for(device)
    return steps * patches / (time.perf_counter() - begin)


def make_learner(args: argparse.Namespace, processes: Processes) -> Learner:
    """The PANDA recipe: ABMILX with four heads and FFN, Adam, EMA, mixed precision on a GPU."""
    device = processes.device
    encoder = build_encoder(args.encoder, pretrained=False)
    encoder.fused_stem = encoder.fused_stem and not args.plain_stem
    options = ModelConfig(inner_dim=512, n_heads=4, ffn=True, act="gelu", mil_norm="ln", mil_bias=False)
    model = SlideModel(build_mil("abmilx", encoder.width, 6, options), encoder, chunk=args.chunk).to(device)
    if device.type == "cuda":
        model.encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    renderer = Renderer(args.crop, encoder.mean, encoder.std, channels_last=device.type == "cuda")
    train = TrainConfig(amp=device.type == "cuda", torchcompile=args.compile, mm=0.9999, sync_bn=args.sync_bn)
    task = ClassificationTask(tuple("012345"), "accuracy_macro")
    return Learner(model, task, renderer, train, processes, with_ema=True)


def batches_of(args: argparse.Namespace, folder: Path, processes: Processes) -> tuple[Iterator[Bags], TrainStream]:
    """The batches of many epochs, read and decoded as a run would."""
    sources: Sequence[Source] = [PixelSource(PatchStore(folder / name)) for name in ("low.lmdb", "high.lmdb")]
    data = DataConfig(jpeg_decoder=args.jpeg_decoder)
    decoder = gpu_decoder(data, sources[-1], processes, args.workers, in_step=True)
    if decoder is not None:
        sources = coded(sources)
    if processes.is_main:
        print(who_decodes(decoder))
    samples = [Sample(f"s{i}", f"s{i}", (f"s{i}",), {"label": i % 6}) for i in range(args.slides)]
    views = ViewPlan("strong", 0.08, args.stored, args.crop)
    bags = TrainBags(samples, sources, SamplingPlan(args.patches, 4.0, pad=True), views, seed=0)
    rank, world = processes.rank, processes.world
    stream = TrainStream(args.slides, args.bags, rank=rank, world=world, epochs=(0, 10_000))
    options = LoaderOptions(args.workers, 2, pin=processes.device.type == "cuda", decoder=decoder)
    return train_batches(bags, stream, options), stream


def who_decodes(decoder: GpuDecoder | None) -> str:
    return "the reading processes decode" if decoder is None else "the GPU decodes"


def loop(learner: Learner, batches: Iterator[Bags], steps: int, device: torch.device) -> float:
    """Seconds of ``steps`` whole steps."""
    begin = time.perf_counter()
    for _ in range(steps):
        learner.step(next(batches), divide_by=1, update=True)
    wait_for(device)
    return time.perf_counter() - begin


def whole_epochs(learner: Learner, batches: Iterator[Bags], steps: int, stream: TrainStream) -> float:
    """Steps per second of the whole loop, over whole epochs of about ``steps`` steps together."""
    device = learner.processes.device
    loop(learner, batches, max(steps // 3, 2), device)
    whole = max(steps // stream.steps_per_epoch, 1) * stream.steps_per_epoch
    return whole / loop(learner, batches, whole, device)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    patches, processes = args.bags * args.patches, Processes(0, 1, device)
    learner = make_learner(args, processes)
    learner.model.train()
    batches, stream = batches_of(args, folder, processes)
    batch = next(batches)
    on_device = batch.to(device)
    figures = {"loader": rate(lambda: next(batches), patches, args.steps, device)}
    figures["step"] = rate(lambda: learner.step(on_device, 1, True), patches, args.steps, device)
    assert learner.renderer is not None
    rendered = learner.renderer(on_device.instances, batch.draws)
    figures["bare"] = rate(lambda: bare_step(learner, rendered, on_device), patches, args.steps, device)
    figures["loop"] = patches * whole_epochs(learner, batches, args.steps, stream)
    for cores in args.cores:
        batches.close()  # type: ignore[attr-defined]
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
        batches, stream = batches_of(args, folder, processes)
        figures[f"{cores} cores"] = patches * whole_epochs(learner, batches, args.steps, stream)
    batches.close()  # type: ignore[attr-defined]
    return figures


def bare_step(learner: Learner, rendered: torch.Tensor, bags: Bags) -> None:
    with learner.precision.autocast():
        logits, _ = learner.model(rendered, bags.sizes)
    learner.scaler.scale(learner.task.loss(logits.float(), bags.target)).backward()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=14 if gpu else 1)
    parser.add_argument("--bags", type=int, default=8 if gpu else 2)
    parser.add_argument("--patches", type=int, default=128 if gpu else 8)
    parser.add_argument("--slides", type=int, default=160 if gpu else 8)
    parser.add_argument("--stored", type=int, default=256 if gpu else 64)
    parser.add_argument("--crop", type=int, default=224 if gpu else 56)
    parser.add_argument("--steps", type=int, default=60 if gpu else 3)
    parser.add_argument("--encoder", default="r18")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sync_bn", action="store_true")
    parser.add_argument("--plain_stem", action="store_true", help="no fused first layers (modules.stem)")
    parser.add_argument("--jpeg_decoder", choices=("auto", "cpu", "gpu"), default="auto")
    return parser


def main() -> None:
    gpu, parser = torch.cuda.is_available(), make_parser(__doc__)
    parser.add_argument("--cores", type=int, nargs="*", default=[], help="fewer and fewer CPU cores")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kilobytes = write_store(folder / "high.lmdb", args.slides, 300 if gpu else 20, args.stored)
        write_store(folder / "low.lmdb", args.slides, 80 if gpu else 10, args.stored)
        figures = measure(args, folder)
    place = torch.cuda.get_device_name() if gpu else "CPU"
    what = f"{args.encoder}, {args.bags} x {args.patches} patches, {kilobytes:.1f} kB JPEGs"
    print(f"{what}, {args.workers} workers, {place}{', plain stem' if args.plain_stem else ''}")
    for name, value in figures.items():
        print(f"{name:8} {value:9.0f} patches/s   {value / figures['bare']:.2f} of bare")


if __name__ == "__main__":
    main()
