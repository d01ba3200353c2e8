"""From options to the objects of a run: sources, cohort, task, model. Every fault of the input is found here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from datasets.bags import FeatureSource, PixelSource, SamplingPlan, Source
from datasets.label_options import LabelOptions
from datasets.labels import Cohort, Fold, load_cohort
from datasets.store import PatchStore
from datasets.views import Renderer, ViewPlan
from engine.learner import Precision
from engine.tasks import ClassificationTask, SurvivalTask, Task, selection_metric
from modules.encoders import build_encoder, load_encoder_weights
from modules.heads import build_mil
from modules.model import SlideModel
from modules.names import parse_model_name
from modules.registry import UnknownNameError
from utils.config import Config, DataConfig
from utils.errors import Faults, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """Where instances come from.

    Attributes:
        train: one source, or (low, high) magnification.
        test: the high magnification for validation and test.
        stored_px: size of the training patches; None for features.
        width: width of a feature; None for pixels.
        slides: names that every training source and the test source hold, with their instance counts.
        fingerprints: short ids of the stores, for the records.
    """

    train: tuple[Source, ...]
    test: Source
    stored_px: int | None
    width: int | None
    slides: Mapping[str, int]
    fingerprints: dict[str, str]


@dataclass(frozen=True)
class Setup:
    """What all folds share.

    Attributes:
        encoder, mil: names that the model name holds; encoder is None for features.
        sources: where instances come from.
        cohort: samples, folds and classes.
        plan: how many instances a training bag takes.
        views: random views of training patches; None for features.
    """

    config: Config
    encoder: str | None
    mil: str
    sources: Sources
    cohort: Cohort
    plan: SamplingPlan
    views: ViewPlan | None


def prepare(config: Config) -> Setup:
    """Opens and checks everything that the run reads.

    Raises:
        UserError: for every fault found in model name, stores and labels.
    """
    try:
        encoder, mil = parse_model_name(config.model.model)
    except UnknownNameError as error:
        raise UserError(f"--model={config.model.model}: {error}") from error
    data = config.data
    if data.image_input and encoder is None:
        raise UserError(
            f"--image_input: patches need an encoder, and the model name {config.model.model!r} names none. "
            f"Give --model=e2e_r18_{mil}, or leave image_input out to train on features."
        )
    sources = open_sources(data, pixels=encoder is not None)
    cohort = load_cohort(LabelOptions.from_config(data, config.model, config.train), sources.slides)
    _check_outputs(config, cohort)
    views = None
    if sources.stored_px is not None:
        views = ViewPlan(data.img_transform, data.crop_scale, sources.stored_px, data.crop_size)
    plan = SamplingPlan(data.same_psize, data.mul_scale_ratio, data.pad_enc_bs, data.all_patch_train)
    return Setup(config, encoder, mil, sources, cohort, plan, views)


def open_sources(data: DataConfig, pixels: bool) -> Sources:
    """Opens the stores or feature folders that the options name.

    Raises:
        UserError: for missing paths, sizes that do not fit each other, and slides that one magnification lacks.
    """
    faults = Faults("data")
    if not data.dataset_root:
        faults.add(
            "dataset_root is not set: give --dataset_root, the store (or feature folder) of the high magnification"
        )
    if data.mul_scale_input and not data.dataset_sub_root:
        faults.add("mul_scale_input needs --dataset_sub_root, the store of the low magnification")
    if data.mul_scale_ratio < 1:
        faults.add(
            f"mul_scale_ratio is {data.mul_scale_ratio:g}: the low-magnification share is 1 / ratio, so at least 1"
        )
    if data.dataset_sub_root and not data.mul_scale_input:
        log.info("dataset_sub_root is given but not read: bags have one magnification without --mul_scale_input.")
    faults.raise_if_any()
    return _pixel_sources(data) if pixels else _feature_sources(data)


def _pixel_sources(data: DataConfig) -> Sources:
    train_roots, test_root = _roots(data)
    stores = {root: _open_store(root) for root in dict.fromkeys([*train_roots, test_root])}
    return Sources(
        train=tuple(PixelSource(stores[root], data.channel_order) for root in train_roots),
        test=PixelSource(stores[test_root], data.channel_order),
        stored_px=_common_size(data, {root: stores[root] for root in train_roots}),
        width=None,
        slides=_in_all({root: store.counts for root, store in stores.items()}, test_root),
        fingerprints={root: store.fingerprint for root, store in stores.items()},
    )


def _feature_sources(data: DataConfig) -> Sources:
    from datasets.features import FeatureFolder  # h5py is needed for features only

    train_roots, test_root = _roots(data)
    folders = {root: FeatureFolder(root) for root in dict.fromkeys([*train_roots, test_root])}
    widths = {root: folder.width for root, folder in folders.items()}
    if len(set(widths.values())) > 1:
        listing = ", ".join(f"{root}: {width}" for root, width in widths.items())
        raise UserError(f"the feature folders differ in width ({listing}). Extract all with one encoder.")
    return Sources(
        train=tuple(FeatureSource(folders[root]) for root in train_roots),
        test=FeatureSource(folders[test_root]),
        stored_px=None,
        width=widths[test_root],
        slides=_in_all({root: folder.counts for root, folder in folders.items()}, test_root),
        fingerprints={root: folder.fingerprint for root, folder in folders.items()},
    )


def _roots(data: DataConfig) -> tuple[list[str], str]:
    """Paths of the training sources, low magnification first, and of the test source."""
    high = str(data.dataset_root)
    low = [str(data.dataset_sub_root)] if data.mul_scale_input else []
    return [*low, high], data.dataset_test_root or high


def _in_all(counts: Mapping[str, Mapping[str, int]], test_root: str) -> Mapping[str, int]:
    """Slides that every source holds, with their instances in the test source; logs which ones are left out."""
    names = [set(held) for held in counts.values()]
    common = set.intersection(*names)
    lacking = sorted(set.union(*names) - common)
    if not lacking:
        return counts[test_root]
    log.info("%d slides are not in every store and count as missing, such as %s.", len(lacking), ", ".join(lacking[:3]))
    return {slide: n for slide, n in counts[test_root].items() if slide in common}


def _open_store(root: str) -> PatchStore:
    if not Path(root).exists():
        raise UserError(f"there is no store {root}. Write one with CLAM/save_patches.py, or correct the path.")
    return PatchStore(root)


def _common_size(data: DataConfig, stores: dict[str, PatchStore]) -> int:
    """The stored size in px of the training stores; they must agree with each other and with ``img_size``."""
    sizes = {root: store.image_size_px for root, store in stores.items()}
    listing = ", ".join(f"{root}: {px} px" for root, px in sizes.items())
    if len(set(sizes.values())) > 1:
        raise UserError(
            f"the two magnifications hold patches of different size ({listing}). Write both with one --img_size "
            "of CLAM/save_patches.py."
        )
    size = next(iter(sizes.values()))
    if data.img_size is not None and data.img_size != size:
        raise UserError(
            f"img_size is {data.img_size}, but the training store holds {size} px patches ({listing}). Give the "
            f"store that holds {data.img_size} px as --dataset_root, or --img_size={size}. (The published program "
            "replaced 224 by 256 inside the path; here --dataset_root is the training store as it is, and "
            "--dataset_test_root may name a separate one for evaluation.)"
        )
    return size


def _check_outputs(config: Config, cohort: Cohort) -> None:
    asked = config.model.n_classes
    if asked is not None and cohort.task == "classification" and asked != cohort.n_classes:
        raise UserError(
            f"n_classes is {asked}, but the labels have {cohort.n_classes} classes ({', '.join(cohort.class_names)}). "
            "Remove --n_classes, or name the classes with --classes."
        )
    if config.train.loss == "nll_surv" and cohort.task != "survival":
        raise UserError("loss nll_surv needs survival labels: name the data set surv_<name> with --datasets.")
    if config.train.loss == "ce" and cohort.task == "survival":
        raise UserError("loss ce needs class labels, and --datasets names a survival task. Remove --loss.")


def build_task(setup: Setup, fold: Fold) -> Task:
    """The task of one fold; survival metrics know the training part's censoring."""
    options = setup.config.eval
    survival = setup.cohort.task == "survival"
    classes = None if survival else setup.cohort.n_classes
    selection = selection_metric(options.best_metric, options.best_metric_index, classes)
    if not survival:
        return ClassificationTask(setup.cohort.class_names, selection)
    return SurvivalTask(
        outputs=setup.cohort.n_classes,
        train_time=tuple(float(s.target["time"]) for s in fold.train),
        train_event=tuple(int(s.target["event"]) for s in fold.train),
        selection=selection,
    )


