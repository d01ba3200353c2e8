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

from modules.attention_plus_kernels import backward_all, forward_all

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """A kernel's tiles: query rows, key columns; its warps, loads in flight, and registers per thread at most."""

    rows: int
    cols: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Plan:
    """The tiles of the kernels at one head width: forward pass in evaluation, in training, and backward pass."""

    evaluation: Tiles
    training: Tiles
    backward: Tiles


_NARROW = Plan(Tiles(64, 128, 4, 2), Tiles(64, 64, 4, 3, 128), Tiles(128, 64, 4, 3))
PLANS = {
    16: _NARROW,
    32: _NARROW,
    64: Plan(Tiles(64, 128, 4, 2, 128), Tiles(64, 64, 4, 3, 168), Tiles(64, 128, 4, 3)),
    128: Plan(Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 3), Tiles(64, 64, 4, 3)),
}
"""Fastest tiles by head width d, measured on an H100; the widths are those that the kernels take."""


@torch.library.custom_op(
    "abmilx::attention_plus",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor qk, Tensor v, Tensor? mask, float scale) -> (Tensor, Tensor)",
)
def attention_plus(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax_rows(q k^T * scale) v`` and the base-2 logarithm of the softmax's row sums; no gradients.

    Args:
        qk: (B, N, m, 2, d) float16 or bfloat16, Q at index 0 and K at index 1; any strides but the last.
        v: (B, m, N) float32, contiguous.
        mask: (B, N) bool, True where there is a key, or None.
        scale: factor on q k^T, positive.

    Returns:
        Two float32 tensors (B, m, N).
    """
    return forward(qk, v, mask, scale)


@attention_plus.register_fake
def _(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(v)


@torch.library.custom_op(
    "abmilx::attention_plus_training",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor qk, Tensor v, Tensor? mask, float scale) -> (Tensor, Tensor, Tensor)",
)
def attention_plus_training(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_plus`` with gradients; also returns the slopes, the derivatives of the output in Q (B, N, m, d)."""
    return forward_slopes(qk, v, mask, scale)


@attention_plus_training.register_fake
def _(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(v), _empty_slopes(qk)


@torch.library.custom_op(
    "abmilx::attention_plus_backward",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor grad, Tensor qk, Tensor v, Tensor? mask, Tensor out, Tensor lse, Tensor slopes, float scale)"
    " -> (Tensor, Tensor)",
)
def attention_plus_backward(
    grad: Tensor, qk: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, slopes: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients in ``qk`` and ``v``, from that in the first output of ``attention_plus_training``."""
    return backward(grad, (qk, v, mask), (out, lse, slopes), scale)


@attention_plus_backward.register_fake
def _(
    grad: Tensor, qk: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, slopes: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qk), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qk, v, mask, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # else lse and the slopes, which nobody uses, get gradients of zeros in memory
    ctx.save_for_backward(qk, v, mask, *output)


def _differentiate(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:  # the output took no part in what is differentiated
        return None, None, None, None
    return *attention_plus_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None, None


attention_plus_training.register_autograd(_differentiate, setup_context=_save)


def forward(
    qk: Tensor, v: Tensor, mask: Tensor | None, scale: float, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """``attention_plus``, with a choice of tiles."""
    out, lse = torch.empty_like(v), torch.empty_like(v)
    _launch_forward((qk, v, mask), (v, out, lse, v), scale, tiles or PLANS[qk.shape[-1]].evaluation)
    return out, lse


def forward_slopes(
    qk: Tensor, v: Tensor, mask: Tensor | None, scale: float, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_plus_training`` without autograd, with a choice of tiles."""
    out, lse, slopes = torch.empty_like(v), torch.empty_like(v), _empty_slopes(qk)
    centre = v.mean(dim=-1)
    results = centre, out, lse, slopes
    tiles = tiles or PLANS[qk.shape[-1]].training
    _launch_forward((qk, v - centre.unsqueeze(-1), mask), results, scale, tiles, train=True)
    return out, lse, slopes


def backward(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor, Tensor],
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients in qk and v, from ``grad`` in the first of the ``outputs`` of ``forward_slopes``."""
    qk, v, mask = inputs
    out, lse, slopes = outputs
    results = torch.empty_like(qk), torch.empty_like(v)
    tiles = tiles or PLANS[qk.shape[-1]].backward
    with torch.cuda.device_of(qk):
        backward_all[_grid(qk, tiles.cols)](
            *(qk, v, _pointer(mask, v), grad, grad * out, lse, slopes, *results),
            *(scale, scale * LOG2_E, *_sizes(qk), *_sizes(results[0])[2:]),
            **_constants(qk, mask, tiles),
        )
    return results


def _launch_forward(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    results: tuple[Tensor, ...],
    scale: float,
    tiles: Tiles,
    train: bool = False,
) -> None:
    qk, v, mask = inputs
    with torch.cuda.device_of(qk):
        forward_all[_grid(qk, tiles.rows)](
            *(qk, v, _pointer(mask, v), *results),
            *(scale, scale * LOG2_E, *_sizes(qk)),
            TRAIN=train,
            **_constants(qk, mask, tiles),
        )


def _empty_slopes(qk: Tensor) -> Tensor:
    """Half precision in bfloat16: a slope is a mean over N keys, and may be too small for float16."""
    kind = torch.float32 if qk.dtype == torch.float32 else torch.bfloat16
    return qk.new_empty((*qk.shape[:3], qk.shape[-1]), dtype=kind)


def _pointer(mask: Tensor | None, unread: Tensor) -> Tensor:
    """What a kernel gets for the mask; without one it reads nothing there."""
    return unread if mask is None else mask.contiguous()


def _grid(qk: Tensor, tile: int) -> tuple[int, int]:
    bags, count, heads = qk.shape[:3]
    return triton.cdiv(count, tile), bags * heads


def _sizes(qk: Tensor) -> tuple[int, ...]:
    """N, m, and the strides of bag, instance, head, and from Q to K."""
    if qk.stride(-1) != 1:
        raise ValueError(f"the last of the strides {qk.stride()} of qk is not 1")
    return qk.shape[1], qk.shape[2], *qk.stride()[:4]


def _constants(qk: Tensor, mask: Tensor | None, tiles: Tiles) -> dict[str, int | None]:
    shape = {"D": qk.shape[-1], "ROWS": tiles.rows, "COLS": tiles.cols, "MASKED": mask is not None}
    return shape | {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers}
