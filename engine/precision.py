"""Mixed precision: which type the forward passes use; and which of cuDNN's kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from utils.config import TrainConfig


@dataclass(frozen=True)
class Precision:
    """Mixed precision of forward passes; losses and metrics are computed in float32 whatever is chosen here."""

    device: str
    dtype: torch.dtype | None

    @classmethod
    def choose(cls, options: TrainConfig, device: torch.device) -> Precision:
        """bf16 where the device has it, else fp16; on a CPU always bf16."""
        if not options.amp:
            return cls(device.type, None)
        if device.type == "cpu":
            return cls("cpu", torch.bfloat16)
        name = options.amp_dtype
        if name == "auto":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return cls("cuda", {"bf16": torch.bfloat16, "fp16": torch.float16}[name])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device, self.dtype) if self.dtype else contextlib.nullcontext()

    @property
    def needs_scaling(self) -> bool:
        return self.dtype == torch.float16


@contextlib.contextmanager
def fixed_kernels() -> Iterator[None]:
    """No search for the fastest kernels of cuDNN: for encoder calls of sizes that were never seen before."""
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searching
