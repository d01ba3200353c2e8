"""What a test takes from a checkpoint besides weights: the order of classes, bins, the scale of values, the options."""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.labels.options import LabelOptions
from datasets.labels.types import ELSEWHERE, Cohort, Fold
from engine.checkpoint import load
from engine.run_names import best_path, last_path, run_folder, split_path
from utils.config import Config, ModelConfig
from utils.errors import UserError

log = logging.getLogger(__name__)

WHOLE_COPY = "take a whole copy of it, or train again with --resume=never"
"""Remedy for damaged weights of a run that is trained."""

MOST_NAMED = 5

OF_THE_START = {"enc_init", "enc_pt", "freeze_enc", "sdpa_type", "n_classes", "input_dim"}
"""Options of the model that a test does not use, or that the shapes of the weights tell."""

SAME_IN_A_TEST = {f.name for f in dataclasses.fields(ModelConfig)} - OF_THE_START | {
    "crop_size",
    "channel_order",
    "loss",
    "keep_epoch",
}
"""Options with which the same weights would give other predictions, or be reported as something else."""


@dataclass(frozen=True)
class Trained:
    """A fold's checkpoint without its weights; what files of the published program lack is None."""

    path: Path
    fold: int | None
    task: str | None
    facts: Mapping[str, Any]
    classes: tuple[str, ...] | None
    bin_edges: tuple[float, ...] | None


def as_tested(config: Config) -> Config:
    """The options of a test of ``--checkpoint``, which reads no low magnification; those of other runs as they are."""
    if config.run.checkpoint is None or not config.data.mul_scale_input:
        return config
    log.info("This test reads the high magnification only: mul_scale_input and dataset_sub_root are for training.")
    data = dataclasses.replace(config.data, mul_scale_input=False, dataset_sub_root=None)
    return dataclasses.replace(config, data=data)


def weights_path(config: Config, fold: int, name: str) -> Path:
    """The file from which a test takes the weights ``name`` of a fold."""
    given = config.run.checkpoint
    folder = run_folder(config.run) if given is None else Path(given)
    return folder if folder.is_file() else best_path(folder, fold, name)


def read_trained(config: Config) -> dict[int, Trained]:
    """Fold to its checkpoint, for a run that only tests; those that are not there yet are left out.

    Raises:
        UserError: for ``--checkpoint`` where it has no use, no such file, or one of a run with other options.
    """
    given, data = config.run.checkpoint, config.data
    if config.run.trains:
        if given is not None:
            raise UserError(
                f"--checkpoint={given} says what --script_mode=test tests. Give that too; to train on from encoder "
                "weights give --enc_init."
            )
        return {}
    if config.run.predicts and given is None:
        raise UserError("--script_mode=predict needs --checkpoint, the folder of the run whose models predict.")
    folds = range(data.fold_start, data.cv_fold)
    if given is not None and Path(given).is_file() and len(folds) > 1:
        raise UserError(
            f"--checkpoint={given} is one file, and there are {len(folds)} folds. Give the folder of the run, or "
            "--cv_fold=1."
        )
    name = "ema" if config.eval.test_type == "ema" else "main"
    paths = {fold: weights_path(config, fold, name) for fold in folds}
    return {fold: _read(path, config) for fold, path in paths.items() if given is not None or path.is_file()}


def _read(path: Path, config: Config) -> Trained:
    content = load(path, WHOLE_COPY)
    now, given = config.flat(), content.get("config")
    stored = {**Config().flat(), **given} if isinstance(given, Mapping) else now
    differing = [k for k in sorted(SAME_IN_A_TEST) if stored[k] != now[k]]
    if differing:
        listing = ", ".join(f"{k} {stored[k]!r} -> {now[k]!r}" for k in differing)
        raise UserError(
            f"{path} was trained with other options ({listing}). Give the same, such as -c {path.parent}/config.yaml."
        )
    edges, classes = content.get("bin_edges"), content.get("classes")
    return Trained(
        path,
        content.get("k"),
        content.get("task"),
        content.get("task_facts") or {},
        None if classes is None else tuple(classes),
        tuple(edges) if edges else None,
    )


