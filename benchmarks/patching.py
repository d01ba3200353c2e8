"""Segmentation and coordinates: our program against the published algorithm written down plainly, in one run.

    python benchmarks/patching.py [--slide SLIDE] [--repeats 5] [--json OUT]

The slide: 21,772 x 18,268 px, JPEG tiles of 256, levels of downsample 1, 4, 16 and 64, made by repeating
the real slide wsi/oral-scc-06.tiff of the data folder (environment variable ABMILX_DATA). The reference
reads the segmentation level whole, traces the same contours and tests every grid point with
cv2.pointPolygonTest, in this process or in the published pool of four processes per contour. Both must
give the same coordinates, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import openslide
import simplejpeg
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "CLAM")]

from coords_file import read_coords  # noqa: E402
from flat_tiff import tiff_directory  # noqa: E402
from jobs import Job, Steps  # noqa: E402
from magnification import Request  # noqa: E402
from one_slide import process  # noqa: E402
from params import SlideParams, read_preset  # noqa: E402

from utils.cores import usable_cores  # noqa: E402

SIZE_PX = (21_772, 18_268)
TILE_PX = 256
DOWNSAMPLES = (1, 4, 16, 64)


def real_slide() -> Path:
    return ROOT / os.environ.get("ABMILX_DATA", "../shared/data") / "wsi" / "oral-scc-06.tiff"


def mosaic(downsample: int) -> np.ndarray:
    """The level of the big slide: the real one's level repeated and cut, mirrored in turn so that edges
    meet.
    """
    with openslide.OpenSlide(str(real_slide())) as slide:
        level = slide.get_best_level_for_downsample(min(downsample, 32) + 0.5)
        image = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))[..., :3]
    if downsample > slide_factor(downsample):
        half = (image.shape[1] // 2, image.shape[0] // 2)
        image = cv2.resize(np.ascontiguousarray(image), half, interpolation=cv2.INTER_AREA)
    row = np.concatenate([image, image[:, ::-1], image], axis=1)
    whole = np.concatenate([row, row[::-1], row], axis=0)
    return whole[: SIZE_PX[1] // downsample, : SIZE_PX[0] // downsample]


def slide_factor(downsample: int) -> int:
    return min(downsample, 32)


def jpeg_tiles(image: np.ndarray) -> Iterator[bytes]:
    for y in range(0, image.shape[0], TILE_PX):
        for x in range(0, image.shape[1], TILE_PX):
            tile = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
            part = image[y : y + TILE_PX, x : x + TILE_PX]
            tile[: part.shape[0], : part.shape[1]] = part
            yield simplejpeg.encode_jpeg(tile, quality=85, colorsubsampling="420")


def make_slide(path: Path) -> Path:
    return write_jpeg_pyramid(path, (mosaic(d) for d in DOWNSAMPLES))


def write_jpeg_pyramid(path: Path, levels: Iterable[np.ndarray]) -> Path:
    """Writes images (h, w, 3), largest first, as a classic TIFF of YCbCr JPEG tiles."""
    with path.open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        link = 4
        for number, image in enumerate(levels):
            places = []
            for tile in jpeg_tiles(image):
                places.append((file.tell(), len(tile)))
                file.write(tile)
            start = file.tell()
            directory = tiff_directory(level_entries(image.shape, places, number > 0), start)
            file.write(directory)
            end = file.tell()
            file.seek(link)
            file.write(struct.pack("<I", start))
            file.seek(end)
            # The link to the next directory is the last field of the table, before the long values.
            link = start + 2 + 12 * struct.unpack("<H", directory[:2])[0]
    return path


def level_entries(shape: tuple[int, ...], places: list[tuple[int, int]], reduced: bool) -> dict[int, Any]:
    """TIFF tags of a level of YCbCr JPEG tiles: code to (type, values); types 3 and 4 are 16 and 32 bits."""
    return {
        254: (4, (int(reduced),)),
        256: (4, (shape[1],)),
        257: (4, (shape[0],)),
        258: (3, (8, 8, 8)),
        259: (3, (7,)),
        262: (3, (6,)),
        277: (3, (3,)),
        284: (3, (1,)),
        322: (4, (TILE_PX,)),
        323: (4, (TILE_PX,)),
        324: (4, tuple(offset for offset, _ in places)),
        325: (4, tuple(size for _, size in places)),
        530: (3, (2, 2)),
    }


Contour = np.ndarray
Pieces = list[tuple[Contour, list[Contour]]]


def reference_pieces(slide: openslide.OpenSlide, params: SlideParams) -> Pieces:
    """Contours and holes in level-0 px, by the rules of the published script."""
    level = slide.get_best_level_for_downsample(64)
    image = np.array(slide.read_region((0, 0), level, slide.level_dimensions[level]))
    saturation = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGBA2RGB), cv2.COLOR_RGB2HSV)[:, :, 1]
    blurred = cv2.medianBlur(saturation, params.mthresh)
    _, mask = cv2.threshold(blurred, params.sthresh, 255, cv2.THRESH_BINARY)
    if params.close:
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((params.close, params.close), np.uint8))
    contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    scale = tuple(a / b for a, b in zip(slide.dimensions, slide.level_dimensions[level], strict=True))
    unit = int(512 * 512 / (scale[0] * scale[1]))
    pieces = []
    for i in [i for i in range(len(contours)) if hierarchy[0, i, 3] == -1]:
        holes = [contours[j] for j in range(len(contours)) if hierarchy[0, j, 3] == i]
        area = cv2.contourArea(contours[i]) - sum(cv2.contourArea(h) for h in holes)
        if area > params.a_t * unit:
            largest = sorted(holes, key=cv2.contourArea, reverse=True)[: params.max_n_holes]
            kept = [h for h in largest if cv2.contourArea(h) > params.a_h * unit]
            pieces.append(((contours[i] * scale).astype(np.int32), [(h * scale).astype(np.int32) for h in kept]))
    return pieces


def reference_test(task: tuple[tuple[int, int], int, Contour, list[Contour]]) -> tuple[int, int] | None:
    """One grid point under four_pt."""
    (x, y), patch, outline, holes = task
    centre_x, centre_y, shift = x + patch // 2, y + patch // 2, int(patch // 2 * 0.5)
    for dx, dy in ((-shift, -shift), (shift, shift), (shift, -shift), (-shift, shift)):
        if cv2.pointPolygonTest(outline, (float(centre_x + dx), float(centre_y + dy)), False) >= 0:
            middle = (x + patch / 2, y + patch / 2)
            return None if any(cv2.pointPolygonTest(h, middle, False) > 0 for h in holes) else (x, y)
    return None


def reference_coords(pieces: Pieces, patch: int, pooled: bool) -> np.ndarray:
    found: list[Any] = []
    for outline, holes in pieces:
        x0, y0, w, h = cv2.boundingRect(outline)
        corners = [(x, y) for x in range(x0, x0 + w, patch) for y in range(y0, y0 + h, patch)]
        tasks = [(corner, patch, outline, holes) for corner in corners]
        if pooled:
            with multiprocessing.Pool(4) as pool:
                found += pool.map(reference_test, tasks)
        else:
            found += [reference_test(task) for task in tasks]
    return np.array([c for c in found if c is not None])


def reference_outputs(path: Path, folder: Path, params: SlideParams, pooled: bool) -> np.ndarray:
    """What the published script does for a slide: contours, coordinates, mask picture, h5 grown contour by contour."""
    with openslide.OpenSlide(str(path)) as slide:
        level = slide.get_best_level_for_downsample(64)
        pieces = reference_pieces(slide, params)
        picture = np.array(slide.read_region((0, 0), level, slide.level_dimensions[level]).convert("RGB"))
        scale = np.array(slide.dimensions) / slide.level_dimensions[level]
    for outline, holes in pieces:
        for contour, colour in [(outline, (0, 255, 0)), *((h, (0, 0, 255)) for h in holes)]:
            cv2.drawContours(picture, [(contour / scale).astype(np.int32)], -1, colour, 6)
    Image.fromarray(picture).save(folder / "mask.jpg")
    found = [reference_coords([piece], TILE_PX, pooled) for piece in pieces]
    with h5py.File(folder / "reference.h5", "w") as file:
        data = file.create_dataset("coords", (0, 2), np.int64, chunks=(1, 2), maxshape=(None, 2))
        for coords in found:
            data.resize(len(data) + len(coords), axis=0)
            data[len(data) - len(coords) :] = coords
    return np.concatenate(found)


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The least seconds of each function, run in turn: other work on the machine then hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def peak_mb() -> float:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(path: Path, folder: Path, repeats: int) -> dict[str, Any]:
    params = read_preset("tcga")
    steps = Steps(save_dir=folder, seg=True, patch=True, auto_skip=False)
    job = Job(path=path, params=params, request=Request(), steps=steps)
    folder.mkdir(parents=True)
    outcome, peak = process(job), peak_mb()
    found = read_coords(job.output("patches", ".h5"))
    expected = reference_outputs(path, folder, params, False)
    if not np.array_equal(found, expected):
        raise SystemExit(f"coordinates differ: {len(found)} of ours, {len(expected)} of the reference ({outcome})")
    runs = {
        "ours_s": lambda: process(job),
        "reference_pool_of_4_s": lambda: reference_outputs(path, folder, params, True),
        "reference_one_process_s": lambda: reference_outputs(path, folder, params, False),
    }
    seconds = interleaved(runs, repeats)
    return {
        "patches": len(found),
        **seconds,
        "times_faster_than_pool_of_4": seconds["reference_pool_of_4_s"] / seconds["ours_s"],
        "times_faster_than_one_process": seconds["reference_one_process_s"] / seconds["ours_s"],
        "times_faster_than_0.75_s": 0.75 / seconds["ours_s"],
        "peak_memory_mb": peak,
        "cores": usable_cores(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, help="a slide to use; made when the file is not there")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if not (args.slide and args.slide.is_file()) and not real_slide().is_file():
        print(f"skipped: there is no {real_slide()}. Give --slide, or ABMILX_DATA, the data folder.")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = args.slide or Path(folder) / "big.tiff"
        if not path.is_file():
            # In a process of its own, so that the peak memory measured is the patching's.
            maker = multiprocessing.get_context("spawn").Process(target=make_slide, args=(path,))
            maker.start()
            maker.join()
        figures = compare(path, Path(folder) / "out", args.repeats)
    for name, value in figures.items():
        print(f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
