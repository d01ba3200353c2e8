"""Reading a store: one LMDB file, or a folder of LMDB files (shards) as one store."""

from __future__ import annotations

import functools
import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np
from numpy.typing import NDArray

from datasets import jpeg
from datasets.store import layout, safe_pickle
from datasets.store.cut_off import check_length
from datasets.store.layout import SlideInfo, StoreHeader
from utils.errors import Faults, UserError, did_you_mean

T = TypeVar("T")

# LMDB must not open one file twice in a process, and an environment must not cross a fork.
_OPEN: weakref.WeakValueDictionary[tuple[int, int, int], Any] = weakref.WeakValueDictionary()


def _close_inherited() -> None:
    """In a forked process: lets go of the parent's environments, which LMDB would count as open here."""
    for env in list(_OPEN.values()):
        env.close()
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


class PatchStore:
    """Read-only view of the patches of many slides.

    Picklable and safe under fork and spawn: each process opens the files for itself, when it first reads.

    Attributes:
        path: what was given.
        slides: names, in the order of the files and of their ``__slide__`` lists.
        counts: patches per slide.
        header: how the patches were made; None for files of the published program, which have none.

    Raises:
        UserError: no such file, not an LMDB, cut off, no metadata (half-written), a slide in two shards, shards
            made differently.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files = _store_files(self.path)
        self.slides: list[str] = []
        self.counts: dict[str, int] = {}
        self._file_of: dict[str, int] = {}
        self._envs: dict[int, Any] = {}
        self._pid = os.getpid()
        headers = [self._read_metadata(number) for number in range(len(self.files))]
        self.header = _common_header(self.files, headers)
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_envs": {}}

    def __repr__(self) -> str:
        return f"PatchStore({str(self.path)!r}: {len(self.slides)} slides, {len(self)} patches)"

    def __len__(self) -> int:
        return sum(self.counts.values())

    def _read_metadata(self, number: int) -> StoreHeader | None:
        file = self.files[number]
        with self._transaction(number) as txn:
            counts = _metadata(txn, file, layout.COUNTS, safe_pickle.load_counts)
            slides = _metadata(txn, file, layout.SLIDES, safe_pickle.load_names)
            header = txn.get(layout.HEADER)
        if sorted(slides) != sorted(counts):
            raise UserError(f"{file}: __slide__ lists {len(slides)} slides and __pn__ {len(counts)} others: damaged.")
        for slide in slides:
            if slide in self._file_of:
                other = self.files[self._file_of[slide]]
                raise UserError(f"{file}: slide {slide!r} is also in {other}. Keep it in one shard.")
            self._file_of[slide] = number
        self.slides += slides
        self.counts.update((slide, counts[slide]) for slide in slides)
        return None if header is None else _in_file(file, lambda: layout.load_header(header))

    @contextmanager
    def _transaction(self, number: int) -> Iterator[Any]:
        if self._pid != os.getpid():
            self._envs, self._pid = {}, os.getpid()
        if number not in self._envs:
            self._envs[number] = _open(self.files[number])
        with self._envs[number].begin(write=False, buffers=False) as txn:
            yield txn

    def _number(self, slide: str) -> int:
        try:
            return self._file_of[slide]
        except KeyError:
            hint = did_you_mean(slide, self.slides)
            raise UserError(f"{self.path}: no slide {slide!r} among {len(self.slides)}.{hint}") from None

    def read(self, slide: str, indices: Iterable[int]) -> list[bytes]:
        """The JPEG bytes of some patches, in the order of ``indices``, as they were written.

        Stores of the published program have no checksums, so damage inside of a value is not seen there.

        Raises:
            UserError: unknown slide, missing patch or damaged value, with slide, index and file.
        """
        number = self._number(slide)
        file = self.files[number]
        images = []
        with self._transaction(number) as txn:
            sums = self._checksums(txn, slide)
            for index in indices:
                value = txn.get(layout.patch_key(slide, int(index)))
                if value is None or index >= self.counts[slide]:
                    raise UserError(
                        f"{file}: patch {index} of slide {slide!r} is missing; the store lists "
                        f"{self.counts[slide]} patches. `python -m datasets.store verify` names all that are."
                    )
                try:
                    images.append(safe_pickle.unpack_bytes(value))
                except UserError as error:
                    raise UserError(f"{file}: patch {index} of slide {slide!r}: {error}") from error
                if sums is not None and sums[index] != layout.checksum(images[-1]):
                    raise UserError(
                        f"{file}: patch {index} of slide {slide!r} is not what was written (its CRC-32 differs): the "
                        "file was damaged since. Copy it again, or take the other slides into a new store (python -m "
                        "datasets.store subset) and let CLAM/save_patches.py write this one there."
                    )
        return images

    def _checksums(self, txn: Any, slide: str) -> NDArray[np.uint32] | None:
        """(N,) of the patches; None where not stored."""
        value = txn.get(layout.sums_key(slide))
        if value is not None and len(value) != 4 * self.counts[slide]:
            count = self.counts[slide]
            raise UserError(
                f"{self.path}: slide {slide!r} has {count} patches and {len(value) / 4:g} checksums: damaged."
            )
        return None if value is None else np.frombuffer(value, dtype="<u4")

    def checksums(self, slide: str) -> NDArray[np.uint32] | None:
        """(N,) CRC-32 of the patches' JPEGs; None where not stored."""
        with self._transaction(self._number(slide)) as txn:
            return self._checksums(txn, slide)

    def coords(self, slide: str) -> NDArray[np.int64] | None:
        """(N, 2) int64 upper left corners (x, y) in level-0 px, row i for patch i; None where not stored."""
        with self._transaction(self._number(slide)) as txn:
            value = txn.get(layout.coords_key(slide))
        if value is None:
            return None
        if len(value) != 16 * self.counts[slide]:
            raise UserError(
                f"{self.path}: slide {slide!r} has {self.counts[slide]} patches and "
                f"{len(value) / 16:g} coordinates: damaged."
            )
        return np.frombuffer(value, dtype="<i8").astype(np.int64).reshape(-1, 2)

    def info(self, slide: str) -> SlideInfo | None:
        """What was recorded about a slide; None for files of the published program."""
        number = self._number(slide)
        with self._transaction(number) as txn:
            value = txn.get(layout.info_key(slide))
        return None if value is None else _in_file(self.files[number], lambda: layout.load_info(value))

    @property
    def image_size_px(self) -> int:
        """Side of the stored images in px: from the header, else from the first patch's JPEG header."""
        if self.header is not None and self.header.image_size_px:
            return self.header.image_size_px
        slide = next((s for s in self.slides if self.counts[s]), None)
        if slide is None:
            raise UserError(f"{self.path}: holds no patch, so its image size is unknown.")
        height, width = jpeg.image_size(self.read(slide, [0])[0])
        if height != width:
            raise UserError(
                f"{self.path}: patch 0 of slide {slide!r} has {width} x {height} px; stores hold square patches."
            )
        return height

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits over slides and counts; the same for a store and for its slides in shards."""
        text = "\n".join(f"{slide}\t{self.counts[slide]}" for slide in sorted(self.slides))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def used_bytes(self) -> list[int]:
        """Bytes at the front of each file that hold data; a file that was made as long as its map has more."""
        used = []
        for number, file in enumerate(self.files):
            with self._transaction(number):
                env = self._envs[number]
                pages = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
            used.append(min(pages, file.stat().st_size))
        return used

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """A read transaction on a store of one file, for tools that look at its entries."""
        if len(self.files) != 1:
            raise UserError(f"{self.path}: has {len(self.files)} files; look at them one by one.")
        with self._transaction(0) as txn:
            yield txn

    def __enter__(self) -> PatchStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files; a later read opens them again."""
        self._envs = {}


