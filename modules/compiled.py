"""An encoder compiled twice: for the usual numbers of patches, and for any other.

torch.compile alone makes a graph for the first number of patches that it sees and, when a second one comes, another for
any number, which it then uses for every call, also of the first number. That graph is the slower one, so a single odd
batch would slow down the rest of a run.

Shapes: P patches of H x W px, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CompiledEncoder:
    """Calls ``encoder`` compiled. Usual are full calls, and the first number of patches in training and evaluation.

    Args:
        encoder: (P, 3, H, W) -> (P, D); its weights stay where they are.
        full: patches of a full encoder call.
        options: of ``torch.compile``, among them ``mode``.
    """

    def __init__(self, encoder: nn.Module, full: int, **options: object) -> None:
        self._encoder, self._full = encoder, full
        self._first: dict[bool, int] = {}
        self._usual = torch.compile(_usual, dynamic=False, **options)  # type: ignore[call-overload]
        self._any = torch.compile(_any, **options)  # type: ignore[call-overload]

    def __call__(self, patches: Tensor) -> Tensor:
        """Features (P, D) of the patches."""
        count = len(patches)
        features: Tensor
        if count in (self._full, self._first.setdefault(self._encoder.training, count)):
            features = self._usual(self._encoder, patches)
        else:
            torch._dynamo.maybe_mark_dynamic(patches, 0)  # height and width stay constants
            features = self._any(self._encoder, patches)
        return features


def _usual(encoder: nn.Module, patches: Tensor) -> Tensor:
    """One graph for each number of patches; two functions, as torch.compile keeps graphs by function."""
    features: Tensor = encoder(patches)
    return features


def _any(encoder: nn.Module, patches: Tensor) -> Tensor:
    features: Tensor = encoder(patches)
    return features
