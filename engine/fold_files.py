"""The checkpoints of one fold: the last state, the best weights, and copies on request.

``fold_<k>_last.pt`` is written first and the best weights after it. A run that is killed in between writes the best
weights again when it goes on, because the state that it goes on from then holds exactly these weights.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets.labels.types import Fold
from engine import checkpoint
from engine.learner import Learner
from engine.run_names import best_path, last_path
from engine.setup import Setup
from engine.tasks import Task, task_builder
from modules.model import bare_state_dict
from utils.dist import Processes
from utils.errors import UserError

log = logging.getLogger(__name__)


def forget_folds(folder: Path, folds: Iterable[int], processes: Processes) -> None:
    """Removes the states of ``folds``, all at once: else a new run that is stopped would go on with old folds."""
    if processes.is_main:
        for fold in folds:
            last_path(folder, fold).unlink(missing_ok=True)
    processes.barrier()


def check_states(setup: Setup, folds: Iterable[Fold], folder: Path, processes: Processes) -> None:
    """Refuses states of ``folds`` with which this run cannot go on, before any fold is trained.

    Raises:
        UserError: as ``FoldFiles.load_last``.
    """
    for fold in folds:
        task = task_builder.build(setup.config, setup.cohort, fold, processes.world)
        FoldFiles(setup, fold, task, folder, processes).load_last()


class FoldFiles:
    """Paths and contents of a fold's checkpoints; rank 0 writes, every rank reads."""

    def __init__(self, setup: Setup, fold: Fold, task: Task, folder: Path, processes: Processes) -> None:
        self.setup, self.fold, self.task, self.folder, self.processes = setup, fold, task, folder, processes

    @property
    def last(self) -> Path:
        """State from which a stopped run goes on."""
        return last_path(self.folder, self.fold.index)

    def clear(self) -> None:
        """Removes half-written files."""
        if self.processes.is_main:
            checkpoint.remove_torn(self.folder, f"fold_{self.fold.index}_")
        self.processes.barrier()

    def load_last(self) -> dict[str, Any] | None:
        """The state to go on from; None where there is none.

        Raises:
            UserError: when it belongs to a run with other options, data or processes, or only some ranks see it.
        """
        seen = self.processes.gather(self.last.is_file())
        if not any(seen):
            return None
        if not all(seen):
            raise UserError(
                f"{self.last} is there for {sum(seen)} of {len(seen)} processes. Give an --output_path that all "
                "machines of the run share."
            )
        state = checkpoint.load(self.last)
        stored, world = state["config"], state.get("world", self.processes.world)
        if world != self.processes.world and state["progress"].get("step", 0):
            raise UserError(
                f"{self.last} was saved in the middle of an epoch by {world} process(es), and there are "
                f"{self.processes.world} now. Go on with {world}, or give --resume=never to start anew."
            )
        if self.setup.config.run.trains:
            stored = self._with_this_batch_size(stored, world)
        checkpoint.check_same_run(stored, self.setup.config.flat(), self.last)
        self._check_data(state.get("data"))
        return state

    def _with_this_batch_size(self, stored: Mapping[str, Any], world: int) -> Mapping[str, Any]:
        """The stored options with the batch size that stands for the same step in another number of processes.

        Raises:
            UserError: when a step would have more bags than so far, or fewer.
        """
        own, size = self.processes.world, self.setup.config.train.batch_size
        then, now = stored["batch_size"] * world, size * own
        if world == own:
            return stored
        if then != now:
            remedy = f"Give --batch_size={then // own}" if then % own == 0 else f"Go on with {world} process(es)"
            raise UserError(
                f"{self.last} was trained with {then} bags per step ({world} x batch_size {stored['batch_size']}), and "
                f"{own} process(es) with batch_size {size} take {now}. {remedy}, give another --title, or "
                "--resume=never to start anew and replace its files."
            )
        return {**stored, "batch_size": size}

    def _check_data(self, stored: Mapping[str, Any] | None) -> None:
        now = self._data()
        for what, value in (stored or {}).items():
            if value != now[what]:
                raise UserError(
                    f"{self.last} was trained on other {what} ({value} -> {now[what]}). Give the {what} it was "
                    "trained on, another --title, or --resume=never to start anew and replace its files."
                )

    def _data(self) -> dict[str, Any]:
        """Short ids of what is trained on, by content and not by path."""
        stores = list(self.setup.sources.fingerprints.values())
        rows = [(s.id, sorted(s.target.items())) for s in (*self.fold.train, *self.fold.val)]
        return {"stores": stores, "samples": hashlib.sha256(repr(rows).encode()).hexdigest()[:16]}

    def identity(self, epoch: int) -> dict[str, Any]:
        """What every checkpoint says about itself."""
        return {
            "epoch": epoch,
            "k": self.fold.index,
            "config": self.setup.config.flat(),
            "task": self.task.name,
            "task_facts": self.task.facts(),
            "classes": list(self.setup.cohort.class_names),
            "bin_edges": list(self.fold.bin_edges) if self.fold.bin_edges else None,
            "world": self.processes.world,
            "data": self._data(),
        }

    def save_last(self, learner: Learner, progress: Mapping[str, Any], ranks: list[Any] | None = None) -> None:
        """Writes the state to go on from; ``ranks`` is what differs between ranks inside an epoch."""
        if self.processes.is_main:
            epoch = progress["epoch"] - 1  # the last finished one
            state = {**learner.state_dict(), **self.identity(epoch), "progress": dict(progress), "ranks": ranks}
            checkpoint.save(self.last, state)

    def save_behind_epoch(self, learner: Learner, epoch: int, best: Iterable[str]) -> None:
        """Writes the files that come after ``last``: the weights in ``best``, and the copy of every nth epoch."""
        if not self.processes.is_main:
            return
        for name in best:
            weights = {k: bare_state_dict(m) for k, m in learner.weights().items()}
            content: dict[str, Any] = {"teacher": weights.get("ema"), **self.identity(epoch)}
            if name == "main":
                content["model"] = weights["main"]
            checkpoint.save(best_path(self.folder, self.fold.index, name), content)
        every = self.setup.config.run.save_iter
        if every > 0 and (epoch + 1) % every == 0:
            checkpoint.copy(self.last, self.folder / f"fold_{self.fold.index}_epoch_{epoch}_model.pt")
