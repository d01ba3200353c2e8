"""Pieces that several MIL heads share.

Shapes: B bags, N patches of the longest bag, D width of a feature, C inner width, H heads, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.sync_batchnorm import JoinedBatchNorm
from utils.errors import UserError

BLOCK_PATCHES = 2**16
"""Patches whose scores' hidden layer exists at a time in evaluation: 96 MiB at width 384 in float32."""

Criterion = Callable[[Tensor, Tensor], Tensor]
"""The engine's bag loss: logits (B, K) and target indices (B,) to a scalar."""


@dataclass(frozen=True, kw_only=True)
class StemOptions:
    """The input projection of a head: [norm] -> Linear -> activation -> dropout."""

    inner_dim: int = 512
    act: str = "relu"
    dropout: float = 0.25
    norm: str | None = None
    bias: bool = True


def as_batch(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The bags as (B, N, D) with their mask (B, N); one bag (N, D) becomes a batch of one.

    Rows outside the mask are set to zero, so that whatever a padded row holds (NaN included) cannot matter.
    Raises UserError when the shapes do not fit.
    """
    if x.dim() == 2:
        x = x.unsqueeze(0)
        mask = mask if mask is None else mask.reshape(1, -1)
    if x.dim() != 3 or x.shape[1] == 0:
        raise UserError(f"a bag must be (patches, width) or (bags, patches, width) with a patch; got {tuple(x.shape)}")
    if mask is None:
        return x, None
    if mask.shape != x.shape[:2]:
        raise UserError(f"the mask {tuple(mask.shape)} must have the bags and patches of x, {tuple(x.shape[:2])}")
    mask = mask.bool()
    return x.masked_fill(~mask.unsqueeze(-1), 0), mask


def real_bags(x: Tensor, mask: Tensor | None, pos: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each group of bags that needs no mask, with its positions: all of them, or one by one cut to length.

    For heads whose bags cannot share one computation because their layout depends on the number of patches.
    """
    if mask is None:
        yield x, pos
        return
    for index, real in enumerate(mask):
        yield x[index, real].unsqueeze(0), None if pos is None else pos[index, real].unsqueeze(0)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the real patches, in float32.

    Args:
        scores: (B, H, N).
        mask: (B, N), or (B, H, N) when heads see different patches; True where there is a patch.

    Returns:
        (B, H, N) that sum to 1 over N; exactly 0 outside the mask.
    """
    scores = scores.float()
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask.unsqueeze(1)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Bag features (B, H, C) from weights (B, H, N) and patches (B, N, C).

    In float32 even under autocast: the weights of a bag of 100,000 patches are below what float16 resolves.
    """
    with torch.autocast(x.device.type, enabled=False):
        return (weights.float() @ x.float()).to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean (B, C) over the real patches of (B, N, C), in float32."""
    if mask is None:
        return x.float().mean(1)
    real = mask.unsqueeze(-1)
    return x.float().masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)


class PatchBatchNorm(nn.Module):
    """BatchNorm over the real patches of all bags: padded rows enter neither the mean nor the variance.

    A single patch has no variance, so it is normalised with the running statistics, in training too.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns (B, N, C) as it came, normalised; rows outside the mask are zero."""
        rows = x.flatten(0, 1) if mask is None else x[mask]
        rows = self._normalise(rows)
        if mask is None:
            return rows.view_as(x)
        return x.new_zeros(x.shape, dtype=rows.dtype).masked_scatter(mask.unsqueeze(-1), rows)

    def _normalise(self, rows: Tensor) -> Tensor:
        # A synchronised norm must be entered by every process, or the others wait for it.
        if len(rows) > 1 or isinstance(self.norm, JoinedBatchNorm):
            return self.norm(rows)
        norm = self.norm
        return F.batch_norm(
            rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )


class PatchNorm(nn.Module):
    """The normalisation at the input of a head: 'ln' per patch, 'bn' over patches, None for none."""

    def __init__(self, width: int, kind: str | None, *, bias: bool = True) -> None:
        super().__init__()
        if kind not in (None, "none", "ln", "bn"):
            raise UserError(f"--mil_norm={kind} is unknown; it must be one of bn, ln, none")
        self.norm: nn.Module | None = None
        if kind == "ln":
            self.norm = nn.LayerNorm(width, bias=bias)
        elif kind == "bn":
            self.norm = PatchBatchNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.norm is None:
            return x
        return self.norm(x, mask) if isinstance(self.norm, PatchBatchNorm) else self.norm(x)


def activation(name: str) -> nn.Module:
    """The activation under its option name; raises UserError for another name."""
    known: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "none": nn.Identity}
    if name not in known:
        raise UserError(f"--act={name} is unknown; it must be one of {', '.join(known)}")
    return known[name]()


class Stem(nn.Module):
    """[norm] -> Linear -> activation -> dropout: patches (B, N, D) to (B, N, C)."""

    def __init__(self, input_dim: int, options: StemOptions) -> None:
        super().__init__()
        self.norm = PatchNorm(input_dim, options.norm, bias=options.bias)
        self.proj = nn.Linear(input_dim, options.inner_dim, bias=options.bias)
        self.act = activation(options.act)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.dropout(self.act(self.proj(self.norm(x, mask))))


def bag_norm(width: int, options: StemOptions) -> nn.Module:
    """The norm of a bag feature before the classifier: LayerNorm under 'ln', else nothing.

    BatchNorm has no statistics over a batch of one bag, so 'bn' normalises at the input only.
    """
    return nn.LayerNorm(width, bias=options.bias) if options.norm == "ln" else nn.Identity()


class AttentionScores(nn.Module):
    """Attention scores before the softmax (Ilse et al. 2018, arXiv 1802.04712, eq. 8 and 9).

    s_i = w^T tanh(V h_i), gated: s_i = w^T (tanh(V h_i) * sigmoid(U h_i)). The last layer has no bias: the
    softmax over patches removes a constant, so its gradient would be zero.
    """

    def __init__(self, width: int, hidden: int, heads: int = 1, *, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.value = nn.Linear(width, hidden, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if gated else None
        self.score = nn.Linear(hidden, heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Patches (B, N, C) to scores (B, heads, N), a block of patches at a time."""
        return torch.cat([self._score(block) for block in x.split(BLOCK_PATCHES, 1)], 2)

    def _score(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.value(x))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(x))
        return self.score(hidden).transpose(1, 2)


def initialise(module: nn.Module) -> None:
    """Xavier-normal linear layers with zero bias, for ``head.apply``; norms keep weight 1 and bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B, H, N, C / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, C / H) to (B, N, C)."""
    return x.transpose(1, 2).flatten(2)


def check_heads(head: str, inner_dim: int, n_heads: int) -> None:
    """Raises UserError when the heads do not divide the inner width."""
    if n_heads < 1 or inner_dim % n_heads:
        raise UserError(f"{head}: inner_dim {inner_dim} is not a multiple of its {n_heads} attention heads; change one")


def join_weights(parts: list[Tensor], mask: Tensor | None) -> Tensor:
    """Weights (b, H, n) of the groups of ``real_bags`` as one (B, H, N), zero outside the mask (B, N)."""
    if mask is None:
        return torch.cat(parts)
    mask = mask.bool().reshape(len(parts), -1)
    empty = parts[0].new_zeros(parts[0].shape[1], mask.shape[1])
    rows = [empty.masked_scatter(real, part[0]) for part, real in zip(parts, mask, strict=True)]
    return torch.stack(rows)
