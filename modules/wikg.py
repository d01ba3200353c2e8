"""WiKG: a directed graph drawn between patches, with attention over each patch's nearest neighbours.

Paper: Li et al., "Dynamic Graph Representation with Knowledge-aware Attention for Histopathology Whole
Slide Image Analysis", CVPR 2024, arXiv 2403.07719.

    head and tail:  u_i = W_h h_i,   t_i = W_t h_i
    neighbours:     the k = 6 patches j of largest w_ij = <u_i, t_j> / sqrt(C),   p_ij = softmax over them
    edges:          r_ij = p_ij t_j + (1 - p_ij) u_i
    attention:      a_ij = softmax over j of <t_j, tanh(u_i + r_ij)>,   n_i = sum_j a_ij t_j
    update:         v_i = lrelu(W1 (u_i + n_i)) + lrelu(W2 (u_i * n_i))
    read-out:       z = sum_i s_i v_i,   s = softmax over i of a small network,   logits = W LN(z)

The 1.71 M parameters at 1024 -> 512 -> 2 are those of Table 1 of the ABMILX paper.

Different on purpose: the N x N similarities are never stored: neighbours are found in blocks of rows
without a gradient (choosing has none), then the k chosen similarities are computed again with one. Memory
is linear in N, time quadratic. The program that the ABMILX authors used runs out of memory on survival
bags.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.layers import Stem, StemOptions, as_batch, initialise, masked_softmax, weighted_sum

BLOCK_SCORES = 2**26
"""Similarities that exist at a time while neighbours are found: 256 MiB in float32."""


@torch.no_grad()
def nearest(heads: Tensor, tails: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """The ``k`` patches with the largest <head_i, tail_j> among the real ones: indices (B, N, k).

    Args:
        heads: (B, N, C).
        tails: (B, N, C).
        k: neighbours per patch, at most N.
        mask: (B, N), True where there is a patch.
    """
    rows = max(1, BLOCK_SCORES // (len(tails) * tails.shape[1]))
    transposed = tails.transpose(1, 2)
    found = []
    for block in heads.split(rows, 1):
        scores = block @ transposed  # (B, rows, N)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        found.append(scores.topk(k, -1).indices)
    return torch.cat(found, 1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, N, C) at (B, N, k): (B, N, k, C)."""
    bags = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    return x[bags, index]


class WiKG(nn.Module):
    """Knowledge-aware dynamic graph MIL.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
        neighbours: edges that leave a patch; a bag with fewer patches has fewer.
    """

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions, *, neighbours: int = 6) -> None:
        super().__init__()
        inner, bias = stem.inner_dim, stem.bias
        self.neighbours = neighbours
        self.stem = Stem(input_dim, stem)
        self.head = nn.Linear(inner, inner, bias=bias)
        self.tail = nn.Linear(inner, inner, bias=bias)
        self.add = nn.Linear(inner, inner, bias=bias)
        self.multiply = nn.Linear(inner, inner, bias=bias)
        self.act = nn.LeakyReLU()
        self.dropout = nn.Dropout(stem.dropout)
        self.scores = nn.Sequential(
            nn.Linear(inner, max(1, inner // 2), bias=bias),
            nn.LeakyReLU(),
            nn.Linear(max(1, inner // 2), 1, bias=False),
        )
        self.norm = nn.LayerNorm(inner)
        self.classifier = nn.Linear(inner, n_classes, bias=bias)
        self.apply(initialise)

    def _neighbourhood(self, head: Tensor, tail: Tensor, mask: Tensor | None) -> Tensor:
        """What the neighbours of each patch send to it: (B, N, C)."""
        index = nearest(head, tail, min(self.neighbours, tail.shape[1]), mask)  # (B, N, k)
        near = gather_rows(tail, index)  # (B, N, k, C)
        exists = None if mask is None else mask.unsqueeze(1).expand(-1, head.shape[1], -1).gather(2, index)
        own = head.unsqueeze(2)
        likeness = (own * near).sum(-1) / head.shape[-1] ** 0.5
        share = masked_softmax(likeness, exists).unsqueeze(-1).to(near.dtype)
        edge = share * near + (1 - share) * own
        joint = (near * torch.tanh(own + edge)).sum(-1)
        weights = masked_softmax(joint, exists).to(near.dtype)
        return (weights.unsqueeze(-1) * near).sum(2)

    def _pool(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        x, mask = as_batch(x, mask)
        h = self.stem(x, mask)
        head, tail = self.head(h), self.tail(h)
        near = self._neighbourhood(head, tail, mask)
        nodes = self.act(self.add(head + near)) + self.act(self.multiply(head * near))
        nodes = self.dropout(nodes)
        weights = masked_softmax(self.scores(nodes).transpose(1, 2), mask)  # (B, 1, N)
        return weighted_sum(weights, nodes).squeeze(1), weights

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D) with mask (B, N) to logits (B, K); ``pos`` is not used."""
        return self.classifier(self.norm(self._pool(x, mask)[0]))

    def attention(self, x: Tensor, mask: Tensor | None = None, pos: Tensor | None = None) -> Tensor:
        """Weights (B, 1, N) of the read-out."""
        return self._pool(x, mask)[1]
