"""Whole bags for the tests of ``--full_bag``: tiny stores, encoders and learners, plain and in two passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import SIDE_PX, write_store
from torch import Tensor, nn

import modules.heads  # noqa: F401  (fills the registry)
from datasets.bags import SamplingPlan, TrainBags
from datasets.full_bags import ChunkPlan, FullBags, full_bag_batches
from datasets.instances import PixelSource
from datasets.labels import Sample
from datasets.loaders import LoaderOptions, TrainStream
from datasets.positions import Grid
from datasets.store import PatchStore
from datasets.views import Renderer, ViewPlan
from engine.learner import Learner
from engine.tasks import ClassificationTask, Task
from modules.heads import build_mil
from modules.model import SlideModel
from utils.config import ModelConfig, TrainConfig
from utils.dist import Processes

COUNTS = {"a": 13, "b": 9, "c": 17, "d": 4}
CHUNK, CROP_PX, WIDTH = 5, 12, 6
CLASSES = ClassificationTask(("x", "y"), "auc")
CPU = torch.device("cpu")


def stores_in(folder: Path) -> tuple[PatchStore, PatchStore]:
    """Low and high magnification of the slides in ``COUNTS``."""
    labels = {slide: i % 2 for i, slide in enumerate(COUNTS)}
    write_store(folder / "low.lmdb", labels, {s: 1 + n // 3 for s, n in COUNTS.items()}, seed=1)
    write_store(folder / "high.lmdb", labels, COUNTS, seed=2)
    return PatchStore(folder / "low.lmdb"), PatchStore(folder / "high.lmdb")


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def encoder(norm: nn.Module, *noise: nn.Module) -> nn.Module:
    """Patches (P, 3, 12, 12) to (P, 6), always the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.GELU(), *noise, nn.Conv2d(4, WIDTH, 3), nn.GELU(), Pool())


def batch_norm_in_evaluation_mode() -> nn.Module:
    norm = nn.BatchNorm2d(4).eval()
    norm.train = lambda mode=True: norm  # type: ignore[method-assign]
    norm.running_mean += 0.3  # type: ignore[operator]
    return norm


NORMS = {"group norm": lambda: nn.GroupNorm(2, 4), "fixed batch norm": batch_norm_in_evaluation_mode}


def bags_of(stores: Sequence[PatchStore], positions: bool = False) -> TrainBags:
    grids = [Grid(store, stores[-1]) if positions else None for store in stores]
    sources = [PixelSource(store, grid=grid) for store, grid in zip(stores, grids, strict=True)]
    samples = [Sample(s, s, (s,), {"label": i % 2, "event": i % 3 % 2, "time": float(i)}) for i, s in enumerate(COUNTS)]
    return TrainBags(samples, sources, SamplingPlan(0), ViewPlan("strong_v2", 0.2, SIDE_PX, CROP_PX), seed=3)


def learner_of(kind: type[Learner], trunk: nn.Module, head: str = "abmilx", **more: Any) -> Learner:
    """A learner in float64 with its model in training mode; the same seed gives the same weights."""
    task: Task = more.pop("task", CLASSES)
    dtype, chunk = more.pop("dtype", torch.float64), more.pop("chunk", CHUNK)
    processes = more.pop("processes", None) or Processes(0, more.pop("world", 1), more.pop("device", CPU))
    frozen, dropout, norm = more.pop("frozen", False), more.pop("dropout", 0.0), more.pop("mil_norm", "bn")
    options = ModelConfig(inner_dim=8, n_heads=2, n_layers=1, act="gelu", dropout=dropout, mil_norm=norm)
    torch.manual_seed(0)
    model = SlideModel(build_mil(head, WIDTH, task.outputs, options), trunk, chunk, frozen)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    renderer = Renderer(CROP_PX, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), dtype=dtype)
    train = TrainConfig(**{"mm": 0.9, **more})
    learner = kind(model.to(processes.device, dtype), task, renderer, train, processes, with_ema=True)
    learner.model.train()
    return learner


def full(bags: TrainBags, batch: int, keep: int = 11, workers: int = 0, **plan: Any) -> Iterator[FullBags]:
    stream = TrainStream(len(COUNTS), batch, seed=1, epochs=(0, 2))
    return full_bag_batches(bags, stream, LoaderOptions(workers), ChunkPlan(CHUNK, keep, **plan))
