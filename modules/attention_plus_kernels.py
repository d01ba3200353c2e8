# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels behind ``attention_plus_triton``; their arguments, pointers and numbers, have no types.

With p_ij the softmax over keys j and g = dL/do, o_i = sum_j p_ij v_j has the gradients

    dv_j = sum_i p_ij g_i
    dq_i = scale g_i sum_j p_ij (v_j - o_i) k_j
    dk_j = scale sum_i p_ij (v_j g_i - o_i g_i) q_i

P is computed tile by tile, in the backward pass again from the base-2 logarithm ``lse`` of its row sums, so
that no N x N matrix exists in memory. Vectors (v, o, g, lse) are (B, m, N); Q and K are read by strides from
(B, N, m, 2, d).
"""

from __future__ import annotations

import triton
import triton.language as tl

from utils.triton_version import require_triton

require_triton()


@triton.jit
def _tile(base, start, stride, count, SIZE: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr):
    """Rows start.. of a (count, D) matrix, as (SIZE, D), zero after its end."""
    rows = start + tl.arange(0, SIZE)
    at = base + rows[:, None].to(tl.int64) * stride + tl.arange(0, D)[None, :]
    if TAIL:
        return tl.load(at, mask=rows[:, None] < count, other=0.0)
    return tl.load(at)


@triton.jit
def _valid(mask, columns, count, MASKED: tl.constexpr, TAIL: tl.constexpr):
    valid = columns < count
    if MASKED:
        valid = tl.load(mask + columns, mask=valid, other=0) != 0
    return valid


@triton.jit
def _forward_step(
    q, keys, v, mask, start, stride, count, scale, top, total, acc,
    D: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of keys: moves the running maximum, the sum of p and the sum of p v."""
    columns = start + tl.arange(0, COLS)
    k = _tile(keys, start, stride, count, COLS, D, TAIL)
    scores = tl.dot(q, tl.trans(k))
    if MASKED or TAIL:
        valid = _valid(mask, columns, count, MASKED, TAIL)
        scores = tl.where(valid[None, :], scores, float("-inf"))
    values = tl.load(v + columns, mask=columns < count, other=0.0)
    highest = tl.maximum(top, tl.max(scores, 1) * scale)
    # Until a row has met its first key, its maximum is minus infinity, and the difference below would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
    p = tl.exp2(scores * scale - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay + tl.sum(p * values[None, :], 1)
    return highest, total, acc


@triton.jit
def forward_all(
    qk, v, mask, out, lse, scale, count, heads, stride_bag, stride_row, stride_head, stride_key,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Program (i, b m + h): query rows i ROWS.. of one head of one bag, against all of its keys."""
    which = tl.program_id(1).to(tl.int64)
    queries = qk + which // heads * stride_bag + which % heads * stride_head
    keys = queries + stride_key
    mask += which // heads * count
    v += which * count
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    q = _tile(queries, first, stride_row, count, ROWS, D, True)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS], tl.float32)
    whole = count // COLS * COLS
    for start in range(0, whole, COLS):
        top, total, acc = _forward_step(
            q, keys, v, mask, start, stride_row, count, scale, top, total, acc, D, COLS, MASKED, False
        )  # fmt: skip
    if whole < count:
        top, total, acc = _forward_step(
            q, keys, v, mask, whole, stride_row, count, scale, top, total, acc, D, COLS, MASKED, True
        )  # fmt: skip
    tl.store(out + which * count + rows, acc / total, mask=rows < count)
    tl.store(lse + which * count + rows, top + tl.log2(total), mask=rows < count)


@triton.jit
def _grad_type(x):
    """float32 stays; half precision becomes bfloat16, since p ~ 1/N times a gradient underflows float16."""
    return x if x.dtype == tl.float32 else x.to(tl.bfloat16)


@triton.jit
def _queries_step(
    q, keys, v, mask, start, stride, count, scale, lse, out, acc,
    D: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of keys: adds sum_j p_ij (v_j - o_i) k_j."""
    columns = start + tl.arange(0, COLS)
    k = _tile(keys, start, stride, count, COLS, D, TAIL)
    p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
    if MASKED or TAIL:
        p = tl.where(_valid(mask, columns, count, MASKED, TAIL)[None, :], p, 0.0)
    values = tl.load(v + columns, mask=columns < count, other=0.0)
    slope = p * (values[None, :] - out[:, None])
    k = _grad_type(k)
    return tl.dot(slope.to(k.dtype), k, acc)


@triton.jit
def backward_queries(
    qk, v, mask, grad, out, lse, grad_qk, factor, scale, count, heads,
    stride_bag, stride_row, stride_head, stride_key, to_bag, to_row, to_head, to_key,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Program (i, b m + h): the gradient of query rows i ROWS.."""
    which = tl.program_id(1).to(tl.int64)
    queries = qk + which // heads * stride_bag + which % heads * stride_head
    keys = queries + stride_key
    mask += which // heads * count
    v += which * count
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    at = which * count + rows
    q = _tile(queries, first, stride_row, count, ROWS, D, True)
    lse_i = tl.load(lse + at, mask=rows < count, other=float("inf"))
    out_i = tl.load(out + at, mask=rows < count, other=0.0)
    acc = tl.zeros([ROWS, D], tl.float32)
    whole = count // COLS * COLS
    for start in range(0, whole, COLS):
        acc = _queries_step(
            q, keys, v, mask, start, stride_row, count, scale, lse_i, out_i, acc, D, COLS, MASKED, False
        )  # fmt: skip
    if whole < count:
        acc = _queries_step(
            q, keys, v, mask, whole, stride_row, count, scale, lse_i, out_i, acc, D, COLS, MASKED, True
        )  # fmt: skip
    acc *= (tl.load(grad + at, mask=rows < count, other=0.0) * factor)[:, None]
    to = grad_qk + which // heads * to_bag + which % heads * to_head + rows[:, None].to(tl.int64) * to_row
    tl.store(to + tl.arange(0, D)[None, :], acc.to(grad_qk.dtype.element_ty), mask=rows[:, None] < count)


@triton.jit
def _keys_step(
    k, queries, grad, grad_out, lse, start, stride, count, scale, values, acc, acc_v,
    D: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of queries: adds sum_i p_ij (v_j g_i - o_i g_i) q_i and sum_i p_ij g_i."""
    rows = start + tl.arange(0, ROWS)
    q = _tile(queries, start, stride, count, ROWS, D, TAIL)
    lse_i = tl.load(lse + rows, mask=rows < count, other=float("inf"))
    grad_i = tl.load(grad + rows, mask=rows < count, other=0.0)
    grad_out_i = tl.load(grad_out + rows, mask=rows < count, other=0.0)
    p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse_i[None, :])  # (COLS, ROWS), transposed
    slope = p * (values[:, None] * grad_i[None, :] - grad_out_i[None, :])
    q = _grad_type(q)
    return tl.dot(slope.to(q.dtype), q, acc), acc_v + tl.sum(p * grad_i[None, :], 1)


@triton.jit
def backward_keys(
    qk, v, mask, grad, grad_out, lse, grad_qk, grad_v, factor, scale, count, heads,
    stride_bag, stride_row, stride_head, stride_key, to_bag, to_row, to_head, to_key,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Program (j, b m + h): the gradients of key and V columns j COLS.. ``grad_out`` is grad times out."""
    which = tl.program_id(1).to(tl.int64)
    queries = qk + which // heads * stride_bag + which % heads * stride_head
    first = tl.program_id(0) * COLS
    columns = first + tl.arange(0, COLS)
    k = _tile(queries + stride_key, first, stride_row, count, COLS, D, True)
    valid = _valid(mask + which // heads * count, columns, count, MASKED, True)
    values = tl.load(v + which * count + columns, mask=columns < count, other=0.0)
    grad += which * count
    grad_out += which * count
    lse += which * count
    acc = tl.zeros([COLS, D], tl.float32)
    acc_v = tl.zeros([COLS], tl.float32)
    whole = count // ROWS * ROWS
    for start in range(0, whole, ROWS):
        acc, acc_v = _keys_step(
            k, queries, grad, grad_out, lse, start, stride_row, count, scale, values, acc, acc_v,
            D, ROWS, False,
        )  # fmt: skip
    if whole < count:
        acc, acc_v = _keys_step(
            k, queries, grad, grad_out, lse, whole, stride_row, count, scale, values, acc, acc_v,
            D, ROWS, True,
        )  # fmt: skip
    # An absent key has a p here that it does not have in the softmax; nothing of it may remain.
    acc = tl.where(valid[:, None], acc * factor, 0.0)
    to = grad_qk + which // heads * to_bag + which % heads * to_head + to_key
    to += columns[:, None].to(tl.int64) * to_row
    tl.store(to + tl.arange(0, D)[None, :], acc.to(grad_qk.dtype.element_ty), mask=columns[:, None] < count)
    tl.store(grad_v + which * count + columns, tl.where(valid, acc_v, 0.0), mask=columns < count)
