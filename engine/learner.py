"""The part of a run that learns: model, EMA, optimiser, schedule, scaler, and one training step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from datasets.bags import Bags
from datasets.views import Renderer
from engine.attention_sampling import favourites, reduced
from engine.optim import build_optimizer, build_schedule
from engine.precision import Precision
from engine.tasks import Task
from modules.model import SlideModel, bare_state_dict
from utils.config import TrainConfig
from utils.dist import Processes
from utils.errors import UserError

log = logging.getLogger(__name__)


class Learner:
    """Holds everything that training changes and does one step at a time.

    Args:
        model: on its device already.
        task: loss and labels.
        renderer: patches to encoder input; None for features.
        options: optimiser, schedule, precision, EMA.
        processes: this process among its peers.
        with_ema: keep an exponential moving average of the weights.

    Attributes:
        favoured: patches per bag that the attention of the EMA model chooses for a step; 0: all that the bag holds.
        grad_norm: norm of the last update's gradient before clipping; None without clipping.
        aux_loss: the head's own loss of the last step, unweighted; None for a head without one. As of the loss, the
            mean over the processes is that of all bags.
    """

    def __init__(
        self,
        model: SlideModel,
        task: Task,
        renderer: Renderer | None,
        options: TrainConfig,
        processes: Processes,
        with_ema: bool,
    ) -> None:
        self.task, self.renderer, self.options, self.processes = task, renderer, options, processes
        self.precision = Precision.choose(options, processes.device)
        cuda = processes.device.type == "cuda"
        if renderer is not None and cuda and self.precision.dtype is not None:
            self.renderer = dataclasses.replace(renderer, dtype=self.precision.dtype)
        if options.sync_bn and processes.world > 1:
            model.synchronise()
        elif options.sync_bn:
            log.info("sync_bn has no effect here: there is one process.")
        self.model: SlideModel = model
        self.ema = ModelEmaV3(model, decay=options.mm) if with_ema else None
        self.optimizer = build_optimizer(model, options, fused=cuda)
        self.schedule = build_schedule(self.optimizer, options)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.precision.needs_scaling)
        self.loss_weights = _loss_weights(model, options)
        if options.torchcompile:
            model.compile_encoder(mode=options.torchcompile_mode)
        self.grad_norm: Tensor | None = None
        self.aux_loss: Tensor | None = None
        self.favoured = 0
        self.wrapped = self._distributed(model) if processes.world > 1 else model

    def _distributed(self, model: SlideModel) -> SlideModel | DistributedDataParallel:
        device = self.processes.device
        ids = [device.index] if device.type == "cuda" else None
        # After its first step DDP groups the gradients anew, unless it looks for unused parameters. Sums over three
        # processes and more then have another order, so a run that goes on would differ in the last bit.
        return DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=self.options.deter_algo
        )

    def rates(self) -> dict[str, float]:
        """Learning rates: ``lr`` of the head, and ``lr_encoder`` where an encoder is trained."""
        groups = {str(group["name"]): float(group["lr"]) for group in self.optimizer.param_groups}
        return {"lr" if name == "head" else f"lr_{name}": rate for name, rate in groups.items()}

    def step(self, bags: Bags, divide_by: int, update: bool, counts: Sequence[int] | None = None) -> Tensor:
        """Forward and backward of one batch, and the update of the weights at the end of a group of batches.

        Args:
            bags: one batch, in host memory.
            divide_by: batches in the group, which share one update.
            update: whether this batch ends its group.
            counts: bags of every process in this step; a process with none holds one that does not count, as it
                must take part in what processes do together. None: as many as here.

        Returns:
            The batch's loss, a detached scalar on the device. The mean over the processes is the loss of all bags.
        """
        loss = self._backward(bags, divide_by, update, counts or [len(bags.sizes)] * self.processes.world)
        if update:
            self._update()
        return loss.detach()

    def _backward(self, bags: Bags, divide_by: int, update: bool, counts: Sequence[int]) -> Tensor:
        """Adds the gradient of one batch to those of its group; returns its loss."""
        bags = bags.to(self.processes.device)
        if self.favoured and self.ema is not None:
            chosen = favourites(self.ema.module, bags, self.favoured, self.renderer, self.precision)
            bags = reduced(bags, chosen)
        hold: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not update and isinstance(self.wrapped, DistributedDataParallel):
            hold = self.wrapped.no_sync()
        inputs = bags.instances if self.renderer is None else self.renderer(bags.instances, bags.draws)
        with hold:
            loss = self._loss(self.wrapped, inputs, bags, counts)
            self.scaler.scale(loss / divide_by).backward()
        return loss

    def _loss(self, model: Callable[..., Any], inputs: Tensor, bags: Bags, counts: Sequence[int]) -> Tensor:
        """The loss of one batch; ``model`` takes ``inputs`` and everything else that ``SlideModel.forward`` takes."""
        rank, real = self.processes.rank, counts[self.processes.rank]

        def criterion(logits: Tensor, labels: Tensor) -> Tensor:
            return self.task.criterion(logits[:real], labels[:real])

        with self.precision.autocast():
            labels = self.task.labels(bags.target)
            logits, aux = model(inputs, bags.sizes, bags.keep, labels, criterion, bags.pos)
        main_weight, aux_weight = self.loss_weights
        target = {name: values[:real] for name, values in bags.target.items()}
        share = self.task.share(target, counts, rank) if len(counts) > 1 else 1.0
        loss = main_weight * self.task.loss(logits[:real].float(), target) * share
        self.aux_loss = None if aux is None else aux.detach().float() * share
        return loss if aux is None else loss + aux_weight * aux.float() * share

    def _update(self) -> None:
        if self.options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)

    def end_epoch(self, epoch: int) -> None:
        """Advances the schedule after ``epoch`` (counted from 0)."""
        if self.schedule is not None:
            self.schedule.step(epoch + 1)

    def weights(self) -> dict[str, SlideModel]:
        """The sets of weights that can be evaluated: main, and ema where there is one."""
        return {"main": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued run needs from here, with prefix-free names."""
        return {
            "model": bare_state_dict(self.model),
            "teacher": bare_state_dict(self.ema.module) if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_sche": self.schedule.state_dict() if self.schedule is not None else None,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()`` of a run with the same options.

        Raises:
            UserError: when that run computed in fp16 and this device would not, or the other way round.
        """
        scaled, names = bool(state["scaler"]), {True: "fp16", False: "bf16 or float32"}
        if scaled != self.scaler.is_enabled():
            raise UserError(
                f"the run so far was computed in {names[scaled]}, and on this device it would go on in "
                f"{names[not scaled]}. Go on where it began, or start anew with --resume=never and a fixed --amp_dtype."
            )
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["lr_sche"])
        self.scaler.load_state_dict(state["scaler"])


def _loss_weights(model: SlideModel, options: TrainConfig) -> tuple[float, float]:
    main, aux = model.loss_weights
    return (
        main if options.main_alpha is None else options.main_alpha,
        aux if options.aux_alpha is None else options.aux_alpha,
    )
