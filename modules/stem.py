"""The first four layers of a ResNet (conv1, bn1, act1, maxpool) as one operator on NVIDIA GPUs.

On large, thin feature maps these layers are bound by memory: a small part of a ResNet's work, they take half of its
time. ``modules.stem_triton`` fuses them; this file says where it can run. Everywhere else the four plain modules do,
with the same parameters and buffers, which stay where they are: state dicts, copies and conversions of the model know
of nothing. Figures: docs/decisions/resnet-stem.md.

Shapes: P patches of H x W px, C channels.
"""

from __future__ import annotations

import functools
import importlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modules.sync_batchnorm import JoinedBatchNorm, track

STEM = ("conv1", "bn1", "act1", "maxpool")
HALF = (torch.float16, torch.bfloat16)
CHANNELS = (16, 32, 64, 128)


def has_standard_stem(model: nn.Module) -> bool:
    """Whether ``model`` is a chain of modules that begins with a ResNet's stem and returns the last one's output."""
    if not isinstance(model, nn.ModuleDict) or tuple(model)[:4] != STEM or len(model) < 5:
        return False
    conv, norm, act, pool = (model[name] for name in STEM)
    only_last = list(getattr(model, "return_layers", ())) == [list(model)[-1]]
    return (
        only_last and _is_stem_conv(conv) and type(norm) is nn.BatchNorm2d and type(act) is nn.ReLU and _is_pool(pool)
    )


def _is_stem_conv(conv: nn.Module) -> bool:
    if type(conv) is not nn.Conv2d or conv.bias is not None or conv.padding_mode != "zeros":
        return False
    shape = (conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return shape == (3, (7, 7), (2, 2), (3, 3), (1, 1), 1) and conv.out_channels in CHANNELS


def _is_pool(pool: nn.Module) -> bool:
    if type(pool) is not nn.MaxPool2d or pool.return_indices or pool.ceil_mode:
        return False
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)


def run_with_stem(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, one of (P, D, h, w), of a model that ``has_standard_stem``, which is fused where that can be done."""
    modules = dict(model.named_children())
    y = fused_stem(modules["conv1"], modules["bn1"], x)
    if y is None:
        outputs: list[Tensor] = model(x)
        return outputs
    for name, module in modules.items():
        if name not in STEM:
            y = module(y)
    return [y]


def fused_stem(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor | None:
    """What the stem's four modules make of patches (P, 3, H, W): (P, C, ceil(H / 4), ceil(W / 4)).

    Args:
        conv: a convolution as in ``has_standard_stem``.
        norm: what normalises it. In training its running statistics are updated.
        x: channels-last; converted to the type of a running autocast.

    Returns:
        None where the plain modules must do it: other norms, layouts, types and devices, and patches that need a
        gradient.
    """
    if not _runs_on(x):
        return None
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if not (isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm) and _takes(norm, x)):
        return None
    if not norm.training:
        return _evaluate(conv, norm, x)
    joined = _is_joined(norm)
    alone = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2) == 1
    if (alone and not joined) or norm.momentum is None:
        return None
    y, mean, var, count, *_ = torch.ops.abmilx.stem(x, conv.weight, norm.weight, norm.bias, norm.eps, joined)
    track(norm, mean.detach(), var.detach(), count.detach())
    fused: Tensor = y
    return fused


def _runs_on(x: Tensor) -> bool:
    return x.is_cuda and _kernels_run()


def _takes(norm: _BatchNorm, x: Tensor) -> bool:
    known = type(norm) in (nn.BatchNorm2d, JoinedBatchNorm)
    plain = known and norm.affine and norm.weight.dtype == torch.float32 and norm.running_mean is not None
    laid_out = x.dim() == 4 and x.shape[1] == 3 and x.is_contiguous(memory_format=torch.channels_last)
    differentiated = x.requires_grad and torch.is_grad_enabled()
    some = x.shape[0] > 0 or _is_joined(norm)  # a process without patches takes part in what all do together
    return plain and laid_out and some and x.dtype in HALF and not differentiated


def _is_joined(norm: _BatchNorm) -> bool:
    """Whether the statistics are those of all processes."""
    return isinstance(norm, JoinedBatchNorm) and norm.training and dist.is_initialized()


def _evaluate(conv: nn.Conv2d, norm: _BatchNorm, x: Tensor) -> Tensor:
    statistics = norm.running_mean, norm.running_var
    y, *_ = torch.ops.abmilx.stem_fixed(x, conv.weight, *statistics, norm.weight, norm.bias, norm.eps)
    fused: Tensor = y
    return fused


@torch.compiler.assume_constant_result
def _kernels_run() -> bool:
    return _import_kernels()


@functools.cache
def _import_kernels() -> bool:
    """Registers the operators by importing their file; False without Triton or a device that it compiles for."""
    devices = range(torch.cuda.device_count())
    if torch.version.cuda is None or any(torch.cuda.get_device_capability(i) < (8, 0) for i in devices):
        return False
    try:
        importlib.import_module("modules.stem_triton")
    except ImportError:  # Triton is not installed
        return False
    return True
