"""BatchNorm whose statistics are those of the batch of all processes (``--sync_bn``).

On CUDA torch's own layer does this, through timm's conversion, which keeps the activation that some timm layers
hold. On a CPU, where torch's layer refuses to work, ``JoinedBatchNorm`` does: slower, the same numbers.

Shapes: P rows of this process (patches), C channels; further dimensions are positions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


class JoinedBatchNorm(_BatchNorm):
    """``nn.BatchNorm1d`` and ``2d`` over the rows of all processes, who may hold different numbers of them, or none.

    Mean and variance are sums over the processes in two passes, and so are their gradients: every process must call
    the layer, and its backward pass, equally often and in the same order.

    Attributes:
        drop, act: what a timm layer that joins norm and activation does behind the norm.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop: nn.Module = getattr(norm, "drop", nn.Identity())
        self.act: nn.Module = getattr(norm, "act", nn.Identity())
        self.training = norm.training

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of positions will do."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (P, C, ...); in evaluation with the running statistics, without a word to other processes."""
        out = self._joined(x) if self.training else super().forward(x)
        return self.act(self.drop(out))

    def _joined(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            full, channels = x.float(), [1, -1] + [1] * (x.dim() - 2)
            places = [d for d in range(x.dim()) if d != 1]
            own = full.new_tensor([full.numel() // x.shape[1]])
            sums = all_reduce(torch.cat([full.sum(places), own]))
            count = sums[-1].clamp(min=1)
            mean = sums[:-1] / count
            centred = full - mean.view(channels)
            variance = all_reduce((centred**2).sum(places)) / count
            self._track(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
            out = centred * (variance + self.eps).rsqrt().view(channels)
            if self.affine:
                out = out * self.weight.view(channels) + self.bias.view(channels)
        return out.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance, share)


def synchronised(model: nn.Module, cuda: bool) -> nn.Module:
    """``model`` with its BatchNorm layers replaced; names and values of weights and buffers stay."""
    if cuda:
        from timm.layers import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    if isinstance(model, _BatchNorm):
        return JoinedBatchNorm(model)
    for name, child in model.named_children():
        setattr(model, name, synchronised(child, cuda))
    return model


def largest_of_all(number: int, device: torch.device) -> int:
    """The largest ``number`` of all processes, the same on each of them."""
    value = torch.full((), number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)
