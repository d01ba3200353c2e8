"""One fold: train, validate, choose the epoch, test."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from datasets.bags import Bags, EvalParts, TrainBags
from datasets.label_types import Fold, Sample
from datasets.loaders import LoaderOptions, TrainStream, eval_loader, shard, train_loader
from engine import checkpoint, task_builder
from engine.bootstrap import bootstrap
from engine.evaluate import Predictions, predict
from engine.learner import Learner
from engine.progress import Bar, LossMeter, Meter, speed
from engine.records import Records
from engine.selection import Best, EarlyStopping, Progress
from engine.setup import Setup, build_model, describe
from modules.model import SlideModel, average_buffers, bare_state_dict
from utils.dist import Processes
from utils.log import duration
from utils.seed import seed_all, step_seed

log = logging.getLogger(__name__)

EVALUATED = {"main": ("main",), "ema": ("ema",), "both": ("main", "ema"), "both_ema": ("ema", "main")}
"""``test_type`` -> sets of weights that are evaluated; the first one decides on early stopping."""


class FoldRun:
    """Everything of one fold, in the order it happens: ``train()``, then ``test()``."""

    def __init__(self, setup: Setup, fold: Fold, processes: Processes, records: Records) -> None:
        self.setup, self.fold, self.processes, self.records = setup, fold, processes, records
        self.train_options, self.eval_options = setup.config.train, setup.config.eval
        self.names = EVALUATED[self.eval_options.test_type]
        self.keep_last = self.eval_options.keep_epoch == "last"
        self.task = task_builder.build(setup.config, setup.cohort, fold, processes.world)
        seed_all(fold.seed)
        model, renderer = build_model(setup, self.task.outputs, fold.index)
        self.learner = Learner(
            model.to(processes.device),
            self.task,
            renderer,
            self.train_options,
            processes,
            "ema" in self.names,
        )
        stopping = EarlyStopping(
            self.train_options.patient,
            min(self.train_options.max_epoch, self.train_options.num_epoch),
            self.train_options.early_stopping and not self.keep_last,
        )
        self.progress = Progress(stopping, best={name: Best() for name in self.names})
        self._resume()
        self.label = f"fold {fold.index + 1}/{setup.config.data.cv_fold}"
        self._loaders: dict[str, DataLoader[Bags]] = {}

    @property
    def last_path(self) -> Path:
        """Checkpoint behind the last finished epoch, from which a stopped run goes on."""
        return self.records.folder / f"fold_{self.fold.index}_last.pt"

    def _resume(self) -> None:
        if self.setup.config.run.resume == "never" or not self.last_path.is_file():
            return
        state = checkpoint.load(self.last_path)
        checkpoint.check_same_run(state["config"], self.setup.config.flat(), self.last_path)
        self.learner.load_state_dict(state)
        self.progress.load_state_dict(state["progress"])
        self.records.forget(self.fold.index, from_epoch=self.progress.epoch)
        log.info("fold %d goes on behind epoch %d (%s).", self.fold.index, self.progress.epoch, self.last_path)

    # Training

    def train(self) -> None:
        """Trains until the last epoch or until early stopping, keeping the best epoch of each set of weights."""
        for line in describe(self.setup, self.learner.model, self.learner.precision):
            log.info("%s", line)
        options = self.train_options
        if self._finished():
            log.info("%s: all %d epochs are trained already.", self.label, self.progress.epoch)
            return
        stream = self._stream()
        batches = iter(self._train_loader(stream))
        begin, first = time.perf_counter(), self.progress.epoch
        for epoch in range(first, options.num_epoch):
            values = self._train_epoch(epoch, batches, stream.steps_per_epoch)
            self.learner.end_epoch(epoch)
            self._synchronise()
            values |= self._validate(epoch)
            self.progress.epoch = epoch + 1
            per_epoch = (time.perf_counter() - begin) / (epoch + 1 - first)
            self._report(epoch, values, per_epoch * (options.num_epoch - epoch - 1))
            self._save(epoch)
            if self._finished():
                break
        if self.progress.epoch < options.num_epoch:
            log.info("%s: stopped early behind epoch %d.", self.label, self.progress.epoch)

    def _finished(self) -> bool:
        done = self.progress.epoch
        return done >= self.train_options.num_epoch or self.progress.stopping.should_stop(done - 1)

    def _stream(self) -> TrainStream:
        options = self.train_options
        return TrainStream(
            len(self.fold.train),
            options.batch_size,
            rank=self.processes.rank,
            world=self.processes.world,
            seed=self.fold.seed,
            drop_last=options.drop_last,
            epochs=(self.progress.epoch, options.num_epoch),
            strata=task_builder.strata(self.setup.config, self.fold.train),
        )

    def _train_loader(self, stream: TrainStream) -> DataLoader[Bags]:
        setup = self.setup
        bags = TrainBags(self.fold.train, setup.sources.train, setup.plan, setup.views, self.fold.seed)
        return train_loader(bags, stream, self._loader_options(setup.config.data.num_workers))

    def _loader_options(self, workers: int) -> LoaderOptions:
        data = self.setup.config.data
        pin = data.pin_memory and self.processes.device.type == "cuda"
        return LoaderOptions(workers, data.prefetch_factor, pin, data.img_trans_chunk)

    def _train_epoch(self, epoch: int, batches: Iterator[Bags], steps: int) -> dict[str, Any]:
        options, meter, losses = self.train_options, Meter(), LossMeter()
        label = f"{self.label}  epoch {epoch + 1}/{options.num_epoch}"
        bar = Bar(label, steps, self.setup.config.run.log_iter, self.processes.is_main)
        self.learner.model.train()
        for step in range(steps):
            bags = meter.wait(batches)
            seed_all(step_seed(self.fold.seed, epoch, step, self.processes.rank))
            group = step - step % options.accumulation_steps
            size = min(options.accumulation_steps, steps - group)
            loss = self.learner.step(bags, divide_by=size, update=step + 1 == group + size)
            losses.add(loss, [self.fold.train[i].id for i in bags.index])
            bar.step(step + 1, meter)
        bar.close()
        total, count = losses.total()
        totals = self.processes.gather((total, count, meter.rate))
        mean = sum(t for t, _, _ in totals) / max(sum(n for _, n, _ in totals), 1)
        return {
            "train_loss": mean,
            "lr": self.learner.lr,
            "train_seconds": meter.seconds,
            "patches_per_s": sum(rate for _, _, rate in totals),
            "data_wait": meter.data_share,
            "speed": speed(meter),
        }

    def _synchronise(self) -> None:
        """Averages the BatchNorm statistics of the processes, so that all of them evaluate the same model."""
        if self.processes.world > 1:
            for model in self.learner.weights().values():
                average_buffers(model)

    # Validation

    def _validate(self, epoch: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name in self.names:
            suffix = "" if name == "main" else f"_{name}"
            predictions = self._predict(name, "val")
            metrics = self.task.statistics(predictions.logits, predictions.target).point()
            loss = float(self.task.loss(predictions.logits, predictions.target))
            values |= {f"val_{k}{suffix}": v for k, v in metrics.values.items()} | {f"val_loss{suffix}": loss}
            chosen = metrics.values[self.task.selection]
            if self.progress.best[name].update(chosen, loss, epoch) or self.keep_last:
                self._save_best(name, epoch)
            if name == self.names[0]:
                self.progress.stopping.update(chosen)
                for note in metrics.notes if epoch == 0 else ():
                    log.info("%s  validation: %s", self.label, note)
            if self.eval_options.always_test:
                tested = self._predict(name, "test")
                point = self.task.statistics(tested.logits, tested.target).point()
                values |= {f"te_{k}{suffix}": v for k, v in point.values.items()}
        return values

    def _predict(self, name: str, split: str) -> Predictions:
        learner = self.learner
        model: SlideModel = learner.weights()[name]
        return predict(model, self._eval_loader(split), learner.renderer, learner.precision, self.processes)

    def _eval_loader(self, split: str) -> DataLoader[Bags]:
        if split not in self._loaders:
            data, setup = self.setup.config.data, self.setup
            samples: Sequence[Sample] = getattr(self.fold, split)
            mine = shard(len(samples), self.processes.rank, self.processes.world)
            parts = EvalParts(samples, setup.sources.test, self._part_size(), mine)
            workers = data.num_workers if data.num_workers_test is None else data.num_workers_test
            self._loaders[split] = eval_loader(parts, self._loader_options(workers), keep_workers=True)
        return self._loaders[split]

    def _part_size(self) -> int:
        """Instances that are read and encoded at a time in evaluation; features need no parts."""
        return self.eval_options.p_batch_size_v if self.setup.encoder is not None else 1 << 40

    # Files

    def best_path(self, name: str) -> Path:
        """Checkpoint of the best epoch: ``fold_<k>_model_best.pt``, ``fold_<k>_ema_model_best.pt`` for the EMA."""
        middle = "" if name == "main" else f"{name}_"
        return self.records.folder / f"fold_{self.fold.index}_{middle}model_best.pt"

    def _identity(self, epoch: int) -> dict[str, Any]:
        """What every checkpoint says about itself."""
        return {
            "epoch": epoch,
            "k": self.fold.index,
            "config": self.setup.config.flat(),
            "task": self.task.name,
            "task_facts": self.task.facts(),
            "classes": list(self.setup.cohort.class_names),
            "bin_edges": list(self.fold.bin_edges) if self.fold.bin_edges else None,
        }

    def _save_best(self, name: str, epoch: int) -> None:
        if not self.processes.is_main:
            return
        weights = {k: bare_state_dict(m) for k, m in self.learner.weights().items()}
        content: dict[str, Any] = {"teacher": weights.get("ema"), **self._identity(epoch)}
        if name == "main":
            content["model"] = weights["main"]
        checkpoint.save(self.best_path(name), content)

    def _save(self, epoch: int) -> None:
        if not self.processes.is_main:
            return
        state = {**self.learner.state_dict(), **self._identity(epoch), "progress": self.progress.state_dict()}
        checkpoint.save(self.last_path, state)
        every = self.setup.config.run.save_iter
        if every > 0 and (epoch + 1) % every == 0:
            checkpoint.save(self.records.folder / f"fold_{self.fold.index}_epoch_{epoch}_model.pt", state)

    def _report(self, epoch: int, values: dict[str, Any], remaining: float) -> None:
        shown = values.pop("speed")
        self.records.epoch(self.fold.index, {"epoch": epoch, **values})
        name = self.task.selection
        suffix = "" if self.names[0] == "main" else f"_{self.names[0]}"
        log.info(
            "%s  epoch %d/%d  loss %.3f  val %s %.3f  %s  eta %s",
            self.label,
            epoch + 1,
            self.train_options.num_epoch,
            values["train_loss"],
            name,
            values[f"val_{name}{suffix}"],
            shown,
            duration(remaining),
        )

    # Test

    def test(self) -> FoldResult:
        """Tests the best epoch of each evaluated set of weights; writes the predictions."""
        self.processes.barrier()
        results = {}
        logits = {}
        for name in self.names:
            path = self.best_path(name)
            content = checkpoint.load(path)
            weights = content["model"] if name == "main" else content["teacher"]
            checkpoint.load_weights(self.learner.weights()[name], weights, path)
            predictions = self._predict(name, "test")
            statistics = self.task.statistics(predictions.logits, predictions.target)
            estimates = bootstrap(statistics, self.fold.index, self.eval_options.num_bootstrap)
            results[name] = {
                "epoch": content["epoch"],
                "metrics": estimates.as_dict(),
                "notes": estimates.notes,
                "report": self.task.report(predictions.logits, predictions.target),
            }
            logits[name] = replace(predictions, logits=self.task.comparable(predictions.logits))
            self._write_predictions(name, predictions)
            chosen = estimates[self.task.selection]
            log.info(
                "%s  test (%s weights of epoch %d, %s)  %s %.4f [%.4f, %.4f]",
                self.label,
                name,
                content["epoch"] + 1,
                "the last" if self.keep_last else f"chosen on {self.fold.selection}",
                self.task.selection,
                chosen.value,
                chosen.low,
                chosen.high,
            )
            for line in results[name]["report"].pop("lines", ()):
                log.info("%s    %s", self.label, line)
        selected_on = "none" if self.keep_last else self.fold.selection
        return FoldResult(self.fold, self.progress.epoch, selected_on, results, logits)

    def _write_predictions(self, name: str, predictions: Predictions) -> None:
        scores = self.task.scores(predictions.logits)
        table = scores.tolist() if scores.ndim == 2 else [[s] for s in scores.tolist()]
        samples = [self.fold.test[int(i)] for i in predictions.index]
        targets = list(predictions.target)
        rows = [
            [s.id, s.case, *(_number(predictions.target[t][i]) for t in targets), *table[i]]
            for i, s in enumerate(samples)
        ]
        suffix = "" if name == "main" else f"_{name}"
        self.records.table(
            f"fold_{self.fold.index}_test{suffix}_predictions.csv", ["id", "case", *targets, *self.task.columns], rows
        )


@dataclass(frozen=True)
class FoldResult:
    """What a fold gives to the summary.

    Attributes:
        fold: its samples and seed.
        epochs: epochs trained.
        selected_on: split that chose the epoch: "val", "test", or "none" where the last one was kept.
        test: for each evaluated set of weights: chosen epoch, metrics with intervals, notes.
        predictions: logits and targets behind the metrics, comparable between folds, for pooling.
    """

    fold: Fold
    epochs: int
    selected_on: str
    test: dict[str, dict[str, Any]]
    predictions: dict[str, Predictions]


def _number(value: Tensor) -> float | int:
    return value.item()
