"""A cohort of synthetic slides: pyramidal TIFFs of stained-looking tissue with a planted visual signal.

    python tests/cohort.py OUT --patients 30

writes ``OUT/slides/*.tif`` and ``OUT/labels.csv`` (case,slide,label,fold). Half of the patients are `tumor`:
a region of their tissue holds few large, long nuclei where normal tissue has many small round ones. Both
cover the same share of the tissue with the same ink, so mean colours are equal, and every slide is stained
differently; only the shape of what is seen tells the classes apart.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

CLASSES = ("normal", "tumor")
TILE_PX = 128
LEVEL_0_MPP = 0.5

# Optical density per unit of stain in red, green, blue (Ruifrok and Johnston 2001, rounded).
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.90, 0.20])
PENS = ((30, 60, 160), (20, 110, 60), (25, 25, 30))

# Share of the tissue that nuclei cover, of either kind: equal cover is equal mean colour.
NUCLEAR_COVER = 0.20

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Field = NDArray[np.float32]


@dataclass(frozen=True)
class Nuclei:
    """A kind of nucleus: half axes in level-0 px, and how far it strays in units of spacing."""

    long_px: float
    short_px: float
    stray: float


NORMAL = Nuclei(long_px=2.8, short_px=2.5, stray=0.20)
TUMOUR = Nuclei(long_px=8.0, short_px=4.8, stray=0.16)


@dataclass(frozen=True)
class Cohort:
    """How many slides of which size; the same values always give the same files."""

    patients: int = 30
    slides_per_patient: int = 2
    side_px: int = 1024
    levels: int = 3
    seed: int = 7


@dataclass(frozen=True)
class Drawn:
    """A slide's level 0 (side, side, 3) in RGB, and where its tissue and its tumour are (side, side)."""

    image: Image
    tissue: Mask
    tumour: Mask


