"""Patches that stay JPEGs until they are on the GPU: for machines with few CPU cores for each GPU.

A reading process hands on rows of bytes, and a thread of the training process lets the GPU decode them while the device
trains on the batch before. Chosen by ``--jpeg_decoder``.

Shapes: P patches, W bytes of the longest JPEG and 4 more, S stored size in px.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from datasets.ahead import in_thread
from datasets.bags import Bags
from datasets.instances import PixelSource, broken_patch
from datasets.jpeg import JpegError, decode, image_size
from datasets.nvjpeg import NvJpeg, NvJpegError

HEAD = 4
"""Bytes in front of a row that hold the length of its JPEG, little endian."""


def pack(jpegs: Sequence[bytes]) -> Tensor:
    """(P, W) uint8: each JPEG behind its length, zeros behind it."""
    rows = np.zeros((len(jpegs), HEAD + max(map(len, jpegs), default=0)), np.uint8)
    rows[:, :HEAD] = np.array([len(j) for j in jpegs], "<u4").view(np.uint8).reshape(-1, HEAD)
    for row, jpeg in zip(rows, jpegs, strict=True):
        row[HEAD : HEAD + len(jpeg)] = np.frombuffer(jpeg, np.uint8)
    return torch.from_numpy(rows)


def lengths(rows: Tensor) -> np.ndarray:
    """(P,) int64, the bytes of each JPEG."""
    return np.ascontiguousarray(rows[:, :HEAD].numpy()).view("<u4")[:, 0].astype(np.int64)


def is_coded(instances: Tensor) -> bool:
    """Whether these are rows of ``pack``: decoded patches have four dimensions, and features are no bytes."""
    return instances.dtype == torch.uint8 and instances.ndim == 2


@dataclass(frozen=True)
class CodedSource(PixelSource):
    """Patches of a store as they are stored, (n, W) uint8; refused here unless they are JPEGs of the store's size.

    Attributes:
        cpu_share: share of the batches, and of the parts of an evaluation, that reading processes decode all the same,
            because they have time.
    """

    coded: ClassVar[bool] = True
    cpu_share: float = 0.0

    def at(self, *place: int) -> PixelSource:
        """What is read from for the batch or part at ``place``; always the same, so that a restart repeats it."""
        by_cpu = np.random.default_rng(place).random() < self.cpu_share
        return PixelSource(self.store, self.order, self.grid) if by_cpu else self

    def room(self, count: int) -> None:
        """Nothing is decoded here."""

    def load(self, slide: str, picks: np.ndarray, out: Tensor | None = None) -> Tensor:
        jpegs = self.store.read(slide, picks.tolist())
        wanted = (self.store.image_size_px, self.store.image_size_px)
        for pick, jpeg in zip(picks, jpegs, strict=True):
            try:
                size = image_size(jpeg)  # the GPU's decoder writes as much as the JPEG says
            except JpegError as error:
                raise broken_patch(self.store, slide, pick, error) from error
            if size != wanted:
                raise broken_patch(self.store, slide, pick, f"it holds {size[0]} x {size[1]} px")
        return pack(jpegs)


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
        self.codec = NvJpeg(device, bgr=order == "bgr")
        self.stream = torch.cuda.Stream(device, priority=-1)  # its small kernels go between the large ones of the step

    def __call__(self, rows: Tensor) -> Tensor:
        """(P, W) coded patches -> (P, S, S, 3) uint8 on the device, complete on return."""
        begins, sizes = np.full(len(rows), HEAD), lengths(rows)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            patches = torch.empty((len(rows), self.side_px, self.side_px, 3), dtype=torch.uint8, device=self.device)
            try:
                self.codec.decode(rows, begins, sizes, patches)
            except NvJpegError:
                patches.copy_(decode_rows(rows, self.side_px, self.order))
            self.stream.synchronize()
        return patches


def decode_rows(rows: Tensor, side_px: int, order: str) -> Tensor:
    """The same on the CPU: (P, S, S, 3) uint8.

    Raises:
        JpegError: for a patch that nobody can decode.
    """
    patches = np.empty((len(rows), side_px, side_px, 3), np.uint8)
    for row, size, patch in zip(rows.numpy(), lengths(rows), patches, strict=True):
        try:
            decode(row[HEAD : HEAD + size].tobytes(), order=order, out=patch)
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
