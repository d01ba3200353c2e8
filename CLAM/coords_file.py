"""patches/<slide>.h5: kept corners and how they are to be read. The attributes are listed in
docs/patching.md.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from utils.files import atomic_path

FINGERPRINT_VERSION = 1
"""Raised when a change to the program changes coordinates: files of older versions are then made anew."""


def fingerprint(values: dict[str, Any]) -> str:
    """A short hash of everything that decides a slide's coordinates."""
    text = json.dumps({"version": FINGERPRINT_VERSION, **values}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_coords(path: Path, coords: npt.NDArray[np.int64], attributes: dict[str, Any]) -> None:
    """Writes ``coords`` (N, 2) int64 and its attributes, whole or not at all. Attributes that are None are left out."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_dataset("coords", data=coords, chunks=(1, 2), maxshape=(None, 2))
        for name, value in attributes.items():
            if value is not None:
                data.attrs[name] = value


def read_attributes(path: Path) -> dict[str, Any] | None:
    """The attributes of a file and its number of patches as ``patches``; None where it is absent or damaged."""
    try:
        with h5py.File(path, "r") as file:
            data = file["coords"]
            return {**{k: _plain(v) for k, v in data.attrs.items()}, "patches": int(data.shape[0])}
    except (OSError, KeyError, AttributeError):
        return None


def read_coords(path: Path) -> npt.NDArray[np.int64]:
    """The corners in a file, (N, 2) int64 in level-0 px."""
    with h5py.File(path, "r") as file:
        return np.asarray(file["coords"], np.int64)


def _plain(value: Any) -> Any:
    """Attribute values as Python numbers, text and lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
