"""From options to the objects of a run: sources, cohort, task, model. Every fault of the input is found here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from datasets.bags import SamplingPlan
from datasets.full_bags import ChunkPlan
from datasets.labels import Cohort, load_cohort
from datasets.labels.options import LabelOptions
from datasets.labels.unlabelled import load_unlabelled
from datasets.sampling import Regions, bag_limit
from datasets.views import Renderer, ViewPlan
from engine.attention_files import check_attention
from engine.precision import Precision
from engine.sources import Sources, check_features, check_paths, check_positions, keep_in_memory, open_sources
from engine.tasks.task_builder import check_task_options
from engine.trained import as_tested, checked, read_trained, with_trained
from engine.training_options import check_training_options
from modules.encoders import build_encoder, load_encoder_weights
from modules.heads import build_mil
from modules.model import SlideModel
from modules.names import parse_model_name
from modules.registry import UnknownNameError
from utils.config import Config, DataConfig, ModelConfig
from utils.errors import Faults, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """What all folds share.

    Attributes:
        encoder, mil: names that the model name holds; encoder is None for features.
        sources: where instances come from.
        cohort: samples, folds and classes.
        plan: how many instances a training bag takes.
        views: random views of training patches; None for features.
        chunks: how whole training bags are taken apart; None where they are not (``--full_bag``).
    """

    config: Config
    encoder: str | None
    mil: str
    sources: Sources
    cohort: Cohort
    plan: SamplingPlan
    views: ViewPlan | None
    chunks: ChunkPlan | None = None


def prepare(config: Config) -> Setup:
    """Opens and checks everything that the run reads.

    Raises:
        UserError: for every fault found in model name, stores and labels.
    """
    check_training_options(config)
    config = as_tested(config)
    encoder, mil = _checked_names(config)
    data = config.data
    positions = uses_positions(mil, config.model) or data.num_group_2d is not None
    sources = open_sources(data, encoder is not None, positions)
    trained = read_trained(config)
    options = with_trained(LabelOptions.from_config(data, config.model, config.train, config.run), trained)
    load = load_unlabelled if config.run.predicts else load_cohort
    cohort = load(options, sources.slides, sources.absent)
    cohort = checked(cohort, trained, config)
    _check_outputs(config, cohort)
    check_task_options(config, cohort, mil)
    if encoder is None:
        check_features(sources, cohort)
    if positions:
        check_positions(sources, cohort)
    if data.persistence:
        pin = data.pin_memory and config.run.device != "cpu" and torch.cuda.is_available()
        keep_in_memory(sources, cohort, pin)
    views = None
    if sources.stored_px is not None:
        views = ViewPlan(data.img_transform, data.crop_scale, sources.stored_px, data.crop_size, data.img_trans_chunk)
    return Setup(config, encoder, mil, sources, cohort, sampling_plan(data), views, chunk_plan(config))


def _checked_names(config: Config) -> tuple[str | None, str]:
    """Encoder and head that the model name holds; raises UserError with its faults and those of all paths."""
    faults, name = Faults("input"), config.model.model
    encoder, mil = None, ""
    try:
        encoder, mil = parse_model_name(name)
    except UnknownNameError as error:
        faults.add(f"--model={name}: {error}")
    if config.data.image_input and mil and encoder is None:
        faults.add(
            f"--image_input: patches need an encoder, and the model name {name!r} names none. "
            f"Give --model=e2e_r18_{mil}, or leave image_input out to train on features."
        )
    check_paths(config.data, name.startswith("e2e_"), faults, labels=not config.run.predicts)
    faults.raise_if_any()
    return encoder, mil


def sampling_plan(data: DataConfig) -> SamplingPlan:
    """How many instances a training bag takes, and what becomes of short ones."""
    random = data.same_psize_pad_type == "random"
    by_attention = data.sel_type == "ema"  # chosen on the device, from all
    return SamplingPlan(
        total=0 if by_attention else bag_limit(data),
        low_ratio=data.mul_scale_ratio,
        pad=data.pad_enc_bs or random,
        duplicates_in_head=data.all_patch_train or random,
        shuffle=data.patch_shuffle,
        regions=_regions(data),
    )


def chunk_plan(config: Config) -> ChunkPlan | None:
    """How whole training bags are taken apart; None where they are not (``--full_bag``)."""
    train = config.train
    if not train.full_bag:
        return None
    return ChunkPlan(train.p_batch_size, train.full_bag_keep, twice=not config.model.freeze_enc)


def _regions(data: DataConfig) -> Regions | None:
    groups = {"num_group_1d": data.num_group_1d, "num_group_2d": data.num_group_2d}
    given = {name: n for name, n in groups.items() if n is not None}
    if len(given) > 1:
        raise UserError("num_group_1d and num_group_2d are two ways to divide a bag: give one of them.")
    for name, n in given.items():
        if not bag_limit(data):
            raise UserError(f"{name} chooses patches, and every patch is taken: give --same_psize too.")
        return Regions(n, grid=name == "num_group_2d")
    return None


def uses_positions(mil: str, options: ModelConfig) -> bool:
    """Whether the head takes the grid positions of its instances."""
    return mil == "2dmamba" or (options.pos == "sincos" and mil in ("vitmil", "gigap"))


def _check_outputs(config: Config, cohort: Cohort) -> None:
    asked = config.model.n_classes
    if asked not in (None, 1) and cohort.task == "regression":
        raise UserError(f"n_classes is {asked}, but a regression has one output. Give --n_classes=none.")


def build_model(setup: Setup, outputs: int, fold: int) -> tuple[SlideModel, Renderer | None]:
    """The model with its starting weights, and what turns stored patches into its input.

    A run that only tests takes its weights from its checkpoint, so no others are looked for.

    Args:
        setup: names and options.
        outputs: width of the logits.
        fold: chooses the file when ``enc_init`` is a folder.
    """
    options, train = setup.config.model, setup.config.train
    encoder, renderer, width = None, None, setup.sources.width
    if setup.encoder is not None:
        trains = setup.config.run.trains
        encoder = build_encoder(setup.encoder, pretrained=trains and options.enc_pt and options.enc_init is None)
        if trains and options.enc_init is not None:
            load_encoder_weights(encoder, options.enc_init, fold)
        encoder.fused_stem = encoder.fused_stem and train.fused_stem
        width = encoder.width
        renderer = Renderer(setup.config.data.crop_size, encoder.mean, encoder.std, channels_last=train.channels_last)
    if width is None or (options.input_dim is not None and options.input_dim != width):
        what = f"the features of encoder {setup.encoder}" if setup.encoder else "the feature files"
        raise UserError(f"input_dim is {options.input_dim}, but {what} have width {width}. Give --input_dim=none.")
    mil = build_mil(setup.mil, width, outputs, options)
    if setup.config.eval.save_attention:
        check_attention(mil)
    model = SlideModel(mil, encoder, train.p_batch_size, options.freeze_enc, train.grad_checkpointing)
    if train.channels_last and encoder is not None:
        for parameter in encoder.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model, renderer


def describe(setup: Setup, model: nn.Module, precision: Precision) -> Sequence[str]:
    """Lines for the log: what is trained, from what, in which precision."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [f"model {setup.config.model.model}: {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"]
    if setup.views is not None:
        lines.append(setup.views.describe())
    wanted = ["all" if n is None else str(n) for n in setup.plan.wanted(len(setup.sources.train))]
    if setup.config.data.sel_type == "ema":
        wanted = [f"{bag_limit(setup.config.data)}, chosen from all by the attention of the EMA model"]
    scales = " low + ".join(wanted) + " high" if len(wanted) == 2 else wanted[0]
    lines.append(f"instances per training bag: {scales}; evaluation: all of the high magnification")
    if setup.chunks is not None:
        lines.append(
            f"full bags: exact gradient in two passes, at most {setup.chunks.chunk} patches per encoder call; the "
            f"first {setup.chunks.keep} patches of a step stay on the device in between"
        )
    lines.append(f"precision: {'float32' if precision.dtype is None else str(precision.dtype).removeprefix('torch.')}")
    return lines
