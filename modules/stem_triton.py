"""A ResNet's stem in training as torch operators: 7 x 7 convolution, BatchNorm, ReLU and 3 x 3 maximum, fused.

``stem`` computes all four: the statistics are taken where the convolution's result z is made, one kernel makes the
rest, and the backward pass never writes the gradient of z. ``stem_fixed`` is the same for evaluation.
``modules.stem`` imports this file only where it can run. Figures: docs/decisions/resnet-stem.md.

Shapes: P patches of H x W px, z is (P, C, A, B), y is (P, C, ceil(A / 2), ceil(B / 2)); all channels-last. The
operators have a gradient, but no second one: asking for it is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modules.stem_launch import (
    Norm,
    convolve,
    convolved_like,
    merge,
    pool,
    pooled_like,
    reduce_gradient,
    weight_gradient,
)
from modules.sync_batchnorm import joined_moments, joined_sum

GIVEN, OWN, JOINED = "given", "own", "joined"


@torch.library.custom_op(
    "abmilx::stem",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor weight, Tensor bias, float eps, bool joined)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def stem(
    x: Tensor, w: Tensor, weight: Tensor, bias: Tensor, eps: float, joined: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``max_pool2d(relu(batch_norm(conv2d(x, w, stride=2, padding=3))), 3, 2, 1)``, with the batch's own statistics.

    Args:
        x: (P, 3, H, W), channels-last, finite; no gradient is made for it.
        w: (C, 3, 7, 7), rounded to the type of ``x``; C a power of two, 16 to 128.
        weight: (C,) float32, contiguous, of BatchNorm.
        bias: (C,), likewise.
        eps: of BatchNorm.
        joined: whether the batch is that of all processes, who call this together; P may then be zero.

    Returns:
        y; mean and biased variance (C,) float32 of z, and of how many pixels (1,); z; and the places of the maxima,
        uint8, shaped as y.
    """
    z, means, squares = convolve(x, w)
    mean, var = merge(means, squares, z)
    count = z.numel() // z.shape[1]
    if joined:
        mean, var, number = joined_moments(mean, var, count)
    else:
        number = mean.new_full((1,), count)
    y, where = pool(z, Norm(mean, var, weight, bias, eps))
    return y, mean, var, number, z, where


@torch.library.custom_op(
    "abmilx::stem_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor z, Tensor places, Tensor mean, Tensor var, Tensor weight, Tensor count, "
    "float eps, str statistics) -> (Tensor, Tensor, Tensor)",
)
def stem_backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    places: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    count: Tensor,
    eps: float,
    statistics: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``stem``, or ``stem_fixed``, in w (float32), weight and bias, from that in y.

    ``statistics`` says whose they are: GIVEN, of this batch (OWN), or of the batches of all processes (JOINED), which
    have ``count`` pixels (1,).
    """
    norm = Norm(mean, var, weight, weight, eps)
    maps = grad, places, z
    total, product = reduce_gradient(maps, norm)
    sums = torch.cat([total, product])
    if statistics == JOINED:
        sums = joined_sum(sums)
    # Statistics that are given do not move with z, and these means are how far the others do.
    moved = torch.zeros_like(sums) if statistics == GIVEN else sums / count
    return weight_gradient(x, maps, norm, (moved[: len(total)], moved[len(total) :])), product, total


@torch.library.custom_op(
    "abmilx::stem_fixed",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
)
def stem_fixed(
    x: Tensor, w: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``stem`` with given statistics, which are constants: y, z and the places of the maxima."""
    z = convolve(x, w)[0]
    y, where = pool(z, Norm(mean, var, weight, bias, eps))
    return y, z, where


@stem_fixed.register_fake
def _(
    x: Tensor, w: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    z = convolved_like(x, w)
    return pooled_like(z, z.dtype), z, pooled_like(z, torch.uint8)


@stem.register_fake
def _(
    x: Tensor, w: Tensor, weight: Tensor, bias: Tensor, eps: float, joined: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    z, mean, var = convolved_like(x, w), torch.empty_like(weight), torch.empty_like(weight)
    return pooled_like(z, z.dtype), mean, var, weight.new_empty(1), z, pooled_like(z, torch.uint8)


@stem_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    places: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    count: Tensor,
    eps: float,
    statistics: str,
) -> tuple[Tensor, Tensor, Tensor]:
    w = weight.new_empty((len(weight), 3, 7, 7))
    return w, torch.empty_like(weight), torch.empty_like(weight)


def _save_stem(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, weight, _, ctx.eps, joined = inputs
    _, mean, var, count, z, where = output
    ctx.type, ctx.statistics = w.dtype, JOINED if joined else OWN
    # Else autograd makes zeros for the outputs that nobody differentiates, z among them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, z, where, mean, var, weight, count)


def _differentiate_stem(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None
    grad = grad.contiguous(memory_format=torch.channels_last)
    w, weight, bias = stem_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.statistics)
    return None, w.to(ctx.type), weight, bias, None, None


def _save_fixed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, mean, var, weight, _, ctx.eps = inputs
    _, z, where = output
    ctx.type = w.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, z, where, mean, var, weight)


def _differentiate_fixed(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None, None
    grad = grad.contiguous(memory_format=torch.channels_last)
    *saved, weight = ctx.saved_tensors
    w, weight, bias = stem_backward(grad, *saved, weight, weight.new_ones(1), ctx.eps, GIVEN)
    return None, w.to(ctx.type), None, None, weight, bias, None


stem.register_autograd(_differentiate_stem, setup_context=_save_stem)
stem_fixed.register_autograd(_differentiate_fixed, setup_context=_save_fixed)
