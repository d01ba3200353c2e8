"""One fold: train, validate, choose the epoch, test."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from datasets.bags import Bags, TrainBags
from datasets.full_bags import full_bag_batches
from datasets.gpu_jpeg.coded import GpuDecoder
from datasets.labels.types import Fold
from datasets.loaders import TrainStream, train_batches
from datasets.sampling import bag_limit
from engine import memory
from engine.attention_sampling import check_attention_sampling
from engine.decoding import coded, gpu_decoder
from engine.evaluate import Predictions
from engine.fold_files import FoldFiles
from engine.full_bag import FullBagLearner
from engine.learner import Learner
from engine.metrics.classification import Metrics
from engine.profiling import StepTrace
from engine.progress import Bar, EpochMeters, speed
from engine.records import Records
from engine.run_names import ending
from engine.selection import Best, EarlyStopping, Progress
from engine.setup import Setup, build_model, describe
from engine.tasks import Task, task_builder
from engine.testing import FoldResult, Tester
from engine.validation import Evaluator, loader_options
from modules.model import average_buffers, load_buffers
from utils.dist import Poll, Processes
from utils.log import duration
from utils.seed import seed_all, step_seed
from utils.stop import STOPPED_STATUS, Stopped

log = logging.getLogger(__name__)

EVALUATED = {"main": ("main",), "ema": ("ema",), "both": ("main", "ema"), "both_ema": ("ema", "main")}
"""``test_type`` -> sets of weights that are evaluated; the first one decides on early stopping."""

MOST_OF_START = 0.1
"""Share of the weights of the start in an EMA, above which it says little about the training."""

GO_ON, SAVE, STOP = 0, 1, 2
"""What a rank wishes after a step; the largest wish of all ranks is done."""


def build_learner(setup: Setup, fold: Fold, task: Task, processes: Processes) -> Learner:
    """The model of a fold with its starting weights, and what trains it."""
    seed_all(fold.seed)
    model, renderer = build_model(setup, task.outputs, fold.index)
    by_attention = setup.config.data.sel_type == "ema"
    if by_attention:
        check_attention_sampling(setup.config.data, model.mil)
    with_ema = by_attention or "ema" in EVALUATED[setup.config.eval.test_type]
    kind = Learner if setup.chunks is None else FullBagLearner
    learner = kind(model.to(processes.device), task, renderer, setup.config.train, processes, with_ema)
    learner.favoured = bag_limit(setup.config.data) if by_attention else 0
    return learner


def training_stream(
    setup: Setup, fold: Fold, processes: Processes, epochs: tuple[int, int], start_step: int = 0
) -> TrainStream:
    """The training batches of this process in ``epochs`` (first one, the one after the last)."""
    options = setup.config.train
    return TrainStream(
        len(fold.train),
        options.batch_size,
        rank=processes.rank,
        world=processes.world,
        seed=fold.seed,
        drop_last=options.drop_last,
        epochs=epochs,
        start_step=start_step,
        strata=task_builder.strata(setup.config, fold.train),
    )


def training_decoder(setup: Setup, processes: Processes) -> GpuDecoder | None:
    """The decoder for training patches; None where the reading processes decode, and for features."""
    data, in_step = setup.config.data, setup.chunks is None
    return gpu_decoder(data, setup.sources.train[-1], processes, data.num_workers, in_step)


def training_batches(setup: Setup, fold: Fold, processes: Processes, stream: TrainStream) -> Iterator[Bags]:
    """The batches of ``stream``, prepared as the options say."""
    sources, decoder = setup.sources.train, training_decoder(setup, processes)
    if decoder is not None:
        sources = coded(sources)
        log.info("The GPU decodes the patches (--jpeg_decoder).")
    bags = TrainBags(fold.train, sources, setup.plan, setup.views, fold.seed)
    options = loader_options(setup, processes, setup.config.data.num_workers, decoder)
    if setup.chunks is not None:
        return full_bag_batches(bags, stream, options, setup.chunks)
    return train_batches(bags, stream, options)


class FoldRun:
    """Everything of one fold, in the order it happens: ``train()``, then ``test()``."""

    def __init__(self, setup: Setup, fold: Fold, processes: Processes, records: Records) -> None:
        self.setup, self.fold, self.processes, self.records = setup, fold, processes, records
        self.train_options, self.eval_options = setup.config.train, setup.config.eval
        self.names = EVALUATED[self.eval_options.test_type]
        self.keep_last = self.eval_options.keep_epoch == "last"
        self.task = task_builder.build(setup.config, setup.cohort, fold, processes.world)
        self.learner = build_learner(setup, fold, self.task, processes)
        stopping = EarlyStopping(
            self.train_options.patient,
            min(self.train_options.max_epoch, self.train_options.num_epoch),
            self.train_options.early_stopping and not self.keep_last,
        )
        self.progress = Progress(stopping, best={name: Best() for name in self.names})
        self.files = FoldFiles(setup, fold, self.task, records.folder, processes)
        self.evaluator = Evaluator(setup, fold, self.learner, processes)
        self.label = f"fold {fold.index + 1}/{setup.config.data.cv_fold}"
        self._poll, self._saved_at = Poll(processes), time.monotonic()
        self._inside: dict[str, Any] | None = None  # this rank's state inside the epoch that is gone on with
        self._resume()

    def _resume(self) -> None:
        run = self.setup.config.run
        training = run.trains
        if training:
            self.files.clear()
        state = None if run.resume == "never" else self.files.load_last()
        if state is not None:
            self.learner.load_state_dict(state)
            self.progress.load_state_dict(state["progress"])
        if not training:
            return
        self.records.forget(self.fold.index, from_epoch=self.progress.epoch)
        if state is None:
            return
        done = self.progress.epoch
        if self.progress.between_epochs:
            self.files.save_behind_epoch(self.learner, done - 1, self._best_of(done - 1))
            log.info("%s: goes on after epoch %d (%s).", self.label, done, self.files.last)
            return
        if state["ranks"] is not None:
            self._inside = state["ranks"][self.processes.rank]
            for name, model in self.learner.weights().items():
                load_buffers(model, self._inside["buffers"].get(name, {}))
        where = f"step {self.progress.step}" if self.progress.trained is None else "its last step"
        log.info("%s: goes on in epoch %d after %s (%s).", self.label, done + 1, where, self.files.last)

    # Training

    def train(self) -> None:
        """Trains until the last epoch or until early stopping, keeping the best epoch of each set of weights.

        Raises:
            Stopped: when a process was asked to stop and the state is saved.
            UserError: when a loss is not finite or the device has too little memory.
        """
        for line in describe(self.setup, self.learner.model, self.learner.precision):
            log.info("%s", line)
        self._look_at_ema()
        if self._finished():
            log.info("%s: all %d epochs are trained already.", self.label, self.progress.epoch)
            return
        options, first, begin = self.train_options, self.progress.epoch, time.perf_counter()
        trace = self.records.folder / f"trace_rank{self.processes.rank}.json"
        self.trace = StepTrace(trace if self.setup.config.run.profile else None)
        stream = self._stream()
        batches = training_batches(self.setup, self.fold, self.processes, stream)
        with torch.autograd.set_detect_anomaly(self.setup.config.run.debug):
            for epoch in range(first, options.num_epoch):
                values = self._one_epoch(epoch, batches, stream)
                per_epoch = (time.perf_counter() - begin) / (epoch + 1 - first)
                self._report(epoch, values, per_epoch * (options.num_epoch - epoch - 1))
                if self._finished():
                    break
        if self.progress.epoch < options.num_epoch:
            log.info("%s: stopped early after epoch %d.", self.label, self.progress.epoch)

    def _look_at_ema(self) -> None:
        """Warns where the moving average cannot leave the start behind in as many updates as there will be."""
        options = self.train_options
        steps = training_stream(self.setup, self.fold, self.processes, (0, 1)).steps_per_epoch
        updates = options.num_epoch * -(-steps // options.accumulation_steps)
        left = options.mm**updates
        if "ema" in self.names and left > MOST_OF_START:
            log.warning(
                "%s: after all %d updates the EMA, which --test_type=%s evaluates, still holds %.0f %% of the starting "
                "weights. Lower --mm, to %.4f or less, or give --test_type=main.",
                self.label,
                updates,
                self.eval_options.test_type,
                100 * left,
                0.01 ** (1 / updates),
            )

    def _one_epoch(self, epoch: int, batches: Iterator[Bags], stream: TrainStream) -> dict[str, Any]:
        if self.progress.trained is None:
            values = self._train_epoch(epoch, batches, stream)
            self.learner.end_epoch(epoch)
            self._synchronise()
            self.progress.step, self.progress.trained = 0, values
        values = self.progress.trained or {}
        values = values | self._validate(epoch)
        self.progress.finish_epoch()
        # The line comes first: one too many is removed when the run goes on, a missing one would stay missing.
        self.records.epoch(self.fold.index, {"epoch": epoch, **{k: v for k, v in values.items() if k != "speed"}})
        self._save()
        self.files.save_behind_epoch(self.learner, epoch, self._best_of(epoch))
        return values

    def _finished(self) -> bool:
        done = self.progress.epoch
        if not self.progress.between_epochs:
            return False
        return done >= self.train_options.num_epoch or self.progress.stopping.should_stop(done - 1)

    def _best_of(self, epoch: int) -> list[str]:
        """Sets of weights of which ``epoch`` is the one to keep so far."""
        return [name for name in self.names if self.keep_last or self.progress.best[name].epoch == epoch]

    def _stream(self) -> TrainStream:
        epochs = self.progress.epoch + (self.progress.trained is not None), self.train_options.num_epoch
        return training_stream(self.setup, self.fold, self.processes, epochs, self.progress.step)

    def _train_epoch(self, epoch: int, batches: Iterator[Bags], stream: TrainStream) -> dict[str, Any]:
        meters, load, steps = EpochMeters(), memory.Load(), stream.steps_per_epoch
        if self._inside is not None:
            meters.load_state_dict(self._inside["meters"], self.processes.device)
            self._inside = None
        label = f"{self.label}  epoch {epoch + 1}/{self.train_options.num_epoch}"
        bar = Bar(label, steps, self.setup.config.run.log_iter, self.processes.is_main)
        self.learner.model.train()
        with memory.explained(load, self.setup.config, training=True):
            for step in range(self.progress.step, steps):
                bags = meters.speed.wait(batches)
                load.now([self.fold.train[i].id for i in bags.index], sum(bags.sizes))
                updated = self._step(epoch, step, stream, bags, meters)
                meters.speed.waited += bags.waited
                bar.step(step + 1, meters.speed)
                self.trace.step()
                if updated:
                    self._heed_wishes(step + 1, meters)
        bar.close()
        self.trace.close()
        return self._training_values(meters)

    def _step(self, epoch: int, step: int, stream: TrainStream, bags: Bags, meters: EpochMeters) -> bool:
        """One batch; returns whether it ended its group of batches, so that the weights were updated."""
        options, steps = self.train_options, stream.steps_per_epoch
        seed_all(step_seed(self.fold.seed, epoch, step, self.processes.rank))
        group = step - step % options.accumulation_steps
        size = min(options.accumulation_steps, steps - group)
        update = step + 1 == group + size
        loss = self.learner.step(bags, divide_by=size, update=update, counts=stream.counts(step))
        meters.loss.add(loss, [self.fold.train[i].id for i in bags.index])
        if self.learner.aux_loss is not None:
            meters.aux.add(self.learner.aux_loss)
        if update and self.learner.grad_norm is not None:
            meters.norm.add(self.learner.grad_norm)
        return update

    def _training_values(self, meters: EpochMeters) -> dict[str, Any]:
        seen = meters.speed
        own = (*meters.loss.total(), seen.rate, seen.instances, seen.kept, meters.aux.mean)
        losses, bags, rates, instances, kept, auxiliary = zip(*self.processes.gather(own), strict=True)
        values = {
            "train_loss": sum(losses) / max(sum(bags), 1),
            **self.learner.rates(),
            "train_seconds": seen.seconds,
            "patches_per_s": sum(rates),
            "data_wait": seen.data_share,
            "speed": speed(seen),
            **seen.counts(sum(instances), sum(kept)),
        }
        if self.learner.ema is not None:
            values["mm"] = self.train_options.mm
        present = [aux for aux in auxiliary if aux is not None]
        means = {"grad_norm": meters.norm.mean, "aux_loss": statistics.fmean(present) if present else None}
        return values | {name: mean for name, mean in means.items() if mean is not None}

    def _synchronise(self) -> None:
        """Averages the BatchNorm statistics of the processes, so that all of them evaluate the same model."""
        if self.processes.world > 1:
            for model in self.learner.weights().values():
                average_buffers(model)

    # Going on later

    def _heed_wishes(self, step: int, meters: EpochMeters) -> None:
        """After an update: saves when it is time, or when a process was asked to stop."""
        minutes = self.setup.config.run.save_every_min
        due = self.processes.is_main and minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes
        wish = self._poll.ask(STOP if self.processes.stop.by else SAVE if due else GO_ON)
        if wish == GO_ON:
            return
        self._poll.forget()
        self.progress.step = step
        buffers: dict[str, Any] = {}
        if self.processes.world > 1:  # inside an epoch the BatchNorm statistics differ between processes
            weights = self.learner.weights()
            buffers = {n: {k: v.cpu() for k, v in m.named_buffers()} for n, m in weights.items()}
        own = {"meters": meters.state_dict(), "buffers": buffers}
        self._save(self.processes.gather(own))
        if wish == STOP:
            self._say_stopped(f"step {step} of epoch {self.progress.epoch + 1}")
            raise Stopped

    def _save(self, ranks: list[Any] | None = None) -> None:
        self.files.save_last(self.learner, self.progress.state_dict(), ranks)
        self._saved_at = time.monotonic()

    def _say_stopped(self, where: str) -> None:
        by = next((by for by in self.processes.gather(self.processes.stop.by) if by), "a signal")
        anew = " without --resume=never" if self.setup.config.run.resume == "never" else ""
        log.info(
            "%s: %s: saved after %s in %s. The same command%s goes on from there. Exit status %d.",
            self.label,
            by,
            where,
            self.files.last,
            anew,
            STOPPED_STATUS,
        )

    # Validation

    def _validate(self, epoch: int) -> dict[str, Any]:
        """Validation values of the epoch. Nothing is recorded before all predictions are there, so it can be redone."""
        same = self.fold.selection == "test"  # validation is the test set
        splits = ("val", "test") if self.eval_options.always_test and not same else ("val",)
        try:
            seen = {split: self.evaluator.predict(self.names, split) for split in splits}
        except Stopped:
            self._save()
            self._say_stopped(f"the training of epoch {epoch + 1}")
            raise
        values: dict[str, Any] = {}
        for name in self.names:
            predictions = seen["val"][name]
            metrics, loss = self._agreed(predictions)
            values |= {f"val_{k}{ending(name)}": v for k, v in metrics.values.items()}
            values[f"val_loss{ending(name)}"] = loss
            chosen = metrics.values[self.task.selection]
            self.progress.best[name].update(chosen, loss, epoch)
            if name == self.names[0]:
                self.progress.stopping.update(chosen)
                for note in metrics.notes if epoch == 0 else ():
                    log.info("%s  validation: %s", self.label, note)
            if self.eval_options.always_test:
                tested = seen[splits[-1]][name]
                point = self.task.statistics(tested.logits, tested.target).point()
                values |= {f"te_{k}{ending(name)}": v for k, v in point.values.items()}
        return values

    def _agreed(self, predictions: Predictions) -> tuple[Metrics, float]:
        """Metrics and loss as rank 0 computes them: unlike machines may differ in a last digit, and so in a choice."""
        metrics = self.task.statistics(predictions.logits, predictions.target).point()
        loss = float(self.task.loss(predictions.logits, predictions.target))
        agreed: tuple[Metrics, float] = self.processes.gather((metrics, loss))[0]
        return agreed

    def _report(self, epoch: int, values: dict[str, Any], remaining: float) -> None:
        name = self.task.selection
        log.info(
            "%s  epoch %d/%d  loss %.3f  val %s %.3f  %s  eta %s",
            self.label,
            epoch + 1,
            self.train_options.num_epoch,
            values["train_loss"],
            name,
            values[f"val_{name}{ending(self.names[0])}"],
            values["speed"],
            duration(remaining),
        )

    # Test

    def predict(self) -> dict[str, torch.Tensor]:
        """The scores of bags without labels, (N, ...) by set of weights; writes them."""
        return Tester(self.evaluator, self.files, self.records).predict(self.names, self.label)

    def test(self) -> FoldResult:
        """Tests the best epoch of each evaluated set of weights; writes the predictions."""
        self.processes.barrier()
        return Tester(self.evaluator, self.files, self.records).test(self.names, self.progress.epoch, self.label)
