"""QAMIL: one layer of multi-head query attention pools the bag.

The ABMILX paper (Tang et al., NeurIPS 2025, arXiv 2506.02408, Table 7) lists QAMIL as "one layer of
multi-head query attention" and says no more. This is that layer as in pooling by multi-head attention (Lee
et al., "Set Transformer", ICML 2019, arXiv 1810.00825, eq. 11) and the decoder of DETR, with one learnt
query:

    a^j = softmax over i of <q^j, (K h_i)^j> / sqrt(d),   z^j = sum_i a_i^j (V h_i)^j,   j = 1 .. m heads
    z = O concat(z^1 .. z^m),   logits = W LN(z)

Different on purpose: no projection of the query (a learnt vector needs none) and no bias on the keys (the
softmax removes it); no residual, since the query says nothing about the slide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.layers import Stem, StemOptions, as_batch, check_heads, initialise, masked_softmax


class QAMIL(nn.Module):
    """Multi-head attention pooling by one learnt query.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
        n_heads: attention heads; they must divide the inner width.
        attn_dropout: dropout on the attention weights.
    """

    def __init__(
        self,
        input_dim: int,
        n_classes: int,
        stem: StemOptions,
        *,
        n_heads: int = 8,
        attn_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = stem.inner_dim
        check_heads("qamil", inner, n_heads)
        self.n_heads, self.attn_dropout = n_heads, attn_dropout
        self.stem = Stem(input_dim, stem)
        self.query = nn.Parameter(torch.randn(n_heads, inner // n_heads))
        self.key = nn.Linear(inner, inner, bias=False)
        self.value = nn.Linear(inner, inner, bias=stem.bias)
        self.out = nn.Linear(inner, inner, bias=stem.bias)
        self.norm = nn.LayerNorm(inner)
        self.classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.apply(initialise)

    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Patch embeddings (B, N, C) and weights (B, H, N)."""
        x, mask = as_batch(x, mask)
        h = self.stem(x, mask)
        keys = self.key(h).unflatten(-1, self.query.shape)  # (B, N, H, d)
        scores = torch.einsum("bnhd,hd->bhn", keys, self.query.to(keys.dtype)) / self.query.shape[1] ** 0.5
        return h, masked_softmax(scores, mask)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D) with mask (B, N) to logits (B, K); ``pos`` is not used."""
        h, weights = self._attend(x, mask)
        weights = F.dropout(weights, self.attn_dropout, self.training)
        values = self.value(h).unflatten(-1, self.query.shape)  # (B, N, H, d)
        with torch.autocast(h.device.type, enabled=False):
            pooled = torch.einsum("bhn,bnhd->bhd", weights, values.float()).flatten(1)
        return self.classifier(self.norm(self.out(pooled.to(values.dtype))))

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Attention weights (B, heads, N)."""
        return self._attend(x, mask)[1]
