"""ABMIL: attention pooling of the patches of a bag, plain and gated.

Paper: Ilse, Tomczak, Welling, "Attention-based Deep Multiple Instance Learning", ICML 2018, arXiv 1802.04712.

    h_i = dropout(act(W x_i + b))                      input projection
    s_i = w^T tanh(V h_i)                              eq. 8
    s_i = w^T (tanh(V h_i) * sigmoid(U h_i))           eq. 9, gated
    a = softmax over i of s,   z = sum_i a_i h_i       eq. 7
    logits = classifier(z)

Different on purpose: the score has no bias (a constant does not change the softmax); with mil_norm = 'ln' a
LayerNorm stands at the input and before the classifier, as in the published program, for the gated form too
(where the program lost it); the dropout rate is the option's, not a fixed 0.25.
"""

from __future__ import annotations

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


class ABMIL(nn.Module):
    """Attention-based MIL.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
        hidden: width of the attention scores' hidden layer (128 in the paper, 384 for the gated form here).
        gated: eq. 9 instead of eq. 8.
    """

    def __init__(
        self, input_dim: int, n_classes: int, stem: StemOptions, *, hidden: int = 128, gated: bool = False
    ) -> None:
        super().__init__()
        self.stem = Stem(input_dim, stem)
        self.scores = AttentionScores(stem.inner_dim, hidden, gated=gated, bias=stem.bias)
        self.norm = bag_norm(stem.inner_dim, stem)
        self.classifier = nn.Linear(stem.inner_dim, n_classes, bias=stem.bias)
        self.apply(initialise)

    def _pool(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x, mask = as_batch(x, mask)
        h = self.stem(x, mask)  # (B, N, C)
        weights = masked_softmax(self.scores(h), mask)  # (B, 1, N)
        return weighted_sum(weights, h).squeeze(1), weights

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D) with mask (B, N) to logits (B, K); ``pos`` is not used."""
        feature, _ = self._pool(x, mask)
        return self.classifier(self.norm(feature))

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Attention weights (B, 1, N)."""
        return self._pool(x, mask)[1]
