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


@torch.library.custom_op(
    "abmilx::stem",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def stem(
    x: Tensor, w: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``max_pool2d(relu(batch_norm(conv2d(x, w, stride=2, padding=3))), 3, 2, 1)``, with the batch's own statistics.

    Args:
        x: (P, 3, H, W), channels-last, finite; no gradient is made for it.
        w: (C, 3, 7, 7), rounded to the type of ``x``; C a power of two, 16 to 128.
        weight: (C,) float32, contiguous, of BatchNorm.
        bias: (C,), likewise.
        eps: of BatchNorm.

    Returns:
        y; mean and biased variance (C,) float32 of z; z; and the places of the maxima, uint8, shaped as y.
    """
    z, means, squares = convolve(x, w)
    mean, var = merge(means, squares, z)
    y, where = pool(z, Norm(mean, var, weight, bias, eps))
    return y, mean, var, z, where


@torch.library.custom_op(
    "abmilx::stem_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor z, Tensor places, Tensor mean, Tensor var, Tensor weight, float eps, "
    "bool fixed) -> (Tensor, Tensor, Tensor)",
)
def stem_backward(
    grad: Tensor,
    x: Tensor,
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
    return weight_gradient(x, maps, norm, moved), product, total


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
def _(x: Tensor, w: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = convolved_like(x, w)
    return pooled_like(z, z.dtype), torch.empty_like(weight), torch.empty_like(weight), z, pooled_like(z, torch.uint8)


@stem_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
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
    x, w, weight, _, ctx.eps = inputs
    _, mean, var, z, where = output
    ctx.type = w.dtype
    # Else autograd makes zeros for the outputs that nobody differentiates, z among them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, z, where, mean, var, weight)


def _differentiate_stem(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    grad = grad.contiguous(memory_format=torch.channels_last)
    w, weight, bias = stem_backward(grad, *ctx.saved_tensors, ctx.eps, False)
    return None, w.to(ctx.type), weight, bias, None


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
    w, weight, bias = stem_backward(grad, *ctx.saved_tensors, ctx.eps, True)
    return None, w.to(ctx.type), None, None, weight, bias, None


stem.register_autograd(_differentiate_stem, setup_context=_save_stem)
stem_fixed.register_autograd(_differentiate_fixed, setup_context=_save_fixed)
