"""How fast CLAM/save_patches.py writes an LMDB, beside what the machine can do.

    python benchmarks/lmdb_writing.py [--workers 2] [--img_size 224] [--rounds 3]

Makes a JPEG-tiled pyramidal TIFF of 21,772 x 18,268 px (a real slide tiled where ABMILX_DATA has it, else
synthetic tissue), finds its patches with CLAM/create_patches_fp.py, and measures in turn, in the same run:

* limit: decode + resize + encode of the same patches, held in memory as JPEGs, in a bare loop on as many
processes; * ours: save_patches.py, from its first patch to the closed store, and as a whole command.

Seconds of CPU time per patch are given as well: they do not suffer from what else the machine does.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT / "CLAM", ROOT):
    if str(_folder) not in sys.path[:2]:
        sys.path.insert(1, str(_folder))

from datasets import jpeg  # noqa: E402
from utils.cores import usable_cores  # noqa: E402

Image = NDArray[np.uint8]

WIDTH_PX, HEIGHT_PX, LEVELS = 21_772, 18_268, 5
TILE_PX = 256
PUBLISHED_PATCHES_PER_S = 131
SLIDE_MPP = 0.5


@dataclass(frozen=True)
class Measured:
    """Patches per second, and CPU milliseconds per patch over all processes."""

    patches_per_s: float
    cpu_ms: float


def write_pyramid(path: Path, levels: Iterable[Image], mpp: float | None = SLIDE_MPP, tile_px: int = TILE_PX) -> None:
    """Writes a tiled TIFF with JPEG tiles (4:2:0, quality 80), one page per level; no TIFF library does it
    here.

    Args:
        path: the file; below 4 GB.
        levels: (H, W, 3) uint8, largest first.
        mpp: um/px of level 0, None for a file that does not say.
        tile_px: side of a tile in px, a multiple of 16.
    """
    with open(path, "wb") as file:
        file.write(b"II*\0\0\0\0\0")
        link = 4
        for number, level in enumerate(levels):
            offsets, sizes = [], []
            for data in _tiles(level, tile_px):
                offsets.append(file.tell())
                sizes.append(file.write(data))
            tags = _tags(file, level, offsets, sizes, tile_px)
            if number:
                tags[254] = (4, 1, 1)
            elif mpp:
                tags.update(_resolution(file, mpp))
            link = _write_page(file, tags, link)


def _tiles(level: Image, tile_px: int) -> Iterator[bytes]:
    height, width = level.shape[:2]
    for y in range(0, height, tile_px):
        for x in range(0, width, tile_px):
            tile = level[y : y + tile_px, x : x + tile_px]
            room = ((0, tile_px - tile.shape[0]), (0, tile_px - tile.shape[1]), (0, 0))
            yield jpeg.encode(np.pad(tile, room, mode="edge"), 80)


def _tags(
    file: BinaryIO, level: Image, offsets: list[int], sizes: list[int], tile_px: int
) -> dict[int, tuple[int, int, int]]:
    """Tag -> (type, count, value or place)."""
    count = len(offsets)
    tables = []
    for table in (offsets, sizes):
        tables.append(file.tell() if count > 1 else table[0])
        file.write(struct.pack(f"<{count}I", *table))
    bits = file.tell()
    file.write(struct.pack("<3H", 8, 8, 8))
    height, width = level.shape[:2]
    return {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 3, bits),
        259: (3, 1, 7),  # JPEG
        262: (3, 1, 6),  # YCbCr
        277: (3, 1, 3),
        284: (3, 1, 1),
        322: (4, 1, tile_px),
        323: (4, 1, tile_px),
        324: (4, count, tables[0]),
        325: (4, count, tables[1]),
        530: (3, 2, 2 | 2 << 16),  # chroma halved both ways
    }


def _resolution(file: BinaryIO, mpp: float) -> dict[int, tuple[int, int, int]]:
    place = file.tell()
    file.write(struct.pack("<2I", round(10_000 / mpp * 1000), 1000))
    return {282: (5, 1, place), 283: (5, 1, place), 296: (3, 1, 3)}


def _write_page(file: BinaryIO, tags: dict[int, tuple[int, int, int]], link: int) -> int:
    """Writes a directory and links it from ``link``; gives the place of its own link."""
    here = file.tell() + file.tell() % 2
    file.seek(here)
    file.write(struct.pack("<H", len(tags)))
    for tag, (kind, count, value) in sorted(tags.items()):
        file.write(struct.pack("<HHII", tag, kind, count, value))
    end = file.tell()
    file.write(b"\0\0\0\0")
    file.seek(link)
    file.write(struct.pack("<I", here))
    file.seek(end + 4)
    return end


def level0(data: Path) -> Image:
    """The pixels of the slide: a real one repeated, or synthetic tissue."""
    real = data / "wsi" / "oral-scc-06.tiff"
    if real.is_file():
        from slides import open_slide

        with open_slide(real) as slide:
            part = slide.read_region((0, 0), 0, slide.dimensions)
    else:
        part = synthetic_tissue(4096)
    times = (-(-HEIGHT_PX // part.shape[0]), -(-WIDTH_PX // part.shape[1]), 1)
    return np.tile(part, times)[:HEIGHT_PX, :WIDTH_PX]


def synthetic_tissue(side_px: int) -> Image:
    """A disc of pink noise at several scales on a light ground."""
    import cv2

    rng = np.random.default_rng(0)
    density: NDArray[np.float32] = np.zeros((side_px, side_px), np.float32)
    for grain in (4, 16, 64):
        coarse = rng.random((side_px // grain, side_px // grain), dtype=np.float32)
        density += cv2.resize(coarse, (side_px, side_px), interpolation=cv2.INTER_CUBIC)
    y, x = np.ogrid[:side_px, :side_px]
    density *= (x - side_px / 2) ** 2 + (y - side_px / 2) ** 2 < (0.45 * side_px) ** 2
    return np.clip(240 * np.exp(-density[..., None] * np.array([0.25, 0.6, 0.2])), 0, 255).astype(np.uint8)


def pyramid(image: Image, levels: int = LEVELS) -> Iterator[Image]:
    """``image`` and its halvings."""
    import cv2

    for level in range(levels):
        if level:
            half = (image.shape[1] // 2, image.shape[0] // 2)
            image = np.asarray(cv2.resize(image, half, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        yield image


def find_patches(slide: Path, folder: Path) -> Path:
    """Runs create_patches_fp.py; gives the coordinates file."""
    command = [sys.executable, str(ROOT / "CLAM" / "create_patches_fp.py"), "--source", str(slide.parent)]
    command += ["--save_dir", str(folder), "--seg", "--patch", "--a_t", "1"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "patches" / f"{slide.stem}.h5"


def patches_as_jpegs(slide: Path, h5: Path) -> list[bytes]:
    """The 256-px patches of the limit, as JPEGs of quality 80."""
    import h5py
    from patch_reading import PatchReader

    with h5py.File(h5, "r") as file:
        coords_px = file["coords"][:]
    reader = PatchReader(slide)
    return [jpeg.encode(np.asarray(patch), 80) for patch in reader.read(coords_px, 0, 256)]


def limit(patches: list[bytes], img_size: int, workers: int, kernel: str) -> Measured:
    """Decode, resize, encode in a bare loop; the clock starts when all processes are ready."""
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(workers + 1)
    parts = [patches[index::workers] for index in range(workers)]
    processes = [context.Process(target=_bare_loop, args=(part, img_size, kernel, ready)) for part in parts]
    for process in processes:
        process.start()
    ready.wait()
    begin, cpu = time.perf_counter(), _children_cpu()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - begin
    return Measured(len(patches) / seconds, 1000 * (_children_cpu() - cpu) / len(patches))


def _bare_loop(patches: list[bytes], img_size: int, kernel: str, ready: multiprocessing.synchronize.Barrier) -> None:
    from patch_resize import resize, warm_up

    warm_up(kernel)
    jpeg.encode(resize(jpeg.decode(patches[0]), img_size, kernel), 80)
    ready.wait()
    for data in patches:
        jpeg.encode(resize(jpeg.decode(data), img_size, kernel), 80)


def ours(slide: Path, coords: Path, out: Path, img_size: int, workers: int) -> tuple[Measured, float]:
    """save_patches.py on an empty output: rate from the first patch to the end, and of the whole command."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(ROOT / "CLAM" / "save_patches.py"), "--data_h5_dir", str(coords)]
    command += ["--data_slide_dir", str(slide.parent), "--csv_path", str(coords / "process_list_autogen.csv")]
    command += [
        "--patch_dir",
        str(out),
        "--save_lmdb",
        "--img_size",
        str(img_size),
        "--workers",
        str(workers),
    ]
    begin, cpu = time.perf_counter(), _children_cpu()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    found = re.findall(r"patches ([\d,]+)/[\d,]+, ([\d,]+) patches/s", done.stderr)[-1]
    patches, rate = (int(text.replace(",", "")) for text in found)
    return Measured(rate, 1000 * (_children_cpu() - cpu) / patches), patches / seconds


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report(limits: list[Measured], runs: list[tuple[Measured, float]]) -> str:
    """A Markdown table of medians; the ratio is the median of the ratios of neighbouring measurements."""
    rate, cpu = median(m.patches_per_s for m in limits), median(m.cpu_ms for m in limits)
    our_rate, our_cpu = median(m.patches_per_s for m, _ in runs), median(m.cpu_ms for m, _ in runs)
    whole = median(rate for _, rate in runs)
    pairs = list(zip(limits, runs, strict=True))
    ratio = median(ours.patches_per_s / bare.patches_per_s for bare, (ours, _) in pairs)
    ratio_whole = median(whole / bare.patches_per_s for bare, (_, whole) in pairs)
    cpu_ratio = median(bare.cpu_ms / ours.cpu_ms for bare, (ours, _) in pairs)
    published = f"{PUBLISHED_PATCHES_PER_S} | - | -"
    our_cpu_text = f"{our_cpu:.2f} ({cpu_ratio:.2f} of the limit)"
    return "\n".join(
        [
            "| | patches/s | of the limit | CPU ms per patch |",
            "| --- | --- | --- | --- |",
            f"| limit: bare loop | {rate:,.0f} | 1 | {cpu:.2f} |",
            f"| ours, first patch to closed store | {our_rate:,.0f} | {ratio:.2f} | |",
            f"| ours, whole command | {whole:,.0f} | {ratio_whole:.2f} | {our_cpu_text} |",
            f"| published script (measured elsewhere) | {published} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--copies", type=int, default=1, help="the slide so many times; from 10,000 patches torch resizes"
    )
    parser.add_argument("--keep", type=Path, help="folder for the slide, kept and used again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        slide = folder / "slides" / "big.tif"
        if not slide.is_file():
            slide.parent.mkdir(parents=True, exist_ok=True)
            data = ROOT / os.environ.get("ABMILX_DATA", "../shared/data")
            write_pyramid(slide, pyramid(level0(data)))
        for copy in slide.parent.glob("copy_*.tif"):
            copy.unlink()
        for number in range(1, args.copies):
            (slide.parent / f"copy_{number}.tif").symlink_to(slide.resolve())
        shutil.rmtree(folder / "coords", ignore_errors=True)
        h5 = find_patches(slide, folder / "coords")
        patches = patches_as_jpegs(slide, h5) * args.copies
        print(f"{len(patches)} patches of 256 px to {args.img_size} px, {args.workers} processes, {args.rounds} rounds")
        from patch_resize import choose_kernel

        limits, runs = [], []
        for _ in range(args.rounds):
            limits.append(limit(patches, args.img_size, args.workers, choose_kernel(len(patches))))
            runs.append(ours(slide, folder / "coords", folder / "out", args.img_size, args.workers))
        print(report(limits, runs))


if __name__ == "__main__":
    main()
