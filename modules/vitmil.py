"""ViTMIL: pre-norm self-attention layers over the patches, pooled by a class token.

Paper: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929, as the ABMILX paper
uses it (Table 7: two self-attention layers, class token), without the feed-forward block unless ``ffn``
asks for it.

    H = [cls, h_1 .. h_n] (+ position code);   H <- H + MSA(LN(H));   (H <- H + MLP(LN(H)))
    logits = W LN(H)_cls

Position codes: 'none'; 'sincos', sines and cosines of the grid column and row of each patch, added at the
input; 'ppeg', the convolutions of TransMIL after the first layer, which take the list order for reading
order. Pooling: 'cls_token'; 'mean' or 'attn' over the patches (there is then no class token).

Different on purpose: attention runs fused, in memory linear in N; any number of layers; 'sincos' without
positions is refused instead of failing later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

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
    masked_mean,
    masked_softmax,
    merge_heads,
    real_bags,
    split_heads,
    weighted_sum,
)
from modules.transmil import PPEG
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ViTOptions:
    """Layers, pooling and position code of ``ViTMIL``."""

    n_heads: int = 8
    n_layers: int = 2
    pool: str = "cls_token"
    pos: str = "none"
    attn_dropout: float = 0.0
    ffn: bool = False
    ffn_ratio: float = 4.0
    ffn_dropout: float = 0.0

    def check(self) -> None:
        """Raises UserError for values without a meaning."""
        if self.n_layers < 1:
            raise UserError(f"vitmil: n_layers {self.n_layers} must be at least 1")
        if self.pool not in ("cls_token", "mean", "attn"):
            raise UserError(f"vitmil: --pool={self.pool} is unknown; it must be one of cls_token, mean, attn")
        if self.pos not in ("none", "sincos", "ppeg"):
            raise UserError(f"vitmil: --pos={self.pos} is unknown; it must be one of ppeg, sincos, none")


def sincos(pos: Tensor, width: int) -> Tensor:
    """Sine and cosine code of grid positions: (B, N, 2) columns and rows to (B, N, width), float32.

    A quarter of the width each for sin and cos of the column and of the row, with wavelengths from 2 pi to
    20,000 pi; a width that is no multiple of 4 ends in zeros.
    """
    quarter = width // 4
    rates = 10000.0 ** (-torch.arange(quarter, device=pos.device, dtype=torch.float32) / max(1, quarter))
    angles = pos.float().unsqueeze(-1) * rates  # (B, N, 2, width / 4)
    code = torch.cat([angles.sin(), angles.cos()], -1).flatten(2)
    return F.pad(code, (0, width - code.shape[-1]))


def need_positions(head: str, pos: Tensor | None) -> Tensor:
    """``pos``; raises UserError when there is none."""
    if pos is None:
        raise UserError(
            f"{head}: --pos=sincos needs the grid position of every patch, and these bags have none; "
            "give coordinates with the features, or choose --pos=ppeg or --pos=none"
        )
    return pos if pos.dim() == 3 else pos.unsqueeze(0)


class Attention(nn.Module):
    """Multi-head self-attention (B, N, C) to (B, N, C) with a mask (B, N) of real rows."""

    def __init__(self, width: int, n_heads: int, dropout: float = 0.0, *, bias: bool = True) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def _heads(self, x: Tensor) -> list[Tensor]:
        return [split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(x)  # (B, H, N, d)
        keys = None if mask is None else mask[:, None, None, :]
        rate = self.dropout if self.training else 0.0
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=rate)))

    def weights_of_first(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention (B, H, N - 1) of the first row over the others, summing to 1."""
        q, k, _ = self._heads(x)
        scores = (q[:, :, :1] @ k[:, :, 1:].transpose(-1, -2)).squeeze(2) * q.shape[-1] ** -0.5
        return masked_softmax(scores, None if mask is None else mask[:, 1:])


