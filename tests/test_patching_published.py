"""The whole script against the published rules, coordinate by coordinate, on generated and on real slides."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import cv2
import h5py
import numpy as np
import openslide
import pytest
import tifffile
from test_grid import published_coords
from test_tissue import published_regions

sys.path.append(str(Path(__file__).resolve().parents[1] / "CLAM"))

from create_patches_fp import main
from grid import Grid
from params import SlideParams, read_preset

PUBLISHED_COLUMNS = [
    "slide_id", "process", "status", "seg_level", "sthresh", "mthresh", "close", "use_otsu", "keep_ids",
    "exclude_ids", "a_t", "a_h", "max_n_holes", "vis_level", "line_thickness", "use_padding", "contour_fn",
]  # fmt: skip
PUBLISHED_ATTRIBUTES = {
    "patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim", "name", "save_path",
}  # fmt: skip


def published(path: Path, params: SlideParams, patch: int, step: int, level: int) -> np.ndarray:
    """Section 12 for one slide: (N, 2) corners."""
    with openslide.OpenSlide(str(path)) as slide:
        best = 0 if slide.level_count == 1 else slide.get_best_level_for_downsample(64)
        seg = best if params.seg_level < 0 else params.seg_level
        image = np.array(slide.read_region((0, 0), seg, slide.level_dimensions[seg]))
        (width, height), (w, h) = slide.dimensions, slide.level_dimensions[seg]
        patch_width, patch_height = slide.level_dimensions[level]
    saturation = cv2.cvtColor(np.ascontiguousarray(image[..., :3]), cv2.COLOR_RGB2HSV)[:, :, 1]
    regions = published_regions(saturation, params, (width / w, height / h))
    down = int(width / patch_width), int(height / patch_height)
    grid = Grid(
        (patch * down[0], patch * down[1]),
        (step * down[0], step * down[1]),
        (width, height),
        params.contour_fn,
        params.use_padding,
    )
    coords = [c for region in regions for c in published_coords(region, grid)]
    return np.array(coords, np.int64).reshape(-1, 2)


def run(source: Path, out: Path, *options: object) -> int:
    steps = ["--seg", "--patch", "--stitch", "--workers", "1"]
    return main(["--source", str(source), "--save_dir", str(out), *steps, *map(str, options)])


def compare(source: Path, out: Path, params: SlideParams, geometry: tuple[int, int, int]) -> int:
    """Compares every slide of a run with the published rules; returns the number of patches."""
    patch, step, level = geometry
    total = 0
    for path in sorted(source.iterdir()):
        expected = published(path, params, patch, step, level)
        made = out / "patches" / f"{path.stem}.h5"
        assert made.is_file() == (len(expected) > 0)
        if made.is_file():
            with h5py.File(made) as file:
                data = file["coords"]
                assert data.dtype == np.int64
                assert (data.chunks, data.maxshape) == ((1, 2), (None, 2))
                np.testing.assert_array_equal(data[:], expected)
        total += len(expected)
    return total


def draw_slide(seed: int, width: int, height: int) -> np.ndarray:
    """Pink pieces with holes on glass, noise everywhere."""
    rng = np.random.default_rng(seed)
    field = cv2.GaussianBlur(rng.normal(size=(height, width)).astype(np.float32), (0, 0), 40)
    field /= field.std()
    image = np.full((height, width, 3), 240.0)
    image[field > 0.3] = (200, 80, 150)
    return np.clip(image + rng.normal(size=image.shape) * 5, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """Two slides whose sizes leave remainders at every level."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, (width, height) in enumerate([(1603, 1205), (998, 1407)]):
        image = draw_slide(seed, width, height)
        with tifffile.TiffWriter(folder / f"s.{seed}.tif") as tiff:
            for n in (1, 2, 4):
                level = cv2.resize(image, (width // n, height // n), interpolation=cv2.INTER_AREA)
                kinds = {"photometric": "rgb", "compression": "zlib", "tile": (128, 128), "metadata": None}
                tiff.write(level, subfiletype=min(n - 1, 1), **kinds)
    return folder


@pytest.mark.parametrize("contour_fn", ["four_pt", "four_pt_hard", "center", "basic"])
@pytest.mark.parametrize(
    ("geometry", "use_padding"),
    [((64, 64, 0), True), ((64, 40, 1), False), ((33, 50, 0), False), ((16, 16, 2), True)],
)
def test_generated_slides(slides, tmp_path, contour_fn, geometry, use_padding):
    patch, step, level = geometry
    params = SlideParams(a_t=0.01, a_h=0.005, contour_fn=contour_fn, use_padding=use_padding)
    options = ["--a_t", 0.01, "--a_h", 0.005, "--contour_fn", contour_fn, "--use_padding", use_padding]
    size = ["--patch_size", patch, "--step_size", step, "--patch_level", level]
    assert run(slides, tmp_path, *options, *size) == 0
    assert compare(slides, tmp_path, params, geometry) > 50


@pytest.mark.parametrize(
    ("preset", "geometry"),
    [("tcga", (256, 256, 0)), ("bwh_biopsy", (128, 100, 0))],
)
def test_real_slides(real_data, tmp_path, preset, geometry):
    patch, step, _ = geometry
    run(real_data / "wsi", tmp_path, "--preset", preset, "--patch_size", patch, "--step_size", step)
    assert compare(real_data / "wsi", tmp_path, read_preset(preset), geometry) > 300


def test_attributes_and_list(slides, tmp_path):
    assert run(slides, tmp_path, "--a_t", "0.01", "--patch_size", 64, "--step_size", 64, "--patch_level", 1) == 0
    with h5py.File(tmp_path / "patches" / "s.0.h5") as file:
        attributes = dict(file["coords"].attrs)
        count = len(file["coords"])
    assert set(attributes) >= PUBLISHED_ATTRIBUTES
    assert (attributes["patch_size"], attributes["patch_level"]) == (64, 1)
    assert attributes["downsample"].tolist() == [1603 / 801, 1205 / 602]
    assert attributes["level_dim"].tolist() == attributes["downsampled_level_dim"].tolist() == [801, 602]
    assert (attributes["name"], attributes["save_path"]) == ("s.0", str(tmp_path / "patches"))
    with (tmp_path / "process_list_autogen.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][: len(PUBLISHED_COLUMNS)] == PUBLISHED_COLUMNS
    first = dict(zip(rows[0], rows[1], strict=True))
    assert (first["slide_id"], first["process"], first["status"]) == ("s.0.tif", "0", "processed")
    assert (first["seg_level"], first["use_otsu"], first["contour_fn"]) == ("2", "False", "four_pt")
    assert int(first["patches"]) == count
    for folder in ("masks", "stitches"):
        assert (tmp_path / folder / "s.0.jpg").stat().st_size > 1000
