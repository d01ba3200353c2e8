"""Optimisers and schedules, from torch and timm."""

from __future__ import annotations

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from utils.config import TrainConfig

LEAST_LR = 1e-7
"""Where the cosine ends (published value)."""


def build_optimizer(model: nn.Module, options: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    """Adam (decay in the gradient) or AdamW (decoupled decay) over all trainable parameters."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.opt]
    return kind(parameter_groups(model, options), lr=options.lr, fused=fused)


def parameter_groups(model: nn.Module, options: TrainConfig) -> list[dict[str, Any]]:
    """Groups ``encoder`` and ``head``, each with its learning rate.

    Weight decay is that of the options on every parameter, as published; without ``decay_all`` those of one dimension
    (norms, biases, alpha) form groups of their own without decay.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "encoder" if name.startswith("encoder.") else "head"
            groups.setdefault((part, options.decay_all or parameter.ndim > 1), []).append(parameter)
    rates = {"head": options.lr, "encoder": options.lr if options.encoder_lr is None else options.encoder_lr}
    return [
        {
            "params": members,
            "name": part,
            "lr": rates[part],
            "weight_decay": options.weight_decay if decays else 0.0,
        }
        for (part, decays), members in groups.items()
    ]


def build_schedule(optimizer: torch.optim.Optimizer, options: TrainConfig) -> Scheduler | None:
    """The schedule, advanced with ``schedule.step(epoch + 1)`` after each epoch; None for a constant rate.

    Warm-up counts inside the total: the first epoch runs at ``warmup_lr``, and the peak lies on the cosine.
    """
    epochs, warmup, start = options.num_epoch, options.warmup_epochs, options.warmup_lr
    if options.lr_sche == "cosine":
        return CosineLRScheduler(optimizer, t_initial=epochs, lr_min=LEAST_LR, warmup_t=warmup, warmup_lr_init=start)
    if options.lr_sche == "step":
        half = max(epochs / 2, 1)
        return StepLRScheduler(optimizer, decay_t=half, decay_rate=0.2, warmup_t=warmup, warmup_lr_init=start)
    return None
