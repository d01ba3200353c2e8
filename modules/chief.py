"""CHIEF's aggregator: gated attention pooling with an added embedding of the anatomical site.

Paper: Wang et al., "A pathology foundation model for cancer diagnosis and prognosis prediction", Nature 2024,
https://doi.org/10.1038/s41586-024-07894-z.

    a = softmax over i of w^T (tanh(V h_i) * sigmoid(U h_i))
    z = sum_i a_i h_i + dropout(relu(P t)),   logits = W z

where t (768 numbers) stands for the anatomical site: in the paper the text encoding of a prompt from CLIP.

Different on purpose: a cohort here is one task on one kind of slide, and no text encoder is at hand, so t
is one learnt vector for all slides. The authors' pretrained aggregator is not loaded; this head starts from
random weights. The attention scores have no bias, since it does not change the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.layers import (
    AttentionScores,
    Stem,
    StemOptions,
    as_batch,
    bag_norm,
    initialise,
    masked_softmax,
    weighted_sum,
)

SITE_DIM = 768


class CHIEF(nn.Module):
    """Gated attention pooling plus a site embedding.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
    """

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions) -> None:
        super().__init__()
        inner = stem.inner_dim
        self.stem = Stem(input_dim, stem)
        self.scores = AttentionScores(inner, 256, gated=True, bias=stem.bias)
        self.site = nn.Parameter(torch.randn(SITE_DIM))
        self.site_proj = nn.Sequential(nn.Linear(SITE_DIM, inner, bias=stem.bias), nn.ReLU(), nn.Dropout(stem.dropout))
        self.norm = bag_norm(inner, stem)
        self.classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.apply(initialise)

    def _pool(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x, mask = as_batch(x, mask)
        h = self.stem(x, mask)  # (B, N, C)
        weights = masked_softmax(self.scores(h), mask)  # (B, 1, N)
        return weighted_sum(weights, h).squeeze(1), weights

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D) with mask (B, N) to logits (B, K); ``pos`` is not used."""
        feature, _ = self._pool(x, mask)
        return self.classifier(self.norm(feature + self.site_proj(self.site)))

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Attention weights (B, 1, N)."""
        return self._pool(x, mask)[1]
