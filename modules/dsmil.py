"""DSMIL: an instance stream finds the critical patch, a bag stream attends by likeness to it.

Paper: Li, Li, Eliceiri, "Dual-stream Multiple Instance Learning Network for Whole Slide Image
Classification with Self-supervised Contrastive Learning", CVPR 2021, arXiv 2011.08939.

    instance stream:  c_ik = w_k^T h_i,   m_k = argmax over i of c_ik,   logits_k = c_{m_k k}
    bag stream:       U_ki = softmax over i of <q_i, q_{m_k}> / sqrt(128),   b_k = sum_i U_ki v_i
                      logits = Conv1d over (b_1 .. b_K)

with q_i = tanh(W2 relu(W1 h_i)) and v_i = relu(Wv h_i): the non-linear form, which has the 0.87 M
parameters that Table 1 of the ABMILX paper gives. Loss: half the bag stream's, half the instance stream's.

Different on purpose: the score of the bag is the bag stream's alone (as in the published program; the paper
averages both streams); one magnification, since multi-scale bags are made by the data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.layers import (
    Criterion,
    Stem,
    StemOptions,
    as_batch,
    bag_norm,
    initialise,
    masked_softmax,
    weighted_sum,
)

QUERY_DIM = 128


class DSMIL(nn.Module):
    """Dual-stream MIL: ``forward`` gives the bag stream, ``forward_with_aux`` adds the other's loss.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
    """

    loss_weights = (0.5, 0.5)

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions) -> None:
        super().__init__()
        inner = stem.inner_dim
        self.stem = Stem(input_dim, stem)
        self.instance = nn.Linear(inner, n_classes, bias=stem.bias)
        self.query = nn.Sequential(
            nn.Linear(inner, QUERY_DIM, bias=stem.bias),
            nn.ReLU(),
            nn.Linear(QUERY_DIM, QUERY_DIM, bias=stem.bias),
            nn.Tanh(),
        )
        self.value = nn.Sequential(nn.Linear(inner, inner, bias=stem.bias), nn.ReLU())
        self.norm = bag_norm(inner, stem)
        self.bag = nn.Conv1d(n_classes, n_classes, kernel_size=inner, bias=stem.bias)
        self.apply(initialise)

    def _streams(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Instance logits (B, K), attention (B, K, N) and patch embeddings (B, N, C)."""
        x, mask = as_batch(x, mask)
        h = self.stem(x, mask)
        scores = self.instance(h)  # (B, N, K)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-1), torch.finfo(scores.dtype).min)
        best, critical = scores.max(1)  # (B, K)
        query = self.query(h)  # (B, N, Q)
        chosen = query.gather(1, critical.unsqueeze(-1).expand(-1, -1, query.shape[-1]))  # (B, K, Q)
        likeness = chosen @ query.transpose(1, 2) / QUERY_DIM**0.5  # (B, K, N)
        return best, masked_softmax(likeness, mask), h

    def _classify(self, weights: Tensor, h: Tensor) -> Tensor:
        feature = self.norm(weighted_sum(weights, self.value(h)))  # (B, K, C)
        return self.bag(feature).squeeze(-1)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D), mask (B, N), to the bag stream's logits (B, K); ``pos`` is unused."""
        _, weights, h = self._streams(x, mask)
        return self._classify(weights, h)

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Attention weights (B, K, N), one map per class."""
        return self._streams(x, mask)[1]

    def forward_with_aux(
        self, x: Tensor, mask: Tensor | None, target: Tensor, criterion: Criterion
    ) -> tuple[Tensor, Tensor]:
        """The bag stream's logits (B, K), and ``criterion`` of the instance stream's logits."""
        best, weights, h = self._streams(x, mask)
        return self._classify(weights, h), criterion(best, target)
