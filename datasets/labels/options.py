"""The options that decide how label files are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from utils.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from utils.errors import UserError

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "panda": tuple(str(grade) for grade in range(6)),
    "brca": ("IDC", "ILC"),
    "nsclc": ("LUAD", "LUSC"),
    "call": ("normal", "tumor"),
}
"""Class names of the published task keys, in the order of the published label values."""

SEED_STEP = 100
"""Distance of the seeds of two folds under random_seed and random_fold, as published."""

DEFAULT_BINS = 4


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """How a cohort is read; the defaults are those of the command line.

    Attributes:
        csv_path: label csv, or folder of ``fold_<k>.csv``.
        datasets: task key: contains panda, brca, nsclc or call, starts with bio or surv, or any other name.
        task: "classification", "survival", "regression", "multilabel", or "auto": survival for keys that start with
            surv, classification otherwise.
        classes: class names in order; they override what the task key says. multilabel: the label columns.
        n_classes: number of classes, where neither ``classes`` nor the task key gives it.
        fold_start, cv_fold: folds fold_start .. cv_fold - 1 are run; cv_fold 1 is a single run.
        val_ratio: share of the training part taken as validation in k-fold; share taken as test from a csv
            without splits; else 0 means validation equals test. None: the csv's val rows, else the test set.
        val2test: validation rows are appended to test; validation then equals test.
        random_fold: run cv_fold times on one csv, each with its own seed.
        random_seed: each fold has its own seed (seed + 100 x fold).
        seed: base seed of splits and folds.
        missing: "error" or "drop": what happens to a labelled slide that the store lacks.
        bag: "slide", "case", or "auto": case for survival, slide otherwise.
        bins: "train": survival bins are cut on the training rows of each fold; "published": a Label column is
            used as it stands, else the bins are cut on the whole table.
        n_bins: number of survival bins.
        training: whether anything is trained; a test needs no train and val rows.
        elsewhere: whether the model is that of another run (``--checkpoint``), so that a csv without a split column
            holds test rows only.
        edges: survival bins of the folds whose checkpoints give them.
    """

    csv_path: str
    datasets: str = "panda"
    task: str = "auto"
    classes: tuple[str, ...] = ()
    n_classes: int | None = None
    fold_start: int = 0
    cv_fold: int = 5
    val_ratio: float | None = None
    val2test: bool = False
    random_fold: bool = False
    random_seed: bool = False
    seed: int = 2021
    missing: str = "error"
    bag: str = "auto"
    bins: str = "train"
    n_bins: int = DEFAULT_BINS
    training: bool = True
    elsewhere: bool = False
    edges: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls, data: DataConfig, model: ModelConfig, train: TrainConfig, run: RunConfig | None = None
    ) -> LabelOptions:
        """The part of the program's options that concerns labels.

        Raises:
            UserError: no csv_path was given.
        """
        run = run or RunConfig()
        if not data.csv_path and not run.predicts:
            raise UserError("csv_path is not set: give --csv_path, a label csv or a folder of fold_<k>.csv.")
        return cls(
            csv_path=data.csv_path or "",
            datasets=data.datasets,
            task=data.task,
            classes=tuple(name.strip() for name in (data.classes or "").split(",") if name.strip()),
            n_classes=model.n_classes,
            fold_start=data.fold_start,
            cv_fold=data.cv_fold,
            val_ratio=data.val_ratio,
            val2test=data.val2test,
            random_fold=data.random_fold,
            random_seed=data.random_seed,
            seed=train.seed,
            missing=data.missing,
            bag=data.bag_level,
            bins=data.surv_bins,
            n_bins=model.n_classes if model.n_classes and model.n_classes > 1 else DEFAULT_BINS,
            training=run.trains,
            elsewhere=run.checkpoint is not None,
        )

    @property
    def key(self) -> str:
        return self.datasets.lower()

    @property
    def kind(self) -> str:
        """The task with "auto" resolved: the published survival keys are surv, surv_brca, ..."""
        if self.task != "auto":
            return self.task
        return "survival" if self.key.startswith("surv") else "classification"

    @property
    def survival(self) -> bool:
        """Whether rows have times and events."""
        return self.kind == "survival"

    @property
    def bag_level(self) -> str:
        """The bag level with "auto" resolved."""
        if self.bag != "auto":
            return self.bag
        return "case" if self.survival else "slide"

    @property
    def published_key(self) -> str | None:
        """The key of ``CLASS_NAMES`` that the task key contains, or None."""
        return next((name for name in CLASS_NAMES if name in self.key), None)

    def fold_seed(self, fold: int) -> int:
        """The seed of one fold."""
        return self.seed + SEED_STEP * fold * (self.random_seed or self.random_fold)

    def problems(self) -> list[str]:
        """What is wrong with the values themselves, one sentence each."""
        found = []
        if self.cv_fold < 1:
            found.append(f"cv_fold is {self.cv_fold}; it must be at least 1. Use --cv_fold=1 for a single run.")
        elif not 0 <= self.fold_start < self.cv_fold:
            found.append(
                f"fold_start is {self.fold_start}, but with cv_fold {self.cv_fold} the folds are "
                f"0 to {self.cv_fold - 1}. Lower --fold_start or raise --cv_fold."
            )
        if self.val_ratio is not None and not 0 <= self.val_ratio < 1:
            found.append(f"val_ratio is {self.val_ratio}; it is a share, at least 0 and below 1.")
        if self.survival and self.n_bins < 2:
            found.append(f"n_classes is {self.n_bins}; survival needs at least 2 bins. Use --n_classes=4.")
        if len(set(self.classes)) < len(self.classes):
            found.append(f"classes names a class twice: {', '.join(self.classes)}. Name each class once.")
        if self.kind == "multilabel":
            found += self._multilabel_problems()
        if self.kind == "regression" and self.classes:
            found.append("classes is given, but a regression has none. Give --classes=none.")
        found += _outside("task", self.task, ("auto", "classification", "survival", "regression", "multilabel"))
        found += _outside("missing", self.missing, ("error", "drop"))
        found += _outside("bag_level", self.bag, ("auto", "slide", "case"))
        found += _outside("surv_bins", self.bins, ("train", "published"))
        return found

    def _multilabel_problems(self) -> list[str]:
        if not self.classes:
            return ["task multilabel needs the names of the label columns, such as --classes=ER,PR,HER2."]
        if self.n_classes not in (None, len(self.classes)):
            return [
                f"classes names {len(self.classes)} labels, but n_classes is {self.n_classes}. Give --n_classes=none."
            ]
        return []


def _outside(name: str, value: str, choices: tuple[str, ...]) -> list[str]:
    return [] if value in choices else [f"{name} is {value!r}; use one of {', '.join(choices)}."]
