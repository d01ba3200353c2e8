"""Calls of the kernels of a ResNet's stem (``stem_kernels``): tiles, sizes, what goes in and what comes out.

Shapes: P patches of H x W px, z (P, C, A, B) with A = ceil(H / 2), y (P, C, ceil(A / 2), ceil(B / 2)); all
channels-last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from modules import stem_kernels as kernels

LINE, LINES = 32, 8
"""Numbers of a kernel row and rows of the kernel, as the matrix units take them."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work.

    Attributes:
        rows, repeat: pixels (fours of pixels, columns) of a tile, and tiles of a program.
        warps, stages: warps of a program and loads in flight.
        lines: rows of the convolution's kernel that are taken in one step: 1, 2, 4 or 8.
    """

    rows: int
    repeat: int
    warps: int = 4
    stages: int = 3
    lines: int = 1

    def options(self) -> dict[str, int]:
        return {"ROWS": self.rows, "REPEAT": self.repeat, "num_warps": self.warps, "num_stages": self.stages}


TILES = {
    "convolve": Tiles(128, 7),
    "pool": Tiles(8, 14, warps=2),
    "reduce": Tiles(16, 49, warps=8),
    "weights": Tiles(16, 196, warps=8, stages=1),
}
"""Fastest tiles of every kernel, measured on an H100."""


Maps = tuple[Tensor, Tensor, Tensor]
"""The gradient of y, the places of the maxima, and z."""

Sums = tuple[Tensor, Tensor]
"""Sums over all pixels, or means: of the gradient d after ReLU, and of d x^."""


@dataclass(frozen=True)
class Norm:
    """BatchNorm of one batch: mean and biased variance, and its parameters, all (C,) float32."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def pooled_like(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for y, or for the places of its maxima."""
    count, channels, height, width = z.shape
    shape = count, channels, (height + 1) // 2, (width + 1) // 2
    return torch.empty(shape, dtype=dtype, device=z.device, memory_format=torch.channels_last)


def convolved_like(x: Tensor, w: Tensor) -> Tensor:
    """Memory for z."""
    shape = x.shape[0], w.shape[0], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _programs(z: Tensor, size: int, tiles: Tiles) -> int:
    return z.shape[0] * triton.cdiv(size, tiles.rows * tiles.repeat)


def _fours(z: Tensor) -> int:
    return ((z.shape[2] + 1) // 2) * ((z.shape[3] + 1) // 2)


def _run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Starts so many programs where the first argument lies; none for no patches."""
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **options)


def packed(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights (C, 3, 7, 7) as the matrix (8 * 32, C) that the kernels take; its rows: kernel row, column, colour."""
    lines = w.to(dtype).permute(2, 3, 1, 0).reshape(7, 21, len(w))
    return torch.nn.functional.pad(lines, (0, 0, 1, LINE - 22, 0, LINES - 7)).reshape(LINES * LINE, len(w))


def unpacked(matrix: Tensor) -> Tensor:
    """(C, 8 * 32) as a kernel (C, 3, 7, 7)."""
    lines = matrix.view(len(matrix), LINES, LINE)[:, :7, 1:22]
    return lines.reshape(len(matrix), 7, 7, 3).permute(0, 3, 1, 2).contiguous()


def convolve(x: Tensor, w: Tensor, tiles: Tiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """z, and mean and sum of squared deviations of every program's pixels, (programs, C) each."""
    tiles = tiles or TILES["convolve"]
    z = convolved_like(x, w)
    programs, channels = _programs(z, z.shape[2] * z.shape[3], tiles), z.shape[1]
    means, squares = x.new_empty((2, programs, channels), dtype=torch.float32)
    _run(
        kernels.convolve,
        programs,
        (x, packed(w, x.dtype), z, means, squares, *x.shape[2:], channels),
        tiles.options() | {"LINES": tiles.lines, "PRECISION": _precision(x)},
    )
    return z, means, squares


def merge(means: Tensor, squares: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of z from those of its parts (Chan, Golub, LeVeque, 1983)."""
    size, part = z.shape[2] * z.shape[3], TILES["convolve"].rows * TILES["convolve"].repeat
    strips = triton.cdiv(size, part)
    counts = (size - part * torch.arange(strips, device=z.device)).clamp(max=part).double()[:, None]
    own = means.view(-1, strips, z.shape[1]).double()
    mean = (own * counts).sum((0, 1)) / (len(z) * size)
    var = (squares.view_as(own) + counts * (own - mean) ** 2).sum((0, 1)) / (len(z) * size)
    return mean.float(), var.float()


def pool(z: Tensor, norm: Norm, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """The maxima y and their places, for given statistics."""
    tiles = tiles or TILES["pool"]
    y, where = pooled_like(z, z.dtype), pooled_like(z, torch.uint8)
    programs = len(z) * triton.cdiv(y.shape[2], tiles.repeat) * triton.cdiv(y.shape[3], tiles.rows)
    _run(
        kernels.pool,
        programs,
        (z, norm.mean, norm.var, norm.weight, norm.bias, y, where, norm.eps, *z.shape[2:], z.shape[1]),
        tiles.options(),
    )
    return y, where


def reduce_gradient(maps: Maps, norm: Norm, tiles: Tiles | None = None) -> Sums:
    """Both sums, (C,) each."""
    tiles, z = tiles or TILES["reduce"], maps[2]
    programs, channels = _programs(z, _fours(z), tiles), z.shape[1]
    parts = z.new_empty((2, programs, channels), dtype=torch.float32)
    _run(
        kernels.reduce_gradient,
        programs,
        (*maps, norm.mean, norm.var, *parts, norm.eps, *z.shape[2:], channels),
        tiles.options(),
    )
    return parts[0].sum(0), parts[1].sum(0)


def weight_gradient(x: Tensor, maps: Maps, norm: Norm, means: Sums, tiles: Tiles | None = None) -> Tensor:
    """The gradient of the convolution's weights (C, 3, 7, 7), float32; ``means`` of d and d x^ over the batch."""
    tiles, z = tiles or TILES["weights"], maps[2]
    programs, channels = _programs(z, z.shape[2] * z.shape[3], tiles), z.shape[1]
    parts = x.new_empty((programs, channels, LINES * LINE), dtype=torch.float32)
    _run(
        kernels.weight_gradient,
        programs,
        (x, *maps, norm.mean, norm.var, norm.weight, *means, parts, norm.eps, *x.shape[2:], channels),
        tiles.options() | {"PRECISION": _precision(x)},
    )
    return unpacked(parts.sum(0))
