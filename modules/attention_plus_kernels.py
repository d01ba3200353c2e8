# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels behind ``attention_plus_triton``; their arguments, pointers and numbers, have no types.

With p_ij the softmax over keys j and g = dL/do, o_i = sum_j p_ij v_j has the gradients

    dv_j = sum_i p_ij g_i
    dk_j = scale sum_i p_ij (v_j g_i - o_i g_i) q_i
    dq_i = g_i s_i,  s_i = do_i / dq_i = scale (sum_j p_ij v_j k_j - o_i sum_j p_ij k_j)

The slopes s do not depend on g, so the forward pass of training makes them, and the backward pass computes P once
more, not twice. It does so from the base-2 logarithm ``lse`` of the row sums, tile by tile: no N x N matrix exists
in memory. Vectors (v, o, g, lse) are (B, m, N); Q and K are read by strides from (B, N, m, 2, d); the slopes
are (B, N, m, d).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Row sums of exp2(score - base) within these bounds neither overflow nor lose keys to underflow: see forward_all.
_LEAST_SUM = tl.constexpr(1e-20)
_MOST_SUM = tl.constexpr(1e30)
_NARROW = tl.constexpr(16)  # key columns of what is not the main loop, so that it takes few registers from it


@triton.jit
def _tile(base, start, stride, count, SIZE: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr):
    """Rows start.. of a (count, D) matrix, as (SIZE, D); TAIL: zero behind its end."""
    rows = tl.arange(0, SIZE)
    at = base + start * stride + (rows[:, None] * stride + tl.arange(0, D)[None, :])
    if TAIL:
        return tl.load(at, mask=(start + rows)[:, None] < count, other=0.0)
    return tl.load(at)


@triton.jit
def _row(base, start, count, other, SIZE: tl.constexpr, TAIL: tl.constexpr):
    """Numbers start.. of a vector, as (SIZE,); TAIL: ``other`` behind its end."""
    at = start + tl.arange(0, SIZE)
    if TAIL:
        return tl.load(base + at, mask=at < count, other=other)
    return tl.load(base + at)


@triton.jit
def _valid(mask, start, count, SIZE: tl.constexpr, MASKED: tl.constexpr):
    columns = start + tl.arange(0, SIZE)
    valid = columns < count
    if MASKED:
        valid = tl.load(mask + columns, mask=valid, other=0) != 0
    return valid


@triton.jit
def _grad_type(x):
    """float32 stays; half precision becomes bfloat16, since p ~ 1/N times a gradient underflows float16."""
    return x if x.dtype == tl.float32 else x.to(tl.bfloat16)


@triton.jit
def _sum_lanes(x):
    """Rows (R, C) summed to (R, 8), which needs no exchange between threads where x comes from a matrix product."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 1)


@triton.jit
def _forward_step(
    q, keys, v, mask, start, stride, count, scale, base, total, acc, pull, drift,
    D: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr, TRAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of keys: adds to the sums of p, p v, p v k and p k, where p is not yet divided by its sum."""
    k = _tile(keys, start, stride, count, COLS, D, TAIL)
    values = _row(v, start, count, 0.0, COLS, TAIL)
    p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - base[:, None])
    if MASKED or TAIL:
        p = tl.where(_valid(mask, start, count, COLS, MASKED)[None, :], p, 0.0)
    pv = p * values[None, :]
    if TRAIN:
        k = _grad_type(k)
        pull = tl.dot(pv.to(k.dtype), k, pull)
        drift = tl.dot(p.to(k.dtype), k, drift)
    return total + _sum_lanes(p), acc + _sum_lanes(pv), pull, drift


@triton.jit
def _sweep(
    q, keys, v, mask, stride, count, scale, base,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr, TRAIN: tl.constexpr,
):  # fmt: skip
    """The sums of ``_forward_step`` over all keys."""
    total = tl.zeros([ROWS, 8], tl.float32)
    acc = tl.zeros([ROWS, 8], tl.float32)
    pull = tl.zeros([ROWS, D], tl.float32) if TRAIN else 0.0
    drift = tl.zeros([ROWS, D], tl.float32) if TRAIN else 0.0
    whole = count // COLS * COLS
    for start in range(0, whole, COLS):
        total, acc, pull, drift = _forward_step(
            q, keys, v, mask, start, stride, count, scale, base, total, acc, pull, drift,
            D, COLS, MASKED, TRAIN, False,
        )  # fmt: skip
    if whole < count:
        total, acc, pull, drift = _forward_step(
            q, keys, v, mask, whole, stride, count, scale, base, total, acc, pull, drift,
            D, COLS, MASKED, TRAIN, True,
        )  # fmt: skip
    return tl.sum(total, 1), tl.sum(acc, 1), pull, drift


