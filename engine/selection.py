"""Which epoch is kept, and when training may stop."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Best:
    """The best epoch so far by one metric. Among equal values the lower validation loss wins; NaN loses always.

    Small validation sets reach an AUC of 1 early and often, and the first epoch that does is rarely the best one.
    """

    value: float = -math.inf
    loss: float = math.inf
    epoch: int = -1

    def update(self, value: float, loss: float, epoch: int) -> bool:
        """Records an epoch's metric and loss; returns whether it is the new best (the first epoch always is)."""
        value = -math.inf if math.isnan(value) else value
        loss = math.inf if math.isnan(loss) else loss
        if self.epoch >= 0 and (value, -loss) <= (self.value, -self.loss):
            return False
        self.value, self.loss, self.epoch = value, loss, epoch
        return True


@dataclass
class EarlyStopping:
    """Stops after ``patience`` epochs without an equal or better value, but not before ``earliest + 2`` epochs.

    Attributes:
        patience: epochs without improvement.
        earliest: the published limit: epochs are counted from 0, and the first one above it may be the last.
        enabled: False never stops.
    """

    patience: int
    earliest: int
    enabled: bool = True
    best: float = -math.inf
    waited: int = 0

    def update(self, value: float) -> None:
        """Records the value of an epoch; an equal value counts as improvement."""
        if not math.isnan(value) and value >= self.best:
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def should_stop(self, epoch: int) -> bool:
        """Whether training ends after ``epoch`` (counted from 0)."""
        return self.enabled and self.waited >= self.patience and epoch > self.earliest


@dataclass
class Progress:
    """What the loop knows of its past: enough to go on after the last finished epoch.

    Attributes:
        epoch: epochs that are finished.
        best: the best epoch of each evaluated set of weights ("main", "ema").
        stopping: the early-stopping counter.
        step: steps that are done of the epoch that is not finished.
        trained: that epoch's training values when all its steps are done and only its validation is not.
    """

    stopping: EarlyStopping
    epoch: int = 0
    best: dict[str, Best] = field(default_factory=dict)
    step: int = 0
    trained: dict[str, Any] | None = None

    @property
    def between_epochs(self) -> bool:
        """Whether the weights are those after the last finished epoch."""
        return self.step == 0 and self.trained is None

    def finish_epoch(self) -> None:
        self.epoch, self.step, self.trained = self.epoch + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "trained": self.trained,
            "best": {k: asdict(v) for k, v in self.best.items()},
            "stopping": {"best": self.stopping.best, "waited": self.stopping.waited},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.trained = state["epoch"], state.get("step", 0), state.get("trained")
        self.best = {k: Best(**v) for k, v in state["best"].items()}
        self.stopping.best, self.stopping.waited = state["stopping"]["best"], state["stopping"]["waited"]
