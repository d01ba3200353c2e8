"""Scores of every bag of a split: each bag once, in parts of bounded size, shared out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.bags import Bags
from datasets.views import Renderer
from engine.precision import Precision, fixed_kernels
from modules.model import SlideModel
from utils.dist import Processes
from utils.stop import Stopped, StopRequest

Watch = Callable[[str, SlideModel, int, Tensor, "Tensor | None"], None]
"""Is told the name of a set of weights, the model, the position of a bag, its features (N, D) and grid positions."""


@dataclass(frozen=True)
class Predictions:
    """What a model says about a split.

    Attributes:
        index: (N,) positions in the split, ascending.
        logits: (N, K) float32.
        target: (N,) tensors by name.
    """

    index: Tensor
    logits: Tensor
    target: dict[str, Tensor]

    @classmethod
    def join(cls, parts: Iterable[Predictions]) -> Predictions:
        """The predictions of all shards in the order of the split."""
        present = [p for p in parts if len(p.index)]
        index = torch.cat([p.index for p in present])
        order = index.argsort()
        target = {k: torch.cat([p.target[k] for p in present])[order] for k in present[0].target}
        return cls(index[order], torch.cat([p.logits for p in present])[order], target)


def predict(
    model: SlideModel,
    calls: Iterable[Bags],
    renderer: Renderer | None,
    precision: Precision,
    processes: Processes,
) -> Predictions:
    """``predict_all`` of one model."""
    return predict_all({"main": model}, calls, renderer, precision, processes)["main"]


def predict_all(
    models: Mapping[str, SlideModel],
    calls: Iterable[Bags],
    renderer: Renderer | None,
    precision: Precision,
    processes: Processes,
    watch: Watch | None = None,
) -> dict[str, Predictions]:
    """Evaluates the bags that ``calls`` gives this process and joins the results of all processes.

    Patches of a bag are encoded as they come; only their features wait for the rest of the bag, so memory does not grow
    with the number of patches but by their features. Nothing here waits for the device before the last bag. Patches are
    read, decoded and rendered once for all models.

    Args:
        models: sets of weights by name.
        calls: what the encoder takes at a time, on the device (``datasets.eval_reading.on_device``); features: bags.
        renderer: patches to encoder input; None for features.
        precision: of the forward passes.
        processes: this process among its peers.
        watch: sees every bag of this process.

    Raises:
        Stopped: on all processes, when one of them was asked to stop.
    """
    return _of_all_processes(_predict_own(models, calls, renderer, precision, processes.stop, watch), processes)


@torch.inference_mode()
def _predict_own(
    models: Mapping[str, SlideModel],
    calls: Iterable[Bags],
    renderer: Renderer | None,
    precision: Precision,
    stop: StopRequest,
    watch: Watch | None,
) -> dict[str, Predictions]:
    """What this process's bags get; incomplete when it was asked to stop."""
    features: dict[str, list[Tensor]] = {name: [] for name in models}
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    positions: list[Tensor] = []
    index: list[int] = []
    targets: list[dict[str, Tensor]] = []
    for model in models.values():
        model.eval()
    with precision.autocast(), fixed_kernels():  # entered once, so that weights are converted once
        for bags in calls:
            if stop.by is not None:
                break
            inputs = bags.instances if renderer is None else renderer(bags.instances)
            for name, model in models.items():
                features[name].append(model.encode(inputs))
            positions += [] if bags.pos is None else [bags.pos]
            if not bags.last:
                continue
            pos = torch.cat(positions) if positions else None
            for name, model in models.items():
                whole = torch.cat(features[name])
                logits[name].append(model.aggregate(whole, [len(whole)], pos=pos)[0].float())
                if watch is not None:
                    watch(name, model, bags.index[0], whole, pos)
                features[name].clear()
            positions.clear()
            index += bags.index
            targets.append(bags.target)
    return {name: _own(index, own, targets) for name, own in logits.items()}


def _own(index: list[int], logits: list[Tensor], targets: list[dict[str, Tensor]]) -> Predictions:
    names = targets[0] if targets else {}
    return Predictions(
        torch.tensor(index, dtype=torch.int64),
        torch.cat(logits).cpu() if logits else torch.empty(0),
        {k: torch.cat([t[k] for t in targets]) for k in names},
    )


def _of_all_processes(own: dict[str, Predictions], processes: Processes) -> dict[str, Predictions]:
    gathered = processes.gather(None if processes.stop.by is not None else own)
    shards = [shard for shard in gathered if shard is not None]
    if len(shards) < len(gathered):
        raise Stopped("evaluation")
    return {name: Predictions.join(shard[name] for shard in shards) for name in own}
