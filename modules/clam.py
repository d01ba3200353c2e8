"""CLAM: gated attention pooling with clustering of the most and least attended patches.

Paper: Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images",
Nature Biomedical Engineering 2021, arXiv 2004.09666. Instance loss: Berrada, Zisserman, Kumar, "Smooth loss
functions for deep top-k classification", ICLR 2018, arXiv 1802.07595.

    a_b = softmax over i of w_b^T (tanh(V h_i) * sigmoid(U h_i)),   z_b = sum_i a_bi h_i
    single branch (sb): one a, logits = W z        multi branch (mb): one a per class, logits_k = w_k^T z_k

Instance loss, a binary classifier per class: in the bag's own class the k = 8 most attended patches are
positive and the k least attended negative; in every other class the k most attended are negative (the
paper's case of mutually exclusive classes, which softmax and discrete hazards both assume). The loss is the
smooth top-1 SVM with margin 1 and temperature 1, averaged over classes. Weights: 0.7 bag loss, 0.3 instance
loss.

Different on purpose: a bag with fewer than 16 patches takes half of them on each side (never one patch on
both); the attention scores have no bias and no dropout of their own. For survival the class is the time
bin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


def smooth_svm(scores: Tensor, target: Tensor) -> Tensor:
    """Smooth top-1 SVM: mean over rows of log sum_j exp([j != y] + s_j - s_y).

    Args:
        scores: (P, C).
        target: (P,) class indices.
    """
    margin = 1 - F.one_hot(target, scores.shape[-1])
    return F.cross_entropy(scores.float() + margin, target)


class CLAM(nn.Module):
    """CLAM-SB and CLAM-MB.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
        multi_branch: one attention per class (mb) instead of one (sb).
        k_sample: patches taken at each end of the attention for the instance loss.
    """

    loss_weights = (0.7, 0.3)

    def __init__(
        self, input_dim: int, n_classes: int, stem: StemOptions, *, multi_branch: bool, k_sample: int = 8
    ) -> None:
        super().__init__()
        self.n_classes, self.multi_branch, self.k_sample = n_classes, multi_branch, k_sample
        branches = n_classes if multi_branch else 1
        self.stem = Stem(input_dim, stem)
        self.scores = AttentionScores(stem.inner_dim, 256, branches, gated=True, bias=stem.bias)
        self.norm = bag_norm(stem.inner_dim, stem)
        self.classifier = nn.Linear(stem.inner_dim, n_classes, bias=stem.bias)
        self.instance = nn.Linear(stem.inner_dim, 2 * n_classes, bias=stem.bias)
        self.apply(initialise)

    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Patch embeddings (B, N, C) and weights (B, branches, N)."""
        h = self.stem(x, mask)
        return h, masked_softmax(self.scores(h), mask)

    def _classify(self, h: Tensor, weights: Tensor) -> Tensor:
        feature = self.norm(weighted_sum(weights, h))  # (B, branches, C)
        logits = self.classifier(feature)  # (B, branches, K)
        # Branch k answers for class k alone.
        return logits.diagonal(dim1=1, dim2=2) if self.multi_branch else logits.squeeze(1)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D) with mask (B, N) to logits (B, K); ``pos`` is not used."""
        x, mask = as_batch(x, mask)
        return self._classify(*self._attend(x, mask))

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Attention weights (B, 1, N) for sb, (B, K, N) with one map per class for mb."""
        return self._attend(*as_batch(x, mask))[1]

    def forward_with_aux(
        self, x: Tensor, mask: Tensor | None, target: Tensor, criterion: Criterion
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and the instance loss, a scalar; ``target`` (B,) holds classes.

        A survival task counts its bins twice, dead and censored: modulo K either is the bin.

        ``criterion`` is the bag's and is not used: the instance loss has classes of its own.
        """
        x, mask = as_batch(x, mask)
        h, weights = self._attend(x, mask)
        losses = []
        for index, own in enumerate((target % self.n_classes).tolist()):
            real = slice(None) if mask is None else mask[index]
            losses.append(self._instance_loss(h[index, real], weights[index][:, real], own))
        return self._classify(h, weights), torch.stack(losses).mean()

    def _instance_loss(self, h: Tensor, weights: Tensor, own: int) -> Tensor:
        """The loss of one bag: patches (n, C), weights (branches, n), the bag's class."""
        count = len(h)
        most = weights.topk(min(self.k_sample, (count + 1) // 2)).indices  # (branches, k)
        least = weights.topk(min(self.k_sample, count // 2), largest=False).indices
        losses = []
        for k in range(self.n_classes):
            branch = k if self.multi_branch else 0
            chosen, labels = most[branch], torch.full_like(most[branch], int(k == own))
            if k == own:
                chosen = torch.cat([chosen, least[branch]])
                labels = torch.cat([labels, torch.zeros_like(least[branch])])
            scores = self.instance(h[chosen])[:, 2 * k : 2 * k + 2]
            losses.append(smooth_svm(scores, labels))
        return torch.stack(losses).mean()
