"""Out of device memory: which bags, how many patches, and which option to lower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from datasets.sampling import bag_limit
from utils.config import Config
from utils.errors import UserError


@dataclass
class Load:
    """What is on the device at the moment.

    Attributes:
        bags: names of the bags.
        instances: their patches or features together.
    """

    bags: list[str] = field(default_factory=list)
    instances: int = 0

    def now(self, bags: Sequence[str], instances: int) -> None:
        self.bags, self.instances = list(bags), instances


@contextmanager
def explained(load: Load, config: Config, training: bool) -> Iterator[None]:
    """Turns an out-of-memory error of the block into a UserError about ``load``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = "training on" if training else "evaluating"
        raise UserError(
            f"the device ran out of memory while {what} {', '.join(load.bags)} ({load.instances} instances, "
            f"{_chunk(config, training)} per encoder call). {remedy(config, training)} [{str(error).splitlines()[0]}]"
        ) from error


def _chunk(config: Config, training: bool) -> int:
    call = config.train.p_batch_size
    return call if training else min(call, config.eval.p_batch_size_v)


def _has_encoder(config: Config) -> bool:
    return config.model.model.startswith("e2e_")


def remedy(config: Config, training: bool) -> str:
    """The options that save memory and are not at work already, the mildest first."""
    train, encoder = config.train, _has_encoder(config)
    if not training and encoder:
        return f"Lower --p_batch_size_v below {_chunk(config, training)}; the results stay the same."
    if not training:
        return "Give --amp." if not train.amp else "This head needs a device with more memory for bags of that size."
    if train.full_bag:
        return _full_bag_remedy(config)
    offers = [
        "" if train.amp else "give --amp",
        "give --grad_checkpointing (slower, the same result)" if encoder and not train.grad_checkpointing else "",
        "give --full_bag" if encoder and not bag_limit(config.data) else "",
        f"lower --p_batch_size (now {train.p_batch_size}, with --grad_checkpointing)" if encoder else "",
        f"lower --batch_size (now {train.batch_size}) and raise --accumulation_steps" if train.batch_size > 1 else "",
        f"lower --same_psize (now {config.data.same_psize or 'all instances'}) or --max_patch_train",
    ]
    text = ", or ".join(o for o in offers if o)
    return f"{text[0].upper()}{text[1:]}."


def _full_bag_remedy(config: Config) -> str:
    train = config.train
    offers = [
        "" if train.amp else "give --amp",
        f"lower --full_bag_keep (now {train.full_bag_keep}), at the price of reading patches twice",
        f"lower --p_batch_size (now {train.p_batch_size}), which changes BatchNorm statistics",
    ]
    text = ", or ".join(o for o in offers if o)
    return f"{text[0].upper()}{text[1:]}."
