"""Many JPEGs of one form as a single tall one: patches stacked for a GPU's JPEG engines.

What an engine does for an image besides decoding takes longer than decoding 256 x 256 px. The entropy-coded data of
baseline JPEGs that agree in size, quantisation, Huffman tables and sampling can be joined without being decoded: with a
restart marker after each patch (ITU-T T.81, B.1.3 and E.1.4) they are one JPEG, as tall as all of them, in which the
DC prediction begins anew at every patch. Each patch has the pixels that it had alone, but for the chroma at its upper
and lower edge, which a decoder would interpolate across; so planes are taken from a stack, and never RGB
(``datasets.gpu_jpeg.planes``).

A batch travels as rows of bytes, (R, W) uint8: R images, stacks or single JPEGs, each after a ``HEAD``.

Shapes: R rows, W bytes of the longest row, P patches of all rows, S stored size in px.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HEAD = np.dtype([("bytes", "<u4"), ("patches", "<u4"), ("stacked", "<u4")])
"""In front of each row: the length of its JPEG, its patches, and whether it is a stack (of one patch, perhaps)."""

TALLEST_PX = 16384
"""Height that the JPEG engines of data-centre GPUs take."""

MCU_PX = 16
"""Side of the smallest coded unit where chroma has half of the resolution."""

_SCAN, _RESTARTS, _BASELINE, _ADOBE = 0xDA, 0xDD, 0xC0, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers: start of scan, restart interval, frames."""

_YCBCR_420 = bytes((1, 0x22, 2, 0x11, 3, 0x11))
"""Component numbers and sampling factors."""

