"""TransMIL: two layers of approximate self-attention around a convolutional position code.

Paper: Shao et al., "TransMIL: Transformer based Correlated Multiple Instance Learning for Whole Slide Image
Classification", NeurIPS 2021, arXiv 2106.00908. Attention: Xiong et al., "Nystromformer", AAAI 2021,
arXiv 2102.03902.

    H = [cls, h_1 .. h_n, h_1 .. h_r],  n + r the next square      squaring by repeating the first patches
    H <- H + Nystrom(LN(H));  H <- PPEG(H);  H <- H + Nystrom(LN(H));  logits = W LN(H)_cls

    Nystrom(Q, K, V) = softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V + conv33(V)

with Q~, K~ the means over C / 2 segments of the sequence, and the pseudo-inverse by six steps of a cubic
iteration. The 2.67 M parameters at 1024 -> 512 -> 2 are those of Table 1 of the ABMILX paper. The result
depends on the order of the patches: through the segments, the convolutions and the repeated patches.

Different on purpose: the iteration starts from each matrix's own norm (the published program takes the
largest of the batch, which couples bags) and runs in float32; segments may be one shorter at the end, where
the published program pads the sequence with zeros that attract attention; the two softmaxes over n are
fused, so that no matrix of n x C / 2 is kept.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

PINV_STEPS = 6
VALUE_KERNEL = 33


def pseudo_inverse(a: Tensor, steps: int = PINV_STEPS) -> Tensor:
    """Moore-Penrose inverse of row-stochastic (..., m, m) by iteration in float32 (Nystromformer, eq. 11)."""
    with torch.autocast(a.device.type, enabled=False):
        a = a.float()
        eye = torch.eye(a.shape[-1], device=a.device)
        norm = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
        z = a.transpose(-1, -2) / norm[..., None, None]
        for _ in range(steps):
            az = a @ z
            z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
        return z


def segment_means(x: Tensor, landmarks: int) -> Tensor:
    """Means of at most ``landmarks`` consecutive segments of (B, H, N, d); the last may be shorter."""
    count = x.shape[2]
    length = -(-count // landmarks)
    segments = -(-count // length)
    sums = F.pad(x, (0, 0, 0, segments * length - count)).unflatten(2, (segments, length)).sum(3)
    sizes = x.new_full((segments, 1), length)
    sizes[-1] = count - (segments - 1) * length
    return sums / sizes


class NystromAttention(nn.Module):
    """Multi-head self-attention through landmarks: (B, N, C) to (B, N, C), memory linear in N."""

    def __init__(self, width: int, n_heads: int, landmarks: int, *, bias: bool = True) -> None:
        super().__init__()
        self.n_heads, self.landmarks = n_heads, landmarks
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(0.1)
        self.value_conv = nn.Conv2d(
            n_heads, n_heads, (VALUE_KERNEL, 1), padding=(VALUE_KERNEL // 2, 0), groups=n_heads, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.n_heads) for part in self.qkv(x).chunk(3, -1))  # (B, H, N, d)
        q_marks, k_marks = segment_means(q, self.landmarks), segment_means(k, self.landmarks)
        scale = q.shape[-1] ** -0.5
        kernel = (q_marks.float() @ k_marks.float().transpose(-1, -2) * scale).softmax(-1)  # (B, H, m, m)
        summary = F.scaled_dot_product_attention(q_marks, k, v)  # (B, H, m, d)
        with torch.autocast(x.device.type, enabled=False):
            summary = (pseudo_inverse(kernel) @ summary.float()).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k_marks, summary) + self.value_conv(v)
        return self.dropout(self.out(merge_heads(attended)))


class PPEG(nn.Module):
    """Pyramid position encoding generator: 7, 5 and 3 wide depth-wise convolutions of the squared sequence.

    ``forward`` takes patches (B, N, C) in reading order; when N is no square, the first patches are
    repeated to fill the grid and dropped again.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in (7, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        side = square_side(count)
        grid = fill_square(x).transpose(1, 2).unflatten(2, (side, side))  # (B, C, S, S)
        coded = grid + sum(conv(grid) for conv in self.convs)
        return coded.flatten(2).transpose(1, 2)[:, :count]


def square_side(count: int) -> int:
    """The side of the smallest square that holds ``count`` patches."""
    return math.isqrt(count - 1) + 1


def fill_square(x: Tensor) -> Tensor:
    """(B, N, C) to (B, S * S, C), filled by repeating the first patches."""
    missing = square_side(x.shape[1]) ** 2 - x.shape[1]
    return torch.cat([x, x[:, :missing]], 1)


class TransMIL(nn.Module):
    """Transformer MIL with Nystrom attention, PPEG and a class token.

    Args:
        input_dim: width D of a patch feature.
        n_classes: number K of logits.
        stem: input projection, norms and biases.
        n_heads: attention heads (8 in the paper); they must divide the inner width.
    """

    def __init__(self, input_dim: int, n_classes: int, stem: StemOptions, *, n_heads: int = 8) -> None:
        super().__init__()
        inner = stem.inner_dim
        check_heads("transmil", inner, n_heads)
        self.stem = Stem(input_dim, stem)
        self.cls = nn.Parameter(torch.randn(1, 1, inner) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in range(3))
        marks = max(1, inner // 2)
        self.attentions = nn.ModuleList(NystromAttention(inner, n_heads, marks, bias=stem.bias) for _ in range(2))
        self.ppeg = PPEG(inner)
        self.classifier = nn.Linear(inner, n_classes, bias=stem.bias)
        self.apply(initialise)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor | None = None) -> Tensor:
        """Patches (B, N, D) or (N, D), mask (B, N), to logits (B, K); ``pos`` is not used, the order is."""
        x, mask = as_batch(x, mask)
        h = self.stem(x, mask)
        return torch.cat([self._transform(bag) for bag, _ in real_bags(h, mask, None)])

    def _transform(self, h: Tensor) -> Tensor:
        """Embeddings (B, N, C) of bags of equal length to logits (B, K)."""
        h = fill_square(h)
        h = torch.cat([self.cls.to(h.dtype).expand(len(h), -1, -1), h], 1)
        h = h + self.attentions[0](self.norms[0](h))
        h = torch.cat([h[:, :1], self.ppeg(h[:, 1:])], 1)
        h = h + self.attentions[1](self.norms[1](h))
        return self.classifier(self.norms[2](h[:, 0]))
