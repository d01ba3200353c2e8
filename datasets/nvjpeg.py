"""NVIDIA's JPEG decoder, the library that torchvision brings along, on a stream and into a buffer of our choice.

``torchvision.io.decode_jpeg`` would do, but it queues a thousand small kernels a batch on a stream of ordinary
priority, where each of them waits for the large kernels of the training step: measured beside a step, it took half a
second a batch. Nothing here runs before the first use on a machine with a GPU.
"""

from __future__ import annotations

import ctypes
import glob
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BACKENDS = (3, 0)
"""The decoding engines beside the multiprocessors, where the GPU has some; else the library's choice."""

INTERPOLATED = 32
"""Flag: chroma is interpolated, as libjpeg does."""

RGB, BGR = 5, 6
"""Output formats, interleaved."""

LIBRARY_FROM = (12, 1)
"""The version of the library that brought the flag."""


class NvJpegError(RuntimeError):
    """The library refused a batch, or there is no library."""


class NvJpeg:
    """A decoder for one GPU; one thread at a time may use it.

    Raises:
        NvJpegError: without the library or without a GPU that it can use.
    """

    def __init__(self, device: torch.device, bgr: bool = False) -> None:
        self.device, self.format = device, BGR if bgr else RGB
        self._library, self._batch = _library(), 0
        self._handle, self._state = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the library needs a context
            self.backend = self._create()
            self._call("nvjpegJpegStateCreate", self._handle, ctypes.byref(self._state))

    def _create(self) -> int:
        flags = INTERPOLATED if self._version() >= LIBRARY_FROM else 0
        for backend in BACKENDS:
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

    def decode(self, data: Tensor, begins: np.ndarray, lengths: np.ndarray, out: Tensor) -> None:
        """Queues the decoding of a batch on the current stream; ``data`` must stay until the stream has done it.

        Args:
            data: (P, W) uint8 in host memory, one JPEG a row.
            begins: (P,) first byte of each JPEG in its row.
            lengths: (P,) bytes of each JPEG.
            out: (P, S, S, 3) uint8 on the device; every JPEG must be S x S px, which nobody checks here.

        Raises:
            NvJpegError: for a batch with a JPEG that the library cannot decode.
        """
        count, side = out.shape[:2]
        sources = (data.data_ptr() + np.arange(count) * data.stride(0) + begins).astype(np.uint64)
        images = np.zeros((count, 8), np.uint64)  # four pointers and four pitches
        images[:, 0] = out.data_ptr() + np.arange(count, dtype=np.uint64) * (side * side * 3)
        images[:, 4] = side * 3
        sizes = lengths.astype(np.uint64)
        if count != self._batch:
            self._call("nvjpegDecodeBatchedInitialize", self._handle, self._state, count, 1, self.format)
            self._batch = count
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        arrays = (ctypes.c_void_p(a.ctypes.data) for a in (sources, sizes, images))
        try:
            self._call("nvjpegDecodeBatched", self._handle, self._state, *arrays, stream)
        except NvJpegError:
            self._batch = 0
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
