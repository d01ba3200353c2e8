"""2DMamba: a selective state space model that scans the slide's grid along rows, then along columns.

Paper: Zhang et al., "2DMamba: Efficient State Space Model for Image Representation with Applications on
Giga-Pixel Whole Slide Image Classification", CVPR 2025, arXiv 2412.00678; block and selection as in Gu,
Dao, "Mamba", 2023, arXiv 2312.00752.

    u, g = split(W_in LN(x));   u <- silu(conv3x3(u));   Delta, B, C from u;   A = -exp(A_log)
    row scan:     s_ij = exp(Delta_ij A) s_i,j-1 + Delta_ij B_ij u_ij
    column scan:  t_ij = exp(Delta_ij A) t_i-1,j + s_ij
    y_ij = C_ij t_ij + D u_ij;   x <- x + W_out (y * silu(g));   bag = ABMIL(LN(x))

The patches lie on the grid of their positions; cells without a patch hold a learnt vector and are dropped
after the scan. Without positions the list fills a square in reading order. The result depends on positions
or order.

Different on purpose: no CUDA kernel; the scans are a loop over columns and one over rows, in float32, over
as many channels at a time as fit a fixed block, recomputed in the backward pass, so that memory grows with
the area of the grid and not with area x states. Grid rows and columns without any patch are left out.
Patches of one cell (two magnifications, duplicates) share its mean. One block, as the published parameter
count (2.27 M; 2.29 M here) implies.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.layers import (
    AttentionScores,
    Stem,
    StemOptions,
    as_batch,
    initialise,
    join_weights,
    masked_softmax,
    real_bags,
    weighted_sum,
)
from modules.transmil import square_side

BLOCK_STATES = 2**26
"""Hidden states that exist at a time: 256 MiB in float32."""


def scan(decay: Tensor, drive: Tensor, dim: int) -> Tensor:
    """s_t = decay_t s_{t-1} + drive_t along ``dim``, from zero; all three of one shape."""
    state = torch.zeros_like(drive.select(dim, 0))  # so the decay has a gradient on a grid of one cell too
    states: list[Tensor] = []
    for a, b in zip(decay.unbind(dim), drive.unbind(dim), strict=True):
        state = torch.addcmul(b, a, state)
        states.append(state)
    return torch.stack(states, dim)


def scan_2d(u: Tensor, delta: Tensor, rates: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The selective scan over a grid.

    Args:
        u: (R, W, E) input.
        delta: (R, W, E) step sizes, positive.
        rates: (E, S) the negative A.
        b: (R, W, S) input selection.
        c: (R, W, S) output selection.

    Returns:
        (R, W, E): sum over states of C t.
    """
    decay = torch.exp(delta.unsqueeze(-1) * rates)  # (R, W, E, S)
    drive = (delta * u).unsqueeze(-1) * b.unsqueeze(2)
    states = scan(decay, scan(decay, drive, 1), 0)
    return torch.einsum("rwes,rws->rwe", states, c)


def _again(u: Tensor, delta: Tensor, rates: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return checkpoint(scan_2d, u, delta, rates, b, c, use_reentrant=False, preserve_rng_state=False)


def grid_cells(pos: Tensor) -> tuple[Tensor, int, int]:
    """Cells (N,) of positions (N, 2) on a grid without empty rows and columns, and its rows and columns."""
    columns, column = torch.unique(pos[:, 0], return_inverse=True)
    rows, row = torch.unique(pos[:, 1], return_inverse=True)
    return row * len(columns) + column, len(rows), len(columns)


class Mamba2DBlock(nn.Module):
    """x + 2-D selective scan of LN(x), for one grid (R, W, C)."""

    def __init__(self, width: int, *, states: int = 16, expand: int = 2, bias: bool = False) -> None:
        super().__init__()
        inner = expand * width
        self.states, self.rank = states, -(-width // 16)
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, 2 * inner, bias=bias)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.select = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.step = nn.Linear(self.rank, inner)
        self.rate_log = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.outward = nn.Linear(inner, width, bias=bias)

    def start(self) -> None:
        """Mamba's start: step sizes spread over 0.001 to 0.1 on a log scale."""
        steps = torch.exp(torch.empty_like(self.step.bias).uniform_(math.log(1e-3), math.log(1e-1)))
        nn.init.uniform_(self.step.weight, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():
            self.step.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inward(self.norm(x)).chunk(2, -1)  # (R, W, E)
        u = F.silu(self.conv(u.permute(2, 0, 1).unsqueeze(0)).squeeze(0).permute(1, 2, 0))
        low, b, c = self.select(u).split([self.rank, self.states, self.states], -1)
        with torch.autocast(x.device.type, enabled=False):
            delta = F.softplus(F.linear(low.float(), self.step.weight.float(), self.step.bias.float()))
            y = self._scan(u.float(), delta, b.float(), c.float()) + u.float() * self.skip.float()
        return x + self.outward(y.to(gate.dtype) * F.silu(gate))

    def _scan(self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
        rates = -self.rate_log.float().exp()
        size = max(1, BLOCK_STATES // (u[..., 0].numel() * self.states))
        parts = zip(u.split(size, -1), delta.split(size, -1), rates.split(size), strict=True)
        return torch.cat([_again(some, steps, rate, b, c) for some, steps, rate in parts], -1)


class Mamba2DMIL(nn.Module):
    """2-D state space MIL with attention pooling.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
    """

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions) -> None:
        super().__init__()
        inner = stem.inner_dim
        self.stem = Stem(input_dim, stem)
        self.empty = nn.Parameter(torch.randn(inner) * 0.02)
        self.block = Mamba2DBlock(inner)
        self.norm = nn.LayerNorm(inner)
        self.scores = AttentionScores(inner, 128, bias=stem.bias)
        self.classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.apply(initialise)
        self.block.start()

    def _scan(self, h: Tensor, pos: Tensor | None) -> Tensor:
        """One bag's embeddings (N, C) after the block."""
        if pos is None:
            cells, side = torch.arange(len(h), device=h.device), square_side(len(h))
            rows, columns = -(-len(h) // side), side
        else:
            cells, rows, columns = grid_cells(pos)
        filled = h.new_zeros(rows * columns).index_add(0, cells, h.new_ones(len(h)))
        grid = h.new_zeros(rows * columns, h.shape[1]).index_add(0, cells, h)
        grid = torch.where(filled.unsqueeze(1) > 0, grid / filled.clamp(min=1).unsqueeze(1), self.empty.to(h.dtype))
        return self.block(grid.view(rows, columns, -1)).flatten(0, 1)[cells]

    def _pool(self, x: Tensor, mask: Tensor | None, pos: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Bag features (B, C), and the weights (b, 1, n) of each group of equally long bags."""
        x, mask = as_batch(x, mask)
        if pos is not None and pos.dim() == 2:
            pos = pos.unsqueeze(0)
        features, weights = [], []
        for bags, places in real_bags(self.stem(x, mask), mask, pos):
            grids = [self._scan(bag, None if places is None else places[i]) for i, bag in enumerate(bags)]
            z = self.norm(torch.stack(grids))
            weights.append(masked_softmax(self.scores(z), None))
            features.append(weighted_sum(weights[-1], z).squeeze(1))
        return torch.cat(features), weights

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D), mask (B, N), grid positions (B, N, 2), to logits (B, K)."""
        return self.classifier(self._pool(x, mask, pos)[0])

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Weights (B, 1, N) of the attention pooling."""
        return join_weights(self._pool(x, mask, pos)[1], mask)
