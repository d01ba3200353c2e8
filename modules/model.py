"""The model of a slide: an optional patch encoder and a MIL head, joined over bags of unequal length.

Shapes: B bags, P instances of all bags one after another, N instances of the longest bag, D feature width, K outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from modules.compiled import CompiledEncoder
from modules.sync_batchnorm import JoinedBatchNorm, largest_of_all, synchronised
from utils.chunks import split_sizes
from utils.errors import UserError

Criterion = Callable[[Tensor, Tensor], Tensor]


class SlideModel(nn.Module):
    """Encoder and MIL head; without an encoder the instances are features already.

    Args:
        mil: ``mil(x (B, N, D), mask (B, N) or None) -> (B, K)``.
        encoder: ``encoder(patches (P, 3, H, W)) -> (P, D)``; None for features.
        chunk: patches per encoder call in training. BatchNorm statistics are those of one call.
        freeze_encoder: keep the encoder in eval mode and without gradients.
        recompute: keep the activations of one encoder call only and compute those of the others again in the backward
            pass, so that memory grows with ``chunk`` and no longer with the bag. Results stay the same.
    """

    def __init__(
        self,
        mil: nn.Module,
        encoder: nn.Module | None = None,
        chunk: int = 512,
        freeze_encoder: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mil = mil
        self.chunk = chunk
        self.recompute = recompute
        self.joined = False
        self.freeze_encoder = freeze_encoder and encoder is not None
        self._compiled: CompiledEncoder | None = None
        if self.freeze_encoder and encoder is not None:
            encoder.requires_grad_(False)

    def synchronise(self) -> None:
        """From now on BatchNorm statistics in training are those of all processes (``modules.sync_batchnorm``)."""
        self.joined = True
        largest_of_all(0)  # opens connections, which all processes have to do together
        self.mil = synchronised(self.mil)
        if self.encoder is not None:
            self.encoder = synchronised(self.encoder)

    def compile_encoder(self, **options: object) -> None:
        """From now on the encoder runs compiled (``modules.compiled``), with these options of ``torch.compile``."""
        if self.encoder is None:
            return
        for layer in self.encoder.modules():
            if isinstance(layer, JoinedBatchNorm):
                layer.compiled = True
        self._compiled = CompiledEncoder(self.encoder, self.chunk, **options)

    def train(self, mode: bool = True) -> SlideModel:
        super().train(mode)
        if self.freeze_encoder and self.encoder is not None:
            self.encoder.eval()
        return self

    @property
    def loss_weights(self) -> tuple[float, float]:
        """Weights of bag loss and auxiliary loss that the head asks for; (1, 0) for a head without one."""
        return getattr(self.mil, "loss_weights", (1.0, 0.0))

    def forward(
        self,
        instances: Tensor,
        sizes: Sequence[int],
        keep: Tensor | None = None,
        target: Tensor | None = None,
        criterion: Criterion | None = None,
        pos: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores a batch of bags.

        Args:
            instances: (P, 3, H, W) patches or (P, D) features, bag by bag.
            sizes: instances of each bag; they add up to P.
            keep: (P,) bool in host memory; False leaves an encoded instance out of the MIL head.
            target: (B,) labels, for heads with an auxiliary loss.
            criterion: loss of (B, K) logits against (B,) labels, for the same.
            pos: (P, 2) columns and rows of the patch grid, for heads that use them.

        Returns:
            Logits (B, K), and the auxiliary loss or None.
        """
        return self.aggregate(self.encode(instances), sizes, keep, target, criterion, pos)

    def encode(self, instances: Tensor) -> Tensor:
        """Features (P, D) of the instances, at most ``chunk`` patches per encoder call; features become float32.

        The last two calls share what the others leave, so that none has BatchNorm statistics of a small rest. Where
        processes join their statistics all make as many calls as the one with most patches.
        """
        if self.encoder is None:
            return instances.float()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            calls = max(-(-len(instances) // self.chunk), 1)
            if self.joined and self.encoder.training:
                calls = largest_of_all(calls)
            if calls == 1:
                return self._encoded(instances)
            parts = self._parts(instances, calls)
            if not (self.recompute and self.training and torch.is_grad_enabled()):
                return torch.cat([self._encoded(part) for part in parts])
            again = [self._recomputed(part) for part in parts[:-1]]  # the last one's backward pass comes first anyway
            return torch.cat([*again, self._encoded(parts[-1])])

    def _parts(self, instances: Tensor, calls: int) -> Sequence[Tensor]:
        sizes = split_sizes(len(instances), self.chunk)
        return instances.split(sizes) if len(sizes) == calls else instances.tensor_split(calls)

    def _encoded(self, part: Tensor) -> Tensor:
        """One encoder call; compiled for no patches at all it would not take part in what processes do together."""
        encoder = self._compiled if self._compiled is not None and len(part) else self.encoder
        assert encoder is not None
        try:
            features: Tensor = encoder(part)
        except ValueError as error:  # torch's BatchNorm; the heads know a way round it
            if len(part) != 1 or not self.training:
                raise
            raise UserError(
                f"this encoder cannot train on a step of one patch: {str(error)[:60]}. Raise --batch_size, take more "
                "patches per bag (--same_psize with --pad_enc_bs), or keep it fixed with --freeze_enc."
            ) from error
        return features

    def _recomputed(self, part: Tensor) -> Tensor:
        features: Tensor = checkpoint(
            self._encoded,
            part,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), frozen_statistics(self.encoder)),
        )
        return features

    def aggregate(
        self,
        features: Tensor,
        sizes: Sequence[int],
        keep: Tensor | None = None,
        target: Tensor | None = None,
        criterion: Criterion | None = None,
        pos: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of bags whose features (P, D) are given; arguments as in ``forward``."""
        if keep is not None:
            sizes = [int(k.sum()) for k in keep.split(list(sizes))]
            kept = keep.nonzero().squeeze(1).to(features.device, non_blocking=True)
            features, pos = features[kept], None if pos is None else pos[kept]
        x, mask = pad(features, sizes)
        if target is not None and criterion is not None and hasattr(self.mil, "forward_with_aux"):
            with_aux: Callable[..., tuple[Tensor, Tensor]] = self.mil.forward_with_aux  # type: ignore[assignment]
            return with_aux(x, mask, target, criterion)
        if pos is not None:
            return self.mil(x, mask, pos=pad(pos, sizes)[0]), None
        return self.mil(x, mask), None


def pad(features: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Splits (P, D) features, or positions, into bags: (B, N, D) and a mask (B, N); no mask for bags of one length."""
    longest = max(sizes)
    if min(sizes) == longest:
        return features.view(len(sizes), longest, -1), None
    x = nn.utils.rnn.pad_sequence(list(features.split(list(sizes))), batch_first=True)  # (B, N, D)
    lengths = torch.tensor(sizes).to(features.device, non_blocking=True)  # else the device is waited for
    return x, torch.arange(longest, device=features.device) < lengths.unsqueeze(1)


def bare_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights without the prefixes that DDP and compile put in front of their names."""
    return {bare_name(k): v for k, v in model.state_dict().items()}


def bare_name(name: str) -> str:
    """``module.encoder._orig_mod.model.conv1.weight`` -> ``encoder.model.conv1.weight``.

    An encoder may have a layer called ``module``, so that word is a prefix in front only.
    """
    parts = name.split(".")
    while parts[0] in ("module", "_orig_mod"):
        del parts[0]
    return ".".join(part for part in parts if part != "_orig_mod")


@contextlib.contextmanager
def frozen_statistics(model: nn.Module | None) -> Iterator[None]:
    """BatchNorm layers normalise by the batch as before, and their running statistics are put back after the block."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)] if model else []
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in (b for layer in layers for b in layer.buffers(recurse=False)):
        kinds.setdefault(buffer.dtype, []).append(buffer)
    before = {kind: [torch.empty_like(b) for b in buffers] for kind, buffers in kinds.items()}
    with torch.no_grad():  # one kernel for all layers
        for kind, buffers in kinds.items():
            torch._foreach_copy_(before[kind], buffers)
    try:
        yield
    finally:
        with torch.no_grad():
            for kind, buffers in kinds.items():
                torch._foreach_copy_(buffers, before[kind])


def load_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Sets buffers by name, in place."""
    own = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def average_buffers(model: nn.Module) -> None:
    """Replaces floating-point buffers (BatchNorm statistics) by their mean over all processes."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer.div_(torch.distributed.get_world_size())
