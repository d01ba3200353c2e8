"""From paths to sources of instances: stores or feature folders that fit each other, with positions where asked for."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datasets.instances import FeatureSource, PixelSource, Source
from datasets.labels.types import Cohort
from datasets.positions import CoordinateFolder, Coordinates, Grid
from datasets.store import PatchStore
from utils.config import DataConfig
from utils.errors import Faults, UserError
from utils.log import duration

log = logging.getLogger(__name__)

FEATURES_ONLY = {
    "persistence": "patches are read from the store, whose pages stay in memory where they fit",
    "patch_shuffle": "the order of patches is that of the sampling",
    "same_psize_pad_type": "give --pad_enc_bs, and --all_patch_train to let duplicates reach the MIL head",
}
"""Options that only features know -> what holds for patches."""

RENAMED_PATHS = (
    "(The published program replaced 224 by 256 inside the path; here --dataset_root is the training store as it is, "
    "and --dataset_test_root may name a separate one for evaluation.)"
)


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
        absent: the names that are left out -> what lacks them.
    """

    train: tuple[Source, ...]
    test: Source
    stored_px: int | None
    width: int | None
    slides: Mapping[str, int]
    fingerprints: dict[str, str]
    absent: Mapping[str, str] = field(default_factory=dict)


def check_paths(data: DataConfig, pixels: bool, faults: Faults, labels: bool = True) -> None:
    """Adds what is wrong with the paths and with the options that go with them, before anything is opened.

    Args:
        data: paths and options.
        pixels: whether stores of patches are read.
        faults: collects the sentences.
        labels: whether a label file is needed.
    """
    if not data.dataset_root:
        faults.add(
            "dataset_root is not set: give --dataset_root, the store (or feature folder) of the high magnification"
        )
    if data.mul_scale_input and not data.dataset_sub_root:
        faults.add("mul_scale_input needs --dataset_sub_root, the store of the low magnification")
    for name, remedy in FEATURES_ONLY.items() if pixels else ():
        if getattr(data, name) != getattr(DataConfig(), name):
            faults.add(f"{name} is for features, and this model takes patches: {remedy}. Remove --{name}")
    if data.jpeg_decoder == "gpu" and not pixels:
        faults.add("jpeg_decoder is for patches, and this model takes features. Remove --jpeg_decoder")
    remedy = "Write one with CLAM/save_patches.py, or correct the path" if pixels else "Correct the path"
    kind = "store" if pixels else "feature folder"
    for root in (data.dataset_root, data.dataset_sub_root, data.dataset_test_root):
        if root and not Path(root).exists():
            faults.add(f"there is no {kind} {root}. {remedy}")
    if data.stage_to and data.persistence:
        faults.add(
            "persistence reads all features into RAM once, so a copy for stage_to would be read once too: remove one "
            "of the two"
        )
    if not data.csv_path and labels:
        faults.add("csv_path is not set: give --csv_path, a label csv or a folder of fold_<k>.csv")
    elif data.csv_path and not Path(data.csv_path).exists():
        faults.add(f"there is no label file {data.csv_path}. Correct --csv_path")


def open_sources(
    data: DataConfig, pixels: bool, positions: bool = False, places: Mapping[str, Path] | None = None
) -> Sources:
    """Opens the stores or feature folders that the options name.

    Args:
        data: paths and options.
        pixels: stores of patches; otherwise features.
        positions: bags carry the grid positions of their instances.
        places: copies to open in place of the paths in ``data``.

    Raises:
        UserError: for files that are no stores, and sizes that do not fit each other.
    """
    if data.dataset_sub_root and not data.mul_scale_input:
        log.info("dataset_sub_root is given but not read: bags have one magnification without --mul_scale_input.")
    open_all = _pixel_sources if pixels else _feature_sources
    sources = open_all(data, places or {})
    if positions:
        return _with_positions(sources, data)
    if data.h5_path or data.h5_sub_path:
        log.info("h5_path is given but not read: this MIL head uses no positions.")
    return sources


def check_features(sources: Sources, cohort: Cohort) -> None:
    """Looks at the feature file of every slide of the cohort.

    Raises:
        UserError: listing the files that are damaged, empty or of another width.
    """
    faults = Faults("features")
    folders = {id(s.folder): s.folder for s in (*sources.train, sources.test) if isinstance(s, FeatureSource)}
    for folder in folders.values():
        folder.check(_slides(cohort), faults)
    faults.raise_if_any()


