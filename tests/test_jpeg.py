"""The JPEG interface: same result through every codec, and one kind of error for bad data."""

from __future__ import annotations

import io
import sys
import types
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from datasets import jpeg
from datasets.jpeg import JpegError
from datasets.utils import imfrombytes
from utils.errors import UserError


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth RGB image whose three channels differ."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, 255 - x * 255 / width], axis=-1).astype(np.uint8)


class FakeTurboJpeg:
    """PyTurboJPEG 1.8 as documented, with Pillow inside: warnings for damage, dst, scaling factors."""

    def decode_header(self, data: bytes) -> tuple[int, int, int, int]:
        return (*Image.open(io.BytesIO(data)).size, 2, 1)

    def decode(
        self,
        data: bytes,
        pixel_format: int = 1,
        scaling_factor: tuple[int, int] | None = None,
        flags: int = 0,
        dst: np.ndarray | None = None,
    ) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        if b"DAMAGE" in data:
            warnings.warn_explicit("Corrupt JPEG data", UserWarning, "turbojpeg.py", 1, module="turbojpeg")
        if scaling_factor is not None:
            assert scaling_factor[0] == 1
            image = image.reduce(scaling_factor[1])
        pixels = np.array(image.convert("RGB"))[..., :: -1 if pixel_format == 1 else 1]
        if dst is None:
            return np.ascontiguousarray(pixels)
        dst[...] = pixels
        return dst

    def encode(self, image: np.ndarray, quality: int, pixel_format: int, jpeg_subsample: int) -> bytes:
        assert (pixel_format, jpeg_subsample) == (0, 2)
        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG", quality=quality, subsampling="4:2:0")
        return out.getvalue()


