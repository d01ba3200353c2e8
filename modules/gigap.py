"""GigaPath's slide encoder: LongNet, a transformer with dilated attention, over the patches of a slide.

Papers: Xu et al., "A whole-slide foundation model for digital pathology from real-world data", Nature 2024,
https://doi.org/10.1038/s41586-024-07441-w; Ding et al., "LongNet", 2023, arXiv 2307.02486; Wang et al.,
"When an Image is Worth 1,024 x 1,024 Words", 2023, arXiv 2312.03558.

Dilated attention mixes branches i of segment length w_i and dilation r_i. Branch i cuts the sequence into
segments of w_i; in each, head j sees the rows j mod r_i, j mod r_i + r_i, ... and attends among them. With
O_i its result and s_i the softmax denominator (zero for rows that a head skips),

    O = sum_i s_i O_i / sum_i s_i                                                 (LongNet, eq. 10 and 11)

A layer is x + MSA(LN(x)), then x + MLP(LN(x)), with a LayerNorm before each output projection too. The
logits come from the class token after a last LayerNorm. The published size, 86 M parameters on 1536
features, is inner_dim 768, n_layers 12, n_heads 16, pos sincos; the options set it. The result depends on
the order of the patches.

Different on purpose: plain torch in blocks of bounded size, no flash-attention kernel; no stochastic depth;
the authors' pretrained weights are not loaded; the patch embedding has no activation, so ``act`` has no
effect.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.layers import (
    Stem,
    StemOptions,
    as_batch,
    check_heads,
    initialise,
    merge_heads,
    real_bags,
    split_heads,
)
from modules.vitmil import need_positions, sincos
from utils.errors import UserError

BRANCHES = ((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16))
"""Segment length and dilation of GigaPath's five branches."""