_MARKER = re.compile(rb"\xff[^\x00]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_END = b"\xff\xd9"


@dataclass(frozen=True)
class StackForm:
    """What JPEGs of one stack have in common.

    Attributes:
        head: everything in front of the entropy-coded data.
        frame: where its frame segment begins, which holds the height.
        scan: where its scan segment begins.
        height_px: of one patch.
        width_px: of one patch.
    """

    head: bytes
    frame: int
    scan: int
    height_px: int
    width_px: int

    @classmethod
    def of(cls, jpeg: bytes) -> StackForm | None:
        """The form of ``jpeg``; None unless it is a baseline YCbCr 4:2:0 image of whole MCUs without restarts."""
        frame = None
        for marker, at, end in _segments(jpeg):
            if marker == _SCAN:
                if frame is None or jpeg[at + 4] != 3:
                    return None
                return cls(jpeg[:end], frame, at, *_size(jpeg, frame))
            if marker == _BASELINE and frame is None and _stackable_frame(jpeg[at:end]):
                frame = at
            elif marker in _FRAMES or marker == _RESTARTS or (marker == _ADOBE and jpeg[at + 15 : at + 16] != b"\x01"):
                return None
        return None

    def has(self, jpeg: bytes) -> bool:
        """Whether ``jpeg`` is of this form, and its data hold no marker that would begin another patch."""
        body = memoryview(jpeg)[len(self.head) : -2]
        return jpeg.startswith(self.head) and jpeg.endswith(_END) and _MARKER.search(body) is None

    def stacked(self, jpegs: Sequence[bytes]) -> bytes:
        """One JPEG of ``jpegs``, which are of this form."""
        begin, height = self.frame + 5, len(jpegs) * self.height_px
        mcus = self.height_px // MCU_PX * (self.width_px // MCU_PX)
        pieces = [self.head[:begin], height.to_bytes(2, "big"), self.head[begin + 2 : self.scan]]
        pieces += [b"\xff\xdd\x00\x04", mcus.to_bytes(2, "big"), self.head[self.scan :]]
        for i, jpeg in enumerate(jpegs):
            pieces += [bytes((0xFF, 0xD0 + (i - 1) % 8))] if i else []
            pieces.append(jpeg[len(self.head) : -2])
        return b"".join((*pieces, _END))

    @property
    def most(self) -> int:
        """Patches of the tallest stack."""
        return max(TALLEST_PX // self.height_px, 1)


def unstacked(stack: bytes) -> list[bytes]:
    """The JPEGs of which ``StackForm.stacked`` made ``stack``."""
    places = {marker: (begin, end) for marker, begin, end in _segments(stack)}
    (frame, _), (restarts, behind), (_, data) = (places[marker] for marker in (_BASELINE, _RESTARTS, _SCAN))
    bodies = _RESTART.split(stack[data:-2])
    height = _size(stack, frame)[0] // len(bodies)
    head = stack[: frame + 5] + height.to_bytes(2, "big") + stack[frame + 7 : restarts] + stack[behind:data]
    return [head + body + _END for body in bodies]


def pack(jpegs: Sequence[bytes]) -> Tensor:
    """(R, W) uint8: ``jpegs`` in order, neighbours of one form stacked."""
    runs = list(_runs(jpegs))
    images = [run[0] if form is None else form.stacked(run) for form, run in runs]
    rows = np.zeros((len(runs), HEAD.itemsize + max(map(len, images), default=0)), np.uint8)
    for row, image, (form, run) in zip(rows, images, runs, strict=True):
        row[: HEAD.itemsize].view(HEAD)[0] = (len(image), len(run), form is not None)
        row[HEAD.itemsize : HEAD.itemsize + len(image)] = np.frombuffer(image, np.uint8)
    return torch.from_numpy(rows)


def heads(rows: Tensor) -> np.ndarray:
    """(R,) of type ``HEAD``."""
    return np.ascontiguousarray(rows[:, : HEAD.itemsize].numpy()).view(HEAD)[:, 0]


def jpegs_of(rows: Tensor) -> Iterator[bytes]:
    """The P JPEGs that were packed."""
    for row, head in zip(rows.numpy(), heads(rows), strict=True):
        image = row[HEAD.itemsize : HEAD.itemsize + head["bytes"]].tobytes()
        yield from unstacked(image) if head["stacked"] else (image,)


def _runs(jpegs: Sequence[bytes]) -> Iterator[tuple[StackForm | None, list[bytes]]]:
    """Neighbours of one form, as many as a stack takes; JPEGs that cannot be stacked one by one, without a form."""
    form: StackForm | None = None
    run: list[bytes] = []
    for jpeg in jpegs:
        if form is not None and len(run) < form.most and form.has(jpeg):
            run.append(jpeg)
            continue
        if run:
            yield form, run
        form = form if form is not None and jpeg.startswith(form.head) else StackForm.of(jpeg)
        form, run = (form, [jpeg]) if form is not None and form.has(jpeg) else (None, [jpeg])
    if run:
        yield form, run


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of each segment up to the first scan; ends early where ``jpeg`` is damaged."""
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if end > len(jpeg) or end < at + 4:
            return
        yield jpeg[at + 1], at, end
        if jpeg[at + 1] == _SCAN:
            return
        at = end


def _stackable_frame(frame: bytes) -> bool:
    """Whether a frame segment is that of 8-bit YCbCr 4:2:0 of whole MCUs."""
    if len(frame) != 19 or frame[4] != 8 or frame[9] != 3:
        return False
    height, width = _size(frame, 0)
    whole = 0 < height <= TALLEST_PX and width > 0 and height % MCU_PX == 0 and width % MCU_PX == 0
    fits = height // MCU_PX * (width // MCU_PX) < 1 << 16  # the restart interval has two bytes
    return whole and fits and bytes(frame[i] for i in (10, 11, 13, 14, 16, 17)) == _YCBCR_420


def _size(jpeg: bytes, frame: int) -> tuple[int, int]:
    return int.from_bytes(jpeg[frame + 5 : frame + 7], "big"), int.from_bytes(jpeg[frame + 7 : frame + 9], "big")
