"""A ResNet's stem in training as torch operators: 7 x 7 convolution, BatchNorm, ReLU and 3 x 3 maximum, fused.

``stem`` computes all four: the statistics are taken where the convolution's result z is made, one kernel makes the
rest, and the backward pass never writes the gradient of z. ``norm_pool`` is the part behind the convolution,
``stem_fixed`` is ``stem`` in evaluation.
``modules.stem`` imports this file only where it can run. Figures: docs/decisions/resnet-stem.md.

Shapes: P patches of H x W px, z is (P, C, A, B), y is (P, C, ceil(A / 2), ceil(B / 2)); all channels-last. The
operators have a gradient, but no second one: asking for it is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from modules import stem_kernels as kernels

DEPTH = 4 * 4 * 16
"""Numbers of 4 x 4 blocks of 2 x 2 pixels, 12 and 4 zeros each: what one number of z is made of."""


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work.

    Attributes:
        rows, repeat: pixels (fours of pixels, columns) of a tile, and tiles of a program.
        warps, stages: warps of a program and loads in flight.
        lines: rows of blocks of the convolution that are taken in one step: 1, 2 or 4.
        registers: the most that a thread may use; 0: as many as the compiler likes.
    """

    rows: int
    repeat: int
    warps: int = 4
    stages: int = 3
    lines: int = 1
    registers: int = 0

    def options(self) -> dict[str, int]:
        options = {"ROWS": self.rows, "REPEAT": self.repeat, "num_warps": self.warps, "num_stages": self.stages}
        return options | ({"maxnreg": self.registers} if self.registers else {})


TILES = {
    "blocks": Tiles(128, 14),
    "convolve": Tiles(128, 7),
    "moments": Tiles(128, 14, warps=8),
    "pool": Tiles(8, 14, warps=2),
    "reduce": Tiles(16, 49, warps=8),
    "spread": Tiles(8, 14),
    "weights": Tiles(16, 196, warps=8, stages=1),
}
"""Fastest tiles of every kernel, measured on an H100."""


Maps = tuple[Tensor, Tensor, Tensor]
"""The gradient of y, the places of the maxima, and z."""

Sums = tuple[Tensor, Tensor]
"""Sums over all pixels: of the gradient d behind ReLU, and of d x^."""


@dataclass(frozen=True)
class Norm:
    """BatchNorm of one batch: mean and biased variance, and its parameters, all (C,) float32."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


@torch.library.custom_op(
    "abmilx::stem",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def stem(
    x: Tensor, w: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``max_pool2d(relu(batch_norm(conv2d(x, w, stride=2, padding=3))), 3, 2, 1)``, with the batch's own statistics.

    Args:
        x: (P, 3, H, W), channels-last, finite; no gradient is made for it.
        w: (C, 3, 7, 7), rounded to the type of ``x``; C a power of two, 16 to 128.
        weight: (C,) float32, contiguous, of BatchNorm.
        bias: (C,), likewise.
        eps: of BatchNorm.

    Returns:
        y; mean and biased variance (C,) float32 of z; patches as blocks; z; and the places of the maxima, uint8.
    """
    blocks = to_blocks(x)
    z, means, squares = convolve(blocks, w)
    mean, var = merge(means, squares, z, TILES["convolve"])
    y, where = pool(z, Norm(mean, var, weight, bias, eps))
    return y, mean, var, blocks, z, where