BLOCK_SCORES = 2**26
"""Attention scores that exist at a time: 256 MiB in float32."""

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True)
class LongNetOptions:
    """Sizes of the slide encoder; ``branches`` are (segment length, dilation), the first with dilation 1."""

    n_heads: int = 16
    n_layers: int = 12
    ffn_ratio: float = 4.0
    pos: str = "sincos"
    branches: tuple[tuple[int, int], ...] = BRANCHES

    def check(self) -> None:
        """Raises UserError for values without a meaning."""
        if self.n_layers < 1:
            raise UserError(f"gigap: n_layers {self.n_layers} must be at least 1")
        if self.pos not in ("none", "sincos"):
            raise UserError(f"gigap: --pos={self.pos} does not fit; it must be sincos (as published) or none")


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and the log of its softmax denominator.

    Args:
        q: (G, a, d) queries, already scaled.
        k: (G, m, d).
        v: (G, m, d).
        keys: (G, m), True where there is a key.

    Returns:
        (G, a, d) and (G, a), float32.
    """
    scores = (q @ k.transpose(1, 2)).float().masked_fill(~keys.unsqueeze(1), LOWEST)
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.unsqueeze(-1)).exp()
    return (weights.to(v.dtype) @ v).float(), log_sum


def _again(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    return checkpoint(attend, q, k, v, keys, use_reentrant=False, preserve_rng_state=False)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """``attend`` with at most BLOCK_SCORES scores at a time, recomputed in the backward pass."""
    groups, rows, count = len(q), q.shape[1], k.shape[1]
    if groups * rows * count <= BLOCK_SCORES:
        return attend(q, k, v, keys)
    some_rows = min(rows, max(1, BLOCK_SCORES // count))
    some_groups = max(1, BLOCK_SCORES // (count * some_rows))
    outs, sums = [], []
    for at in range(0, groups, some_groups):
        part = slice(at, at + some_groups)
        blocks = [_again(rows_q, k[part], v[part], keys[part]) for rows_q in q[part].split(some_rows, 1)]
        outs.append(torch.cat([out for out, _ in blocks], 1))
        sums.append(torch.cat([log_sum for _, log_sum in blocks], 1))
    return torch.cat(outs), torch.cat(sums)


class Dilation:
    """One branch over tensors like (B, H, N, d): which rows each head sees, and the way there and back."""

    def __init__(self, like: Tensor, segment: int, ratio: int) -> None:
        n_heads, count = like.shape[1:3]
        self.count, self.ratio = count, ratio
        self.segment = min(segment, count)
        self.segments = -(-count // self.segment)
        self.rows = -(-self.segment // ratio)  # m: rows that a head sees of a segment
        self.heads = torch.arange(n_heads, device=like.device)
        self.offsets = self.heads % ratio

    def take(self, x: Tensor) -> Tensor:
        """(B, H, N, e) to what each head sees, (H, B, S, m, e); zero after the end."""
        x = F.pad(x, (0, 0, 0, self.segments * self.segment - self.count)).unflatten(2, (self.segments, -1))
        x = F.pad(x, (0, 0, 0, self.rows * self.ratio - self.segment)).unflatten(3, (self.rows, self.ratio))
        return x[:, self.heads, :, :, self.offsets]

    def put(self, seen: Tensor, fill: float) -> Tensor:
        """The inverse of ``take``: (H, B, S, m, e) to (B, H, N, e), ``fill`` in rows that a head skips."""
        n_heads, bags, _, _, width = seen.shape
        x = seen.new_full((bags, n_heads, self.segments, self.rows, self.ratio, width), fill)
        x[:, self.heads, :, :, self.offsets] = seen
        x = x.flatten(3, 4)[:, :, :, : self.segment].flatten(2, 3)
        return x[:, :, : self.count]


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, branches: tuple[tuple[int, int], ...]) -> Tensor:
    """LongNet attention of (B, H, N, d); branches that cover the same rows twice count them twice."""
    outs, sums = [], []
    ones = q.new_ones(1, q.shape[1], q.shape[2], 1)
    for segment, ratio in branches:
        branch = Dilation(q, segment, ratio)
        seen = branch.take(q * q.shape[-1] ** -0.5)
        keys = (branch.take(ones) > 0).expand(*seen.shape[:-1], 1)
        flat = [part.flatten(0, 2) for part in (seen, branch.take(k), branch.take(v), keys)]
        out, log_sum = attend_in_blocks(flat[0], flat[1], flat[2], flat[3].squeeze(-1))
        outs.append(branch.put(out.view(seen.shape), 0.0))
        sums.append(branch.put(log_sum.view(keys.shape), LOWEST))
    shares = torch.stack(sums).softmax(0)  # (branches, B, H, N, 1)
    mixed = sum(share * out for share, out in zip(shares, outs, strict=True))
    return torch.as_tensor(mixed).to(v.dtype)


class LongNetLayer(nn.Module):
    """Pre-norm layer with dilated attention and a LayerNorm before each output projection."""

    def __init__(self, width: int, options: LongNetOptions, *, dropout: float, bias: bool) -> None:
        super().__init__()
        self.n_heads, self.branches = options.n_heads, options.branches
        hidden = int(width * options.ffn_ratio)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=bias), nn.Dropout(dropout))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden, bias=bias),
            nn.GELU(),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, width, bias=bias),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.n_heads) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(merge_heads(dilated_attention(q, k, v, self.branches)))
        return x + self.mlp(x)


class GigaPathMIL(nn.Module):
    """LongNet slide encoder with a classifier on its class token.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: inner width, input norm and biases; its dropout acts in the layers, its activation is not used.
        options: sizes of the encoder.
    """

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions, options: LongNetOptions) -> None:
        super().__init__()
        options.check()
        inner, self.pos = stem.inner_dim, options.pos
        check_heads("gigap", inner, options.n_heads)
        self.stem = Stem(input_dim, dataclasses.replace(stem, act="none", dropout=0.0))
        self.cls = nn.Parameter(torch.randn(1, 1, inner) * 0.02)
        self.layers = nn.ModuleList(
            LongNetLayer(inner, options, dropout=stem.dropout, bias=stem.bias) for _ in range(options.n_layers)
        )
        self.norm = nn.LayerNorm(inner)
        self.classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.apply(initialise)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D), mask (B, N), grid positions (B, N, 2), to logits (B, K)."""
        x, mask = as_batch(x, mask)
        h = self.stem(x, mask)
        if self.pos == "sincos":
            h = h + sincos(need_positions("gigap", pos), h.shape[-1]).to(h.dtype)
        return torch.cat([self._encode(bag) for bag, _ in real_bags(h, mask, None)])

    def _encode(self, h: Tensor) -> Tensor:
        h = torch.cat([self.cls.to(h.dtype).expand(len(h), -1, -1), h], 1)
        for layer in self.layers:
            h = layer(h)
        return self.classifier(self.norm(h[:, 0]))
