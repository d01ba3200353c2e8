"""What the label files become: samples, folds, the cohort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

TaskName = Literal["classification", "survival", "multilabel", "regression"]
SPLITS = ("train", "val", "test")

ELSEWHERE = "another cohort"
"""What chose the epoch where the csv holds test rows only: a test of a model that was trained on others."""


@dataclass(frozen=True)
class Sample:
    """One bag with its target.

    Attributes:
        id: name of the bag: the slide's name in the store, or the patient where a bag holds all of the
            patient's slides. A row that the csv repeats (oversampling) gives repeated samples, so ids may
            repeat.
        case: the patient; what splits are grouped by.
        slides: names in the store, at least one.
        target: ``{"label": class}``; survival: ``{"label": bin, "time": in the csv's unit, "event": 1 or 0}``;
            regression: ``{"value": number}``; multi-label: each label's name with 1, 0, or -1 for unknown.
    """

    id: str
    case: str
    slides: tuple[str, ...]
    target: Mapping[str, float]


@dataclass(frozen=True)
class Fold:
    """The samples of one training run.

    Attributes:
        index: number of the fold, as in ``fold_<index>.csv``.
        seed: seed of the run.
        train, val, test: the samples; without a validation set of its own ``val`` equals ``test``.
        selection: the split that chooses the epoch, "test" when validation equals test; ``ELSEWHERE`` where nothing
            is trained and there are test samples only.
        bin_edges: inner edges of the survival bins, in the csv's unit of time; None for classification.
        missing: names in the csv that the store lacks, per split; not empty only with the policy "drop".
        scale: mean and standard deviation of the training values, where a regression's checkpoint gives them.
    """

    index: int
    seed: int
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    selection: str
    bin_edges: tuple[float, ...] | None = None
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scale: tuple[float, float] | None = None

    def splits(self) -> dict[str, tuple[Sample, ...]]:
        """Name of each split to its samples; validation only where it is a set of its own."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: named[name] for name in SPLITS if name != "val" or self.selection == "val"}


@dataclass(frozen=True)
class Cohort:
    """Everything that the label files say, checked.

    Attributes:
        task: what is learnt.
        class_names: names of the classes in the order of the model's outputs; for survival, of the bins; for
            multi-label, of the labels; ("value",) for regression.
        folds: the folds to run.
        bin_edges: inner edges of the survival bins where all folds share them, else None
            (``Fold.bin_edges``).
        notes: sentences that belong into the log and the results: drops, guesses, validation equal to test.
    """

    task: TaskName
    class_names: tuple[str, ...]
    folds: tuple[Fold, ...]
    bin_edges: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_classes(self) -> int:
        """Number of classes or survival bins: the width of the model's output."""
        return len(self.class_names)
