"""What the files of a run are called, and the metrics of its sets of weights."""

from __future__ import annotations

from pathlib import Path

from utils.config import RunConfig


def run_folder(options: RunConfig) -> Path:
    """``output_path/project/title``."""
    return Path(options.output_path) / options.project / options.title


def last_path(folder: Path, fold: int) -> Path:
    """Where a fold keeps the state from which a stopped run goes on: ``fold_<k>_last.pt``."""
    return folder / f"fold_{fold}_last.pt"


def best_path(folder: Path, fold: int, weights: str) -> Path:
    """Weights of a fold's best epoch: ``fold_<k>_model_best.pt``, ``fold_<k>_ema_model_best.pt`` for the EMA."""
    return folder / f"fold_{fold}{ending(weights)}_model_best.pt"


def split_path(folder: Path, fold: int) -> Path:
    """The rows of a fold: ``fold_<k>_split.csv``."""
    return folder / f"fold_{fold}_split.csv"


def ending(weights: str) -> str:
    """What follows the names of metrics and files: nothing for the main weights, ``_ema`` for the EMA."""
    return "" if weights == "main" else f"_{weights}"
