"""Slides: every kind of file gives the pixels that its own decoder gives, wherever one reads."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "CLAM"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import flat_tiff
import slide as slide_module
import slide_image
from patching import write_jpeg_pyramid
from slide import RegionError
from slide_scale import openslide_mpp
from slides import open_slide

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with noise: JPEG and PNG both have something to do."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 200 / width, y * 200 / height, (x + y) % 97], -1)
    return np.clip(base + rng.integers(0, 40, base.shape), 0, 255).astype(np.uint8)


def write_pyramid(path: Path, levels: list[np.ndarray], mpp: float | None = None) -> Path:
    """A tiled, deflated TIFF with the given images as levels."""
    kinds = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as tiff:
        for number, image in enumerate(levels):
            tiff.write(
                image, tile=(64, 64), photometric="rgb", compression="zlib", subfiletype=min(number, 1),
                metadata=None, **kinds,
            )  # fmt: skip
    return path


def write_flat(path: Path, image: np.ndarray, kind: str) -> None:
    if kind in ("none", "none-big", "deflate"):
        compression, big = "zlib" if kind == "deflate" else None, kind == "none-big"
        tifffile.imwrite(path, image, photometric="rgb", compression=compression, rowsperstrip=7, bigtiff=big)
    elif kind == "deflate-predictor":
        tifffile.imwrite(path, image, photometric="rgb", compression="zlib", predictor=2, rowsperstrip=7)
    else:
        Image.fromarray(image).save(path, compression=kind, strip_size=5000)


FLAT_KINDS = ["none", "none-big", "deflate", "deflate-predictor", "packbits", "tiff_lzw", "jpeg"]


@pytest.fixture(params=["png", "jpg", "webp", "bmp", *(f"tif-{k}" for k in FLAT_KINDS)])
def image_file(request, tmp_path):
    kind = request.param
    path, image = tmp_path / f"a.b.{kind.split('-')[0]}", picture(130, 95)
    if kind.startswith("tif-"):
        write_flat(path, image, kind.removeprefix("tif-"))
    else:
        Image.fromarray(image).save(path, **({"lossless": True} if kind == "webp" else {}))
    return path


def test_images_are_one_level_slides_with_the_decoders_pixels(image_file):
    whole = np.array(Image.open(image_file).convert("RGB"))
    padded = np.pad(whole, ((200, 200), (200, 200), (0, 0)))
    rng = np.random.default_rng(1)
    with open_slide(image_file) as slide:
        assert slide.name == "a.b"
        assert slide.level_dimensions == ((130, 95),)
        assert slide.level_downsamples == ((1.0, 1.0),)
        assert slide.best_level(64) == 0
        for _ in range(25):
            x, y = (int(v) for v in rng.integers(-150, 180, 2))
            w, h = (int(v) for v in rng.integers(1, 170, 2))
            region = slide.read_region((x, y), 0, (w, h))
            assert region.dtype == np.uint8
            np.testing.assert_array_equal(region, padded[y + 200 : y + 200 + h, x + 200 : x + 200 + w])


def test_transparent_pixels_are_black(tmp_path):
    rgba = np.full((20, 20, 4), 255, np.uint8)
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "t.png")
    with open_slide(tmp_path / "t.png") as slide:
        region = slide.read_region((0, 0), 0, (20, 20))
    assert (region[:10] == 0).all()
    assert (region[10:] == 255).all()


def test_pyramid_levels_and_scale(tmp_path):
    image = picture(300, 200)
    path = write_pyramid(tmp_path / "p.x.tif", [image, image[::2, ::2].copy(), image[::4, ::4].copy()], mpp=0.5)
    with open_slide(path) as slide:
        assert slide.name == "p.x"
        assert slide.dimensions == (300, 200)
        assert slide.level_downsamples[2] == (4.0, 4.0)
        assert [slide.best_level(d) for d in (1, 2.5, 64)] == [0, 1, 2]
        assert slide.mpp == pytest.approx(0.5, rel=1e-3)
        np.testing.assert_array_equal(slide.read_region((8, 4), 1, (50, 60)), image[4:124:2, 8:108:2])
        outside = slide.read_region((280, 180), 0, (40, 40))
    np.testing.assert_array_equal(outside[:20, :20], image[180:, 280:])
    assert outside[20:].sum() == outside[:, 20:].sum() == 0


def test_sixteen_bit_png_is_refused_with_a_reason(tmp_path):
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png.*8 bits"):
        open_slide(tmp_path / "deep.png")


def test_a_pickled_slide_opens_again(tmp_path):
    image = picture(130, 95)
    Image.fromarray(image).save(tmp_path / "s.png")
    with open_slide(tmp_path / "s.png") as slide:
        slide.read_region((0, 0), 0, (4, 4))
        copy = pickle.loads(pickle.dumps(slide))
    np.testing.assert_array_equal(copy.read_region((3, 2), 0, (9, 8)), image[2:10, 3:12])


@pytest.mark.parametrize("edge", [50, 64, 100, 4096])
def test_blocks_give_the_pixels_of_one_whole_read(tmp_path, edge, monkeypatch):
    """Level 1 has a downsample of 2.013 and 2.02: block corners fall between pixels of level 0."""
    image = picture(304, 202)
    monkeypatch.setattr(slide_module, "BLOCK_PX", edge)
    assert_blocks_equal_whole_read(write_pyramid(tmp_path / "odd.tif", [image, picture(151, 100, 1)]), 1)


def assert_blocks_equal_whole_read(path: Path, level: int) -> None:
    with openslide.OpenSlide(str(path)) as handle:
        size = handle.level_dimensions[level]
        whole = np.asarray(handle.read_region((0, 0), level, size))[..., :3]
    with open_slide(path) as slide:
        found = np.full_like(whole, 7)
        for block in slide.blocks(level, 10):
            found[block.y : block.y + block.height, block.x : block.x + block.width] = block.pixels
    np.testing.assert_array_equal(found, whole)


def test_blocks_of_jpeg_tiles_are_openslides_pixels(tmp_path, monkeypatch):
    """Tiles decoded directly, at a level whose downsample is not whole (2.013 and 2.02)."""
    path = write_jpeg_pyramid(tmp_path / "j.tif", [picture(1208, 808), picture(600, 400, 1)])
    monkeypatch.setattr(slide_module, "BLOCK_PX", 300)
    with open_slide(path) as slide:
        tiles = slide._direct_tiles(1)
        assert tiles is not None
        tiles.close()
    assert_blocks_equal_whole_read(path, 0)
    assert_blocks_equal_whole_read(path, 1)


@pytest.mark.parametrize(
    ("name", "level"),
    [("CMU-1-Small-Region.svs", 0), ("tcga-cr-7395-01a-01-ts1.svs", 1), ("oral-scc-06.tiff", 2)],
)
def test_blocks_of_real_slides(real_data, name, level, monkeypatch):
    monkeypatch.setattr(slide_module, "BLOCK_PX", 700)
    assert_blocks_equal_whole_read(real_data / "wsi" / name, level)


@pytest.mark.parametrize("content", [b"", b"hello, I am no slide", b"II*\0garbage", b"\x89PNG\r\n\x1a\nxx"])
@pytest.mark.parametrize("suffix", [".svs", ".tif", ".png", ""])
def test_unreadable_files_are_named(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="broken"):
        open_slide(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.svs: there is no such file"):
        open_slide(tmp_path / "nowhere.svs")


def test_truncated_image_is_a_region_error(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(picture(130, 95)).save(path)
    path.write_bytes(path.read_bytes()[:9000])
    with open_slide(path) as slide, pytest.raises(RegionError, match=r"cut\.png"):
        slide.read_region((0, 0), 0, (10, 10))


def overwrite(path: Path, offset: int, count: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)


def test_a_damaged_strip_spares_the_others(tmp_path, monkeypatch):
    path, image = tmp_path / "s.tif", picture(130, 95)
    write_flat(path, image, "deflate")
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, count = page.dataoffsets[3], page.databytecounts[3]
    overwrite(path, offset, count)
    with open_slide(path) as slide:
        with pytest.raises(RegionError, match="strip or tile 3"):
            slide.read_region((0, 0), 0, (130, 95))
        np.testing.assert_array_equal(slide.read_region((0, 0), 0, (130, 21)), image[:21])
        monkeypatch.setattr(flat_tiff, "BAND_PX", 130 * 7)
        assert [b.pixels is None for b in slide.blocks(0)] == [False] * 3 + [True] + [False] * 10


def test_a_file_that_is_gone_after_an_error_is_said_and_closes(tmp_path):
    path = tmp_path / "p.tif"
    write_pyramid(path, [picture(128, 128)])
    with tifffile.TiffFile(path) as file:
        overwrite(path, file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0])
    with open_slide(path) as slide:
        path.unlink()
        with pytest.raises(UserError, match=r"p\.tif.*cannot be opened again") as caught:
            slide.read_region((0, 0), 0, (10, 10))
        assert not isinstance(caught.value, RegionError)


def test_a_damaged_tile_spares_the_others(tmp_path, monkeypatch):
    """OpenSlide refuses everything after an error; the slide must open anew by itself."""
    path, image = tmp_path / "p.tif", picture(256, 192)
    write_pyramid(path, [image])
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    overwrite(path, offset, count)
    with open_slide(path) as slide:
        with pytest.raises(RegionError, match=r"p\.tif"):
            slide.read_region((0, 0), 0, (10, 10))
        np.testing.assert_array_equal(slide.read_region((64, 64), 0, (64, 64)), image[64:128, 64:128])
        monkeypatch.setattr(slide_module, "BLOCK_PX", 64)
        assert [b.pixels is None for b in slide.blocks(0)] == [True] + [False] * 11


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.27"}, 0.26),
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "0"}, None),
        ({"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"}, None),
        ({"openslide.mpp-x": "nan", "openslide.mpp-y": "1"}, None),
        ({"tiff.XResolution": "40000", "tiff.ResolutionUnit": "centimeter"}, 0.25),
        ({"tiff.XResolution": "72", "tiff.ResolutionUnit": "inch"}, None),
        ({"tiff.XResolution": "20000", "tiff.ResolutionUnit": "none"}, None),
        ({}, None),
    ],
)
def test_only_plausible_scales_are_believed(properties, mpp):
    found, source = openslide_mpp(properties)
    assert found == (pytest.approx(mpp) if mpp else None)
    assert (source is None) == (mpp is None)


def test_sixteen_bit_tiff_is_refused_with_a_reason(tmp_path):
    tifffile.imwrite(tmp_path / "deep.tif", np.zeros((50, 50, 3), np.uint16), photometric="rgb")
    with pytest.raises(UserError, match=r"deep\.tif.*16 bits"):
        open_slide(tmp_path / "deep.tif")


def test_an_image_too_large_to_decode_whole_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_image, "MAX_PX", 1000)
    Image.fromarray(picture(130, 95)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large\.png: 130 x 95 px.*tiled TIFF"):
        open_slide(tmp_path / "large.png")


MEASURE = """
import re, sys
sys.path[:0] = [{root!r}, {root!r} + "/CLAM"]
from params import SlideParams
from slides import open_slide
from tissue import find_tissue, scan_level
with open_slide({path!r}) as slide:
    tissue = find_tissue(scan_level(slide, 0), SlideParams(a_t=0))
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(len(tissue.regions), peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_huge_flat_file_is_segmented_in_bounded_memory(tmp_path):
    """192 Mpx, 576 MB of pixels, no pyramid, one strip per 16 rows."""
    width, height = 16_000, 12_000
    strip = np.full((16, width, 3), 245, np.uint8)
    glass = zlib.compress(strip.tobytes(), 1)
    strip[:, 4000:9000] = (200, 60, 140)
    tissue = zlib.compress(strip.tobytes(), 1)
    path = tmp_path / "huge.tif"
    strips = (tissue if 3000 <= y < 8000 else glass for y in range(0, height, 16))
    tifffile.imwrite(
        path, strips, shape=(height, width, 3), dtype=np.uint8, photometric="rgb", compression="zlib",
        rowsperstrip=16,
    )  # fmt: skip
    code = MEASURE.format(root=str(ROOT), path=str(path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    regions, peak_kb = (int(v) for v in result.stdout.split())
    assert regions == 1
    assert peak_kb < 500_000
