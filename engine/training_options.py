"""Training options that do not go together, or have no effect beside others, found before anything is read."""

from __future__ import annotations

import logging

from utils.config import Config, TrainConfig
from utils.errors import Faults

log = logging.getLogger(__name__)


def check_training_options(config: Config) -> None:
    """Refuses options that do not go together, and warns of those without effect.

    Raises:
        UserError: naming all of them.
    """
    faults = Faults("training options")
    if config.train.warmup_epochs >= config.train.num_epoch > 0 and config.train.lr_sche != "const":
        # No fault: published recipes with a warm-up are tried out with --num_epoch=1.
        log.warning(
            "num_epoch is %d and warmup_epochs %d: the whole run is warm-up. Lower --warmup_epochs for more than a "
            "trial.",
            config.train.num_epoch,
            config.train.warmup_epochs,
        )
    for sentence in _without_effect(config):
        log.warning("%s", sentence)
    _check_full_bag(config, faults)
    faults.raise_if_any()


def _without_effect(config: Config) -> list[str]:
    """Options that others switch off. No faults: layers of recipes may well bring them together."""
    train, model = config.train, config.model
    found = {
        "warmup_epochs has no effect: lr_sche const has no warm-up": train.warmup_epochs and train.lr_sche == "const",
        f"amp_dtype {train.amp_dtype} has no effect without --amp": train.amp_dtype != "auto" and not train.amp,
        "encoder_lr has no effect: --freeze_enc trains no encoder": model.freeze_enc and train.encoder_lr is not None,
        "the encoder keeps the random weights it begins with: --freeze_enc with --no_enc_pt and without --enc_init": (
            model.freeze_enc and not model.enc_pt and model.enc_init is None
        ),
    }
    return [f"{sentence}." for sentence, applies in found.items() if applies]


def _check_full_bag(config: Config, faults: Faults) -> None:
    """Adds what ``--full_bag`` cannot go with."""
    data, train = config.data, config.train
    if not train.full_bag:
        if train.full_bag_keep != TrainConfig().full_bag_keep:
            faults.add(f"full_bag_keep is {train.full_bag_keep}, but nothing is kept without --full_bag")
        return
    reasons = {
        "every patch is trained on: give --same_psize=0": data.same_psize,
        "every patch is trained on: give --max_patch_train=none": data.max_patch_train,
        "every patch is trained on, so none is chosen: give --sel_type=random": data.sel_type != "random",
        "every patch is trained on, so no region goes first: give --num_group_1d=none --num_group_2d=none": (
            data.num_group_1d or data.num_group_2d
        ),
        "bags are not filled up: give --no_pad_enc_bs --no_all_patch_train": data.pad_enc_bs or data.all_patch_train,
        "it is for patches, and features need no encoder: give a model e2e_<encoder>_<mil>": (
            not config.model.model.startswith("e2e_")
        ),
        "processes have different numbers of encoder calls, and --sync_bn would let them wait for each other: give "
        "--no_sync_bn": train.sync_bn,
        "every chunk size would be recorded as a CUDA graph of its own: give --torchcompile_mode=default": (
            train.torchcompile and train.torchcompile_mode != "default"
        ),
        "only one encoder call's activations are held anyway: give --no_grad_checkpointing": train.grad_checkpointing,
    }
    for reason, applies in reasons.items():
        if applies:
            faults.add(f"full_bag is on, but {reason}")
