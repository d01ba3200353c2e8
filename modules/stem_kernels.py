# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels of a ResNet's stem; their arguments, pointers and numbers, have no types.

The stem is z = conv(x), a 7 x 7 convolution of 3 channels with stride 2 and padding 3, and y = pool(relu(norm(z)))
with BatchNorm and a maximum over 3 x 3 with stride 2 and padding 1. All images are channels-last: x (P, H, W, 3),
z (P, A, B, C) with A = ceil(H / 2), B = ceil(W / 2), y (P, ceil(A / 2), ceil(B / 2), C).

The convolution is a matrix product. A row of the kernel covers 7 pixels, that is 21 consecutive numbers of x; with one
more in front, so that they start at an even place, and 10 after, they are a row of 32. ``w`` is (8 * 32, C), zero
where there is no weight. What lies beside the 21 numbers is multiplied by zero, so x must be finite.

A maximum is remembered by its place in its window, 0 to 8, or ``NONE`` where it is not positive: there the gradient of
ReLU is zero. The gradient d after ReLU is gathered: the four pixels (2i, 2j) to (2i + 1, 2j + 1) lie in no other
windows than (i, j), (i, j + 1), (i + 1, j) and (i + 1, j + 1). With x^ = (z - mean) rstd and n pixels,

    dz = weight rstd (d - sum(d) / n - x^ sum(d x^) / n),  dweight = sum(d x^),  dbias = sum(d).

Programs leave partial sums that are added up in a fixed order, so results do not vary from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from utils.triton_version import require_triton

require_triton()

NONE = tl.constexpr(9)
SPAN = tl.constexpr(32)


@triton.jit
def _patches(x, row, col, first, H: tl.constexpr, W: tl.constexpr, LINES: tl.constexpr):
    """What kernel rows first.. see at pixels (row, col) of z: (pixels, LINES * 32)."""
    k = tl.arange(0, LINES * SPAN)
    line = first + k // SPAN
    from_row = (row * 2 - 3)[:, None] + line[None, :]
    place = (col * 6 - 10)[:, None] + (k % SPAN)[None, :]
    inside = (from_row >= 0) & (from_row < H) & (place >= 0) & (place < 3 * W)
    if LINES > 1:
        inside = inside & (line < 7)[None, :]
    return tl.load(x + from_row * (3 * W) + place, mask=inside, other=0.0)