def slow_field(rng: np.random.Generator, side_px: int, grain_px: int) -> Field:
    """Smooth noise of mean about 0 and deviation about 1 that varies over ``grain_px``."""
    coarse = rng.standard_normal((side_px // grain_px + 3,) * 2).astype(np.float32)
    field = cv2.resize(coarse, (side_px, side_px), interpolation=cv2.INTER_CUBIC)
    return field.astype(np.float32, copy=False)


def blob(rng: np.random.Generator, within: Mask, share: float) -> Mask:
    """A connected-looking part of ``within`` around a random point of it, ``share`` of its area."""
    side_px = within.shape[0]
    rows, columns = np.nonzero(within)
    pick = rng.integers(len(rows))
    y, x = np.mgrid[:side_px, :side_px].astype(np.float32)
    distance = np.hypot(x - columns[pick], y - rows[pick])
    distance += 0.06 * side_px * slow_field(rng, side_px, side_px // 8)
    return within & (distance <= np.quantile(distance[within], share))


def tissue_mask(rng: np.random.Generator, side_px: int) -> Mask:
    """One piece of tissue: a wobbly disc near the middle, about half of the slide."""
    y, x = np.mgrid[:side_px, :side_px].astype(np.float32) / side_px
    centre = 0.5 + rng.uniform(-0.05, 0.05, 2)
    distance = np.hypot(x - centre[0], y - centre[1]) + 0.03 * slow_field(rng, side_px, side_px // 6)
    return distance < rng.uniform(0.38, 0.43)


def draw_nucleus(canvas: Image, kind: Nuclei, centre_px: tuple[float, float], turn_deg: float) -> None:
    """Fills one nucleus into ``canvas`` with 255, placed to a sixteenth of a pixel."""
    axes = (round(kind.long_px * 16), round(kind.short_px * 16))
    centre = (round(centre_px[0] * 16), round(centre_px[1] * 16))
    outline = np.array(cv2.ellipse2Poly(centre, axes, round(turn_deg), 0, 360, 20))
    cv2.fillConvexPoly(canvas, outline, 255, shift=4)


@functools.cache
def spacing_px(kind: Nuclei) -> float:
    """Distance between neighbours at which the nuclei, as they are drawn, cover NUCLEAR_COVER of the plane.

    Measured, because OpenCV fills every pixel that an outline touches, which enlarges small shapes more.
    """
    rng = np.random.default_rng(0)
    total = 0
    for _ in range(400):
        canvas = np.zeros((32, 32), np.uint8)
        draw_nucleus(canvas, kind, (rng.uniform(15, 17), rng.uniform(15, 17)), rng.uniform(0, 180))
        total += np.count_nonzero(canvas)
    return math.sqrt(total / 400 / NUCLEAR_COVER)


def draw_nuclei(rng: np.random.Generator, side_px: int, kind: Nuclei) -> Mask:
    """Nuclei of one kind over the whole square, on staggered rows with random displacement and direction."""
    step_px = spacing_px(kind)
    places = np.mgrid[-1 : side_px / step_px + 1, -1 : side_px / step_px + 1].reshape(2, -1).T
    places[:, 1] += 0.5 * (places[:, 0] % 2)
    places = (places + rng.uniform(-kind.stray, kind.stray, places.shape)) * step_px
    turns = rng.uniform(0, 180, len(places))
    canvas = np.zeros((side_px, side_px), np.uint8)
    for (y, x), turn in zip(places, turns, strict=True):
        draw_nucleus(canvas, kind, (x, y), turn)
    return canvas > 0


def draw_slide(rng: np.random.Generator, label: str, side_px: int) -> Drawn:
    """Level 0 of one slide; tumour fills 25 to 40 % of the tissue where ``label`` is `tumor`."""
    tissue = tissue_mask(rng, side_px)
    share = rng.uniform(0.25, 0.40)
    tumour = np.zeros_like(tissue)
    nuclei = draw_nuclei(rng, side_px, NORMAL)
    if label == "tumor":
        tumour = blob(rng, tissue, share)
        nuclei = np.where(tumour, draw_nuclei(rng, side_px, TUMOUR), nuclei)
    image: NDArray[Any] = stain(rng, tissue, nuclei & tissue)
    draw_pen(rng, image)
    # Blur and noise come after the stain: they are linear in the colours and leave their means as they are.
    grain = rng.normal(0, 4, (side_px, side_px, 1))
    image = np.clip(cv2.GaussianBlur(image, (0, 0), 0.7) + grain, 0, 255).round()
    return Drawn(image.astype(np.uint8), tissue, tumour)


def stain(rng: np.random.Generator, tissue: Mask, nuclei: Mask) -> Field:
    """Colours 0 to 255 of stained tissue; both stains vary between slides, and slowly within one."""
    side_px = len(tissue)
    blue, pink = rng.uniform(0.6, 1.1), rng.uniform(0.35, 0.75)
    hues = [hue * rng.uniform(0.9, 1.1, 3) for hue in (HAEMATOXYLIN, EOSIN)]
    uneven = 1 + 0.15 * slow_field(rng, side_px, 48)
    weak = 1 + 0.15 * slow_field(rng, side_px, 96)
    haematoxylin = blue * weak * (0.12 + nuclei) * tissue
    eosin = pink * np.clip(uneven, 0.2, None) * tissue
    density = haematoxylin[..., None] * hues[0] + eosin[..., None] * hues[1]
    return (rng.uniform(238, 248) * np.exp(-density)).astype(np.float32)


def draw_pen(rng: np.random.Generator, image: Field) -> None:
    """One stroke of a felt pen along an edge of the slide, whatever the class."""
    side_px = len(image)
    along = np.linspace(0.15, 0.45, 12) * side_px
    across = (0.04 + 0.012 * np.sin(np.linspace(0, rng.uniform(3, 9), 12))) * side_px
    stroke = np.stack([along, across], axis=1)
    if rng.random() < 0.5:
        stroke = side_px - stroke
    if rng.random() < 0.5:
        stroke = stroke[:, ::-1]
    colour = [float(c) for c in PENS[rng.integers(len(PENS))]]
    cv2.polylines(image, [stroke.astype(np.int32)], False, colour, thickness=max(3, side_px // 100))


def write_pyramid(path: Path, image: Image, levels: int) -> None:
    """Writes level 0 (H, W, 3) in RGB and its halvings as a tiled TIFF whose resolution tags give the mpp.

    The tiles are deflated: tifffile writes JPEG tiles only where the large imagecodecs package is installed.
    """
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            per_cm = 1e4 / (LEVEL_0_MPP * 2**level)
            tiff.write(
                image,
                tile=(TILE_PX, TILE_PX),
                compression="zlib",
                compressionargs={"level": 1},
                photometric="rgb",
                subfiletype=1 if level else 0,
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
            half = (image.shape[1] // 2, image.shape[0] // 2)
            image = cv2.resize(image, half, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def folds_of(patients: int) -> list[str]:
    """The split of each patient; patients alternate between the classes, so every split is balanced."""
    pairs = patients // 2
    held_out = max(1, round(0.2 * pairs))
    return ["train"] * (2 * (pairs - 2 * held_out)) + ["val"] * (2 * held_out) + ["test"] * (2 * held_out)


def make_cohort(out: Path, cohort: Cohort) -> Path:
    """Writes the slides and the label csv under ``out``; returns the path of the csv."""
    slides = out / "slides"
    slides.mkdir(parents=True, exist_ok=True)
    rows = []
    for patient, fold in enumerate(folds_of(cohort.patients)):
        label = CLASSES[patient % 2]
        for number in range(cohort.slides_per_patient):
            name = f"P{patient:03d}-S{number}"
            rng = np.random.default_rng((cohort.seed, patient, number))
            write_pyramid(slides / f"{name}.tif", draw_slide(rng, label, cohort.side_px).image, cohort.levels)
            rows.append((f"P{patient:03d}", name, label, fold))
    path = out / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "slide", "label", "fold"))
        writer.writerows(rows)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes a cohort of synthetic slides.")
    default = Cohort()
    parser.add_argument("out", type=Path, help="folder that receives slides/ and labels.csv")
    parser.add_argument("--patients", type=int, default=default.patients, help="an even number of at least 6")
    parser.add_argument("--slides_per_patient", type=int, default=default.slides_per_patient)
    parser.add_argument("--side_px", type=int, default=default.side_px, help="width and height of level 0")
    parser.add_argument("--levels", type=int, default=default.levels, help="levels, each half of the one before")
    parser.add_argument("--seed", type=int, default=default.seed)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    if options["patients"] < 6 or options["patients"] % 2:
        parser.error(f"--patients is {options['patients']}, but must be even and at least 6 (two per split)")
    path = make_cohort(out, Cohort(**options))
    sys.stdout.write(f"wrote {path} and {options['patients'] * options['slides_per_patient']} slides\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
