"""Large images without a pyramid: the same pixels as small ones, in bounded memory, with nothing left behind."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
for folder in (str(ROOT), str(ROOT / "CLAM")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import flat_tiff  # noqa: E402, F401  (before the limits below are lowered)
import slide_image  # noqa: E402
import spooled  # noqa: E402
from image_probe import damage, held_bytes  # noqa: E402
from pixel_rows import ORDERS, Layout, PixelRows  # noqa: E402
from slide import RegionError  # noqa: E402
from slides import open_slide  # noqa: E402

from utils.errors import UserError  # noqa: E402

SIZE = WIDTH, HEIGHT = 130, 95


def picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    base = np.stack([x * 200 / WIDTH, y * 200 / HEIGHT, (x + y) % 97], -1)
    return np.clip(base + rng.integers(0, 40, base.shape), 0, 255).astype(np.uint8)


def image(mode: str) -> Image.Image:
    rgb = Image.fromarray(picture())
    if mode in ("LA", "RGBA"):
        alpha = np.tile(np.repeat(np.array([0, 1, 128, 255, 255], np.uint8), WIDTH // 5), (HEIGHT, 1))
        rgb.putalpha(Image.fromarray(alpha))
    return rgb.convert(mode)


SPOOLED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rgb png": ("a.png", "RGB", {}),
    "grey png": ("a.png", "L", {}),
    "one-bit png": ("a.png", "1", {}),
    "palette png": ("a.png", "P", {}),
    "rgba png": ("a.png", "RGBA", {}),
    "grey-alpha png": ("a.png", "LA", {}),
    "palette png, one colour transparent": ("a.png", "P", {"transparency": 3}),
    "rgb png, one colour transparent": ("a.png", "RGB", {"transparency": tuple(picture()[4, 5].tolist())}),
    "jpeg": ("a.jpg", "RGB", {}),
    "jpeg, turned": (
        "a.jpg",
        "RGB",
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    ),
    "full-colour jpeg": ("a.jpg", "RGB", {"subsampling": 0}),
    "grey jpeg": ("a.jpg", "L", {}),
    "progressive jpeg": ("a.jpg", "RGB", {"progressive": True}),
    "lossy webp": ("a.webp", "RGB", {}),
    "lossless webp": ("a.webp", "RGB", {"lossless": True}),
    "transparent webp": ("a.webp", "RGBA", {}),
}
IN_PLACE = {
    "bmp": ("a.bmp", "RGB", {}),
    "bmp of 32 bits": ("a.bmp", "RGBA", {}),
    "grey bmp": ("a.bmp", "L", {}),
    "ppm": ("a.ppm", "RGB", {}),
    "pgm": ("a.pgm", "L", {}),
    "tga": ("a.tga", "RGB", {}),
    "transparent tga": ("a.tga", "RGBA", {}),
}


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def everything_is_large(monkeypatch, temporary) -> None:
    monkeypatch.setattr(slide_image, "WHOLE_PX", 1000)
    monkeypatch.setattr(slide_image, "BAND_PX", 1000)


def regions(path: Path) -> list[np.ndarray]:
    """Boxes inside, across every edge and outside; then the bands."""
    rng = np.random.default_rng(1)
    found = []
    with open_slide(path) as slide:
        assert slide.level_dimensions == (SIZE,)
        for _ in range(25):
            corner, size = rng.integers(-150, 180, 2).tolist(), rng.integers(1, 170, 2).tolist()
            found.append(slide.read_region(tuple(corner), 0, tuple(size)))
        whole = np.full((HEIGHT, WIDTH, 3), 7, np.uint8)
        for block in slide.blocks(0, 4):
            whole[block.y : block.y + block.height, block.x : block.x + block.width] = block.pixels
    return [*found, whole]


@pytest.mark.parametrize("kind", [*SPOOLED, *IN_PLACE])
def test_large_images_have_the_pixels_of_small_ones(kind, tmp_path, monkeypatch, temporary):
    """What Pillow decodes whole is what is read in parts."""
    name, mode, options = {**SPOOLED, **IN_PLACE}[kind]
    path = tmp_path / f"Gewebe Ä.{name}"
    image(mode).save(path, **options)
    expected = regions(path)
    assert expected[-1].std() > 10
    monkeypatch.setattr(slide_image, "WHOLE_PX", 1000)
    monkeypatch.setattr(slide_image, "BAND_PX", 1000)
    calls = []
    spool = spooled.spool
    monkeypatch.setattr(slide_image, "spool", lambda *args: calls.append(args) or spool(*args))
    for found, want in zip(regions(path), expected, strict=True):
        np.testing.assert_array_equal(found, want)
    assert len(calls) == (kind in SPOOLED)
    assert not list(temporary.iterdir())


def test_cmyk_jpeg_differs_by_rounding_only(tmp_path, everything_is_large):
    image("CMYK").save(tmp_path / "c.jpg")
    whole = np.asarray(Image.open(tmp_path / "c.jpg").convert("RGB")).astype(int)
    assert np.abs(regions(tmp_path / "c.jpg")[-1] - whole).max() <= 1


def interlaced_png(path: Path, pixels: np.ndarray) -> None:
    """PNG specification, 8.2: seven passes over ever finer grids (Pillow writes none)."""
    packer, data = zlib.compressobj(), b""
    for x, y, step_x, step_y in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
    ):  # fmt: skip
        for row in pixels[y::step_y, x::step_x]:
            data += packer.compress(b"\0" + row.tobytes())
    data += packer.flush()
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 1)
    chunks = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_interlaced_png(tmp_path, everything_is_large):
    interlaced_png(tmp_path / "i.png", picture())
    assert Image.open(tmp_path / "i.png").info["interlace"]
    np.testing.assert_array_equal(regions(tmp_path / "i.png")[-1], picture())


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_uncompressed_tiff_of_one_strip_is_read_in_place(samples, tmp_path, everything_is_large):
    pixels = np.dstack([picture(), np.tile(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, 1))])[..., :samples]
    kinds = {"photometric": "minisblack" if samples == 1 else "rgb", "extrasamples": (2,) if samples == 4 else ()}
    tifffile.imwrite(tmp_path / "t.tif", pixels.squeeze(), rowsperstrip=HEIGHT, **kinds)
    whole = np.asarray(Image.open(tmp_path / "t.tif").convert("RGB"))
    np.testing.assert_array_equal(regions(tmp_path / "t.tif")[-1], whole)
    with open_slide(tmp_path / "t.tif") as slide:
        assert slide._rows is not None


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bottom_up", [False, True])
def test_tiles_put_into_a_file_of_rows_are_found_there(order, bottom_up, tmp_path):
    """Rows with padding, either way up, tiles that reach over the edges; every order gives the same colours."""
    channels = {"RGB": [0, 1, 2], "BGR": [2, 1, 0], "L": [0]}.get(order[:3], [0])
    pixels = picture()[..., channels]
    if len(order) == 4:
        pixels = np.dstack([pixels, np.where(picture()[..., 0] > 100, 0, 9).astype(np.uint8)])
    stride = WIDTH * len(order) + 5
    path = tmp_path / "rows"
    path.write_bytes(bytes(11 + HEIGHT * stride))
    layout = Layout(WIDTH, HEIGHT, order, 11, stride)
    if bottom_up:
        layout = layout._replace(offset=11 + (HEIGHT - 1) * stride, stride=-stride)
    rows = PixelRows(os.open(path, os.O_RDWR), layout)
    for y in range(0, HEIGHT, 32):
        for x in range(0, WIDTH, 48):
            tile = np.zeros((32, 48, len(order)), np.uint8)
            part = pixels[y : y + 32, x : x + 48]
            tile[: part.shape[0], : part.shape[1]] = part
            rows.write((x, y), tile)
    expected = np.repeat(picture()[..., :1], 3, 2) if order == "L" else picture().copy()
    if order.endswith("A"):
        expected[pixels[..., 3] == 0] = 0
    np.testing.assert_array_equal(rows.region((0, 0), SIZE), expected)
    np.testing.assert_array_equal(rows.region((-3, 90), (20, 20))[:5, 3:], expected[90:, :17])
    rows.close()
    top = path.read_bytes()[11 : 11 + len(order)]
    assert top == pixels[-1 if bottom_up else 0, 0].tobytes()


@pytest.mark.parametrize(
    ("entry", "mpp"),
    [
        (struct.pack("<HIf", 11, 1, 40_000.0), 0.25),
        (struct.pack("<HII", 3, 1, 40_000), 0.25),
        (struct.pack("<HI4s", 2, 3, b"96"), None),
        (struct.pack("<HI4s", 1, 1, b"\5"), None),
        (struct.pack("<HII", 3, 0, 0), None),
        (struct.pack("<HIHH", 3, 2, 4, 5), None),
    ],
    ids=["float", "short", "text", "byte", "nothing", "two"],
)
def test_a_resolution_of_any_type_is_read_or_unknown(entry, mpp, tmp_path):
    """In px per cm; the standard asks for a fraction."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(), photometric="rgb", resolution=(9, 9), resolutionunit=3, metadata=None)
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].tags["XResolution"].offset + 2
    data = bytearray(path.read_bytes())
    data[place : place + len(entry)] = entry
    path.write_bytes(data)
    with open_slide(path) as slide:
        assert slide.mpp == mpp
        np.testing.assert_array_equal(slide.read_region((0, 0), 0, SIZE), picture())


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    if how == "cut":
        del data[half:]
    else:
        data[half : half + 40] = bytes(range(40))
    path.write_bytes(data)


