"""Stores from stores: merge, subset, and export to files that CLAM and TRIDENT read."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets.store.layout import SlideInfo, StoreHeader
from datasets.store.reader import PatchStore
from datasets.store.writer import StoreWriter
from utils.errors import Faults, UserError, did_you_mean
from utils.files import atomic_path, is_file_name

log = logging.getLogger(__name__)

READ_PATCHES = 256
LAYOUTS = ("clam", "trident")


class Copied(NamedTuple):
    """How many slides were copied, and how many were in the target already."""

    copied: int
    there: int


def merge(target: Path, sources: Sequence[Path]) -> Copied:
    """Copies all slides of several stores into one.

    Raises:
        UserError: the stores were made differently, a slide is in two of them, or the target has another of its name.
    """
    stores = [PatchStore(source) for source in sources]
    faults = Faults(f"{target}: the stores cannot be merged")
    owner: dict[str, Path] = {}
    for store in stores:
        for difference in header_of(stores[0]).differences(header_of(store)):
            faults.add(f"{store.path} has {difference} as in {stores[0].path}")
        for slide in store.slides:
            if slide in owner:
                faults.add(f"slide {slide!r} is in {owner[slide]} and in {store.path}")
            owner[slide] = store.path
    faults.raise_if_any()
    return copy_slides([(store, store.slides) for store in stores], target)


def subset(source: Path, target: Path, slides: Sequence[str]) -> Copied:
    """Copies some slides into a store of their own.

    Raises:
        UserError: a slide is not in the source (all that are missing are listed), or the target has another of its
            name.
    """
    store = PatchStore(source)
    check_slides(store, slides)
    return copy_slides([(store, list(dict.fromkeys(slides)))], target)


def check_slides(store: PatchStore, slides: Iterable[str]) -> None:
    """Refuses names that are not in the store, all at once."""
    faults = Faults(str(store.path))
    for slide in slides:
        if slide not in store.counts:
            faults.add(f"no slide {slide!r}.{did_you_mean(slide, store.slides)}")
    faults.raise_if_any()


def _check_file_names(slides: Iterable[str]) -> None:
    """A store from elsewhere must not choose where files are written."""
    faults = Faults("slide names that cannot be file names")
    for slide in slides:
        if not is_file_name(slide):
            faults.add(repr(slide))
    faults.raise_if_any()


def header_of(store: PatchStore) -> StoreHeader:
    """The header, or for a published store what can be known of it."""
    return store.header or StoreHeader(image_size_px=store.image_size_px)


def copy_slides(chosen: Sequence[tuple[PatchStore, Sequence[str]]], target: Path) -> Copied:
    """Copies slides that the target lacks, JPEGs as they are; continues where it was stopped.

    Raises:
        UserError: the target has other slides of these names. It does not know where they are from, so they stay.
    """
    if any(file.resolve() == target.resolve() for store, _ in chosen for file in store.files):
        raise UserError(f"{target}: is also a source. Give another name for the result.")
    slides = [(store, slide) for store, names in chosen for slide in names]
    header = functools.reduce(StoreHeader.merged, (header_of(store) for store, _ in chosen))
    with StoreWriter(target, header) as writer:
        lacking = [(store, slide) for store, slide in slides if slide not in writer.finished]
        faults = Faults(f"{target}: has other slides of these names; remove it, or give another name for the result")
        for store, slide in slides:
            if slide in writer.finished and not _is_there(writer, store, slide):
                had, has = writer.finished[slide].count, store.counts[slide]
                faults.add(f"slide {slide!r}: its {had} patches are not the {has} in {store.path}")
        faults.raise_if_any()
        for store, slide in lacking:
            writer.put_slide(slide, _jpegs(store, slide), store.coords(slide), store.info(slide))
            log.info("%s: %d patches of slide %s", target, store.counts[slide], slide)
    return Copied(len(lacking), len(slides) - len(lacking))


def _is_there(writer: StoreWriter, store: PatchStore, slide: str) -> bool:
    info = store.info(slide) or SlideInfo()
    count = store.counts[slide]
    return writer.holds(slide, count, info.fingerprint, store.coords(slide), store.checksums(slide))


def _jpegs(store: PatchStore, slide: str) -> Iterator[bytes]:
    count = store.counts[slide]
    for start in range(0, count, READ_PATCHES):
        yield from store.read(slide, range(start, min(start + READ_PATCHES, count)))


def export(source: Path, folder: Path, slides: Sequence[str] | None = None, layout: str = "clam") -> int:
    """Writes ``imgs/<slide>/<i>.jpg`` and, where coordinates are known, h5 files; gives the number of slides.

    Args:
        source: the store.
        folder: output.
        slides: which; default: all.
        layout: ``clam`` names the h5 files ``patches/<slide>.h5``, ``trident``
            ``patches/<slide>_patches.h5``. Both hold ``coords`` with the attributes of both programs.

    Raises:
        UserError: a slide is not in the store.
    """
    store = PatchStore(source)
    chosen = store.slides if slides is None else list(slides)
    check_slides(store, chosen)
    _check_file_names(chosen)
    for slide in chosen:
        images = folder / "imgs" / slide
        images.mkdir(parents=True, exist_ok=True)
        for index, data in enumerate(_jpegs(store, slide)):
            (images / f"{index}.jpg").write_bytes(data)
        _export_coords(store, slide, folder / "patches", layout == "trident")
        log.info("%s: %d patches of slide %s", folder, store.counts[slide], slide)
    return len(chosen)


def _export_coords(store: PatchStore, slide: str, folder: Path, trident: bool) -> None:
    path = folder / f"{slide}{'_patches' if trident else ''}.h5"
    coords = store.coords(slide)
    if coords is None:
        log.warning("%s: the store has no coordinates of slide %s, so no h5 file is written", store.path, slide)
        return
    import h5py

    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        data = file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=(max(len(coords), 1), 2))
        attributes = trident_attributes if trident else clam_attributes
        info = store.info(slide) or SlideInfo()
        for name, value in attributes(slide, info, store.image_size_px).items():
            data.attrs[name] = value


def clam_attributes(slide: str, info: SlideInfo, image_size_px: int) -> dict[str, Any]:
    """What CLAM and ``save_patches.py`` look for, as far as it is known."""
    level_px = info.source.get("level_dimensions_px")
    return _known(
        name=slide,
        patch_size=info.patch_size_px or image_size_px,
        patch_level=info.level,
        downsample=_downsample(info),
        level_dim=level_px,
        downsampled_level_dim=level_px,
        target_patch_size_px=image_size_px,
        resolved_mpp=info.mpp,
        level0_mpp=info.source.get("level0_mpp"),
    )


def trident_attributes(slide: str, info: SlideInfo, image_size_px: int) -> dict[str, Any]:
    """What TRIDENT looks for, as far as it is known: sides at the target magnification and in level-0 px.

    Its magnifications are 10 um/px over the um/px.
    """
    downsample, mpp, level0_mpp = _downsample(info), info.mpp, info.source.get("level0_mpp")
    width, height = info.source.get("level_dimensions_px") or (None, None)
    return _known(
        name=slide,
        patch_size=image_size_px,
        patch_size_level0=round(info.patch_size_px * downsample[0]) if downsample and info.patch_size_px else None,
        level0_magnification=round(10 / level0_mpp) if level0_mpp else None,
        target_magnification=round(10 / mpp) if mpp else None,
        overlap=0,
        level0_width=round(width * downsample[0]) if downsample and width else None,
        level0_height=round(height * downsample[1]) if downsample and height else None,
    )


def _downsample(info: SlideInfo) -> list[float] | None:
    return info.source.get("downsample") or ([1.0, 1.0] if info.level == 0 else None)


def _known(**facts: Any) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}
