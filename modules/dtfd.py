"""DTFD-MIL: pseudo-bags are pooled in a first tier, their features in a second.

Paper: Zhang et al., "DTFD-MIL: Double-Tier Feature Distillation Multiple Instance Learning for
Histopathology Whole Slide Image Classification", CVPR 2022, arXiv 2203.12081. This is the form AFS
(aggregated feature selection), where the feature that a pseudo-bag hands on is its attention pooled
feature:

    the patches of a bag are split at random into M pseudo-bags
    tier 1:  z_m = sum over i in m of a_i h_i,   a = softmax within m of the gated score,   y_m = W1 z_m
    tier 2:  z = sum over m of b_m z_m,          b = softmax over m of a second gated score,  y = W2 z

Loss: tier 2 with the bag's label plus tier 1 with the bag's label for every pseudo-bag (equal weights, both
trained together as the paper's sum).

Different on purpose: evaluation splits by list position (patch i goes to i modulo M) instead of at random,
so that a slide has one score; a bag with fewer than M patches has fewer pseudo-bags, and the tier-1 loss
repeats them to keep their weight. The forms MaxS, MaxMinS and MAS are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.layers import (
    AttentionScores,
    Criterion,
    Stem,
    StemOptions,
    as_batch,
    bag_norm,
    initialise,
    masked_softmax,
    weighted_sum,
)


class DTFD(nn.Module):
    """Double-tier MIL (AFS).

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
        pseudo_bags: number M of pseudo-bags.
    """

    loss_weights = (1.0, 1.0)

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions, *, pseudo_bags: int = 5) -> None:
        super().__init__()
        inner = stem.inner_dim
        self.pseudo_bags = pseudo_bags
        self.stem = Stem(input_dim, stem)
        self.scores = AttentionScores(inner, 128, gated=True, bias=stem.bias)
        self.classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.bag_scores = AttentionScores(inner, 128, gated=True, bias=stem.bias)
        self.norm = bag_norm(inner, stem)
        self.bag_classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.apply(initialise)

    def _members(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Which patches belong to which pseudo-bag: (B, M, N), True for members."""
        real = mask if mask is not None else x.new_ones(x.shape[:2], dtype=torch.bool)
        if self.training:
            order = torch.rand(real.shape, device=x.device).masked_fill(~real, 2.0)
            rank = order.argsort(1).argsort(1)
        else:
            rank = real.long().cumsum(1) - 1
        groups = torch.arange(self.pseudo_bags, device=x.device).view(1, -1, 1)
        return (rank.unsqueeze(1) % self.pseudo_bags == groups) & real.unsqueeze(1)

    def _tiers(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features (B, M, C) and weights (B, M, N) of tier 1, weights (B, 1, M) of tier 2, filled (B, M)."""
        x, mask = as_batch(x, mask)
        members = self._members(x, mask)
        filled = members.any(-1)
        h = self.stem(x, mask)
        weights = masked_softmax(self.scores(h).expand(-1, self.pseudo_bags, -1), members)
        weights = weights * filled.unsqueeze(-1)  # an empty pseudo-bag weighs no patch
        features = weighted_sum(weights, h)
        return features, weights, masked_softmax(self.bag_scores(features), filled), filled

    def _classify(self, features: Tensor, bag_weights: Tensor) -> Tensor:
        return self.bag_classifier(self.norm(weighted_sum(bag_weights, features).squeeze(1)))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D), mask (B, N), to the second tier's logits (B, K); ``pos`` is unused."""
        features, _, bag_weights, _ = self._tiers(x, mask)
        return self._classify(features, bag_weights)

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Attention weights (B, 1, N): a patch's weight in its pseudo-bag times the pseudo-bag's."""
        _, weights, bag_weights, _ = self._tiers(x, mask)
        return bag_weights @ weights

    def forward_with_aux(
        self, x: Tensor, mask: Tensor | None, target: Tensor, criterion: Criterion
    ) -> tuple[Tensor, Tensor]:
        """The second tier's logits (B, K), and the mean of ``criterion`` over the pseudo-bags of the first.

        The criterion sees one pseudo-bag of every bag at a time, so it may know more about the B bags.
        """
        features, _, bag_weights, filled = self._tiers(x, mask)
        groups = torch.arange(self.pseudo_bags, device=x.device) % filled.sum(1, keepdim=True)  # (B, M)
        logits = self.classifier(features)
        logits = logits.gather(1, groups.unsqueeze(-1).expand_as(logits))  # (B, M, K)
        losses = [criterion(logits[:, m], target) for m in range(self.pseudo_bags)]
        return self._classify(features, bag_weights), torch.stack(losses).mean()