def with_trained(options: LabelOptions, trained: Mapping[int, Trained]) -> LabelOptions:
    """The options with the classes and bins of the checkpoints, whatever the csv holds of them."""
    edges = {fold: t.bin_edges for fold, t in trained.items() if t.bin_edges is not None and options.survival}
    if edges:
        options = dataclasses.replace(options, edges=edges, n_bins=len(next(iter(edges.values()))) + 1)
    classes = next((t.classes for t in trained.values() if t.classes is not None), None)
    own = options.classes or options.published_key or options.kind != "classification"
    return options if own or classes is None else dataclasses.replace(options, classes=classes)


def checked(cohort: Cohort, trained: Mapping[int, Trained], config: Config) -> Cohort:
    """The cohort, of which each fold fits its checkpoint and knows what its missing training rows would have said.

    Raises:
        UserError: for labels of another kind than the model's, and for a test on another cohort in the folder of a
            trained run, whose results it would replace.
    """
    for t in trained.values():
        if t.task not in (None, cohort.task):
            raise UserError(f"{t.path} was trained for {t.task}, and the labels are of a {cohort.task} task.")
        if cohort.task != "survival" and t.classes not in (None, cohort.class_names):
            raise UserError(
                f"{t.path} was trained on the classes {', '.join(t.classes or ())}, and the labels give "
                f"{', '.join(cohort.class_names)}. Give the same with --classes, in that order."
            )
    given, said = config.run.checkpoint, list[str]()
    if given is not None:
        said.append(f"Weights, order of the classes and survival bins are those of {given}.")
        said += [_known_to(trained[fold.index], fold) for fold in cohort.folds if not config.run.predicts]
    folds = tuple(_completed(f, cohort, trained, config) for f in cohort.folds)
    return dataclasses.replace(cohort, folds=folds, notes=(*cohort.notes, *said))


def _known_to(trained: Trained, fold: Fold) -> str:
    """What of the test a model has seen in its training, by the names of slides and patients."""
    rows = [] if trained.fold is None else _rows_of(split_path(trained.path.parent, trained.fold))
    seen = [row for row in rows if row.get("split") in ("train", "val")]
    if not seen:
        return f"fold {fold.index}: what {trained.path} was trained on is not known, and not compared with the test."
    found = []
    for what, mine in (("slide", [s for t in fold.test for s in t.slides]), ("case", [t.case for t in fold.test])):
        shared = sorted(set(mine).intersection(row.get(what, "") for row in seen))
        listed = ", ".join(shared[:MOST_NAMED]) + (", ..." if len(shared) > MOST_NAMED else "")
        found += [f"{len(shared)} {what}s ({listed})"] if shared else []
    if not found:
        return f"fold {fold.index}: no slide and no case of the test is among those that the model was trained on."
    return (
        f"fold {fold.index}: {' and '.join(found)} of the test are among those that the model was trained on or chosen "
        "by. Unless these are others of the same names, the result is optimistic."
    )


def _rows_of(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _completed(fold: Fold, cohort: Cohort, trained: Mapping[int, Trained], config: Config) -> Fold:
    if fold.selection != ELSEWHERE:
        return fold
    folder = run_folder(config.run)
    if last_path(folder, fold.index).exists():
        raise UserError(
            f"{folder} holds a trained run, whose results a test on another cohort would replace. Give another "
            f"--title, and --checkpoint={folder}."
        )
    if cohort.task != "regression":
        return fold
    facts = trained[fold.index].facts if fold.index in trained else {}
    if not {"mean", "sd"} <= facts.keys():
        raise UserError(
            f"fold {fold.index}: without train rows the scale of the values comes from the checkpoint, and "
            f"{weights_path(config, fold.index, 'main')} does not give it. Give --checkpoint=FOLDER of the trained run."
        )
    return dataclasses.replace(fold, scale=(float(facts["mean"]), float(facts["sd"])))


def need_training_rows(cohort: Cohort, command: str) -> None:
    """Refuses to measure training where there is nothing to train on."""
    if not all(fold.train for fold in cohort.folds):
        raise UserError(f"{command} measures training, and there are no train rows: leave --script_mode out.")
