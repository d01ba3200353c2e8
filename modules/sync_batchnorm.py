"""BatchNorm whose statistics are those of the batch of all processes (``--sync_bn``).

torch's own layer waits for the device at every norm, as it leaves out processes without rows by a mask, and
torch.compile cannot take it into its graph. Here nothing waits. Uncompiled on CUDA the norm uses the kernels of torch's
layer; else it is made of plain operations and collectives, which a compiler fuses with what is around them.

Shapes: P rows of this process (patches), C channels, W processes; further dimensions are positions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.nn.modules.batchnorm import _BatchNorm

NO_ROWS = 1e-30
"""Rows that a process without any reports to torch's kernel, which divides by the number that it has met so far."""


class JoinedBatchNorm(_BatchNorm):
    """``nn.BatchNorm1d`` and ``2d`` over the rows of all processes, who may hold different numbers of them, or none.

    Every process must call the layer, and its backward pass, equally often and in the same order.

    Attributes:
        drop, act: what a timm layer that joins norm and activation does after the norm.
        compiled: whether any process may run it in a compiled graph. Then all exchange what such a graph does, also
            one that runs it uncompiled, for it has no rows.
    """

    compiled = False

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
            if x.is_cuda and not (self.compiled or torch.compiler.is_compiling()):
                return self._by_kernels(x)
            out, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
            track(self, mean, variance, count)
        return out

    def _by_kernels(self, x: Tensor) -> Tensor:
        share = 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        running = self.running_mean, self.running_var
        out: Tensor = _NormaliseByKernels.apply(x, self.weight, self.bias, *running, share, self.eps)
        return out


def track(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Advances the running statistics by those of a batch: (C,) mean and biased variance, and of how many (1,)."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        norm.running_mean.lerp_(mean.to(norm.running_mean), share)
        norm.running_var.lerp_(unbiased.to(norm.running_var), share)


class _Normalise(torch.autograd.Function):
    """The normalisation of one layer, from the moments of all processes.

    The two passes take the deviation from the mean with opposite signs. A compiler that found the same one in both
    would keep it in between, in float32, in place of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normalised x; mean, biased variance (C,) and number of the rows' positions of all processes."""
        full, shape = x.float(), _channels(x)
        variance, mean = torch.var_mean(full, _places(x), correction=0)
        mean, variance, count = joined_moments(mean, variance, full.numel() // x.shape[1])
        mean, rstd = _stored(mean), _stored((variance + eps).rsqrt())
        out = (full - mean.view(shape)) * rstd.view(shape)
        if weight is not None and bias is not None:
            out = out * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return _in_type(out, x.dtype), mean, variance, count

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, of_mean: Tensor, of_variance: Tensor, of_count: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients in x, weight and bias; the latter two of the own rows alone, as of any parameter."""
        x, weight, mean, rstd, count = ctx.saved_tensors
        shape, places = _channels(x), _places(x)
        slope, below = grad.float(), mean.view(shape) - x.float()
        bias_gradient, weight_gradient = slope.sum(places), (slope * below).sum(places) * -rstd
        total, product = joined_sum(torch.cat([bias_gradient, weight_gradient]) / count).chunk(2)
        factor = rstd if weight is None else rstd * weight
        inner = (slope - total.view(shape) + below * (product * rstd).view(shape)) * factor.view(shape)
        if weight is None:
            return _in_type(inner, x.dtype), None, None, None
        return _in_type(inner, x.dtype), weight_gradient, bias_gradient, None


class _NormaliseByKernels(torch.autograd.Function):
    """The same by the CUDA kernels of torch's layer, which advance the running statistics too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        share: float,
        eps: float,
    ) -> Tensor:
        """The normalised x; the running statistics take ``share`` of the batch's."""
        x, channels = x.contiguous(memory_format=_layout(x)), x.shape[1]
        if x.numel() > 0:
            moments = torch.batch_norm_stats(x, eps)
        else:
            nothing = x.new_zeros(channels, dtype=torch.promote_types(x.dtype, torch.float32))
            moments = nothing, nothing + 1
        rows = torch.full((1,), x.numel() // channels or NO_ROWS, dtype=moments[0].dtype, device=x.device)
        own = torch.cat([*moments, rows])
        every = own.new_empty(dist.get_world_size(), len(own))
        dist.all_gather_into_tensor(every, own)
        means, rstds, counts = every.split([channels, channels, 1], 1)
        mean, rstd = torch.batch_norm_gather_stats_with_counts(
            own, means, rstds, running_mean, running_var, share, eps, counts.view(-1)
        )
        ctx.save_for_backward(x, weight, mean, rstd, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, rstd, eps) if x.numel() > 0 else torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients in x, weight and bias; the latter two of the own rows alone, as of any parameter."""
        x, weight, mean, rstd, counts = ctx.saved_tensors
        grad, affine = grad.contiguous(memory_format=_layout(x)), weight is not None
        if x.numel() > 0:
            reduced = torch.batch_norm_backward_reduce(grad, x, mean, rstd, weight, True, affine, affine)
        else:
            reduced = (torch.zeros_like(mean),) * 4
        sums = torch.cat(reduced[:2])
        dist.all_reduce(sums)
        total, product = sums.chunk(2)
        if x.numel() > 0:
            grad = torch.batch_norm_backward_elemt(grad, x, mean, rstd, weight, total, product, counts)
        return grad, *(reduced[2:] if affine else (None, None)), None, None, None, None


def joined_moments(mean: Tensor, variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) of the numbers of all processes, and how many they are, from those of each.

    Sums of squares in double precision: single precision would lose the variance of numbers far from zero.
    """
    if count == 0:  # the mean of nothing is not a number
        mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
    own, spread = mean.double(), variance.double()
    number = torch.full((1,), count, dtype=torch.float64, device=mean.device)
    sums = joined_sum(torch.cat([own * count, (spread + own * own) * count, number]))
    total = sums[-1:].clamp(min=1)
    first, second = (sums[:-1] / total).chunk(2)
    return first.float(), (second - first * first).clamp(min=0).float(), total.float()


def joined_sum(value: Tensor) -> Tensor:
    """The sum over all processes."""
    everyone = dist.group.WORLD
    assert everyone is not None
    total: Tensor = collectives.wait_tensor(collectives.all_reduce(value, "sum", everyone))
    return total


def _stored(value: Tensor) -> Tensor:
    """``value``, which a compiler shall not compute again for every element that uses it (Inductor stores what has
    strides of its own).
    """
    return value.as_strided(value.shape, value.stride())


def _in_type(value: Tensor, kind: torch.dtype) -> Tensor:
    """As ``value.to(kind)``; after a conversion that changes nothing torch.compile (2.11) loses the gradient."""
    return value if value.dtype == kind else value.to(kind)


def _places(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _channels(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.dim() - 2)


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def synchronised(model: nn.Module) -> nn.Module:
    """``model`` with its BatchNorm layers replaced; names and values of weights and buffers stay."""
    if isinstance(model, _BatchNorm):
        return JoinedBatchNorm(model)
    for name, child in model.named_children():
        setattr(model, name, synchronised(child))
    return model


def largest_of_all(number: int) -> int:
    """The largest ``number`` of all processes, the same on each of them; no device is waited for."""
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, group=_hosts(dist.group.WORLD))
    return int(value)


@functools.lru_cache(maxsize=1)
def _hosts(world: Any) -> Any:
    """A group of the same processes that exchanges numbers in host memory."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")