def check_positions(sources: Sources, cohort: Cohort) -> None:
    """Looks at the coordinates of every slide of the cohort.

    Raises:
        UserError: listing the slides without coordinates, or with another number of them than of instances.
    """
    faults = Faults("positions, which this MIL head needs")
    sources_with_grid = [(s, s.grid) for s in (*sources.train, sources.test) if s.grid is not None]
    found = [_position_fault(source, grid, slide) for source, grid in sources_with_grid for slide in _slides(cohort)]
    for fault in dict.fromkeys(found):  # training and test may read the same store
        if fault is not None:
            faults.add(fault)
    faults.raise_if_any()


def _position_fault(source: Source, grid: Grid, slide: str) -> str | None:
    """What is wrong with the coordinates of one slide, or None."""
    try:
        cells = grid.cells(slide)
    except UserError as error:
        return str(error)
    if len(cells) == source.count(slide):
        return None
    return (
        f"slide {slide!r} has {source.count(slide)} instances and {len(cells)} coordinates. Give the coordinate files "
        "that the instances were made from"
    )


def keep_in_memory(sources: Sources, cohort: Cohort, pin: bool) -> None:
    """Reads the features of the cohort into (page-locked) RAM; raises UserError where they do not fit."""
    begin, size = time.perf_counter(), 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    folders = {id(s.folder): s.folder for s in (*sources.train, sources.test) if isinstance(s, FeatureSource)}
    for folder in folders.values():
        size += folder.keep_in_memory(_slides(cohort), processes, pin)
    log.info("features in RAM: %.2f GiB, read in %s.", size / 2**30, duration(time.perf_counter() - begin))


def _slides(cohort: Cohort) -> Iterable[str]:
    samples = (s for fold in cohort.folds for split in fold.splits().values() for s in split)
    return dict.fromkeys(slide for sample in samples for slide in sample.slides)


def _with_positions(sources: Sources, data: DataConfig) -> Sources:
    """The same sources with grids whose cell is one step of the high magnification."""
    high = coordinates_of(sources.train[-1], data.h5_path)
    owners = [high] if len(sources.train) == 1 else [coordinates_of(sources.train[0], data.h5_sub_path), high]
    tested = coordinates_of(sources.test, data.h5_path)
    return dataclasses.replace(
        sources,
        train=tuple(_on(source, Grid(own, high)) for source, own in zip(sources.train, owners, strict=True)),
        test=_on(sources.test, Grid(tested, tested)),
    )


def coordinates_of(source: Source, folder: str | None) -> Coordinates:
    """The corners of a source's instances: in ``folder`` (``--h5_path``), else where the instances are."""
    if folder:
        return CoordinateFolder(folder)
    if isinstance(source, PixelSource):
        return source.store
    assert isinstance(source, FeatureSource)
    return source.folder


def _on(source: Source, grid: Grid) -> Source:
    assert isinstance(source, (PixelSource, FeatureSource))
    return dataclasses.replace(source, grid=grid)


def _pixel_sources(data: DataConfig, places: Mapping[str, Path]) -> Sources:
    train_roots, test_root = _roots(data)
    stores = {root: _open_store(places.get(root, Path(root))) for root in dict.fromkeys([*train_roots, test_root])}
    empty = {root: _empty_slides(root, store) for root, store in stores.items()}
    slides, absent = _in_all({root: store.counts for root, store in stores.items()}, test_root, empty)
    return Sources(
        train=tuple(PixelSource(stores[root], data.channel_order) for root in train_roots),
        test=PixelSource(stores[test_root], data.channel_order),
        stored_px=_common_size(data, {root: stores[root] for root in train_roots}),
        width=None,
        slides=slides,
        fingerprints={root: store.fingerprint for root, store in stores.items()},
        absent=absent,
    )


def _feature_sources(data: DataConfig, places: Mapping[str, Path]) -> Sources:
    from datasets.features import FeatureFolder  # h5py is needed for features only

    train_roots, test_root = _roots(data)
    folders = {root: FeatureFolder(places.get(root, Path(root))) for root in dict.fromkeys([*train_roots, test_root])}
    widths = {root: folder.width for root, folder in folders.items()}
    if len(set(widths.values())) > 1:
        listing = ", ".join(f"{root}: {width}" for root, width in widths.items())
        raise UserError(f"the feature folders differ in width ({listing}). Extract all with one encoder.")
    slides, absent = _in_all({root: folder.counts for root, folder in folders.items()}, test_root, {})
    return Sources(
        train=tuple(FeatureSource(folders[root]) for root in train_roots),
        test=FeatureSource(folders[test_root]),
        stored_px=None,
        width=widths[test_root],
        slides=slides,
        fingerprints={root: folder.fingerprint for root, folder in folders.items()},
        absent=absent,
    )