@pytest.mark.parametrize(("name", "how"), [("a.png", "cut"), ("a.png", "bad"), ("a.jpg", "cut"), ("p.jpg", "cut")])
def test_damage_is_found_once_and_named(name, how, tmp_path, everything_is_large, temporary, monkeypatch):
    path = tmp_path / name
    image("RGB").save(path, **({"progressive": True} if name.startswith("p") else {}))
    damaged(path, how)
    calls = []
    spool = spooled.spool
    monkeypatch.setattr(slide_image, "spool", lambda *args: calls.append(args) or spool(*args))
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(RegionError, match=name.replace(".", r"\.")):
                slide.read_region((0, 0), 0, (10, 10))
        assert all(block.pixels is None for block in slide.blocks(0))
    assert len(calls) <= 1
    assert not list(temporary.iterdir())


def test_a_cut_uncompressed_file_keeps_the_rows_that_are_there(tmp_path, everything_is_large):
    path = tmp_path / "a.ppm"
    image("RGB").save(path)
    damaged(path, "cut")
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read_region((0, 0), 0, (WIDTH, 40)), picture()[:40])
        with pytest.raises(RegionError, match=r"a\.ppm.*ends"):
            slide.read_region((0, 60), 0, (10, 10))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are read from Linux's /proc")
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_the_temporary_file_has_no_name_and_ends_with_the_slide(name, tmp_path, everything_is_large, temporary):
    """So a killed process leaves nothing."""
    image("RGB").save(tmp_path / name, **({"compression": "tiff_lzw"} if name == "a.tif" else {}))
    with open_slide(tmp_path / name) as slide:
        slide.read_region((0, 0), 0, (5, 5))
        assert spooled_bytes() == 3 * WIDTH * HEIGHT
        assert not list(temporary.iterdir())
    assert spooled_bytes() == 0


