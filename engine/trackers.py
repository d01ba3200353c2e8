"""TensorBoard and Weights & Biases behind one small object, under the published names.

The published program logged ``{k}-fold/val_acc``, ``test_auc``, ``cross_val/f1_mean`` and so on; the functions here
translate our metric names into those keys, and names that it did not have are kept. Two of its faults are not kept:
``cross_val/acc_std_mean`` and ``auc_std_mean`` were exchanged, and ``val_best_*`` took the best of each metric by
itself; here they are the metrics of the best epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.metrics.classification import PUBLISHED_NAMES
from engine.run_names import ending
from engine.selection import Best
from utils.config import Config
from utils.errors import UserError
from utils.files import write_text

EPOCH_NAMES = {
    "train_loss": "main_loss",
    "epoch": "val_epoch",
    "patches_per_step": "patch_num",
    "kept_per_step": "keep_num",
}
"""Our names of an epoch's other values -> the published ones."""

SUMMARY_NAMES = {**PUBLISHED_NAMES, "f1_macro": "f1", "precision_macro": "pre"}
"""The published summary over folds has its own words for two metrics."""

Values = Mapping[str, Any]


class Tracker(Protocol):
    """Where numbers go besides the run folder."""

    def log(self, values: Values, step: int | None = None) -> None:
        """Takes numbers by name; ``step`` is the epoch, or the fold for its test."""
        ...

    def finish(self) -> None:
        """Writes what is still waiting."""
        ...


class Trackers:
    """Tells all of several trackers, or none."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self.trackers = tuple(trackers)

    def __bool__(self) -> bool:
        return bool(self.trackers)

    def log(self, values: Values, step: int | None = None) -> None:
        for tracker in self.trackers:
            tracker.log(values, step)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


class WandbTracker:
    """Weights & Biases. A run that goes on from its checkpoint goes on there too.

    It neither reads nor changes the git repository, and keeps its files in the run's folder. ``WANDB_MODE=offline``
    works without a network.

    Args:
        config: the options; they are shown with the run.
        folder: the run's folder.
        facts: what is shown besides, such as the git hash.

    Raises:
        UserError: when wandb is not installed, or refuses to start.
    """

    def __init__(self, config: Config, folder: Path, facts: Values) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs the package wandb: pip install wandb, or leave the option out.") from error
        remembered = folder / "wandb_id.txt"
        goes_on = config.run.resume != "never" and remembered.is_file()
        try:
            self.run = wandb.init(
                project=config.run.project,
                name=config.run.title,
                config={**config.flat(), **facts},
                dir=str(folder),
                id=remembered.read_text(encoding="utf-8").strip() if goes_on else None,
                resume="allow" if goes_on else None,
                settings=wandb.Settings(disable_git=True, save_code=False),
            )
        except wandb.Error as error:
            raise UserError(
                f"wandb does not start: {error}. Log in with 'wandb login', set WANDB_MODE=offline, or leave "
                "--wandb out."
            ) from error
        write_text(remembered, self.run.id + "\n")

    def log(self, values: Values, step: int | None = None) -> None:
        """``step`` starts anew with every fold, so wandb counts by itself; the epoch is among the values."""
        self.run.log(dict(values))

    def finish(self) -> None:
        self.run.finish()


class TensorBoardTracker:
    """Event files in ``<run folder>/tensorboard``.

    Raises:
        UserError: when tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard needs the package tensorboard: pip install tensorboard, or leave the option out."
            ) from error
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Values, step: int | None = None) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)) and value == value:
                self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def open_trackers(config: Config, folder: Path, facts: Values) -> Trackers:
    """The trackers that the options ask for; each is imported only then."""
    trackers: list[Tracker] = []
    if config.run.tensorboard:
        trackers.append(TensorBoardTracker(folder))
    if config.run.wandb:
        trackers.append(WandbTracker(config, folder, facts))
    return Trackers(trackers)


def published_key(name: str) -> str:
    """``val_accuracy_macro_ema`` -> ``val_acc_ema``; ``te_auc_ema`` -> ``te_ema_auc``; others by ``EPOCH_NAMES``."""
    split, _, metric = name.partition("_")
    if split not in ("val", "te", "test"):
        return EPOCH_NAMES.get(name, name)
    bare = metric.removesuffix("_ema")
    known = PUBLISHED_NAMES.get(bare, bare)
    if bare == metric:
        return f"{split}_{known}"
    return f"te_ema_{known}" if split == "te" else f"{split}_{known}_ema"


def epoch_values(fold: int, history: Sequence[Values], selection: str) -> dict[str, Any]:
    """What is tracked after an epoch.

    Args:
        fold: number of the fold.
        history: the values of all epochs of the fold, the newest last.
        selection: our name of the metric that chooses the epoch.
    """
    tracked = {published_key(name): value for name, value in history[-1].items()}
    for suffix in ("", "_ema"):
        key = f"val_{selection}{suffix}"
        best = Best()
        for position, line in enumerate(history):
            if line.get(key) is not None:
                best.update(line[key], _number(line[f"val_loss{suffix}"]), position)
        if best.epoch >= 0:
            tracked |= _best_values(history[best.epoch], suffix, selection)
    return {f"{fold}-fold/{name}": value for name, value in tracked.items() if value is not None}


def _number(value: float | None) -> float:
    """A recorded value; JSON has null for NaN."""
    return math.nan if value is None else value


def _best_values(best: Values, suffix: str, selection: str) -> dict[str, Any]:
    """``val_best_*`` of the best epoch; ``best_te_*`` where the test set was looked at every epoch."""
    here = {
        name: value
        for name, value in best.items()
        if name.startswith("val_") and name.endswith("_ema") == bool(suffix) and name != "val_epoch"
    }
    found = {published_key(name).replace("val_", "val_best_", 1): value for name, value in here.items()}
    other = "auc" if selection == "accuracy_macro" else "accuracy_macro"
    for word, metric in (("main", selection), ("sub", other)):
        if f"te_{metric}{suffix}" in best:
            found[f"best_te{suffix}_{word}"] = best[f"te_{metric}{suffix}"]
    return found


def fold_values(test: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``test_acc``, ``test_acc_std``, ... of one fold, from the tested sets of weights and their metrics."""
    tracked = {}
    for weights, result in test.items():
        for name, estimate in result["metrics"].items():
            known = PUBLISHED_NAMES.get(name, name)
            tracked[f"test_{known}{ending(weights)}"] = estimate["value"]
            tracked[f"test_{known}_std{ending(weights)}"] = estimate["std"]
    return _known(tracked)


def summary_values(summary: Mapping[str, Any]) -> dict[str, Any]:
    """``cross_val/acc_mean``, ``cross_val/acc_std``, ``cross_val/acc_std_mean``, ... from ``results.json``."""
    tracked = {}
    for weights, metrics in summary["summary"].items():
        for name, over_folds in metrics.items():
            key = f"cross_val/{SUMMARY_NAMES.get(name, name)}"
            stds = [fold["test"][weights]["metrics"][name]["std"] for fold in summary["folds"]]
            tracked[f"{key}_mean{ending(weights)}"] = over_folds["mean"]
            tracked[f"{key}_std{ending(weights)}"] = over_folds["sd"]
            tracked[f"{key}_std_mean{ending(weights)}"] = sum(stds) / len(stds)
    return _known(tracked)


def _known(values: dict[str, float]) -> dict[str, float]:
    """Without NaN: the spread over a single fold, metrics of one class."""
    return {name: value for name, value in values.items() if not math.isnan(value)}