def build_model(setup: Setup, outputs: int, fold: int) -> tuple[SlideModel, Renderer | None]:
    """The model with its starting weights, and what turns stored patches into its input.

    Args:
        setup: names and options.
        outputs: width of the logits.
        fold: chooses the file when ``enc_init`` is a folder.
    """
    options, train = setup.config.model, setup.config.train
    encoder, renderer, width = None, None, setup.sources.width
    if setup.encoder is not None:
        encoder = build_encoder(setup.encoder, pretrained=options.enc_pt and options.enc_init is None)
        if options.enc_init is not None:
            log.info("%s", load_encoder_weights(encoder, options.enc_init, fold))
        width = encoder.width
        renderer = Renderer(setup.config.data.crop_size, encoder.mean, encoder.std, channels_last=train.channels_last)
    if width is None or (options.input_dim is not None and options.input_dim != width):
        what = f"encoder {setup.encoder}" if setup.encoder else "the feature files"
        raise UserError(f"input_dim is {options.input_dim}, but {what} gives {width}. Remove --input_dim.")
    mil = build_mil(setup.mil, width, outputs, options)
    model = SlideModel(mil, encoder, train.p_batch_size, options.freeze_enc)
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
    scales = " low + ".join(wanted) + " high" if len(wanted) == 2 else wanted[0]
    lines.append(f"instances per training bag: {scales}; evaluation: all of the high magnification")
    lines.append(f"precision: {'float32' if precision.dtype is None else str(precision.dtype).removeprefix('torch.')}")
    return lines
