"""From the planes of 4:2:0 JPEGs to RGB, to the bit as libjpeg does it by default.

Chroma has half of the resolution and is interpolated by a triangle filter, 3/4 of the nearer sample and 1/4 of the
further one, first along columns and then along rows, in integers; samples after an edge repeat the edge. Then R =
Y + 1.402 Cr, G = Y - 0.34414 Cb - 0.71414 Cr, B = Y + 1.772 Cb (JFIF 1.02), in 16-bit fixed point.

On a GPU with Triton one kernel (``datasets.gpu_jpeg.planes_triton``) does it.

Shapes: P patches, S stored size in px, a multiple of two.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

HALF = 1 << 15
RED_CR, GREEN_CB, GREEN_CR, BLUE_CB = WEIGHTS = tuple(int(c * 2 * HALF + 0.5) for c in (1.402, 0.34414, 0.71414, 1.772))

AT_ONCE = 64
"""Patches converted at a time without the kernel: intermediate values take 16 bytes a pixel."""


class Kernel(Protocol):
    """Fills ``result`` (P, S, S, 3) uint8; ``weights`` are those above, in units of 1 / 65,536."""

    def __call__(
        self, planes: tuple[Tensor, Tensor, Tensor], result: Tensor, bgr: bool, weights: tuple[int, ...]
    ) -> Tensor: ...


def interleaved(luma: Tensor, blue: Tensor, red: Tensor, result: Tensor, bgr: bool) -> Tensor:
    """Fills ``result`` with the pixels of the planes.

    Args:
        luma: (P, S, S) uint8, Y.
        blue: (P, S/2, S/2) uint8, Cb.
        red: (P, S/2, S/2) uint8, Cr.
        result: (P, S, S, 3) uint8, contiguous, on the same device.
        bgr: the order of the last axis, blue first.
    """
    kernel = _fused_kernel() if luma.is_cuda else None
    if kernel is not None:
        return kernel((luma, blue, red), result, bgr, WEIGHTS)
    for begin in range(0, len(luma), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        result[part] = _pixels(luma[part], blue[part], red[part], bgr)
    return result


def _pixels(luma: Tensor, blue: Tensor, red: Tensor, bgr: bool) -> Tensor:
    y, cb, cr = luma.int(), _upsampled(blue) - 128, _upsampled(red) - 128
    r = y + ((RED_CR * cr + HALF) >> 16)
    g = y + ((HALF - GREEN_CB * cb - GREEN_CR * cr) >> 16)
    b = y + ((BLUE_CB * cb + HALF) >> 16)
    return torch.stack((b, g, r) if bgr else (r, g, b), -1).clamp_(0, 255).to(torch.uint8)


def _upsampled(chroma: Tensor) -> Tensor:
    """(P, S/2, S/2) uint8 -> (P, S, S) int32."""
    c = chroma.int()
    above, below = torch.cat([c[:, :1], c[:, :-1]], 1), torch.cat([c[:, 1:], c[:, -1:]], 1)
    rows = torch.stack([3 * c + above, 3 * c + below], 2).flatten(1, 2)  # (P, S, S/2), sums of four
    left = torch.cat([rows[..., :1], rows[..., :-1]], 2)
    right = torch.cat([rows[..., 1:], rows[..., -1:]], 2)
    return torch.stack([(3 * rows + left + 8) >> 4, (3 * rows + right + 7) >> 4], 3).flatten(2, 3)


@functools.lru_cache(maxsize=1)
def _fused_kernel() -> Kernel | None:
    """All of it as one kernel; None where Triton is not installed."""
    try:
        from datasets.gpu_jpeg.planes_triton import interleave
    except ImportError:
        return None
    return interleave
