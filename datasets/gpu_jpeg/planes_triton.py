# mypy: allow-untyped-defs, allow-incomplete-defs
"""``datasets.gpu_jpeg.planes`` as one Triton kernel. Imported there only where Triton can run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from utils.triton_version import require_triton

require_triton()

BLOCK = 1024
"""Pixels of one program."""


@triton.jit
def _chroma(plane, row, column, half, there):
    """The interpolated sample at pixel (row, column), around zero; ``half`` is S/2."""
    near_y, near_x = row // 2, column // 2
    far_y = tl.minimum(tl.maximum(near_y + 2 * (row % 2) - 1, 0), half - 1)
    far_x = tl.minimum(tl.maximum(near_x + 2 * (column % 2) - 1, 0), half - 1)
    near = 3 * tl.load(plane + near_y * half + near_x, mask=there, other=0).to(tl.int32)
    near += tl.load(plane + far_y * half + near_x, mask=there, other=0).to(tl.int32)
    far = 3 * tl.load(plane + near_y * half + far_x, mask=there, other=0).to(tl.int32)
    far += tl.load(plane + far_y * half + far_x, mask=there, other=0).to(tl.int32)
    return ((3 * near + far + 8 - column % 2) >> 4) - 128


@triton.jit
def _interleave(
    luma, blue, red, result, side, RED: tl.constexpr, GREEN_B: tl.constexpr, GREEN_R: tl.constexpr,
    BLUE: tl.constexpr, BGR: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Writes ``PIXELS`` pixels of one patch."""
    patch = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    there, half = pixel < side * side, side // 2
    row, column = pixel // side, pixel % side
    y = tl.load(luma + patch * side * side + pixel, mask=there, other=0).to(tl.int32)
    cb = _chroma(blue + patch * half * half, row, column, half, there)
    cr = _chroma(red + patch * half * half, row, column, half, there)
    r = y + ((RED * cr + 32768) >> 16)
    g = y + ((32768 - GREEN_B * cb - GREEN_R * cr) >> 16)
    b = y + ((BLUE * cb + 32768) >> 16)
    to = result + (patch * side * side + pixel) * 3
    tl.store(to + (2 if BGR else 0), tl.minimum(tl.maximum(r, 0), 255).to(tl.uint8), mask=there)
    tl.store(to + 1, tl.minimum(tl.maximum(g, 0), 255).to(tl.uint8), mask=there)
    tl.store(to + (0 if BGR else 2), tl.minimum(tl.maximum(b, 0), 255).to(tl.uint8), mask=there)


def interleave(planes: tuple[Tensor, Tensor, Tensor], result: Tensor, bgr: bool, weights: tuple[int, ...]) -> Tensor:
    """As ``datasets.gpu_jpeg.planes.interleaved``; planes and result contiguous; weights of Cr, Cb, Cr and Cb."""
    count, side = planes[0].shape[:2]
    with torch.cuda.device_of(result):
        _interleave[(count, triton.cdiv(side * side, BLOCK))](*planes, result, side, *weights, BGR=bgr, PIXELS=BLOCK)
    return result
