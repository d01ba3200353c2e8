"""One JPEG codec behind one small interface, chosen once per process and logged.

Order of choice: PyTurboJPEG if its native library loads, simplejpeg (which carries its own library), and
torchvision as the last resort, so that training runs where neither is installed. All three are libjpeg-turbo
or libjpeg underneath and use its accurate DCT, so a choice changes the speed and at most the last bit of a
pixel.
"""

from __future__ import annotations

import functools
import logging
import struct
import warnings
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError

log = logging.getLogger(__name__)

ORDERS = ("rgb", "bgr")
FRAME_MARKERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
BARE_MARKERS = {0x01, *range(0xD0, 0xD8)}
Image = NDArray[np.uint8]


class JpegError(UserError):
    """Data that is not a JPEG, is truncated, or is corrupt."""


class Backend(Protocol):
    """What a codec has to offer; ``data`` are checked before."""

    name: str

    def size(self, data: bytes) -> tuple[int, int]: ...

    def decode(self, data: bytes, bgr: bool) -> Image: ...

    def decode_into(self, data: bytes, bgr: bool, out: Image) -> None: ...

    def encode(self, image: Image, quality: int) -> bytes: ...


class TurboJpeg:
    """PyTurboJPEG over the system's libturbojpeg."""

    name = "PyTurboJPEG"

    def __init__(self) -> None:
        import turbojpeg

        self.module = turbojpeg
        self.codec = turbojpeg.TurboJPEG()
        # The library reports corrupt data as a Python warning and returns a grey image.
        warnings.filterwarnings("error", module="turbojpeg")

    def _format(self, bgr: bool) -> int:
        return int(self.module.TJPF_BGR if bgr else self.module.TJPF_RGB)

    def size(self, data: bytes) -> tuple[int, int]:
        width, height = self.codec.decode_header(data)[:2]
        return int(height), int(width)

    def decode(self, data: bytes, bgr: bool) -> Image:
        image: Image = self.codec.decode(data, pixel_format=self._format(bgr))
        return image

    def decode_into(self, data: bytes, bgr: bool, out: Image) -> None:
        self.codec.decode(data, pixel_format=self._format(bgr), dst=out)

    def encode(self, image: Image, quality: int) -> bytes:
        kinds = {"pixel_format": self.module.TJPF_RGB, "jpeg_subsample": self.module.TJSAMP_420}
        return bytes(self.codec.encode(image, quality=quality, **kinds))


class SimpleJpeg:
    """simplejpeg, whose wheels carry libjpeg-turbo."""

    name = "simplejpeg"

    def __init__(self) -> None:
        import simplejpeg

        self.module = simplejpeg

    def size(self, data: bytes) -> tuple[int, int]:
        height, width = self.module.decode_jpeg_header(data)[:2]
        return int(height), int(width)

    def decode(self, data: bytes, bgr: bool) -> Image:
        image: Image = self.module.decode_jpeg(data, "BGR" if bgr else "RGB", fastdct=False, fastupsample=False)
        return image

    def decode_into(self, data: bytes, bgr: bool, out: Image) -> None:
        self.module.decode_jpeg(data, "BGR" if bgr else "RGB", fastdct=False, fastupsample=False, buffer=out)

    def encode(self, image: Image, quality: int) -> bytes:
        return bytes(self.module.encode_jpeg(image, quality, "RGB", "420", fastdct=False))


class TorchvisionJpeg:
    """torchvision's decoder and encoder."""

    name = "torchvision"

    def __init__(self) -> None:
        import torch
        import torchvision.io as io

        self.torch, self.io = torch, io

    def _decode(self, data: bytes) -> Image:
        tensor = self.torch.frombuffer(bytearray(data), dtype=self.torch.uint8)
        image: Image = self.io.decode_jpeg(tensor, mode=self.io.ImageReadMode.RGB).permute(1, 2, 0).numpy()
        return image

    def size(self, data: bytes) -> tuple[int, int]:
        return _size_in_header(data)

    def decode(self, data: bytes, bgr: bool) -> Image:
        image = self._decode(data)
        return np.ascontiguousarray(image[..., ::-1] if bgr else image)

    def decode_into(self, data: bytes, bgr: bool, out: Image) -> None:
        out[...] = self.decode(data, bgr)

    def encode(self, image: Image, quality: int) -> bytes:
        tensor = self.torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return bytes(self.io.encode_jpeg(tensor, quality=quality).numpy().tobytes())


