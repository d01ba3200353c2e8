# mypy: allow-untyped-defs, allow-incomplete-defs
"""The views of ``datasets.views`` as one Triton kernel: every output pixel gathers the few stored pixels that it needs.

The two matrix products run everywhere, but their matrices and intermediate images are ten times the memory traffic of
the patches themselves. Here a patch is read once and its view written once. ``datasets.views`` imports this file only
where Triton can run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from utils.triton_version import require_triton

require_triton()

BLOCK = 256
"""Output pixels of one program."""


@triton.jit
def _weight(tap, centre, reach, begin, end):
    """Weight of the stored pixels ``tap`` in the triangle around ``centre``, zero outside of the crop."""
    weight = tl.maximum(1 - tl.abs(tap + 0.5 - centre) / reach, 0.0)
    return tl.where((tap >= begin) & (tap < end), weight, 0.0)


@triton.jit
def _axis(target, begin, length, flip, out, TAPS: tl.constexpr):
    """Centre, reach, first tap and sum of weights of the output pixels ``target`` along one axis."""
    target = tl.where(flip > 0, out - 1 - target, target)
    scale = length / out
    reach = tl.maximum(scale, 1.0)
    centre = begin + (target + 0.5) * scale
    first = tl.ceil(centre - reach - 0.5)
    total = tl.zeros_like(centre)
    for k in tl.static_range(TAPS):
        total += _weight(first + k, centre, reach, begin, begin + length)
    return centre, reach, first, total


@triton.jit
def _view(
    patches, draws, result, draw_stride, stored, out, patch_stride, channel_stride, row_stride, column_stride,
    mean_0, mean_1, mean_2, factor_0, factor_1, factor_2, TAPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Writes ``PIXELS`` pixels of one view; rows of ``draws`` as in ``datasets.views``."""
    patch = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    there = pixel < out * out
    row, column = pixel // out, pixel % out
    draw = draws + patch * draw_stride
    top, left, height, width = tl.load(draw), tl.load(draw + 1), tl.load(draw + 2), tl.load(draw + 3)
    shift_x, shift_y = tl.load(draw + 6), tl.load(draw + 7)
    y, reach_y, first_y, total_y = _axis(row.to(tl.float32), top, height, tl.load(draw + 5), out, TAPS)
    x, reach_x, first_x, total_x = _axis(column.to(tl.float32), left, width, tl.load(draw + 4), out, TAPS)
    source = patches + patch * stored * stored * 3
    red = tl.zeros([PIXELS], tl.float32)
    green = tl.zeros([PIXELS], tl.float32)
    blue = tl.zeros([PIXELS], tl.float32)
    for j in tl.static_range(TAPS):
        weight_y = _weight(first_y + j, y, reach_y, top, top + height) / total_y
        from_y = (first_y + j - shift_y).to(tl.int32)
        for i in tl.static_range(TAPS):
            weight = weight_y * _weight(first_x + i, x, reach_x, left, left + width) / total_x
            from_x = (first_x + i - shift_x).to(tl.int32)
            covered = (from_y >= 0) & (from_y < stored) & (from_x >= 0) & (from_x < stored)
            at = source + (from_y * stored + from_x) * 3
            use = there & covered & (weight > 0)
            red += weight * tl.load(at, mask=use, other=0).to(tl.float32)
            green += weight * tl.load(at + 1, mask=use, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2, mask=use, other=0).to(tl.float32)
    to = result + patch * patch_stride + row * row_stride + column * column_stride
    kind = result.dtype.element_ty
    tl.store(to, ((red - mean_0) * factor_0).to(kind), mask=there)
    tl.store(to + channel_stride, ((green - mean_1) * factor_1).to(kind), mask=there)
    tl.store(to + 2 * channel_stride, ((blue - mean_2) * factor_2).to(kind), mask=there)


def render(
    patches: Tensor,
    draws: Tensor,
    result: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Tensor:
    """Fills ``result`` with the normalised views of ``patches``.

    Args:
        patches: (P, S, S, 3) uint8.
        draws: (P, 8) float32 on the same device, columns as in ``datasets.views``; or (1, 8) for all patches.
        result: (P, 3, C, C), float32 or a half precision, any strides.
        mean: per channel on the scale 0..1.
        std: per channel on the scale 0..1.
    """
    patches, stored, out = patches.contiguous(), patches.shape[1], result.shape[-1]
    taps = math.ceil(2 * max(1.0, stored / out))
    grid = (len(patches), triton.cdiv(out * out, BLOCK))
    step = draws.stride(0) if len(draws) > 1 else 0
    levels = *(255 * m for m in mean), *(1 / (255 * s) for s in std)
    with torch.cuda.device_of(patches):
        _view[grid](patches, draws, result, step, stored, out, *result.stride(), *levels, TAPS=taps, PIXELS=BLOCK)
    return result
