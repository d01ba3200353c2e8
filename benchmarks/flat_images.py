"""Memory of both patching scripts on large images without a pyramid, in fresh processes.

    python -m benchmarks.flat_images [--mpx 100 300] [--kinds png jpeg ...] [--folder FOLDER]

Makes images of each kind (tissue-coloured noise in an ellipse on glass), writes coordinates and a store from each,
and prints the peak resident memory (VmHWM) of create_patches_fp.py and of the two workers of save_patches.py, and the
processor time of both. Images and results lie in a temporary folder, about 15 bytes a pixel, and are deleted.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parents[1]
Pixels = np.ndarray
BAND_ROWS = 1000


def picture(mpx: float) -> Pixels:
    """(h, w, 3) uint8 BGR of 5:4."""
    width = int((mpx * 1.25e6) ** 0.5)
    height = int(mpx * 1e6 / width)
    image = np.empty((height, width, 3), np.uint8)
    noise = np.random.default_rng(0).normal(0, 6, (BAND_ROWS, width, 3)).astype(np.int16)
    x = (np.arange(width) - width / 2) / (0.3 * width)
    for top in range(0, height, BAND_ROWS):
        rows = min(BAND_ROWS, height - top)
        y = (np.arange(top, top + rows) - height / 2) / (0.3 * height)
        inside = (y[:, None] ** 2 + x[None] ** 2 < 1)[..., None]
        colours = np.where(inside, np.array([150, 90, 190]) + 3 * noise[:rows], 240 + noise[:rows] // 4)
        image[top : top + rows] = np.clip(colours, 0, 255)
    return image


def _tiff(compression: str | None) -> Callable[[Path, Pixels], object]:
    return lambda path, image: tifffile.imwrite(path, image[..., ::-1], photometric="rgb", compression=compression)


def _opencv(*flags: int) -> Callable[[Path, Pixels], object]:
    return lambda path, image: cv2.imwrite(str(path), image, flags)


def _with_alpha(path: Path, image: Pixels) -> None:
    cv2.imwrite(
        str(path), np.dstack([image, np.full(image.shape[:2], 255, np.uint8)]), [cv2.IMWRITE_PNG_COMPRESSION, 1]
    )


KINDS: dict[str, tuple[str, Callable[[Path, Pixels], object]]] = {
    "png": (".png", _opencv(cv2.IMWRITE_PNG_COMPRESSION, 1)),
    "png-alpha": (".png", _with_alpha),
    "jpeg": (".jpg", _opencv(cv2.IMWRITE_JPEG_QUALITY, 85)),
    "jpeg-progressive": (".jpg", _opencv(cv2.IMWRITE_JPEG_QUALITY, 85, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),
    "webp": (".webp", _opencv(cv2.IMWRITE_WEBP_QUALITY, 80)),
    "bmp": (".bmp", _opencv()),
    "tiff": (".tif", _tiff(None)),
    "tiff-deflate": (".tif", _tiff("zlib")),
}


class Measured(NamedTuple):
    """Of one command: peak memory of the first process and of the largest worker in MB, processor seconds, status."""

    parent_mb: int
    worker_mb: int
    cpu_s: float
    status: int
    said: str


def measured(command: list[str], environment: dict[str, str]) -> Measured:
    """Runs a command and watches its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks: dict[int, int] = {}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            for number in family(process.pid):
                peaks[number] = max(peaks.get(number, 0), peak_mb(number))
            time.sleep(0.01)
        said.seek(0)
        text = said.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    parent = peaks.pop(process.pid, 0)
    return Measured(parent, max(peaks.values(), default=0), cpu, process.returncode, text)


def family(number: int) -> list[int]:
    """A process and its descendants."""
    found = [number]
    for parent in found:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def peak_mb(number: int) -> int:
    """Peak resident memory of a process until now, in MB."""
    try:
        match = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{number}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) * 1024 // 1_000_000 if match else 0


def run(path: Path, folder: Path) -> str:
    """Both scripts on one image; a row of the table."""
    source, out = path.parent, folder / "out"
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    create = measured(
        [sys.executable, str(ROOT / "CLAM" / "create_patches_fp.py"), "--source", str(source), "--save_dir", str(out)]
        + ["--seg", "--patch", "--stitch", "--a_t", "1", "--workers", "1"],
        environment,
    )
    if create.status:
        with (out / "process_list_autogen.csv").open(newline="") as file:
            return f"{create.parent_mb} | - | {next(csv.DictReader(file))['reason']}"
    save = measured(
        [sys.executable, str(ROOT / "CLAM" / "save_patches.py"), "--data_h5_dir", str(out), "--data_slide_dir"]
        + [str(source), "--csv_path", str(out / "process_list_autogen.csv"), "--patch_dir", str(folder / "store")]
        + ["--save_lmdb", "--img_size", "224", "--workers", "2"],
        environment,
    )
    if save.status:
        return f"{create.parent_mb} | - | failed: {save.said.strip().splitlines()[-1]}"
    return f"{create.parent_mb} | {save.worker_mb} | {create.cpu_s:.1f} | {save.cpu_s:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mpx", type=float, nargs="+", default=[100.0], help="sizes in megapixels")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--folder", type=Path, help="where temporary files go (the system's folder)")
    args = parser.parse_args()
    print("| kind | Mpx | create_patches_fp.py, MB | save_patches.py, MB a worker | CPU s | CPU s |")
    for mpx in args.mpx:
        image = picture(mpx)
        for kind in args.kinds:
            suffix, write = KINDS[kind]
            with tempfile.TemporaryDirectory(dir=args.folder) as name:
                path = Path(name) / "slides" / f"image{suffix}"
                path.parent.mkdir()
                write(path, image)
                print(f"| {kind} | {image.size / 3e6:.0f} | {run(path, Path(name))} |", flush=True)


if __name__ == "__main__":
    main()
