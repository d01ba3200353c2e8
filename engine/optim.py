"""Optimisers and schedules, from torch and timm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from utils.config import TrainConfig

LEAST_LR = 1e-7
"""Where the cosine ends (published value)."""


def build_optimizer(parameters: Iterable[nn.Parameter], options: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    """Adam (decay in the gradient) or AdamW (decoupled decay) over all trainable parameters."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.opt]
    trainable = [p for p in parameters if p.requires_grad]
    return kind(trainable, lr=options.lr, weight_decay=options.weight_decay, fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, options: TrainConfig) -> Scheduler | None:
    """The schedule, advanced with ``schedule.step(epoch + 1)`` behind each epoch; None for a constant rate.

    Warm-up counts inside the total: the first epoch runs at ``warmup_lr``, and the peak lies on the cosine.
    """
    epochs, warmup, start = options.num_epoch, options.warmup_epochs, options.warmup_lr
    if options.lr_sche == "cosine":
        return CosineLRScheduler(optimizer, t_initial=epochs, lr_min=LEAST_LR, warmup_t=warmup, warmup_lr_init=start)
    if options.lr_sche == "step":
        half = max(epochs / 2, 1)
        return StepLRScheduler(optimizer, decay_t=half, decay_rate=0.2, warmup_t=warmup, warmup_lr_init=start)
    return None
