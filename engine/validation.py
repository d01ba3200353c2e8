"""The splits of one fold as a set of weights sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch.utils.data import DataLoader

from datasets.bags import Bags, EvalParts
from datasets.label_types import Fold, Sample
from datasets.loaders import LoaderOptions, eval_loader, shard
from engine import memory
from engine.evaluate import Predictions, predict
from engine.learner import Learner
from engine.setup import Setup
from utils.dist import Processes


def loader_options(setup: Setup, processes: Processes, workers: int) -> LoaderOptions:
    """How batches are prepared for this process; features in RAM are handed on as they are, by no other process."""
    data = setup.config.data
    pin = data.pin_memory and processes.device.type == "cuda"
    return LoaderOptions(0 if data.persistence else workers, data.prefetch_factor, pin)


class Evaluator:
    """Predicts the validation and test bags of one fold; its reading processes live as long as it does."""

    def __init__(self, setup: Setup, fold: Fold, learner: Learner, processes: Processes) -> None:
        self.setup, self.fold, self.learner, self.processes = setup, fold, learner, processes
        self._loaders: dict[str, DataLoader[Bags]] = {}

    def predict(self, name: str, split: str) -> Predictions:
        """What the weights ``name`` ("main", "ema") say about ``split`` ("val", "test"), each bag once.

        Raises:
            Stopped: when a process was asked to stop; all processes raise it.
            UserError: when the device has too little memory.
        """
        learner, load = self.learner, memory.Load()
        model, stream = learner.weights()[name], self._watched(split, load)
        with memory.explained(load, self.setup.config, training=False):
            return predict(model, stream, learner.renderer, learner.precision, self.processes)

    def _watched(self, split: str, load: memory.Load) -> Iterator[Bags]:
        """The parts of a split; ``load`` follows them."""
        samples = self._samples(split)
        loader: Iterable[Bags] = self._loader(split)
        for bags in loader:
            load.now([samples[i].id for i in bags.index], sum(bags.sizes))
            yield bags

    def _samples(self, split: str) -> Sequence[Sample]:
        return self.fold.val if split == "val" else self.fold.test

    def _loader(self, split: str) -> DataLoader[Bags]:
        if split not in self._loaders:
            data, samples = self.setup.config.data, self._samples(split)
            mine = shard(len(samples), self.processes.rank, self.processes.world)
            parts = EvalParts(samples, self.setup.sources.test, self._part_size(), mine)
            workers = data.num_workers if data.num_workers_test is None else data.num_workers_test
            options = loader_options(self.setup, self.processes, workers)
            self._loaders[split] = eval_loader(parts, options, keep_workers=True)
        return self._loaders[split]

    def _part_size(self) -> int:
        """Instances that are read and encoded at a time in evaluation; features need no parts."""
        return self.setup.config.eval.p_batch_size_v if self.setup.encoder is not None else 1 << 40