@torch.library.custom_op(
    "abmilx::stem_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor blocks, Tensor z, Tensor places, Tensor mean, Tensor var, Tensor weight, float eps, "
    "bool fixed) -> (Tensor, Tensor, Tensor)",
)
def stem_backward(
    grad: Tensor,
    blocks: Tensor,
    z: Tensor,
    places: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``stem``, or ``stem_fixed``, in w (float32), weight and bias, from that in y."""
    norm = Norm(mean, var, weight, weight, eps)
    maps = grad, places, z
    total, product = reduce_gradient(maps, norm)
    # Statistics that are given do not move with z, and these sums are how far they do.
    moved = (torch.zeros_like(total), torch.zeros_like(product)) if fixed else (total, product)
    return weight_gradient(blocks, maps, norm, moved), product, total


@torch.library.custom_op(
    "abmilx::norm_pool",
    mutates_args=(),
    schema="(Tensor z, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def norm_pool(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``stem`` behind its convolution: y, mean, variance and places from z, which may be float32 too."""
    mean, var = merge(*moments(z), z, TILES["moments"])
    y, where = pool(z, Norm(mean, var, weight, bias, eps))
    return y, mean, var, where


@torch.library.custom_op(
    "abmilx::norm_pool_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor places, Tensor mean, Tensor var, Tensor weight, float eps)"
    " -> (Tensor, Tensor, Tensor)",
)
def norm_pool_backward(
    grad: Tensor, z: Tensor, places: Tensor, mean: Tensor, var: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``norm_pool`` in z, weight and bias, from that in y."""
    norm = Norm(mean, var, weight, weight, eps)
    maps = grad, places, z
    total, product = reduce_gradient(maps, norm)
    return spread_gradient(maps, norm, (total, product)), product, total


@torch.library.custom_op(
    "abmilx::stem_fixed",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def stem_fixed(
    x: Tensor, w: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``stem`` with given statistics, which are constants: y, blocks, z and the places of the maxima."""
    blocks = to_blocks(x)
    z = convolve(blocks, w)[0]
    y, where = pool(z, Norm(mean, var, weight, bias, eps))
    return y, blocks, z, where


@stem_fixed.register_fake
def _(
    x: Tensor, w: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = _blocks(x)
    z = _convolved(blocks, w)
    return _pooled(z, z.dtype), blocks, z, _pooled(z, torch.uint8)


def _pooled(z: Tensor, dtype: torch.dtype) -> Tensor:
    count, channels, height, width = z.shape
    shape = count, channels, (height + 1) // 2, (width + 1) // 2
    return z.new_empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@norm_pool.register_fake
def _(z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _pooled(z, z.dtype), torch.empty_like(weight), torch.empty_like(weight), _pooled(z, torch.uint8)


@norm_pool_backward.register_fake
def _(
    grad: Tensor, z: Tensor, places: Tensor, mean: Tensor, var: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(weight), torch.empty_like(weight)


@stem.register_fake
def _(
    x: Tensor, w: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    blocks = _blocks(x)
    z = _convolved(blocks, w)
    mean, var = torch.empty_like(weight), torch.empty_like(weight)
    return _pooled(z, z.dtype), mean, var, blocks, z, _pooled(z, torch.uint8)


@stem_backward.register_fake
def _(
    grad: Tensor,
    blocks: Tensor,
    z: Tensor,
    places: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    eps: float,
    fixed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    w = weight.new_empty((len(weight), 3, 7, 7))
    return w, torch.empty_like(weight), torch.empty_like(weight)


def _save_stem(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w, weight, _, ctx.eps = inputs
    _, mean, var, blocks, z, where = output
    ctx.type = w.dtype
    # Else autograd makes zeros for the outputs that nobody differentiates, z among them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(blocks, z, where, mean, var, weight)


def _differentiate_stem(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    grad = grad.contiguous(memory_format=torch.channels_last)
    w, weight, bias = stem_backward(grad, *ctx.saved_tensors, ctx.eps, False)
    return None, w.to(ctx.type), weight, bias, None


def _save_fixed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w, mean, var, weight, _, ctx.eps = inputs
    _, blocks, z, where = output
    ctx.type = w.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(blocks, z, where, mean, var, weight)


def _differentiate_fixed(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None, None
    grad = grad.contiguous(memory_format=torch.channels_last)
    w, weight, bias = stem_backward(grad, *ctx.saved_tensors, ctx.eps, True)
    return None, w.to(ctx.type), None, None, weight, bias, None


def _save_norm_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, weight, _, ctx.eps = inputs
    _, mean, var, where = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, where, mean, var, weight)


def _differentiate_norm_pool(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    grad = grad.contiguous(memory_format=torch.channels_last)
    return *norm_pool_backward(grad, *ctx.saved_tensors, ctx.eps), None


stem.register_autograd(_differentiate_stem, setup_context=_save_stem)
stem_fixed.register_autograd(_differentiate_fixed, setup_context=_save_fixed)
norm_pool.register_autograd(_differentiate_norm_pool, setup_context=_save_norm_pool)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _blocks(x: Tensor) -> Tensor:
    shape = x.shape[0], 16, (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _convolved(blocks: Tensor, w: Tensor) -> Tensor:
    shape = blocks.shape[0], w.shape[0], *blocks.shape[2:]
    return blocks.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _programs(z: Tensor, size: int, tiles: Tiles) -> int:
    return z.shape[0] * triton.cdiv(size, tiles.rows * tiles.repeat)


def _fours(z: Tensor) -> int:
    return ((z.shape[2] + 1) // 2) * ((z.shape[3] + 1) // 2)


def packed(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights (C, 3, 7, 7) as the matrix (4 * 64, C) that the kernels take."""
    whole = torch.nn.functional.pad(w.to(dtype), (1, 0, 1, 0)).view(len(w), 3, 4, 2, 4, 2)
    blocks = whole.permute(2, 4, 3, 5, 1, 0).reshape(16, 12, len(w))  # of 4 x 4; row, column, colour
    return torch.nn.functional.pad(blocks, (0, 0, 0, 4)).view(DEPTH, len(w))


def unpacked(matrix: Tensor) -> Tensor:
    """(C, 4 * 64) as weights (C, 3, 7, 7)."""
    blocks = matrix.view(len(matrix), 16, 16)[:, :, :12].reshape(len(matrix), 4, 4, 2, 2, 3)
    whole = blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(matrix), 3, 8, 8)
    return whole[:, :, 1:, 1:].contiguous()


def to_blocks(x: Tensor, tiles: Tiles | None = None) -> Tensor:
    """Patches as blocks (P, 16, A, B), channels-last."""
    tiles, blocks = tiles or TILES["blocks"], _blocks(x)
    programs = _programs(x, blocks.shape[2] * blocks.shape[3], tiles)
    with torch.cuda.device_of(x):
        kernels.to_blocks[(programs,)](x, blocks, *x.shape[2:], **tiles.options())
    return blocks


def convolve(blocks: Tensor, w: Tensor, tiles: Tiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution z, and mean and sum of squared deviations of every program's pixels, (programs, C) each."""
    tiles, z = tiles or TILES["convolve"], _convolved(blocks, w)
    programs, channels = _programs(z, z.shape[2] * z.shape[3], tiles), z.shape[1]
    means, squares = z.new_empty((2, programs, channels), dtype=torch.float32)
    with torch.cuda.device_of(z):
        kernels.convolve[(programs,)](
            *(blocks, packed(w, z.dtype), z, means, squares),
            *(*z.shape[2:], channels),
            **(tiles.options() | {"LINES": tiles.lines, "PRECISION": _precision(z)}),
        )
    return z, means, squares


def moments(z: Tensor, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of every program's pixels, (programs, C) each."""
    tiles = tiles or TILES["moments"]
    size, channels = z.shape[2] * z.shape[3], z.shape[1]
    programs = _programs(z, size, tiles)
    means, squares = z.new_empty((2, programs, channels), dtype=torch.float32)
    with torch.cuda.device_of(z):
        kernels.moments[(programs,)](z, means, squares, size, channels, **tiles.options())
    return means, squares


def merge(means: Tensor, squares: Tensor, z: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of z from those of its parts (Chan, Golub, LeVeque, 1983)."""
    size, part = z.shape[2] * z.shape[3], tiles.rows * tiles.repeat
    strips = triton.cdiv(size, part)
    counts = (size - part * torch.arange(strips, device=z.device)).clamp(max=part).double()[:, None]
    own = means.view(-1, strips, z.shape[1]).double()
    mean = (own * counts).sum((0, 1)) / (len(z) * size)
    var = (squares.view_as(own) + counts * (own - mean) ** 2).sum((0, 1)) / (len(z) * size)
    return mean.float(), var.float()


def pool(z: Tensor, norm: Norm, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """The maxima y and their places, for given statistics."""
    tiles = tiles or TILES["pool"]
    y, where = _pooled(z, z.dtype), _pooled(z, torch.uint8)
    programs = len(z) * triton.cdiv(y.shape[2], tiles.repeat) * triton.cdiv(y.shape[3], tiles.rows)
    with torch.cuda.device_of(z):
        kernels.pool[(programs,)](
            *(z, norm.mean, norm.var, norm.weight, norm.bias, y, where, norm.eps),
            *(*z.shape[2:], z.shape[1]),
            **tiles.options(),
        )
    return y, where


def reduce_gradient(maps: Maps, norm: Norm, tiles: Tiles | None = None) -> Sums:
    """Both sums, (C,) each."""
    tiles, z = tiles or TILES["reduce"], maps[2]
    programs, channels = _programs(z, _fours(z), tiles), z.shape[1]
    parts = z.new_empty((2, programs, channels), dtype=torch.float32)
    with torch.cuda.device_of(z):
        kernels.reduce_gradient[(programs,)](
            *(*maps, norm.mean, norm.var, *parts, norm.eps),
            *(*z.shape[2:], channels),
            **tiles.options(),
        )
    return parts[0].sum(0), parts[1].sum(0)


def spread_gradient(maps: Maps, norm: Norm, sums: Sums, tiles: Tiles | None = None) -> Tensor:
    """The gradient of z, from the sums of ``reduce_gradient``."""
    tiles, z = tiles or TILES["spread"], maps[2]
    dz, channels, count = torch.empty_like(z), z.shape[1], z.numel() // z.shape[1]
    with torch.cuda.device_of(z):
        kernels.spread_gradient[(_programs(z, _fours(z), tiles),)](
            *(*maps, norm.mean, norm.var, norm.weight, sums[0] / count, sums[1] / count, dz, norm.eps),
            *(*z.shape[2:], channels),
            **tiles.options(),
        )
    return dz


def weight_gradient(blocks: Tensor, maps: Maps, norm: Norm, sums: Sums, tiles: Tiles | None = None) -> Tensor:
    """The gradient of the convolution's weights (C, 3, 7, 7), float32, from the sums of ``reduce_gradient``."""
    tiles, z = tiles or TILES["weights"], maps[2]
    programs, channels, count = _programs(z, z.shape[2] * z.shape[3], tiles), z.shape[1], z.numel() // z.shape[1]
    parts = z.new_empty((programs, channels, DEPTH), dtype=torch.float32)
    with torch.cuda.device_of(z):
        kernels.weight_gradient[(programs,)](
            *(blocks, *maps, norm.mean, norm.var, norm.weight, sums[0] / count, sums[1] / count, parts, norm.eps),
            *(*z.shape[2:], channels),
            **(tiles.options() | {"PRECISION": _precision(z)}),
        )
    return unpacked(parts.sum(0))