class Layer(nn.Module):
    """One pre-norm layer: x + MSA(LN(x)), then x + MLP(LN(x)) with ``ffn``."""

    def __init__(self, width: int, options: ViTOptions, *, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, options.n_heads, options.attn_dropout, bias=bias)
        self.mlp: nn.Module | None = None
        if options.ffn:
            hidden = int(width * options.ffn_ratio)
            self.mlp = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, hidden, bias=bias),
                nn.GELU(),
                nn.Dropout(options.ffn_dropout),
                nn.Linear(hidden, width, bias=bias),
                nn.Dropout(options.ffn_dropout),
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x if self.mlp is None else x + self.mlp(x)

    def class_weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention (B, H, N - 1) of the first token over the others, summing to 1."""
        return self.attention.weights_of_first(self.norm(x), mask)


class ViTMIL(nn.Module):
    """Transformer MIL with exact self-attention.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
        options: layers, pooling and position code.
    """

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions, options: ViTOptions) -> None:
        super().__init__()
        options.check()
        inner, self.options = stem.inner_dim, options
        check_heads("vitmil", inner, options.n_heads)
        self.stem = Stem(input_dim, stem)
        self.cls = nn.Parameter(torch.randn(1, 1, inner) * 0.02) if options.pool == "cls_token" else None
        self.layers = nn.ModuleList(Layer(inner, options, bias=stem.bias) for _ in range(options.n_layers))
        self.ppeg = PPEG(inner) if options.pos == "ppeg" else None
        self.norm = nn.LayerNorm(inner)
        self.scores = AttentionScores(inner, 128, bias=stem.bias) if options.pool == "attn" else None
        self.classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.apply(initialise)

    def _tokens(self, x: Tensor, mask: Tensor | None, pos: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embeddings with their position code and the class token, and the mask that covers it."""
        h = self.stem(x, mask)
        if self.options.pos == "sincos":
            h = h + sincos(need_positions("vitmil", pos), h.shape[-1]).to(h.dtype)
        if self.cls is not None:
            h = torch.cat([self.cls.to(h.dtype).expand(len(h), -1, -1), h], 1)
            mask = mask if mask is None else F.pad(mask, (1, 0), value=True)
        return h, mask

    def _transform(self, h: Tensor, mask: Tensor | None, last: int) -> Tensor:
        """The tokens after ``last`` layers."""
        for index, layer in enumerate(self.layers[:last]):
            h = layer(h, mask)
            if index == 0 and self.ppeg is not None:
                start = 0 if self.cls is None else 1
                h = torch.cat([h[:, :start], self.ppeg(h[:, start:])], 1)
        return h

    def _patch_weights(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Pooling weights (B, 1, N) of 'mean' and 'attn'."""
        if self.scores is None:
            return masked_softmax(h.new_zeros(len(h), 1, h.shape[1]), mask)
        return masked_softmax(self.scores(h), mask)

    def _logits(self, x: Tensor, mask: Tensor | None, pos: Tensor | None) -> Tensor:
        h, mask = self._tokens(x, mask, pos)
        h = self.norm(self._transform(h, mask, len(self.layers)))
        if self.cls is not None:
            return self.classifier(h[:, 0])
        if self.scores is None:
            return self.classifier(masked_mean(h, mask).to(h.dtype))
        return self.classifier(weighted_sum(self._patch_weights(h, mask), h).squeeze(1))

    def _weights(self, x: Tensor, mask: Tensor | None, pos: Tensor | None) -> Tensor:
        h, mask = self._tokens(x, mask, pos)
        if self.cls is None:
            return self._patch_weights(self.norm(self._transform(h, mask, len(self.layers))), mask)
        h = self._transform(h, mask, len(self.layers) - 1)
        return cast(Layer, self.layers[-1]).class_weights(h, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D), mask (B, N), grid positions (B, N, 2), to logits (B, K)."""
        x, mask = as_batch(x, mask)
        if self.ppeg is None:
            return self._logits(x, mask, pos)
        return torch.cat([self._logits(bag, None, None) for bag, _ in real_bags(x, mask, None)])

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """The class token's attention in the last layer (B, heads, N), or the pooling weights (B, 1, N)."""
        x, mask = as_batch(x, mask)
        if self.ppeg is None:
            return self._weights(x, mask, pos)
        return join_weights([self._weights(bag, None, None) for bag, _ in real_bags(x, mask, None)], mask)
