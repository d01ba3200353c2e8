"""The pooling baselines: mean and maximum of patch logits, and mean of patch features.

    meanmil: logits = mean over i of f(x_i)
    maxmil:  logits_k = max over i of f(x_i)_k
    meanP:   logits = W mean over i of norm(x_i)

with f(x_i) = classifier(dropout(act(W x_i + b))). Paper of the instance-level forms as baselines: Wang et
al., "Revisiting multiple instance neural networks", 2018, arXiv 1610.02501 (mi-Net). meanP has no hidden
layer: end to end it is the encoder with its usual classifier on the average patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.layers import PatchNorm, Stem, StemOptions, as_batch, initialise, masked_mean


class InstancePooling(nn.Module):
    """Classifies every patch and pools the logits by mean or maximum."""

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions, *, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.stem = Stem(input_dim, stem)
        self.classifier = nn.Linear(stem.inner_dim, n_classes, bias=stem.bias)
        self.apply(initialise)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D) with mask (B, N) to logits (B, K); ``pos`` is not used."""
        x, mask = as_batch(x, mask)
        logits = self.classifier(self.stem(x, mask))  # (B, N, K)
        if not self.maximum:
            return masked_mean(logits, mask)
        if mask is not None:
            logits = logits.masked_fill(~mask.unsqueeze(-1), torch.finfo(logits.dtype).min)
        return logits.amax(1)


class FeatureMean(nn.Module):
    """Mean of the (normalised) features and one linear layer.

    There is no hidden layer: ``inner_dim``, ``act`` and ``dropout`` have no effect.
    """

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions) -> None:
        super().__init__()
        self.norm = PatchNorm(input_dim, stem.norm, bias=stem.bias)
        self.classifier = nn.Linear(input_dim, n_classes, bias=stem.bias)
        self.apply(initialise)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D) with mask (B, N) to logits (B, K); ``pos`` is not used."""
        x, mask = as_batch(x, mask)
        mean = masked_mean(self.norm(x, mask), mask).to(x.dtype)
        return self.classifier(mean)
