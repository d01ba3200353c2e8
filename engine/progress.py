"""What a person sees while a run works: a bar on a terminal, plain lines otherwise, and where the time goes."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.host_copy import HostCopy

log = logging.getLogger(__name__)


class LossMeter:
    """Mean loss of an epoch, without waiting for the device, and a stop when a loss is not finite.

    A step's loss is looked at when the next step is under way, so the device never idles.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._last: HostCopy | None = None
        self._bags: list[str] | None = None  # those of the last loss, until it was looked at

    def add(self, loss: Tensor, bags: list[str]) -> None:
        """Takes the loss of one step over the bags with these names."""
        self.check()
        if self._last is None:
            self._last = HostCopy(loss)
        else:
            self._last.take(loss)
        self._bags = bags
        self._sum = loss.clone() if self._sum is None else self._sum + loss
        self._count += 1

    def check(self) -> None:
        """Raises UserError with the names of the bags when the last loss was NaN or infinite."""
        if self._last is None or self._bags is None:
            return
        value, bags = self._last.value(), self._bags
        self._bags = None
        if not math.isfinite(value):
            raise UserError(
                f"the loss became {value} on the bags {', '.join(bags)}. Look at their patches or features; if "
                "they are sound, lower --lr, or give --clip_grad=1, --amp_dtype=bf16 or no --amp."
            )

    def total(self) -> tuple[float, int]:
        """Sum of the losses and number of steps."""
        self.check()
        return (0.0 if self._sum is None else float(self._sum)), self._count

    def state_dict(self) -> dict[str, Any]:
        """The sum so far, exactly; raises UserError rather than let a loss that is not finite be saved."""
        self.check()
        return {"sum": None if self._sum is None else self._sum.cpu(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sum = None if state["sum"] is None else state["sum"].to(device)
        self._count = state["count"]


class MeanMeter:
    """Mean of a number over an epoch, without waiting for the device; values that are not finite do not count.

    (A gradient norm is infinite where the gradient scaler skips the update.)
    """

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._count: Tensor | int = 0

    def add(self, value: Tensor) -> None:
        """Takes one value, a scalar on the device."""
        finite = value.isfinite()
        self._sum = self._sum + torch.where(finite, value, 0.0)
        self._count = self._count + finite.int()

    @property
    def mean(self) -> float | None:
        """None where no value was taken."""
        return float(self._sum) / int(self._count) if int(self._count) else None

    def state_dict(self) -> dict[str, Any]:
        return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in (("sum", self._sum), ("count", self._count))}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self._sum, self._count = (v.to(device) if isinstance(v, Tensor) else v for v in (state["sum"], state["count"]))


class Meter:
    """Throughput and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.waited = 0.0
        self.instances = self.kept = self.steps = 0

    def wait(self, stream: Iterator[Any]) -> Any:
        """The next batch, counting the time until it is there."""
        begin = time.perf_counter()
        batch = next(stream)
        self.waited += time.perf_counter() - begin
        size = sum(batch.sizes)
        self.instances += size
        self.kept += size if batch.keep is None else int(batch.keep.sum())
        self.steps += 1
        return batch

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def state_dict(self) -> dict[str, Any]:
        counts = {"instances": self.instances, "kept": self.kept, "steps": self.steps}
        return {"seconds": self.seconds, "waited": self.waited, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin -= state["seconds"]
        self.waited = state["waited"]
        self.instances, self.kept, self.steps = state["instances"], state["kept"], state["steps"]

    @property
    def rate(self) -> float:
        """Instances per second."""
        return self.instances / max(self.seconds, 1e-9)

    def counts(self, instances: int, kept: int) -> dict[str, float]:
        """Instances per step, those that reach the MIL head, and the share that only fills up bags.

        Args:
            instances: of all processes, which do as many steps as this one.
            kept: those of them that reach the head.
        """
        steps = max(self.steps, 1)
        return {
            "patches_per_step": instances / steps,
            "kept_per_step": kept / steps,
            "pad_ratio": 1 - kept / max(instances, 1),
        }

    @property
    def data_share(self) -> float:
        """Share of the time spent waiting for data."""
        return self.waited / max(self.seconds, 1e-9)


class EpochMeters:
    """What is measured in one epoch of training."""

    def __init__(self) -> None:
        self.loss, self.norm, self.aux, self.speed = LossMeter(), MeanMeter(), MeanMeter(), Meter()

    def state_dict(self) -> dict[str, Any]:
        return {k: meter.state_dict() for k, meter in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.loss.load_state_dict(state["loss"], device)
        self.norm.load_state_dict(state["norm"], device)
        self.aux.load_state_dict(state["aux"], device)
        self.speed.load_state_dict(state["speed"])


class Bar:
    """Steps of an epoch: a tqdm bar on a terminal, a log line every ``every`` steps otherwise.

    Args:
        label: what stands in front, for example "fold 1/3  epoch 12/75".
        total: steps of the epoch.
        every: steps between two lines where there is no terminal.
        active: whether this process speaks.
    """

    def __init__(self, label: str, total: int, every: int, active: bool) -> None:
        self.label, self.total, self.every, self.active = label, total, every, active
        self._bar: Any = None
        if active and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="step", leave=False, dynamic_ncols=True)

    def step(self, done: int, meter: Meter) -> None:
        """Shows that ``done`` steps are finished."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{meter.rate:.0f} patch/s  data {meter.data_share:.0%}", refresh=False)
            self._bar.update(1)
        elif self.active and done % self.every == 0 and done < self.total:
            log.info("%s  step %d/%d  %s", self.label, done, self.total, speed(meter))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def speed(meter: Meter) -> str:
    """``312 patch/s  data 8%  mem 17.2G``; memory only on a GPU."""
    text = f"{meter.rate:.0f} patch/s  data {meter.data_share:.0%}"
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        text += f"  mem {torch.cuda.max_memory_allocated() / 2**30:.1f}G"
    return text
