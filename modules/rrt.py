"""RRTMIL (R2T-MIL): a regional transformer re-embeds the patches, attention pooling aggregates them.

Paper: Tang et al., "Feature Re-Embedding: Towards Foundation Model-Level Performance in Computational
Pathology", CVPR 2024, arXiv 2402.17228.

    Z = H + R-MSA(LN(H));   Z' = Z + CR-MSA(LN(Z));   bag = ABMIL(LN(Z'))

The patches, in list order, fill a square that is cut into L x L regions of p cells. R-MSA is self-attention
inside each region with EPEG, a depth-wise convolution of the attention logits E before the softmax:
softmax(E + conv_k(E)). CR-MSA lets the regions exchange K representatives each:

    A = Z_region Phi (p x K),   R = softmax_p(A)^T Z_region,   R' = MSA over the regions of R
    Z'_region = sum over K of softmax_K(A) * minmax_p(A) * R'

``rrt_n_layers`` counts both kinds: the last is CR-MSA, those before it R-MSA. The 2.70 M parameters at
1024 -> 512 -> 2 are those of Table 1 of the ABMILX paper. The result depends on the order of the patches.

Different on purpose: cells of the square that hold no patch take no part in attention, representatives or
minmax (the published program attends to zeros); EPEG has no bias, which the softmax would remove.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.layers import (
    AttentionScores,
    Stem,
    StemOptions,
    as_batch,
    check_heads,
    initialise,
    join_weights,
    masked_softmax,
    merge_heads,
    real_bags,
    split_heads,
    weighted_sum,
)
from modules.transmil import square_side
from utils.errors import UserError

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True)
class RRTOptions:
    """Sizes of the regional transformer: heads, layers, regions per side, EPEG kernel, representatives."""

    n_heads: int = 8
    n_layers: int = 2
    region_num: int = 8
    epeg_k: int = 15
    crmsa_k: int = 3

    def check(self) -> None:
        """Raises UserError for values without a meaning."""
        if self.n_layers < 1 or self.region_num < 1 or self.crmsa_k < 1:
            raise UserError(
                f"rrtmil: rrt_n_layers {self.n_layers}, region_num {self.region_num} and crmsa_k "
                f"{self.crmsa_k} must all be at least 1"
            )
        if self.epeg_k < 1 or self.epeg_k % 2 == 0:
            raise UserError(f"rrtmil: epeg_k {self.epeg_k} must be odd, so that the convolution has a centre")


def to_regions(x: Tensor, per_side: int) -> Tensor:
    """(B, N, C) in reading order to (B, L * L, p, C), zero where the square holds no patch."""
    bags, count, width = x.shape
    cell = -(-square_side(count) // per_side)
    side = cell * per_side
    grid = F.pad(x, (0, 0, 0, side * side - count)).view(bags, per_side, cell, per_side, cell, width)
    return grid.transpose(2, 3).reshape(bags, per_side * per_side, cell * cell, width)


def from_regions(x: Tensor, per_side: int, count: int) -> Tensor:
    """The inverse of ``to_regions``: (B, L * L, p, C) to the first ``count`` cells in reading order."""
    bags, _, size, width = x.shape
    cell = round(size**0.5)
    grid = x.view(bags, per_side, per_side, cell, cell, width).transpose(2, 3)
    return grid.reshape(bags, -1, width)[:, :count]


def spread(logits: Tensor, cells: Tensor) -> Tensor:
    """Min-max normalisation of (B, R, p, K) over a region's real cells (R, p, 1); 0 where all are equal."""
    low = logits.masked_fill(~cells, -LOWEST).amin(2, keepdim=True)
    high = logits.masked_fill(~cells, LOWEST).amax(2, keepdim=True)
    # A region without a span, or without a patch, is divided by 1: no infinity may enter the gradient.
    filled = cells.any(1, keepdim=True)
    span = torch.where(filled & (high > low), high - low, 1.0)
    return (logits - low.masked_fill(~filled, 0)) / span