def _size_in_header(data: bytes) -> tuple[int, int]:
    """(height, width) from the frame header; the markers before it say how long they are."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in FRAME_MARKERS:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return height, width
        if marker in (0x00, 0xD8, 0xD9):
            break
        if marker == 0xFF:  # filling
            place += 1
        elif marker in BARE_MARKERS:
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise ValueError("no frame header")


@functools.lru_cache(maxsize=1)
def backend() -> Backend:
    """The codec of this process: the first that loads; logged, with the reasons of those that did not."""
    reasons = []
    kinds: tuple[type[Any], ...] = (TurboJpeg, SimpleJpeg, TorchvisionJpeg)
    for kind in kinds:
        try:
            chosen: Backend = kind()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
            reasons.append(f"{kind.name}: {reason}")
            continue
        log.info("JPEG codec: %s%s", chosen.name, f" (not {'; not '.join(reasons)})" if reasons else "")
        return chosen
    raise UserError(
        f"No JPEG codec loads ({'; '.join(reasons)}). Install one that needs no system library: pip install simplejpeg."
    )


def _check(data: bytes) -> None:
    """Refuses what is not a whole JPEG: cheap, and the same with every codec."""
    if len(data) < 4 or data[:2] != b"\xff\xd8":
        raise JpegError(f"not a JPEG: {len(data)} bytes starting with {bytes(data[:4]).hex(' ') or 'nothing'}")
    if b"\xff\xd9" not in data[-64:]:
        raise JpegError(f"truncated JPEG: {len(data)} bytes without an end-of-image marker")


def decode(data: bytes, order: str = "rgb", out: Image | None = None) -> Image:
    """Decodes one JPEG.

    Args:
        data: the file's bytes.
        order: ``rgb`` or ``bgr``, the order of the last axis.
        out: (H, W, 3) uint8 array to fill instead of allocating one; any strides. Its shape must be the
            image's.

    Returns:
        (H, W, 3) uint8, C-contiguous unless it is ``out``.

    Raises:
        JpegError: the data is not a JPEG, truncated or corrupt, or has another size than ``out`` (it is not decoded
            then: a few bytes can say that they are a gigapixel).
    """
    if order not in ORDERS:
        raise UserError(f"channel order {order!r} is not one of {', '.join(ORDERS)}.")
    _check(data)
    codec = backend()
    try:
        if out is not None:
            height, width = codec.size(data)
            if out.shape != (height, width, 3):
                raise JpegError(f"the JPEG holds {height} x {width} px, not {out.shape[0]} x {out.shape[1]}")
            if out.flags.c_contiguous:
                codec.decode_into(data, order == "bgr", out)
                return out
        image = codec.decode(data, order == "bgr")
    except (ValueError, OSError, RuntimeError, Warning) as error:
        raise JpegError(f"corrupt JPEG of {len(data)} bytes: {error}") from error
    if out is None:
        return image
    out[...] = image
    return out


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in px from the JPEG header; raises JpegError."""
    _check(data)
    try:
        return backend().size(data)
    except (ValueError, OSError, RuntimeError, Warning) as error:
        raise JpegError(f"corrupt JPEG header: {error}") from error


def encode(image: Image, quality: int = 80) -> bytes:
    """Encodes an RGB image (H, W, 3) uint8 as a baseline JPEG with 4:2:0 chroma, Pillow's default."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise UserError(f"encode takes a non-empty (H, W, 3) uint8 array, not {image.shape} {image.dtype}.")
    if not 1 <= quality <= 100:
        raise UserError(f"JPEG quality {quality} is not in 1..100.")
    return backend().encode(np.ascontiguousarray(image), int(quality))