def contents(data: DataConfig, sources: Sources, positions: bool) -> dict[str, list[tuple[Path, int]]]:
    """The files behind each path of ``data`` that is read, each with how many of its first bytes hold data.

    Args:
        data: paths.
        sources: what was opened from them.
        positions: whether coordinates in files beside the features are read.
    """
    train_roots, test_root = _roots(data)
    opened = dict(zip([*train_roots, test_root], [*sources.train, sources.test], strict=True))
    found = {}
    for root, source in opened.items():
        if isinstance(source, PixelSource):
            found[root] = list(zip(source.store.files, source.store.used_bytes, strict=True))
            source.store.close()
        elif isinstance(source, FeatureSource):
            files = source.folder.files(with_coordinates=positions)
            found[root] = [(file, file.stat().st_size) for file in files]
    return found


def _roots(data: DataConfig) -> tuple[list[str], str]:
    """Paths of the training sources, low magnification first, and of the test source."""
    high = str(data.dataset_root)
    low = [str(data.dataset_sub_root)] if data.mul_scale_input else []
    return [*low, high], data.dataset_test_root or high


def _in_all(
    counts: Mapping[str, Mapping[str, int]], test_root: str, empty: Mapping[str, Collection[str]]
) -> tuple[Mapping[str, int], dict[str, str]]:
    """Slides that every source holds, with their instances in the test source, and the others with what lacks them.

    Args:
        counts: instances per slide of every source.
        test_root: the source whose numbers are wanted.
        empty: slides of a source that have no instances there.

    Raises:
        UserError: no slide is in every source.
    """
    held = {root: set(slides) - set(empty.get(root, ())) for root, slides in counts.items()}
    common = set.intersection(*held.values())
    if not common:
        listing = "; ".join(f"{root} holds {', '.join(sorted(names)[:3])}" for root, names in held.items())
        raise UserError(
            f"no slide is in every store ({listing}). Give stores of the same slides, under the same names."
        )
    absent = {slide: _lack(slide, counts, empty) for slide in sorted(set().union(*counts.values()) - common)}
    if not absent:
        return counts[test_root], {}
    apart = [slide for slide in absent if not all(slide in slides for slides in counts.values())]
    if apart:
        such = "; ".join(f"{slide} is {absent[slide]}" for slide in apart[:3])
        log.info("%d slides are not in every store and count as missing, such as: %s.", len(apart), such)
    return {slide: n for slide, n in counts[test_root].items() if slide in common}, absent


def _lack(slide: str, counts: Mapping[str, Mapping[str, int]], empty: Mapping[str, Collection[str]]) -> str:
    """What lacks a slide: 'not in low.lmdb'."""
    found = [f"not in {root}" for root, slides in counts.items() if slide not in slides]
    return ", ".join(found + [f"without patches in {root}" for root, slides in empty.items() if slide in slides])


def _empty_slides(root: str, store: PatchStore) -> list[str]:
    """Slides of a store that have no patches; logs them. Raises UserError where no slide has any."""
    remedy = "Write patches into it with CLAM/save_patches.py, or correct the path."
    if not store.slides:
        raise UserError(f"the store {root} holds no slide. {remedy}")
    empty = sorted(slide for slide, n in store.counts.items() if n == 0)
    if len(empty) == len(store.slides):
        raise UserError(f"the store {root} holds no patch: each of its {len(empty)} slides is empty. {remedy}")
    if empty:
        such = ", ".join(empty[:3])
        log.warning("%d slides of %s hold no patches and count as missing, such as %s.", len(empty), root, such)
    return empty


def _open_store(root: Path) -> PatchStore:
    if not root.exists():
        raise UserError(f"there is no store {root}. Write one with CLAM/save_patches.py, or correct the path.")
    return PatchStore(root)


def _common_size(data: DataConfig, stores: dict[str, PatchStore]) -> int:
    """The stored size in px of the training stores; they must agree with each other and with ``img_size``."""
    sizes = {root: store.image_size_px for root, store in stores.items()}
    listing = ", ".join(f"{root}: {px} px" for root, px in sizes.items())
    if len(set(sizes.values())) > 1:
        raise UserError(
            f"the two magnifications hold patches of different size ({listing}). Write both with one --img_size "
            f"of CLAM/save_patches.py. {RENAMED_PATHS}"
        )
    size = next(iter(sizes.values()))
    if data.img_size is not None and data.img_size != size:
        raise UserError(
            f"img_size is {data.img_size}, but the training store holds {size} px patches ({listing}). Give the "
            f"store that holds {data.img_size} px as --dataset_root, or --img_size={size}. {RENAMED_PATHS}"
        )
    return size
