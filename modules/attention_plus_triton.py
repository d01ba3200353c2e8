"""Attention plus (A+) on NVIDIA GPUs as a torch operator: attention with a V of one channel.

    o_i = sum_j p_ij v_j,  p_ij = exp(scale q_i k_j) / sum_j exp(scale q_i k_j)    (U A of Equation 4)

Library kernels need V padded to many channels, so they spend a whole matrix product on zeros, and another on
their gradient; the kernels in ``attention_plus_kernels`` do neither. ``modules.abmilx`` imports this file
only where it can run. Figures: docs/decisions/abmilx-attention-kernel.md.

Shapes: B bags, N instances, m heads of width d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from modules.attention_plus_kernels import backward_keys, backward_queries, forward_all

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's tiles: query rows, key columns, warps, and loads in flight."""

    rows: int
    cols: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """The tiles of the three kernels at one head width."""

    forward: Tiles
    queries: Tiles
    keys: Tiles


_NARROW = Plan(Tiles(64, 128, 4, 3), Tiles(64, 128, 4, 3), Tiles(128, 64, 4, 3))
PLANS = {
    16: _NARROW,
    32: _NARROW,
    64: Plan(Tiles(64, 128, 4, 2), Tiles(128, 64, 4, 3), Tiles(128, 64, 4, 3)),
    128: Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
}
"""Fastest tiles by head width d, measured on an H100; the widths are those that the kernels take."""


@torch.library.custom_op(
    "abmilx::attention_plus",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor qk, Tensor v, Tensor? mask, float scale) -> (Tensor, Tensor)",
)
def attention_plus(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax_rows(q k^T * scale) v`` and the base-2 logarithm of the softmax's row sums.

    Args:
        qk: (B, N, m, 2, d) float16 or bfloat16, Q at index 0 and K at index 1; any strides but the last.
        v: (B, m, N) float32, contiguous.
        mask: (B, N) bool, contiguous, True where there is a key, or None.
        scale: factor on q k^T, positive.

    Returns:
        Two float32 tensors (B, m, N).
    """
    return forward(qk, v, mask, scale)


@attention_plus.register_fake
def _(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(v)


@torch.library.custom_op(
    "abmilx::attention_plus_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor qk, Tensor v, Tensor? mask, Tensor out, Tensor lse, float scale) -> (Tensor, Tensor)",
)
def attention_plus_backward(
    grad: Tensor, qk: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``attention_plus`` in ``qk`` and ``v``, from that in its first output."""
    return backward(grad, (qk, v, mask), (out, lse), scale)


@attention_plus_backward.register_fake
def _(
    grad: Tensor, qk: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qk), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qk, v, mask, ctx.scale = inputs
    ctx.save_for_backward(qk, v, mask, *output)


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    qk, v, mask, out, lse = ctx.saved_tensors
    return *attention_plus_backward(grad.contiguous(), qk, v, mask, out, lse, ctx.scale), None, None


attention_plus.register_autograd(_differentiate, setup_context=_save)


def forward(
    qk: Tensor, v: Tensor, mask: Tensor | None, scale: float, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """``attention_plus`` without autograd, with a choice of tiles."""
    tiles = tiles or PLANS[qk.shape[-1]].forward
    out, lse = torch.empty_like(v), torch.empty_like(v)
    with torch.cuda.device_of(qk):
        forward_all[_grid(qk, tiles.rows)](
            *(qk, v, v if mask is None else mask, out, lse),
            *(scale * LOG2_E, *_sizes(qk)),
            **_constants(qk, mask, tiles),
        )
    return out, lse


def backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor | None], outputs: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients in qk and v, from ``grad`` in the first of the ``outputs`` of ``forward``."""
    results = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
    plan = PLANS[inputs[0].shape[-1]]
    launch_queries(grad, inputs, outputs, results, (scale, plan.queries))
    launch_keys(grad, inputs, outputs, results, (scale, plan.keys))
    return results


def launch_queries(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    options: tuple[float, Tiles],
) -> None:
    """Writes the gradient of Q into ``results[0]``."""
    qk, v, mask = inputs
    scale, tiles = options
    with torch.cuda.device_of(qk):
        backward_queries[_grid(qk, tiles.rows)](
            *(qk, v, v if mask is None else mask, grad, *outputs, results[0]),
            *(scale, scale * LOG2_E, *_sizes(qk), *_sizes(results[0])[2:]),
            **_constants(qk, mask, tiles),
        )


def launch_keys(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    options: tuple[float, Tiles],
) -> None:
    """Writes the gradients of K into ``results[0]`` and of V into ``results[1]``."""
    qk, v, mask = inputs
    out, lse = outputs
    scale, tiles = options
    with torch.cuda.device_of(qk):
        backward_keys[_grid(qk, tiles.cols)](
            *(qk, v, v if mask is None else mask, grad, grad * out, lse, *results),
            *(scale, scale * LOG2_E, *_sizes(qk), *_sizes(results[0])[2:]),
            **_constants(qk, mask, tiles),
        )


def _grid(qk: Tensor, tile: int) -> tuple[int, int]:
    bags, count, heads = qk.shape[:3]
    return triton.cdiv(count, tile), bags * heads


def _sizes(qk: Tensor) -> tuple[int, ...]:
    """N, m, and the strides of bag, instance, head, and from Q to K."""
    if qk.stride(-1) != 1:
        raise ValueError(f"the last of the strides {qk.stride()} of qk is not 1")
    return qk.shape[1], qk.shape[2], *qk.stride()[:4]


def _constants(qk: Tensor, mask: Tensor | None, tiles: Tiles) -> dict[str, int]:
    shape = {"D": qk.shape[-1], "ROWS": tiles.rows, "COLS": tiles.cols, "MASKED": mask is not None}
    return shape | {"num_warps": tiles.warps, "num_stages": tiles.stages}
