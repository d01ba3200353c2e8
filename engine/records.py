"""What a run leaves behind: its folder, the configuration as run, metrics per epoch, predictions, results."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.run_names import run_folder
from engine.trackers import Trackers, epoch_values
from utils.config import Config, RunConfig
from utils.dist import Processes
from utils.errors import UserError
from utils.files import MAKE_ROOM, atomic_path, json_safe, write_json, write_text, writing
from utils.lock import FolderLock

GIVE_ANOTHER = "Give an --output_path that can be."
PACKAGES = ("torch", "torchvision", "timm", "numpy", "lmdb", "scikit-survival", "scikit-learn", "h5py")


@contextmanager
def open_folder(options: RunConfig, processes: Processes) -> Iterator[Records]:
    """The run's folder, which belongs to this run alone while the block runs.

    Raises:
        UserError: on every process, when process 0 cannot have it.
    """
    records, fault = None, ""
    try:
        records = Records(run_folder(options), processes.is_main)
    except UserError as error:
        fault = str(error)
    fault = processes.gather(fault)[0]
    if records is None or fault:
        raise UserError(fault)
    try:
        yield records
    finally:
        records.close()


class Records:
    """Writes the files of one run; on ranks other than 0 nothing is written.

    Args:
        folder: the run's folder, made when missing, and held until ``close()``.
        active: whether this process writes.

    Raises:
        UserError: when another run holds the folder, or it cannot be written; so do all methods that write.

    Attributes:
        tracker: where numbers go besides.
        selection: the metric that chooses the epoch; set before the first epoch is recorded.
    """

    def __init__(self, folder: Path, active: bool) -> None:
        self.folder, self.active = folder, active
        self.tracker, self.selection = Trackers(), ""
        self._lock: FolderLock | None = None
        if active:
            with writing(folder, GIVE_ANOTHER):
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = FolderLock(folder)

    def close(self) -> None:
        """Leaves the folder to the next run."""
        if self._lock is not None:
            self._lock.close()

    def start(self, config: Config, facts: Mapping[str, Any]) -> None:
        """Writes ``config.yaml`` (usable with ``-c``) and ``environment.json``.

        What does not train leaves those of the training alone, which repeat it: ``config_test.yaml`` lies beside them.
        """
        if self.active:
            suffix = "" if config.run.trains else f"_{config.run.script_mode}"
            self.text(f"config{suffix}.yaml", yaml.safe_dump(config.flat(), sort_keys=False))
            self.json(f"environment{suffix}.json", {**environment(), **facts})

    def epoch(self, fold: int, values: Mapping[str, Any]) -> None:
        """Appends one line to ``metrics.jsonl`` and tells the tracker."""
        if self.active:
            line = json.dumps(json_safe({"fold": fold, **values}), allow_nan=False)
            path = self.folder / "metrics.jsonl"
            with writing(path, MAKE_ROOM), path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            if self.tracker:
                history = [line for line in self._lines() if line.pop("fold") == fold]
                self.tracker.log(epoch_values(fold, history, self.selection), step=values["epoch"])

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines; a last one that a kill cut off belongs to an epoch that will be done again."""
        text = (self.folder / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n")[:-1] if line]

    def forget(self, fold: int, from_epoch: int) -> None:
        """Removes the lines of a fold from ``from_epoch`` on: they are about to be written again."""
        path = self.folder / "metrics.jsonl"
        if self.active and path.is_file():
            kept = [line for line in self._lines() if line["fold"] != fold or line["epoch"] < from_epoch]
            self.text(path.name, "".join(json.dumps(line) + "\n" for line in kept))

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Writes a csv file."""
        if self.active:
            with (
                writing(self.folder / name, MAKE_ROOM),
                atomic_path(self.folder / name) as temporary,
                temporary.open("w", newline="", encoding="utf-8") as file,
            ):
                writer = csv.writer(file)
                writer.writerow(header)
                writer.writerows(rows)

    def json(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        if self.active:
            with writing(self.folder / name, MAKE_ROOM):
                write_json(self.folder / name, value)

    def text(self, name: str, text: str) -> None:
        """Writes a text file."""
        if self.active:
            with writing(self.folder / name, MAKE_ROOM):
                write_text(self.folder / name, text)


def environment() -> dict[str, Any]:
    """Versions, hardware, command line and the program's git state."""
    root = Path(__file__).resolve().parent.parent
    changes = _git(root, "status", "--porcelain")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_hash": _git(root, "rev-parse", "HEAD"),
        "git_changed": None if changes is None else bool(changes),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *words: str) -> str | None:
    try:
        answer = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
