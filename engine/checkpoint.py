"""Checkpoints: written atomically, read without running code, named without prefixes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules.model import bare_name
from utils.config import Config
from utils.errors import UserError
from utils.files import DAMAGED, MAKE_ROOM, atomic_path, unreadable, writing


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint of tensors, numbers, text, lists and dictionaries; raises UserError without room for it."""
    with writing(path, MAKE_ROOM), atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())  # else a crash of the machine may leave the new name with no content behind it


def copy(source: Path, target: Path) -> None:
    """Copies a checkpoint, so that ``target`` is whole or absent; raises UserError without room for it."""
    with writing(target, MAKE_ROOM), atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def remove_torn(folder: Path, prefix: str) -> None:
    """Removes what killed runs left half-written of files whose names start with ``prefix``."""
    for path in folder.glob(f".{prefix}*.tmp"):
        path.unlink(missing_ok=True)


def load(path: Path, remedy: str = "remove it to start this fold anew") -> dict[str, Any]:
    """Reads a checkpoint to the CPU; ``remedy`` is said of a damaged one.

    Raises:
        UserError: when the file is missing, is no checkpoint, or holds more than data.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such checkpoint. Train first, or check --output_path, --project, --title; "
            "to test a model of another run give --checkpoint=FOLDER."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise unreadable(path, error, remedy) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dictionary of weights, found {type(content).__name__}")
    return content


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Loads a state dict strictly; prefixes of DDP and compile are removed, a bare MIL head's names are accepted.

    Raises:
        UserError: naming what is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    given = {bare_name(k): v for k, v in weights.items()}
    if not any(k.startswith(("mil.", "encoder.")) for k in given):
        given = {f"mil.{k}": v for k, v in given.items()}
    missing, unexpected = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    shapes = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(v.shape)}"
        for k, v in own.items()
        if k in given and given[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
            if names
        ]
        raise UserError(
            f"{source}: the weights do not fit the model ({'; '.join(parts)}). Give the options it was trained with."
        )
    model.load_state_dict(given)


MAY_DIFFER = {
    "num_workers",
    "num_workers_test",
    "prefetch_factor",
    "pin_memory",
    "resume",
    "script_mode",
    "checkpoint",
    "log_iter",
    "save_iter",
    "wandb",
    "tensorboard",
    "persistence",
    "full_bag_keep",
    "device",
    "output_path",
    "num_bootstrap",
    "save_attention",
    "always_test",
    "save_every_min",
    "dry_run",
    "profile",
    "debug",
    "dataset_root",
    "dataset_sub_root",
    "dataset_test_root",
    "stage_to",
    "csv_path",
    "h5_path",
    "h5_sub_path",
}
"""Options that change neither the weights nor the chosen epoch, so a run may go on with other values.

Data may have moved: its content is compared, see ``engine.fold_files``.
"""


def check_same_run(stored: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Refuses to go on from a checkpoint of a run with other options.

    Raises:
        UserError: naming the options that differ.
    """
    stored = {**Config().flat(), **stored}  # an option that is younger than the checkpoint had its default then
    differing = [k for k in now if k not in MAY_DIFFER and stored[k] != now[k]]
    if differing:
        listing = ", ".join(f"{k} {stored[k]!r} -> {now[k]!r}" for k in sorted(differing))
        raise UserError(
            f"{path} belongs to a run with other options ({listing}). Give another --title, the same options to go on, "
            "or --resume=never to start anew and replace its files."
        )