def _store_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such store (an LMDB file, or a folder of them).{did_you_mean(path.name, known)}")
    if (path / "data.mdb").is_file():
        return [path / "data.mdb"]
    files = sorted(p for p in path.iterdir() if p.suffix in (".lmdb", ".mdb") and p.is_file())
    if not files:
        raise UserError(f"{path}: the folder holds no .lmdb file. Give the store that CLAM/save_patches.py wrote.")
    return files


def _open(file: Path) -> Any:
    try:
        stat = os.stat(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be opened: {error.strerror}.") from error
    key = (os.getpid(), stat.st_dev, stat.st_ino)
    env = _OPEN.get(key)
    if env is None:
        try:
            env = lmdb.open(str(file), subdir=False, readonly=True, lock=False, readahead=False, max_spare_txns=1)
        except lmdb.Error as error:
            raise UserError(f"{file}: {_why_not_opened(error, file, stat.st_size)}") from error
        check_length(file, env)
        _OPEN[key] = env
    return env


def _why_not_opened(error: lmdb.Error, file: Path, size_bytes: int) -> str:
    if size_bytes and not isinstance(error, lmdb.InvalidError):
        return f"cannot be opened as an LMDB file: {str(error).removeprefix(f'{file}: ')}."
    empty = " (it is empty)" if not size_bytes else ""
    return f"is not an LMDB file{empty}, so no store of patches. Give the store that CLAM/save_patches.py wrote."


def _in_file(file: Path, load: Callable[[], T]) -> T:
    try:
        return load()
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _metadata(txn: Any, file: Path, key: bytes, load: Callable[[bytes], T]) -> T:
    value = txn.get(key)
    if value is None:
        raise UserError(
            f"{file}: no {key.decode()} entry, so the file is half-written or not a patch store (the "
            "published program writes its metadata last). Write it again with CLAM/save_patches.py, whose "
            "files are readable after every slide and which continues where it was stopped."
        )
    return _in_file(file, lambda: load(value))


def _common_header(files: list[Path], headers: list[StoreHeader | None]) -> StoreHeader | None:
    first = headers[0]
    faults = Faults("shards made in different ways")
    for file, header in zip(files[1:], headers[1:], strict=True):
        if first is None or header is None:
            if first is not header:
                faults.add(f"{file} and {files[0]}: one has a header, the other has none")
            continue
        for difference in first.differences(header):
            faults.add(f"{file} has {difference} as in {files[0]}")
    faults.raise_if_any()
    return functools.reduce(lambda a, b: a.merged(b) if a and b else None, headers)