@triton.jit
def _highest(
    q, keys, mask, start, stride, count,
    D: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The largest score of every row against one tile of keys, not yet scaled."""
    scores = tl.dot(q, tl.trans(_tile(keys, start, stride, count, COLS, D, True)))
    valid = _valid(mask, start, count, COLS, MASKED)
    return tl.max(tl.where(valid[None, :], scores, float("-inf")), 1)


@triton.jit
def forward_all(
    qk, v, mask, centre, out, lse, slopes, factor, scale, count, heads, stride_bag, stride_row, stride_head, stride_key,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr, TRAIN: tl.constexpr,
):  # fmt: skip
    """Program (i, b m + h): query rows i ROWS.. of one head of one bag, against all of its keys.

    A softmax subtracts the largest score of a row only to stay within the range of its numbers, and float32 spans 250
    powers of two. So the largest of a row's first scores is subtracted, and no maximum is kept; where a sum shows that
    this was not enough (a later score is larger by 69 or more), the sweep is repeated with the largest of all.

    TRAIN: ``v`` holds differences from ``centre`` (B, m), so that little cancels in the slopes.
    """
    which = tl.program_id(1).to(tl.int64)
    queries = qk + which // heads * stride_bag + which % heads * stride_head
    keys = queries + stride_key
    mask += which // heads * count
    v += which * count
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    stride = tl.cast(stride_row, tl.int64)
    q = _tile(queries, first, stride, count, ROWS, D, True)
    base = _highest(q, keys, mask, 0, stride, count, D, _NARROW, MASKED) * scale
    if MASKED:
        base = tl.where(base == float("-inf"), 0.0, base)
    total, acc, pull, drift = _sweep(q, keys, v, mask, stride, count, scale, base, D, ROWS, COLS, MASKED, TRAIN)
    if tl.max(tl.where((total > _LEAST_SUM) & (total < _MOST_SUM), 0, 1), 0) != 0:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        for start in range(0, count, _NARROW):
            top = tl.maximum(top, _highest(q, keys, mask, start, stride, count, D, _NARROW, MASKED))
        base = top * scale
        total, acc, pull, drift = _sweep(q, keys, v, mask, stride, count, scale, base, D, ROWS, _NARROW, MASKED, TRAIN)
    o = acc / total
    if TRAIN:
        slope = (pull - o[:, None] * drift) * (factor / total)[:, None]
        to = slopes + (which // heads * count * heads + which % heads) * D + rows[:, None].to(tl.int64) * (heads * D)
        tl.store(to + tl.arange(0, D)[None, :], slope.to(slopes.dtype.element_ty), mask=rows[:, None] < count)
        o += tl.load(centre + which)
    tl.store(out + which * count + rows, o, mask=rows < count)
    tl.store(lse + which * count + rows, base + tl.log2(total), mask=rows < count)


@triton.jit
def _keys_step(
    k, queries, grad, grad_out, lse, start, stride, count, scale, values, acc, acc_v,
    D: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of queries: adds sum_i p_ij (v_j g_i - o_i g_i) q_i and sum_i p_ij g_i."""
    q = _tile(queries, start, stride, count, ROWS, D, TAIL)
    lse_i = _row(lse, start, count, float("inf"), ROWS, TAIL)
    grad_i = _row(grad, start, count, 0.0, ROWS, TAIL)
    grad_out_i = _row(grad_out, start, count, 0.0, ROWS, TAIL)
    p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse_i[None, :])  # (COLS, ROWS), transposed
    slope = p * (values[:, None] * grad_i[None, :] - grad_out_i[None, :])
    q = _grad_type(q)
    return tl.dot(slope.to(q.dtype), q, acc), acc_v + _sum_lanes(p * grad_i[None, :])


@triton.jit
def backward_all(
    qk, v, mask, grad, grad_out, lse, slopes, grad_qk, grad_v, factor, scale, count, heads,
    stride_bag, stride_row, stride_head, stride_key, to_bag, to_row, to_head, to_key,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Program (j, b m + h): the gradients of instances j COLS... ``grad_out`` is grad times out."""
    which = tl.program_id(1).to(tl.int64)
    queries = qk + which // heads * stride_bag + which % heads * stride_head
    first = tl.program_id(0) * COLS
    columns = first + tl.arange(0, COLS)
    stride = tl.cast(stride_row, tl.int64)
    k = _tile(queries + stride_key, first, stride, count, COLS, D, True)
    values = tl.load(v + which * count + columns, mask=columns < count, other=0.0)
    grad += which * count
    grad_out += which * count
    lse += which * count
    acc = tl.zeros([COLS, D], tl.float32)
    acc_v = tl.zeros([COLS, 8], tl.float32)
    whole = count // ROWS * ROWS
    for start in range(0, whole, ROWS):
        acc, acc_v = _keys_step(
            k, queries, grad, grad_out, lse, start, stride, count, scale, values, acc, acc_v, D, ROWS, False
        )  # fmt: skip
    if whole < count:
        acc, acc_v = _keys_step(
            k, queries, grad, grad_out, lse, whole, stride, count, scale, values, acc, acc_v, D, ROWS, True
        )  # fmt: skip
    # An absent key has a p here that it does not have in the softmax; nothing of it may remain.
    valid = _valid(mask + which // heads * count, first, count, COLS, MASKED)
    acc = tl.where(valid[:, None], acc * factor, 0.0)
    present = columns[:, None] < count
    channels = tl.arange(0, D)[None, :]
    to = grad_qk + which // heads * to_bag + which % heads * to_head + columns[:, None].to(tl.int64) * to_row + channels
    tl.store(to + to_key, acc.to(grad_qk.dtype.element_ty), mask=present)
    tl.store(grad_v + which * count + columns, tl.where(valid, tl.sum(acc_v, 1), 0.0), mask=columns < count)
    at = (which // heads * count * heads + which % heads) * D + columns[:, None].to(tl.int64) * (heads * D) + channels
    slope = tl.load(slopes + at, mask=present, other=0.0).to(tl.float32)
    slope *= tl.load(grad + columns, mask=columns < count, other=0.0)[:, None]
    tl.store(to, slope.to(grad_qk.dtype.element_ty), mask=present)