@pytest.fixture(params=["turbojpeg", "simplejpeg", "torchvision"])
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each codec in turn; the others cannot be imported."""
    for name in {"turbojpeg", "simplejpeg"} - {request.param}:
        monkeypatch.setitem(sys.modules, name, None)
    if request.param == "turbojpeg":
        fake = types.ModuleType("turbojpeg")
        fake.TurboJPEG = FakeTurboJpeg  # type: ignore[attr-defined]
        fake.TJPF_RGB, fake.TJPF_BGR, fake.TJSAMP_420 = 0, 1, 2  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "turbojpeg", fake)
    else:
        pytest.importorskip(request.param)
    jpeg.backend.cache_clear()
    yield {"turbojpeg": "PyTurboJPEG"}.get(request.param, request.param)
    jpeg.backend.cache_clear()


def test_round_trip_keeps_colours_in_place(codec: str) -> None:
    assert jpeg.backend().name == codec
    image = gradient()
    back = jpeg.decode(jpeg.encode(image, 95))
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - image).mean() < 2
    assert jpeg.image_size(jpeg.encode(image)) == (48, 64)


def test_bgr_is_rgb_reversed(codec: str) -> None:
    data = jpeg.encode(gradient())
    assert np.array_equal(jpeg.decode(data, order="bgr"), jpeg.decode(data)[..., ::-1])


def test_decodes_as_pillow_does(codec: str) -> None:
    data = jpeg.encode(gradient(), 80)
    pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(jpeg.decode(data) - pillow).max() <= 2


@pytest.mark.parametrize("contiguous", [True, False])
def test_fills_a_given_array(codec: str, contiguous: bool) -> None:
    data = jpeg.encode(gradient())
    out = np.zeros((48, 64, 3), np.uint8) if contiguous else np.zeros((3, 48, 64), np.uint8).transpose(1, 2, 0)
    assert jpeg.decode(data, out=out) is out
    assert np.array_equal(out, jpeg.decode(data))


def test_refuses_an_array_of_another_size(codec: str) -> None:
    with pytest.raises(JpegError, match="48 x 64 px, not 32 x 64"):
        jpeg.decode(jpeg.encode(gradient()), out=np.zeros((32, 64, 3), np.uint8))


def of_claimed_size(side_px: int) -> bytes:
    """A small JPEG whose header says that it is large."""
    data = jpeg.encode(gradient())
    sides = data.index(b"\xff\xc0") + 5
    return data[:sides] + 2 * side_px.to_bytes(2, "big") + data[sides + 4 :]


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_header_of_another_size_is_refused_before_decoding(
    codec: str, contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = of_claimed_size(30_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # of the Pillow in the codec that stands in
    monkeypatch.setattr(jpeg.backend(), "decode", lambda *_: pytest.fail("decoded"))
    out = np.zeros((48, 64, 3), np.uint8)[:, :: 1 if contiguous else 2]
    with pytest.raises(JpegError, match="30000 x 30000 px, not 48 x"):
        jpeg.decode(data, out=out)
    assert jpeg.image_size(data) == (30_000, 30_000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[: len(d) // 2], "truncated"),
        (lambda d: b"", "not a JPEG: 0 bytes"),
        (lambda d: b"\x89PNG\r\n\x1a\n" + d, "not a JPEG"),
        (lambda d: d[:2] + b"\xff\xd9", "corrupt"),
        (lambda d: d[:2] + b"\xff\x00" + d[2:20] + b"\xff\xd9", "corrupt"),
    ],
)
def test_bad_data_is_a_jpeg_error(codec: str, damage: object, message: str) -> None:
    data = damage(jpeg.encode(gradient()))  # type: ignore[operator]
    with pytest.raises(JpegError, match=message):
        jpeg.decode(data)
    assert issubclass(JpegError, UserError)


@pytest.mark.parametrize("codec", ["turbojpeg"], indirect=True)
def test_warnings_of_turbojpeg_are_errors(codec: str) -> None:
    """libturbojpeg reports damaged data as a warning and gives a grey image."""
    data = jpeg.encode(gradient())
    with pytest.raises(JpegError, match="Corrupt JPEG data"):
        jpeg.decode(data[:2] + b"\xff\xfe\x00\x08DAMAGE" + data[2:])


@pytest.mark.parametrize("codec", ["simplejpeg"], indirect=True)
def test_damage_inside_is_an_error_not_a_grey_image(codec: str) -> None:
    rng = np.random.default_rng(0)
    data = jpeg.encode(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    middle = len(data) // 2
    with pytest.raises(JpegError):
        jpeg.decode(data[:middle] + b"\xff\xd4" * 40 + data[middle + 80 :])


def test_library_that_does_not_load_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    fake = types.ModuleType("turbojpeg")

    def missing() -> None:
        raise RuntimeError("Unable to locate turbojpeg library automatically.")

    fake.TurboJPEG = missing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "turbojpeg", fake)
    jpeg.backend.cache_clear()
    assert jpeg.backend().name == "simplejpeg"
    jpeg.backend.cache_clear()


def test_no_codec_at_all_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("turbojpeg", "simplejpeg", "torchvision.io"):
        monkeypatch.setitem(sys.modules, name, None)
    jpeg.backend.cache_clear()
    with pytest.raises(UserError, match="pip install simplejpeg"):
        jpeg.backend()
    jpeg.backend.cache_clear()


def test_encode_refuses_what_is_no_rgb_image() -> None:
    with pytest.raises(UserError, match=r"\(4, 4\) uint8"):
        jpeg.encode(np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match="quality 0"):
        jpeg.encode(gradient(), 0)


def test_imfrombytes_takes_arrays_and_gives_what_the_flags_say() -> None:
    data = jpeg.encode(gradient(), 95)
    colour = imfrombytes(np.frombuffer(data, np.uint8).tobytes())
    assert np.array_equal(imfrombytes(np.frombuffer(data, np.uint8)), colour)  # type: ignore[arg-type]
    assert np.array_equal(imfrombytes(data, channel_order="bgr"), colour[..., ::-1])
    assert np.allclose(imfrombytes(data, float32=True), colour / 255, atol=1e-6)
    grey = imfrombytes(data, flag="grayscale")
    assert np.array_equal(grey, imfrombytes(data, flag="grayscale", channel_order="bgr"))
    assert np.abs(grey - colour @ np.array([0.299, 0.587, 0.114])).max() <= 0.5
    with pytest.raises(UserError, match="grayscale"):
        imfrombytes(data, flag="unchanged")
