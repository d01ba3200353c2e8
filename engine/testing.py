"""The test of one fold: the kept epoch of each evaluated set of weights, its metrics and predictions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from datasets.labels.types import Cohort, Fold, Sample
from engine.attention_files import AttentionFiles
from engine.checkpoint import load, load_weights
from engine.evaluate import Predictions
from engine.fold_files import FoldFiles
from engine.metrics.bootstrap import bootstrap
from engine.records import Records
from engine.run_names import ending
from engine.sources import coordinates_of
from engine.tasks import Task
from engine.trained import WHOLE_COPY, weights_path
from engine.validation import Evaluator
from utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoldResult:
    """What a fold gives to the summary.

    Attributes:
        fold: its samples and seed.
        epochs: epochs trained; None for a model of another run.
        selected_on: split that chose the epoch: "val", "test", "another cohort" where the csv holds test rows only, or
            "none" where the last one was kept.
        test: for each evaluated set of weights: chosen epoch, metrics with intervals, notes.
        predictions: logits and targets behind the metrics, comparable between folds, for pooling.
    """

    fold: Fold
    epochs: int | None
    selected_on: str
    test: dict[str, dict[str, Any]]
    predictions: dict[str, Predictions]


class Tester:
    """Tests weights that training has left in files."""

    def __init__(self, evaluator: Evaluator, files: FoldFiles, records: Records) -> None:
        self.evaluator, self.files, self.records = evaluator, files, records
        self.fold, self.task = files.fold, files.task
        self.eval_options = files.setup.config.eval
        self.keep_last = self.eval_options.keep_epoch == "last"

    def test(self, names: Sequence[str], epochs: int, label: str) -> FoldResult:
        """Tests the sets of weights ``names`` of a fold that was trained for ``epochs`` epochs."""
        results: dict[str, dict[str, Any]] = {}
        logits: dict[str, Predictions] = {}
        kept = {name: self._load(name) for name in names}
        seen = self.evaluator.predict(names, "test", self._watch())
        for name, predictions in seen.items():
            statistics = self.task.statistics(predictions.logits, predictions.target)
            estimates = bootstrap(statistics, self.fold.index, self.eval_options.num_bootstrap)
            results[name] = {
                "epoch": kept[name],
                "metrics": estimates.as_dict(),
                "notes": estimates.notes,
                "report": self.task.report(predictions.logits, predictions.target),
            }
            logits[name] = replace(predictions, logits=self.task.comparable(predictions.logits))
            self._write_predictions(name, predictions)
            chosen = estimates[self.task.selection]
            log.info(
                "%s  test (%s weights of epoch %d, %s)  %s %.4f [%.4f, %.4f]",
                label,
                name,
                kept[name] + 1,
                "the last" if self.keep_last else f"chosen on {self.fold.selection}",
                self.task.selection,
                chosen.value,
                chosen.low,
                chosen.high,
            )
            for note in estimates.notes:
                log.info("%s    %s", label, note)
            for line in results[name]["report"].pop("lines", ()):
                log.info("%s    %s", label, line)
        selected_on = "none" if self.keep_last else self.fold.selection
        trained = epochs if self.files.setup.config.run.checkpoint is None else None
        return FoldResult(self.fold, trained, selected_on, results, logits)

    def predict(self, names: Sequence[str], label: str) -> dict[str, Tensor]:
        """The scores of the test bags, which have no labels, by set of weights: (N, ...), in the order of the fold."""
        for name in names:
            self._load(name)
        scores = {}
        for name, predictions in self.evaluator.predict(names, "test", self._watch()).items():
            scores[name] = self.task.scores(predictions.logits)
            file = f"fold_{self.fold.index}_predictions{ending(name)}.csv"
            write_scores(self.records, file, self.fold.test, self.task, scores[name])
            log.info("%s  %d predictions (%s weights) in %s", label, len(self.fold.test), name, file)
        return scores

    def _watch(self) -> AttentionFiles | None:
        setup = self.files.setup
        if not setup.config.eval.save_attention:
            return None
        source = setup.sources.test
        corners = coordinates_of(source, setup.config.data.h5_path)
        return AttentionFiles(self.records.folder, self.fold, source, corners)

    def _load(self, name: str) -> int:
        """Puts the kept weights in place; returns the epoch that they are of."""
        path = weights_path(self.files.setup.config, self.fold.index, name)
        content = load(path, WHOLE_COPY)
        weights = content.get("model" if name == "main" else "teacher")
        if weights is None:
            other = "ema" if name == "main" else "main"
            raise UserError(f"{path} holds no {name} weights. Give another --checkpoint, or --test_type={other}.")
        load_weights(self.evaluator.learner.weights()[name], weights, path)
        epoch: int = content["epoch"]
        return epoch

    def _write_predictions(self, name: str, predictions: Predictions) -> None:
        samples = [self.fold.test[int(i)] for i in predictions.index]
        file = f"fold_{self.fold.index}_test{ending(name)}_predictions.csv"
        write_scores(self.records, file, samples, self.task, self.task.scores(predictions.logits), predictions.target)


def write_scores(
    records: Records,
    file: str,
    samples: Sequence[Sample],
    task: Task,
    scores: Tensor,
    target: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a line per bag: id, case, the targets where there are some, the columns of ``task.scores``."""
    known = {name: values.tolist() for name, values in (target or {}).items()}
    table = scores.tolist() if scores.ndim == 2 else [[s] for s in scores.tolist()]
    rows = [[s.id, s.case, *(v[i] for v in known.values()), *table[i]] for i, s in enumerate(samples)]
    records.table(file, ["id", "case", *known, *task.columns], rows)


def write_means(scores: Sequence[Mapping[str, Tensor]], cohort: Cohort, task: Task, records: Records) -> None:
    """Writes ``predictions.csv``, the mean over the models of all folds; ``_ema`` for the EMA weights."""
    for name in scores[0]:
        mean = torch.stack([own[name] for own in scores]).mean(0)
        write_scores(records, f"predictions{ending(name)}.csv", cohort.folds[0].test, task, mean)
    log.info("Predictions of %d fold(s), and their mean (predictions.csv), are in %s.", len(scores), records.folder)