@triton.jit
def _merge(count, mean, square, value, inside, start, SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Adds a tile to count, mean and sum of squared deviations (Chan, Golub, LeVeque, 1983)."""
    more = tl.minimum(tl.maximum(SIZE - start, 0), ROWS).to(tl.float32)
    own_mean = tl.sum(tl.where(inside[:, None], value, 0.0), 0) / tl.maximum(more, 1.0)
    deviation = tl.where(inside[:, None], value - own_mean[None, :], 0.0)
    total = count + more
    delta = own_mean - mean
    share = more / tl.maximum(total, 1.0)
    square += tl.sum(deviation * deviation, 0) + delta * delta * count * share
    return total, mean + delta * share, square


@triton.jit
def convolve(
    x, w, z, means, squares,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr, LINES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: REPEAT tiles of ROWS pixels of an image of z, their means and squared deviations from them."""
    B: tl.constexpr = (W + 1) // 2
    SIZE: tl.constexpr = (H + 1) // 2 * B
    STRIPS: tl.constexpr = (SIZE + ROWS * REPEAT - 1) // (ROWS * REPEAT)
    image = (tl.program_id(0) // STRIPS).to(tl.int64)
    begin = tl.program_id(0) % STRIPS * (ROWS * REPEAT)
    x += image * (H * W * 3)
    z += image * (SIZE * C)
    channel = tl.arange(0, C)
    count = 0.0
    mean = tl.zeros([C], tl.float32)
    square = tl.zeros([C], tl.float32)
    for tile in range(REPEAT):
        start = begin + tile * ROWS
        at = start + tl.arange(0, ROWS)
        acc = tl.zeros([ROWS, C], tl.float32)
        for step in range((7 + LINES - 1) // LINES):
            patch = _patches(x, at // B, at % B, step * LINES, H, W, LINES)
            k = step * LINES * SPAN + tl.arange(0, LINES * SPAN)
            weights = tl.load(w + k[:, None] * C + channel[None, :])
            acc = tl.dot(patch, weights, acc, input_precision=PRECISION)
        result = acc.to(z.dtype.element_ty)
        inside = at < SIZE
        tl.store(z + at[:, None] * C + channel[None, :], result, mask=inside[:, None])
        count, mean, square = _merge(count, mean, square, result.to(tl.float32), inside, start, SIZE, ROWS)
    to = tl.program_id(0).to(tl.int64) * C + channel
    tl.store(means + to, mean)
    tl.store(squares + to, square)


@triton.jit
def _row_maximum(z, row, j, mean, scale, shift, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """First maximum of relu(norm(z)) over columns 2j - 1 to 2j + 1 of a row, and which it is; -1 outside."""
    channel = tl.arange(0, C)[None, :]
    best = tl.full([j.shape[0], C], -1.0, tl.float32)
    place = tl.zeros([j.shape[0], C], tl.int32)
    for step in tl.static_range(3):
        col = 2 * j - 1 + step
        inside = ((row >= 0) & (row < A) & (col >= 0) & (col < B))[:, None]
        value = tl.load(z + (row * B + col)[:, None] * C + channel, mask=inside, other=0.0).to(tl.float32)
        value = (value - mean) * scale + shift
        # Rounded as the plain modules round it: what is equal there must be equal here.
        value = tl.where(value < 0, 0.0, value).to(z.dtype.element_ty).to(tl.float32)
        value = tl.where(inside, value, -1.0)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        place = tl.where(better, step, place)
    return best, place


@triton.jit
def pool(
    z, mean, var, weight, bias, y, where, eps,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """A program: ROWS columns and REPEAT rows of an image of y, and where in their windows the maxima lie."""
    PA: tl.constexpr = (A + 1) // 2
    PB: tl.constexpr = (B + 1) // 2
    STRIPS: tl.constexpr = (PA + REPEAT - 1) // REPEAT
    BLOCKS: tl.constexpr = (PB + ROWS - 1) // ROWS
    image = (tl.program_id(0) // (STRIPS * BLOCKS)).to(tl.int64)
    first = tl.program_id(0) // BLOCKS % STRIPS * REPEAT
    j = tl.program_id(0) % BLOCKS * ROWS + tl.arange(0, ROWS)
    z += image * (A * B * C)
    y += image * (PA * PB * C)
    where += image * (PA * PB * C)
    channel = tl.arange(0, C)[None, :]
    centre = tl.load(mean + channel)
    scale = tl.load(weight + channel) * tl.rsqrt(tl.load(var + channel) + eps)
    shift = tl.load(bias + channel)
    above, above_place = _row_maximum(z, 2 * first - 1, j, centre, scale, shift, A, B, C)
    for step in range(REPEAT):
        i = first + step
        middle, middle_place = _row_maximum(z, 2 * i, j, centre, scale, shift, A, B, C)
        below, below_place = _row_maximum(z, 2 * i + 1, j, centre, scale, shift, A, B, C)
        better = (middle > above) | (middle != middle)
        best = tl.where(better, middle, above)
        place = tl.where(better, middle_place + 3, above_place)
        better = (below > best) | (below != below)
        best = tl.where(better, below, best)
        place = tl.where(better, below_place + 6, place)
        place = tl.where(best == 0, NONE, place)
        inside = ((i < PA) & (j < PB))[:, None]
        to = (i * PB + j)[:, None] * C + channel
        tl.store(y + to, best.to(y.dtype.element_ty), mask=inside)
        tl.store(where + to, place.to(tl.uint8), mask=inside)
        above, above_place = below, below_place


@triton.jit
def _window(grad, where, i, j, PA: tl.constexpr, PB: tl.constexpr, C: tl.constexpr):
    """Gradient of windows (i, j) and the places of their maxima; none after the last row and column."""
    inside = ((i < PA) & (j < PB))[:, None]
    at = (i * PB + j)[:, None] * C + tl.arange(0, C)[None, :]
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    return slope, tl.load(where + at, mask=inside, other=9)


@triton.jit
def _gather(grad, where, i, j, PA: tl.constexpr, PB: tl.constexpr, C: tl.constexpr):
    """The gradient d at pixels (2i, 2j), (2i, 2j + 1), (2i + 1, 2j) and (2i + 1, 2j + 1)."""
    slope, place = _window(grad, where, i, j, PA, PB, C)
    d00 = tl.where(place == 4, slope, 0.0)
    d01 = tl.where(place == 5, slope, 0.0)
    d10 = tl.where(place == 7, slope, 0.0)
    d11 = tl.where(place == 8, slope, 0.0)
    slope, place = _window(grad, where, i, j + 1, PA, PB, C)
    d01 += tl.where(place == 3, slope, 0.0)
    d11 += tl.where(place == 6, slope, 0.0)
    slope, place = _window(grad, where, i + 1, j, PA, PB, C)
    d10 += tl.where(place == 1, slope, 0.0)
    d11 += tl.where(place == 2, slope, 0.0)
    slope, place = _window(grad, where, i + 1, j + 1, PA, PB, C)
    d11 += tl.where(place == 0, slope, 0.0)
    return d00, d01, d10, d11


@triton.jit
def _standard(z, row, col, mean, rstd, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """x^ at pixels (row, col), and where in memory they are and whether they exist."""
    inside = ((row < A) & (col < B))[:, None]
    at = (row * B + col)[:, None] * C + tl.arange(0, C)[None, :]
    return (tl.load(z + at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd, at, inside


@triton.jit
def _add(total, product, z, d, row, col, mean, rstd, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    standard, _, _ = _standard(z, row, col, mean, rstd, A, B, C)
    return total + d, product + d * standard


@triton.jit
def reduce_gradient(
    grad, where, z, mean, var, totals, products, eps,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """A program: sum(d) and sum(d x^) over REPEAT tiles of ROWS fours of pixels of an image."""
    PA: tl.constexpr = (A + 1) // 2
    PB: tl.constexpr = (B + 1) // 2
    STRIPS: tl.constexpr = (PA * PB + ROWS * REPEAT - 1) // (ROWS * REPEAT)
    image = (tl.program_id(0) // STRIPS).to(tl.int64)
    begin = tl.program_id(0) % STRIPS * (ROWS * REPEAT)
    z += image * (A * B * C)
    grad += image * (PA * PB * C)
    where += image * (PA * PB * C)
    channel = tl.arange(0, C)
    centre = tl.load(mean + channel)[None, :]
    rstd = tl.rsqrt(tl.load(var + channel) + eps)[None, :]
    total = tl.zeros([ROWS, C], tl.float32)
    product = tl.zeros([ROWS, C], tl.float32)
    for tile in range(REPEAT):
        at = begin + tile * ROWS + tl.arange(0, ROWS)
        i, j = at // PB, at % PB
        d00, d01, d10, d11 = _gather(grad, where, i, j, PA, PB, C)
        total, product = _add(total, product, z, d00, 2 * i, 2 * j, centre, rstd, A, B, C)
        total, product = _add(total, product, z, d01, 2 * i, 2 * j + 1, centre, rstd, A, B, C)
        total, product = _add(total, product, z, d10, 2 * i + 1, 2 * j, centre, rstd, A, B, C)
        total, product = _add(total, product, z, d11, 2 * i + 1, 2 * j + 1, centre, rstd, A, B, C)
    to = tl.program_id(0).to(tl.int64) * C + channel
    tl.store(totals + to, tl.sum(total, 0))
    tl.store(products + to, tl.sum(product, 0))


@triton.jit
def _odd_windows(grad, where, wanted, i, j, place, PA: tl.constexpr, PB: tl.constexpr, C: tl.constexpr):
    """What windows (i, j) give to pixels at ``place`` in them, where wanted."""
    inside = (wanted & (i < PA) & (j < PB))[:, None]
    at = (i * PB + j)[:, None] * C + tl.arange(0, C)[None, :]
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(tl.load(where + at, mask=inside, other=9) == place[:, None], slope, 0.0)


@triton.jit
def _gather_one(grad, where, row, col, PA: tl.constexpr, PB: tl.constexpr, C: tl.constexpr):
    """The gradient d at pixels (row, col): an odd row lies in two rows of windows, an odd column in two columns."""
    i, j, odd_row, odd_col = row // 2, col // 2, row % 2, col % 2
    always = row >= 0
    d = _odd_windows(grad, where, always, i, j, 4 + odd_row * 3 + odd_col, PA, PB, C)
    d += _odd_windows(grad, where, odd_col == 1, i, j + 1, 3 + odd_row * 3, PA, PB, C)
    d += _odd_windows(grad, where, odd_row == 1, i + 1, j, 1 + odd_col, PA, PB, C)
    return d + _odd_windows(grad, where, (odd_row + odd_col) == 2, i + 1, j + 1, row * 0, PA, PB, C)


@triton.jit
def weight_gradient(
    x, grad, where, z, mean, var, weight, total, product, parts, eps,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, REPEAT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: the gradient of w, as (C, 8 * 32), from REPEAT tiles of ROWS pixels of z; dz is not written."""
    A: tl.constexpr = (H + 1) // 2
    B: tl.constexpr = (W + 1) // 2
    PA: tl.constexpr = (A + 1) // 2
    PB: tl.constexpr = (B + 1) // 2
    STRIPS: tl.constexpr = (A * B + ROWS * REPEAT - 1) // (ROWS * REPEAT)
    image = (tl.program_id(0) // STRIPS).to(tl.int64)
    begin = tl.program_id(0) % STRIPS * (ROWS * REPEAT)
    x += image * (H * W * 3)
    z += image * (A * B * C)
    grad += image * (PA * PB * C)
    where += image * (PA * PB * C)
    channel = tl.arange(0, C)
    centre = tl.load(mean + channel)[None, :]
    rstd = tl.rsqrt(tl.load(var + channel) + eps)[None, :]
    factor = tl.load(weight + channel)[None, :] * rstd
    s = tl.load(total + channel)[None, :]
    t = tl.load(product + channel)[None, :]
    acc = tl.zeros([C, 8 * SPAN], tl.float32)
    for tile in range(REPEAT):
        at = begin + tile * ROWS + tl.arange(0, ROWS)
        row, col = at // B, at % B
        d = _gather_one(grad, where, row, col, PA, PB, C)
        standard, _, inside = _standard(z, row, col, centre, rstd, A, B, C)
        slope = tl.where(inside, factor * (d - s - standard * t), 0.0).to(x.dtype.element_ty)
        patch = _patches(x, row, col, 0, H, W, 8)
        acc = tl.dot(tl.trans(slope), patch, acc, input_precision=PRECISION)
    to = parts + tl.program_id(0).to(tl.int64) * (C * 8 * SPAN)
    tl.store(to + channel[:, None] * (8 * SPAN) + tl.arange(0, 8 * SPAN)[None, :], acc)