def spooled_bytes() -> int:
    """Size of the nameless files that this process holds open."""
    links = list(Path("/proc/self/fd").iterdir())
    return sum(link.stat().st_size for link in links if link.exists() and "/temporary/" in os.readlink(link))


def test_no_room_for_the_decoded_image_is_said_with_the_remedy(tmp_path, everything_is_large, monkeypatch):
    image("RGB").save(tmp_path / "a.png")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=spooled.SPARE_BYTES + 3 * WIDTH * HEIGHT))
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.read_region((0, 0), 0, (5, 5)).shape == (5, 5, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=spooled.SPARE_BYTES))
    with open_slide(tmp_path / "a.png") as slide, pytest.raises(UserError, match=r"a\.png.*GB are free.*TMPDIR"):
        slide.read_region((0, 0), 0, (5, 5))


def test_a_disk_that_fills_up_is_an_error_and_not_a_crash(tmp_path, everything_is_large, monkeypatch):
    image("RGB").save(tmp_path / "a.png")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with open_slide(tmp_path / "a.png") as slide, pytest.raises(UserError, match=r"No space left.*TMPDIR"):
        slide.read_region((0, 0), 0, (5, 5))


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("p.jpg", {"progressive": True}, "jpegtran"),
        ("l.webp", {"lossless": True}, "convert it to PNG"),
        ("a.png", {}, "write it anew"),
    ],
)
def test_what_no_decoder_reads_in_parts_is_refused_with_the_remedy(
    name, options, remedy, tmp_path, everything_is_large, monkeypatch
):
    image("RGB").save(tmp_path / name, **options)
    monkeypatch.setattr(slide_image, "HELD_BYTES", 1000)
    with pytest.raises(UserError, match=rf"130 x 95 px.*MB at once.*{remedy}"):
        open_slide(tmp_path / name)
    image("RGB").save(tmp_path / "s.jpg")
    open_slide(tmp_path / "s.jpg").close()