class SelfAttention(nn.Module):
    """Multi-head self-attention of (G, p, C), mask (G, p) of real rows; EPEG when ``epeg_k`` is given."""

    def __init__(self, width: int, n_heads: int, *, epeg_k: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.epeg: nn.Conv2d | None = None
        if epeg_k is not None:
            self.epeg = nn.Conv2d(n_heads, n_heads, (epeg_k, 1), padding=(epeg_k // 2, 0), groups=n_heads, bias=False)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, -1))  # (G, H, p, d)
        keys = real[:, None, None, :]
        if self.epeg is None:
            # A group without a single patch keeps its keys: its rows are dropped later and must not be NaN.
            keys = keys | ~real.any(-1)[:, None, None, None]
            return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=keys)))
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (G, H, p, p)
        logits = logits.masked_fill(~real[:, None, :, None], 0)
        logits = (logits + self.epeg(logits)).float().masked_fill(~keys, LOWEST)
        return self.out(merge_heads(logits.softmax(-1).to(v.dtype) @ v))


class RegionAttention(nn.Module):
    """R-MSA: (B, L * L, p, C) attends within each region."""

    def __init__(self, width: int, options: RRTOptions, *, bias: bool = True) -> None:
        super().__init__()
        self.attention = SelfAttention(width, options.n_heads, epeg_k=options.epeg_k, bias=bias)

    def forward(self, regions: Tensor, real: Tensor) -> Tensor:
        bags = len(regions)
        attended = self.attention(regions.flatten(0, 1), real.repeat(bags, 1))
        return attended.unflatten(0, (bags, -1))


class CrossRegionAttention(nn.Module):
    """CR-MSA: representatives of each region (B, L * L, p, C) attend to those of the other regions."""

    def __init__(self, width: int, options: RRTOptions, *, bias: bool = True) -> None:
        super().__init__()
        self.phi = nn.Linear(width, options.crmsa_k, bias=False)
        self.attention = SelfAttention(width, options.n_heads, bias=bias)

    def forward(self, regions: Tensor, real: Tensor) -> Tensor:
        cells = real.unsqueeze(-1)
        logits = self.phi(regions).float()  # (B, R, p, K)
        combine = logits.masked_fill(~cells, LOWEST).softmax(2).to(regions.dtype)
        picks = torch.einsum("brpk,brpc->bkrc", combine, regions)  # (B, K, R, C)
        groups = picks.flatten(0, 1)
        exchanged = self.attention(groups, real.any(-1).expand(len(groups), -1)).view_as(picks)
        dispatch = (logits.softmax(-1) * spread(logits, cells)).masked_fill(~cells, 0).to(exchanged.dtype)
        return torch.einsum("brpk,bkrc->brpc", dispatch, exchanged)


class RRTMIL(nn.Module):
    """Re-embedded regional transformer with ABMIL pooling.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
        options: sizes of the transformer.
    """

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions, options: RRTOptions) -> None:
        super().__init__()
        options.check()
        inner = stem.inner_dim
        check_heads("rrtmil", inner, options.n_heads)
        self.region_num = options.region_num
        self.stem = Stem(input_dim, stem)
        kinds = [RegionAttention] * (options.n_layers - 1) + [CrossRegionAttention]
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in kinds)
        self.layers = nn.ModuleList(kind(inner, options, bias=stem.bias) for kind in kinds)
        self.norm = nn.LayerNorm(inner)
        self.scores = AttentionScores(inner, 128, bias=stem.bias)
        self.classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.apply(initialise)

    def _embed(self, h: Tensor) -> Tensor:
        """Re-embeds bags of equal length: (B, N, C) to (B, N, C)."""
        count = h.shape[1]
        ones = h.new_ones(1, count, 1)
        real = to_regions(ones, self.region_num)[0, ..., 0] > 0  # (R, p)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            regions = to_regions(norm(h), self.region_num)
            h = h + from_regions(layer(regions, real), self.region_num, count)
        return self.norm(h)

    def _pool(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Bag features (B, C), and the weights (b, 1, n) of each group of equally long bags."""
        x, mask = as_batch(x, mask)
        features, weights = [], []
        for bag, _ in real_bags(self.stem(x, mask), mask, None):
            z = self._embed(bag)
            weights.append(masked_softmax(self.scores(z), None))
            features.append(weighted_sum(weights[-1], z).squeeze(1))
        return torch.cat(features), weights

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D), mask (B, N), to logits (B, K); ``pos`` is not used, the order is."""
        return self.classifier(self._pool(x, mask)[0])

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Weights (B, 1, N) of the attention pooling."""
        return join_weights(self._pool(x, mask)[1], mask)
