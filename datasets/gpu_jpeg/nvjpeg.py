"""NVIDIA's JPEG decoder, the library that torchvision brings along, on a stream and into a buffer of our choice.

``torchvision.io.decode_jpeg`` would do, but it queues a thousand small kernels a batch on a stream of ordinary
priority, where each of them waits for the large kernels of the training step: measured beside a step, it took half a
second a batch. Nothing here runs before the first use on a machine with a GPU.
"""

from __future__ import annotations

import ctypes
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

INTERPOLATED = 32
"""Flag: chroma is interpolated, as libjpeg does."""

LIBRARY_FROM = (12, 1)
"""The version of the library that brought the flag."""


class NvJpegError(RuntimeError):
    """The library refused a batch, or there is no library."""


@dataclass(frozen=True)
class Images:
    """Where a batch goes.

    Attributes:
        addresses: for each channel of the form, (R,) addresses on the device.
        pitches: bytes of a row of each channel.
        form: NvJpeg.PLANES, RGB or BGR.
    """

    addresses: Sequence[np.ndarray]
    pitches: Sequence[int]
    form: int


class NvJpeg:
    """A decoder for one GPU; one thread at a time may use it.

    Attributes:
        PLANES: form of an image: Y, Cb and Cr in the resolution in which they are coded.
        RGB, BGR: forms with one channel, whose pixels have three bytes.
        ENGINES, ANY: backends: the GPU's JPEG engines, where it has some, and the library's choice.
        backend: the one in use.

    Raises:
        NvJpegError: without the library or without a GPU that it can use.
    """

    PLANES, RGB, BGR = 1, 5, 6
    ENGINES, ANY = 3, 0

    def __init__(self, device: torch.device) -> None:
        self.device, self._library = device, _library()
        self._batch = 0, 0  # images and form of the last one
        self._handle, self._state = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the library needs a context
            self.backend = self._create()
            self._call("nvjpegJpegStateCreate", self._handle, ctypes.byref(self._state))

    def _create(self) -> int:
        flags = INTERPOLATED if self._version() >= LIBRARY_FROM else 0
        for backend in (self.ENGINES, self.ANY):
            handle = ctypes.byref(self._handle)
            status = self._library.nvjpegCreateEx(backend, None, None, ctypes.c_uint(flags), handle)
            if status == 0:
                return backend
        raise NvJpegError(f"nvjpegCreateEx answers {status}")

    def _version(self) -> tuple[int, int]:
        parts = []
        for which in (0, 1):
            value = ctypes.c_int()
            self._call("nvjpegGetProperty", which, ctypes.byref(value))
            parts.append(value.value)
        return parts[0], parts[1]

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status != 0:
            raise NvJpegError(f"{name} answers {status}")

    def decode(self, addresses: np.ndarray, sizes: np.ndarray, images: Images) -> None:
        """Queues the decoding of a batch on the current stream; the JPEGs must stay until the stream has done it.

        Args:
            addresses: (R,) of the JPEGs in host memory.
            sizes: (R,) bytes of each.
            images: where they go, with room for what each JPEG's header says, which nobody checks here.

        Raises:
            NvJpegError: for a batch with a JPEG that the library cannot decode.
        """
        count = len(addresses)
        places = np.zeros((count, 8), np.uint64)  # four addresses and four pitches
        for channel, (begins, pitch) in enumerate(zip(images.addresses, images.pitches, strict=True)):
            places[:, channel], places[:, 4 + channel] = begins, pitch
        if self._batch != (count, images.form):
            call = "nvjpegDecodeBatchedInitialize"
            self._call(call, self._handle, self._state, count, 1, images.form)
            self._batch = count, images.form
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        arrays = [a.astype(np.uint64) for a in (addresses, sizes, places)]
        pointers = (ctypes.c_void_p(a.ctypes.data) for a in arrays)
        try:
            self._call("nvjpegDecodeBatched", self._handle, self._state, *pointers, stream)
        except NvJpegError:
            self._batch = 0, 0
            raise

    def __del__(self) -> None:
        if getattr(self, "_state", None):
            self._library.nvjpegJpegStateDestroy(self._state)
        if getattr(self, "_handle", None):
            self._library.nvjpegDestroy(self._handle)


def _library() -> ctypes.CDLL:
    """The copy of libnvjpeg that torchvision brings along, or the system's.

    Raises:
        NvJpegError: when neither is there.
    """
    import torchvision

    site = Path(os.path.dirname(torchvision.__file__)).parent
    beside = sorted(glob.glob(str(site / "torchvision.libs" / "libnvjpeg*.so*")))
    packaged = sorted(glob.glob(str(site / "nvidia" / "*" / "lib" / "libnvjpeg.so*")))
    for name in (*beside, *packaged, "libnvjpeg.so.13", "libnvjpeg.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NvJpegError("there is no libnvjpeg; torchvision's CUDA wheels bring it along")