def test_formats_that_are_always_decoded_whole_have_a_limit(tmp_path, everything_is_large):
    image("P").save(tmp_path / "a.gif")
    with pytest.raises(UserError, match=r"130 x 95 px.*GIF.*tiled TIFF"):
        open_slide(tmp_path / "a.gif")


def test_held_bytes_by_hand(tmp_path):
    """130 x 95 px: with 4:2:0 9 x 6 units of 6 blocks, with 4:4:4 17 x 12 of 3; 64 coefficients of 2 bytes."""
    rgb, path = image("RGB"), tmp_path / "a.jpg"
    rgb.save(path, progressive=True, subsampling=2)
    assert held_bytes(path, "JPEG") == 9 * 6 * 6 * 128
    rgb.save(path, progressive=True, subsampling=0)
    assert held_bytes(path, "JPEG") == 17 * 12 * 3 * 128
    rgb.save(path)
    assert held_bytes(path, "JPEG") == 0
    for options, bytes_a_pixel in (({}, 0), ({"lossless": True}, 4)):
        rgb.save(tmp_path / "a.webp", **options)
        size = (tmp_path / "a.webp").stat().st_size
        assert held_bytes(tmp_path / "a.webp", "WEBP") == size + bytes_a_pixel * WIDTH * HEIGHT


def test_the_end_of_a_thumbnail_is_not_the_end_of_a_jpeg(tmp_path):
    image("RGB").save(tmp_path / "a.jpg", exif=b"Exif\0\0\xff\xd8 thumbnail \xff\xd9")
    assert damage(tmp_path / "a.jpg", "JPEG") == ""
    damaged(tmp_path / "a.jpg", "cut")
    assert "ends before" in damage(tmp_path / "a.jpg", "JPEG")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("length", [0, 3, 15])
def test_headers_cut_short_are_damage_and_not_a_crash(kind, length, tmp_path):
    path = tmp_path / f"a.{kind.lower()}"
    image("RGB").save(path)
    path.write_bytes(path.read_bytes()[:length])
    if kind == "PNG":
        assert held_bytes(path, kind) <= 13
    else:
        with pytest.raises(ValueError, match="file|marker"):
            held_bytes(path, kind)


MEASURE = """
import re, sys
sys.path[:0] = [{root!r}, {root!r} + "/CLAM"]
from params import SlideParams
from slides import open_slide
from tissue import find_tissue, scan_level
with open_slide({path!r}) as slide:
    tissue = find_tissue(scan_level(slide, 0), SlideParams(a_t=0))
    slide.read_region((100, 100), 0, (256, 8000))
print(len(tissue.regions), re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_huge_image_is_segmented_in_bounded_memory(suffix, tmp_path):
    """90 Mpx: 360 MB as Pillow holds them, and segmented without being reduced."""
    pixels = np.full((9_000, 10_000, 3), 245, np.uint8)
    pixels[3000:8000, 4000:9000] = (140, 60, 200)
    path = tmp_path / f"huge{suffix}"
    cv2.imwrite(str(path), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    del pixels
    code = MEASURE.format(root=str(ROOT), path=str(path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    count, peak_kb = (int(v) for v in result.stdout.split())
    assert count == 1
    assert peak_kb < 450_000
    assert list(tmp_path.iterdir()) == [path]
