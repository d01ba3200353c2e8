"""Time and memory of every MIL head on one bag: the table of docs/models.md, as markdown.

    python -m benchmarks.heads [--heads abmil,clam_sb] [--sizes 1000,10000,100000] [--budget_s 85]

A bag is N random float32 features of width 1024 with positions on a square; 1024 -> 512 -> 2 classes, default
options, autocast to bf16. Evaluation is one forward pass; training is forward and backward with the head's
own losses. The time is the median of the runs that fit 0.3 s, at least one, after two warm-ups (the second of
which is the time itself when it took longer than 2 s); the memory is the allocator's peak, the bag and the weights
included (CUDA only). A head that runs out of memory gives "out of memory"; what the budget does not reach
gives "not run". All heads are measured at the smallest size first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.heads import build_mil
from modules.registry import mils
from utils.config import ModelConfig

WIDTH, CLASSES = 1024, 2
PUBLISHED_GIGAP = {"inner_dim": 768, "n_layers": 12, "n_heads": 16, "pos": "sincos"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a head and the options that differ from the defaults."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def build(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        with device:
            return build_mil(self.name, WIDTH, CLASSES, ModelConfig(**self.options))


class Clock:
    """Measures on one device until the budget is spent."""

    def __init__(self, device: torch.device, budget_s: float) -> None:
        self.device, self.end = device, time.perf_counter() + budget_s

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], object]) -> float:
        start = self.now()
        work()
        return self.now() - start

    def measure(self, work: Callable[[], object]) -> str:
        """'ms · MiB' of ``work``, or why there is none."""
        if time.perf_counter() > self.end:
            return "not run"
        try:
            times = self._times(work)
        except torch.OutOfMemoryError:
            return "out of memory"
        ms = 1000 * statistics.median(times)
        text = f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"
        if self.device.type != "cuda":
            return text
        return f"{text} · {torch.cuda.max_memory_allocated(self.device) / 2**20:,.0f} MiB"

    def _times(self, work: Callable[[], object]) -> list[float]:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds(work)  # compiles kernels where the head has some
        second = self.seconds(work)
        if second > 2:
            return [second]
        times = [self.seconds(work)]
        while sum(times) < 0.3 and len(times) < 20:
            times.append(self.seconds(work))
        return times


def bag(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features (1, N, 1024) and grid positions (1, N, 2)."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(1, size, WIDTH, generator=generator).to(device)
    cells, side = torch.arange(size, device=device), int(size**0.5) + 1
    return x, torch.stack([cells % side, cells // side], -1).unsqueeze(0)


def evaluation(head: nn.Module, x: Tensor, pos: Tensor) -> None:
    """One forward pass."""
    head.eval()
    with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16):
        head(x, pos=pos)


def training(head: nn.Module, x: Tensor, pos: Tensor) -> None:
    """Forward and backward with the losses that the engine gives the head."""
    head.train()
    target = torch.zeros(1, dtype=torch.long, device=x.device)
    with torch.autocast(x.device.type, torch.bfloat16):
        if hasattr(head, "loss_weights"):
            main, aux = head.loss_weights
            logits, extra = head.forward_with_aux(x, None, target, F.cross_entropy)
            loss = main * F.cross_entropy(logits, target) + aux * extra
        else:
            loss = F.cross_entropy(head(x, pos=pos), target)
    loss.backward()
    head.zero_grad(set_to_none=True)


def measure(row: Row, size: int, clock: Clock) -> list[str]:
    """Evaluation and training of one head at one size."""
    head, (x, pos) = row.build(clock.device), bag(size, clock.device)
    return [clock.measure(partial(step, head, x, pos)) for step in (evaluation, training)]


def parameters(row: Row) -> str:
    """The count in millions."""
    return f"{sum(p.numel() for p in row.build(torch.device('meta')).parameters()) / 1e6:.3f} M"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default=",".join(mils.names()), help="names, comma separated")
    parser.add_argument("--sizes", default="1000,10000,100000", help="patches per bag, comma separated")
    parser.add_argument("--budget_s", type=float, default=85.0, help="seconds after which nothing new is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    clock = Clock(torch.device(options.device), options.budget_s)
    sizes = [int(size) for size in options.sizes.split(",")]
    rows = [Row(name, name) for name in options.heads.split(",")]
    if "gigap" in options.heads.split(","):
        rows.append(Row("gigap, published size", "gigap", PUBLISHED_GIGAP))
    name = torch.cuda.get_device_name(clock.device) if clock.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bf16 autocast, 1024 -> 512 -> 2, one bag\n")
    columns = [f"N = {size:,}, {step}" for size in sizes for step in ("evaluation", "training")]
    table = {row: [f"`{row.label}`", parameters(row)] for row in rows}
    for size in sizes:
        for row, found in table.items():
            found += measure(row, size, clock)
            print(size, *found, sep="  ", file=sys.stderr, flush=True)
    print("| head | parameters | " + " | ".join(columns) + " |")
    print("| --- " * (2 + len(columns)) + "|")
    for found in table.values():
        print("| " + " | ".join(found) + " |")


if __name__ == "__main__":
    main()
