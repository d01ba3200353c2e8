"""Whether a store is whole: every listed patch is there, decodes, and has the size that the header says."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import jpeg
from datasets.store import layout, safe_pickle
from datasets.store.reader import PatchStore
from utils.errors import UserError
from utils.parent import end_with_parent

CHUNK_PATCHES = 1000
MOST_UNKNOWN_PX = 4096
"""Longest side of a patch in px where no header says it: a damaged one could claim any."""
BESIDE = (layout.info_key, layout.coords_key, layout.sums_key)
"""Keys of what is stored beside the patches of a slide."""


@dataclass
class Report:
    """What was checked and what is wrong with it."""

    patches: int = 0
    faults: list[str] = field(default_factory=list)


def verify(path: str | Path, workers: int = 1) -> Report:
    """Decodes every patch, over several processes.

    Raises:
        UserError: the store cannot be opened at all, or a process died.
    """
    store = PatchStore(path)
    report = Report(patches=len(store), faults=list(_metadata_faults(store)))
    chunks = list(_chunks(store))
    if workers <= 1 or len(chunks) == 1:
        found = [_check_chunk(store, *chunk) for chunk in chunks]
    else:
        found = _over_processes(store, chunks, workers)
    for faults in found:
        report.faults += faults
    return report


def _over_processes(store: PatchStore, chunks: list[tuple[str, int, int]], workers: int) -> list[list[str]]:
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        try:
            return list(pool.map(_check_chunk, [store] * len(chunks), *zip(*chunks, strict=True)))
        except BrokenProcessPool as error:
            raise UserError(
                f"{store.path}: one of {workers} processes died before all patches were checked. Was it killed, or out "
                "of memory? Give fewer --workers."
            ) from error


def _chunks(store: PatchStore) -> Iterator[tuple[str, int, int]]:
    for slide in store.slides:
        count = store.counts[slide]
        for start in range(0, count, CHUNK_PATCHES):
            yield slide, start, min(start + CHUNK_PATCHES, count)


def _check_chunk(store: PatchStore, slide: str, start: int, stop: int) -> list[str]:
    expected = store.header.image_size_px if store.header else None
    found = (_check_patch(store, slide, index, expected) for index in range(start, stop))
    return [fault for fault in found if fault is not None]


def _check_patch(store: PatchStore, slide: str, index: int, expected_px: int | None) -> str | None:
    try:
        data = store.read(slide, [index])[0]
    except UserError as error:
        return str(error)
    try:
        height, width = jpeg.image_size(data)
        if expected_px and (height, width) != (expected_px, expected_px):
            return f"patch {index} of slide {slide!r} has {width} x {height} px, the header says {expected_px}"
        if not expected_px and max(height, width) > MOST_UNKNOWN_PX:
            return f"patch {index} of slide {slide!r} has {width} x {height} px, more than {MOST_UNKNOWN_PX} a side"
        jpeg.decode(data)
    except jpeg.JpegError as error:
        return f"patch {index} of slide {slide!r}: {error}"
    return None


def _metadata_faults(store: PatchStore) -> Iterator[str]:
    """No slide at all, lists that disagree, coordinates of another length, and patches that no list mentions."""
    if not store.slides:
        yield f"{store.path}: the store holds no slide. Write patches into it with CLAM/save_patches.py"
    for slide in store.slides:
        try:
            store.coords(slide)
        except UserError as error:
            yield str(error)
    for file in store.files:
        yield from _file_faults(file)
    # LMDB must not open a file twice; the readers below open it again.
    store.close()


def _file_faults(file: Path) -> Iterator[str]:
    with PatchStore(file) as alone, alone.transaction() as txn:
        total = len(alone)
        listed = txn.get(layout.LEN)
        if listed is None or safe_pickle.load_count(listed) != total:
            yield f"{file}: __len__ is not {total}, the sum of __pn__"
        if not _keys_agree(txn.get(layout.KEYS), alone):
            yield (
                f"{file}: __keys__ does not list the {total} patches (the writer was killed). Run "
                "CLAM/save_patches.py again to complete it; our readers do not use it"
            )
        extra = txn.stat()["entries"] - total - _count_records(txn, alone.slides)
        if alone.header is not None and extra > 0:
            yield f"{file}: {extra} entries of slides in work (the writer was killed, or is still writing)"


def _keys_agree(value: bytes | None, store: PatchStore) -> bool:
    if value is None:
        return False
    if value == layout.pickle_keys((slide, store.counts[slide]) for slide in store.slides):
        return True
    return safe_pickle.load_names(value) == [f"{s}-{i}" for s in store.slides for i in range(store.counts[s])]


def _count_records(txn: Any, slides: list[str]) -> int:
    """Entries that are no patches."""
    keys = [*layout.RECORDS, *(key(slide) for slide in slides for key in BESIDE)]
    return sum(txn.get(key) is not None for key in keys)
