"""The splits of one fold as a set of weights sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from datasets.bags import Bags
from datasets.eval_parts import CODED_READ, WHOLE, EvalParts, PartPlan
from datasets.eval_reading import EvalReader
from datasets.gpu_jpeg.coded import GpuDecoder
from datasets.labels.types import Fold, Sample
from datasets.loaders import LoaderOptions, shard
from engine import memory
from engine.decoding import coded, gpu_decoder
from engine.evaluate import Predictions, Watch, predict_all
from engine.learner import Learner
from engine.setup import Setup
from utils.dist import Processes
from utils.errors import UserError

MOST_NAMED = 10


def loader_options(
    setup: Setup, processes: Processes, workers: int, decoder: GpuDecoder | None = None
) -> LoaderOptions:
    """How batches are prepared for this process; features in RAM are handed on as they are, by no other process."""
    data = setup.config.data
    pin = data.pin_memory and processes.device.type == "cuda"
    return LoaderOptions(0 if data.persistence else workers, data.prefetch_factor, pin, decoder)


def part_plan(setup: Setup) -> PartPlan:
    """What is read and encoded at a time in evaluation; features come a bag at a time."""
    config = setup.config
    return WHOLE if setup.encoder is None else PartPlan(config.eval.p_batch_size_v, config.train.p_batch_size)


def eval_reader(
    setup: Setup, processes: Processes, splits: Mapping[str, Sequence[Sample]], plan: PartPlan
) -> EvalReader:
    """Reads this process's share of the bags of each split, as the options say."""
    data, source = setup.config.data, setup.sources.test
    workers = data.test_workers
    decoder = gpu_decoder(data, source, processes, workers)
    if decoder is not None:
        (source,) = coded([source])
        plan = dataclasses.replace(plan, read=CODED_READ)
    parts = {
        split: EvalParts(samples, source, plan, shard(len(samples), processes.rank, processes.world))
        for split, samples in splits.items()
    }
    return EvalReader(parts, loader_options(setup, processes, workers, decoder), processes.device)


class Evaluator:
    """Predicts the validation and test bags of one fold; its reading processes live as long as it does."""

    def __init__(self, setup: Setup, fold: Fold, learner: Learner, processes: Processes) -> None:
        self.setup, self.fold, self.learner, self.processes = setup, fold, learner, processes
        self._samples = {"val": fold.val, "test": fold.test}
        self._reader: EvalReader | None = None

    def predict(self, names: Sequence[str], split: str, watch: Watch | None = None) -> dict[str, Predictions]:
        """What each of the weights ``names`` ("main", "ema") says about ``split`` ("val", "test"), each bag once.

        Args:
            names: sets of weights.
            split: which bags.
            watch: sees every bag of this process.

        Raises:
            Stopped: when a process was asked to stop; all processes raise it.
            UserError: when the device has too little memory, and naming the bags whose logits are not finite.
        """
        learner, load = self.learner, memory.Load()
        models, calls = {name: learner.weights()[name] for name in names}, self._watched(split, load)
        with memory.explained(load, self.setup.config, training=False):
            predictions = predict_all(models, calls, learner.renderer, learner.precision, self.processes, watch)
        for name, own in predictions.items():
            self._check_finite(own, f"{split} bags (with the {name} weights)", self._samples[split])
        return predictions

    @staticmethod
    def _check_finite(predictions: Predictions, what: str, samples: Sequence[Sample]) -> None:
        bad = ~predictions.logits.isfinite().flatten(1).all(1)
        if bad.any():
            named = [samples[i].id for i in predictions.index[bad].tolist()]
            listed = ", ".join(named[:MOST_NAMED]) + (", ..." if len(named) > MOST_NAMED else "")
            raise UserError(
                f"the logits of {len(named)} of {len(bad)} {what} are not finite: {listed}. Look at their patches or "
                "features; if they are sound, try --amp_dtype=bf16, --no_amp, or a lower --lr."
            )

    def _watched(self, split: str, load: memory.Load) -> Iterator[Bags]:
        """The encoder calls of a split; ``load`` follows them."""
        samples = self._samples[split]
        for bags in self._reading().read(split):
            load.now([samples[i].id for i in bags.index], sum(bags.sizes))
            yield bags

    def _reading(self) -> EvalReader:
        if self._reader is None:
            self._reader = eval_reader(self.setup, self.processes, self._samples, part_plan(self.setup))
        return self._reader
