"""Numbers among the training options that cannot be, found before anything is read."""

from __future__ import annotations

import logging

from utils.config import Config
from utils.errors import Faults

log = logging.getLogger(__name__)

AT_LEAST_ONE = ("num_epoch", "batch_size", "accumulation_steps", "p_batch_size", "p_batch_size_v", "log_iter")
POSITIVE = ("lr", "encoder_lr", "clip_grad")
NOT_NEGATIVE = ("weight_decay", "warmup_epochs", "warmup_lr", "patient", "same_psize", "num_workers", "save_every_min")


def check_training_options(config: Config) -> None:
    """Refuses numbers out of range.

    Raises:
        UserError: naming all of them with their limits.
    """
    values = config.flat()
    faults = Faults("training options")
    for names, fits, limit in (
        (AT_LEAST_ONE, lambda v: v >= 1, "must be at least 1"),
        (POSITIVE, lambda v: v > 0, "must be above 0"),
        (NOT_NEGATIVE, lambda v: v >= 0, "must not be negative"),
    ):
        for name in names:
            if values[name] is not None and not fits(values[name]):
                faults.add(f"{name} is {values[name]}, but {limit}")
    if not 0 <= config.train.mm < 1:
        faults.add(f"mm is {config.train.mm}, but the decay of the EMA lies between 0 and 1")
    if config.train.warmup_epochs >= config.train.num_epoch > 0 and config.train.lr_sche != "const":
        # No fault: published recipes with a warm-up are tried out with --num_epoch=1.
        log.warning(
            "num_epoch is %d and warmup_epochs %d: the whole run is warm-up. Lower --warmup_epochs for more than a "
            "trial.",
            config.train.num_epoch,
            config.train.warmup_epochs,
        )
    faults.raise_if_any()
