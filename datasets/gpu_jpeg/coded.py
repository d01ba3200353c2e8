"""Patches that stay JPEGs until they are on the GPU, whose engines decode as much as dozens of CPU cores.

A reading process hands on rows of bytes (``stacks``), and a thread of the training process lets the GPU decode them
while the device trains on the batch before. Chosen by ``--jpeg_decoder``.

Shapes: R rows, W bytes of the longest row, P patches of all rows, S stored size in px.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from datasets.ahead import in_thread
from datasets.bags import Bags
from datasets.gpu_jpeg.nvjpeg import Images, NvJpeg, NvJpegError
from datasets.gpu_jpeg.planes import interleaved
from datasets.gpu_jpeg.stacks import HEAD, TALLEST_PX, heads, jpegs_of, pack
from datasets.jpeg import JpegError, decode, encode

log = logging.getLogger(__name__)

MOST_APART = 8
"""Grey levels from which on a decoder is wrong, not another one: on tissue they differ by one at most."""


def is_coded(instances: Tensor) -> bool:
    """Whether these are packed rows: decoded patches have four dimensions, and features are no bytes."""
    return instances.dtype == torch.uint8 and instances.ndim == 2


class GpuDecoder:
    """Decodes batches on one GPU, and what the GPU refuses on the CPU.

    Args:
        device: the GPU.
        side_px: size of the stored patches.
        order: rgb or bgr.

    Raises:
        NvJpegError: when the GPU or the libraries cannot do it.
    """

    def __init__(self, device: torch.device, side_px: int, order: str) -> None:
        self.device, self.side_px, self.order = device, side_px, order
        self.codec = NvJpeg(device)
        self.stream = torch.cuda.Stream(device, priority=-1)  # its small kernels go between the large ones of the step
        self._refused = False
        self._try_out()

    @property
    def engines(self) -> bool:
        """Whether the GPU has engines for JPEGs, beside its multiprocessors."""
        return self.codec.backend == NvJpeg.ENGINES

    def __call__(self, rows: Tensor) -> Tensor:
        """(R, W) packed patches -> (P, S, S, 3) uint8 on the device, complete on return."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            try:
                patches = self._decode(rows)
            except NvJpegError as error:
                self._say_refused(error)
                patches = decode_rows(rows, self.side_px, self.order).to(self.device)
            self.stream.synchronize()
        return patches

    def _try_out(self) -> None:
        """Not every GPU need take stacks as tall as those that this was written on.

        Raises:
            NvJpegError: when the tallest stack does not decode to what the CPU makes of its patches.
        """
        ramp = np.linspace(0, 255, self.side_px)
        picture = np.stack(np.broadcast_arrays(ramp, ramp[:, None], ramp[::-1]), -1)
        jpeg = encode(picture.astype(np.uint8))
        rows = pack([jpeg] * max(TALLEST_PX // self.side_px, 1))
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            got = self._decode(rows).cpu()
        want = torch.from_numpy(decode(jpeg, order=self.order))
        if int((got.int() - want.int()).abs().max()) > MOST_APART:
            raise NvJpegError("this GPU decodes stacks of JPEGs to other pixels than the CPU")

    def _say_refused(self, error: NvJpegError) -> None:
        if not self._refused:
            log.warning("The GPU refused a batch of JPEGs (%s); one CPU core decodes such batches, slowly.", error)
        self._refused = True

    def _decode(self, rows: Tensor) -> Tensor:
        head = heads(rows)
        stacked = head["stacked"] > 0
        if stacked.all():
            return self._stacks(rows, head)
        if not stacked.any():
            return self._singles(rows, head)
        patches = self._room(int(head["patches"].sum()))
        for which, decode_those in ((stacked, self._stacks), (~stacked, self._singles)):
            places, chosen = torch.from_numpy(np.repeat(which, head["patches"])), rows[torch.from_numpy(which)]
            patches[places.to(self.device)] = decode_those(chosen, head[which])
            self.stream.synchronize()  # the engines read ``chosen`` until then
        return patches

    def _stacks(self, rows: Tensor, head: np.ndarray) -> Tensor:
        """Rows that are stacks, as planes and from there to RGB."""
        count, side, half = int(head["patches"].sum()), self.side_px, self.side_px // 2
        begins = np.cumsum(head["patches"]) - head["patches"]
        sizes = (side, half, half)
        planes = [torch.empty((count, s, s), dtype=torch.uint8, device=self.device) for s in sizes]
        addresses = [plane.data_ptr() + begins * (s * s) for plane, s in zip(planes, sizes, strict=True)]
        self.codec.decode(*_jpegs(rows, head), Images(addresses, sizes, NvJpeg.PLANES))
        luma, blue, red = planes
        return interleaved(luma, blue, red, self._room(count), self.order == "bgr")

    def _singles(self, rows: Tensor, head: np.ndarray) -> Tensor:
        """Rows of one patch each that are no stacks: a small kernel for each, and several times slower."""
        patches = self._room(len(rows))
        addresses = patches.data_ptr() + np.arange(len(rows)) * (3 * self.side_px**2)
        form = NvJpeg.BGR if self.order == "bgr" else NvJpeg.RGB
        self.codec.decode(*_jpegs(rows, head), Images([addresses], (3 * self.side_px,), form))
        return patches

    def _room(self, count: int) -> Tensor:
        return torch.empty((count, self.side_px, self.side_px, 3), dtype=torch.uint8, device=self.device)


def _jpegs(rows: Tensor, head: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Address and bytes of the JPEG in each row."""
    return rows.data_ptr() + np.arange(len(rows)) * rows.stride(0) + HEAD.itemsize, head["bytes"]


def decode_rows(rows: Tensor, side_px: int, order: str) -> Tensor:
    """The same on the CPU: (P, S, S, 3) uint8.

    Raises:
        JpegError: for a patch that nobody can decode.
    """
    patches = np.empty((int(heads(rows)["patches"].sum()), side_px, side_px, 3), np.uint8)
    for jpeg, patch in zip(jpegs_of(rows), patches, strict=True):
        try:
            decode(jpeg, order=order, out=patch)
        except JpegError as error:
            raise JpegError(f"{error}. 'python -m datasets.store verify' names the patch.") from error
    return torch.from_numpy(patches)


def decoded(batches: Iterable[Bags], decoder: Callable[[Tensor], Tensor] | None, ahead: int = 2) -> Iterator[Bags]:
    """The batches with coded patches decoded, ``ahead`` of them in advance by a thread.

    Without a decoder there are none, and the batches are passed on.
    """
    if decoder is None:
        yield from batches
        return
    for bags in in_thread((_decoded(bags, decoder) for bags in batches), ahead):
        if bags.instances.is_cuda:  # it was made on another stream
            bags.instances.record_stream(torch.cuda.current_stream(bags.instances.device))
        yield bags


def _decoded(bags: Bags, decoder: Callable[[Tensor], Tensor]) -> Bags:
    return dataclasses.replace(bags, instances=decoder(bags.instances)) if is_coded(bags.instances) else bags
