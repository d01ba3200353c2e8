"""Pre-extracted features as CLAM, TRIDENT and the published program write them.

pt_files/<slide>.pt   a tensor (N, D)                       (CLAM, the published program)
h5_files/<slide>.h5   datasets features (N, D), coords (N, 2)  (CLAM)
<slide>.h5            the same datasets, flat in a folder   (TRIDENT: features_<encoder>/)
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from utils.errors import Faults, UserError, did_you_mean
from utils.files import DAMAGED, unreadable

FEATURE_NAMES = ("features", "feats", "feature")
COORD_NAMES = ("coords", "coordinates")
H5_SUFFIXES = (".h5", ".hdf5")
PLACES = (("pt_files", ".pt"), ("h5_files", ".h5"), (".", ".pt"), (".", ".h5"))
"""Folders that are looked into, in this order, and the extension expected there."""

MOST_MAPPED = 16384
"""Files that stay mapped; a process may have 65,530 mappings by default."""

STORES_NEED = (
    "A store of patches goes with a model that reads patches, --model=e2e_<encoder>_<mil>; a model without e2e_ needs "
    "a folder of features."
)


class Features(NamedTuple):
    """Features (N, D) of one slide, and the level-0 px corners (N, 2) of their patches or None."""

    values: torch.Tensor
    coords: NDArray[np.int64] | None


def read_features(path: str | Path) -> Features:
    """Reads one ``.pt`` or ``.h5`` file.

    A ``.pt`` file is mapped into memory: only what is used is read. A leading axis of length one, as slide
    encoders write it, is dropped. Half-precision features stay as they are.

    Raises:
        UserError: no such file, another kind of content, or coordinates of another length.
    """
    path = Path(path)
    if not path.is_file():
        known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such feature file.{did_you_mean(path.name, known)}")
    values, coords = _read_h5(path) if path.suffix in H5_SUFFIXES else _read_pt(path)
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2 or not values.is_floating_point():
        raise UserError(f"{path}: holds {tuple(values.shape)} {values.dtype}, not floating-point features (N, D).")
    if coords is not None:
        coords = coords.reshape(-1, coords.shape[-1])[:, :2]
        if len(coords) != len(values):
            raise UserError(f"{path}: has {len(values)} features and {len(coords)} coordinates.")
    return Features(values, coords)


def read_coords(path: str | Path) -> NDArray[np.int64] | None:
    """The level-0 px corners (N, 2) in a ``.h5`` or ``.pt`` file; None when it holds none.

    Raises:
        UserError: no such file, or a damaged one.
    """
    path = Path(path)
    if path.suffix not in H5_SUFFIXES:
        return read_features(path).coords
    try:
        with h5py.File(path, "r") as file:
            corners = next((file[n][()] for n in COORD_NAMES if n in file), None)
    except (OSError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a readable HDF5 file of coordinates: {error}") from error
    return None if corners is None else np.asarray(corners, dtype=np.int64).reshape(-1, corners.shape[-1])[:, :2]


def free_memory() -> int | None:
    """Bytes of RAM that can be had without swapping; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _read_h5(path: Path) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
    try:
        with h5py.File(path, "r") as file:
            name = next((n for n in FEATURE_NAMES if n in file), None)
            if name is None:
                raise UserError(f"{path}: has no dataset 'features'; it holds {', '.join(file) or 'nothing'}.")
            corners = next((file[n][:] for n in COORD_NAMES if n in file), None)
            values = torch.from_numpy(file[name][:])
    except (OSError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is not a readable HDF5 file of features: {error}") from error
    return values, None if corners is None else np.asarray(corners, dtype=np.int64)


def _read_pt(path: Path) -> tuple[torch.Tensor, NDArray[np.int64] | None]:
    content = _load_pt(path)
    if isinstance(content, Mapping):
        values = next((content[n] for n in FEATURE_NAMES if n in content), None)
        coords = next((content[n] for n in COORD_NAMES if n in content), None)
    else:
        values, coords = content, None
    if not isinstance(values, torch.Tensor):
        held = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            keys = ", ".join(map(str, list(content)[:10]))
            held = f"a dict with {keys or 'nothing'}, and none of {', '.join(FEATURE_NAMES)}"
        raise UserError(f"{path}: holds {held}, not a tensor of features (N, D).")
    return values, None if coords is None else np.asarray(coords, dtype=np.int64)


def _load_pt(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise unreadable(path, error, "extract the features of this slide again") from error


def _if_store(folder: Path) -> str:
    """What to do with a folder of stores, or nothing."""
    shards = [path for path in folder.iterdir() if path.suffix in (".lmdb", ".mdb")]
    return f" It holds {shards[0].name}. {STORES_NEED}" if shards else ""


class FeatureFolder:
    """The features of many slides: a folder with ``pt_files/`` or ``h5_files/``, or the files themselves.

    Attributes:
        path: what was given.
        slides: names, sorted.

    Raises:
        UserError: no such folder, or no feature file in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_file():
            raise UserError(f"{self.path}: is a file, and features lie in a folder. {STORES_NEED}")
        if not self.path.is_dir():
            raise UserError(f"{self.path}: there is no such feature folder.")
        for folder, suffix in PLACES:
            files = sorted((self.path / folder).glob(f"*{suffix}"))
            if files:
                break
        else:
            raise UserError(
                f"{self.path}: holds no features. Expected pt_files/*.pt, h5_files/*.h5, or "
                f"such files in the folder itself.{_if_store(self.path)}"
            )
        self._files = {file.stem: file for file in files}
        self.slides = list(self._files)
        self.counts: Mapping[str, int] = _Counts(self)
        self._kept: dict[str, torch.Tensor] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        self._layouts: dict[str, tuple[int, int, torch.dtype]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # another process maps the files for itself

    def __repr__(self) -> str:
        return f"FeatureFolder({str(self.path)!r}: {len(self.slides)} slides)"

    def file(self, slide: str) -> Path:
        """The file of a slide; raises UserError for an unknown one."""
        try:
            return self._files[slide]
        except KeyError:
            hint = did_you_mean(slide, self.slides)
            raise UserError(f"{self.path}: no features of slide {slide!r} among {len(self.slides)}.{hint}") from None

    def read(self, slide: str) -> torch.Tensor:
        """(N, D) features; for ``.pt`` files mapped into memory, and left so for the next reader."""
        for known in (self._kept, self._mapped):
            if slide in known:
                return known[slide]
        values = read_features(self.file(slide)).values
        if len(self._mapped) < MOST_MAPPED and zipfile.is_zipfile(self.file(slide)):  # others are read, not mapped
            self._mapped[slide] = values
        return values

    def layout(self, slide: str) -> tuple[int, int, torch.dtype]:
        """(N, D) and type of a slide's features; raises UserError for an unknown slide or a damaged file."""
        if slide not in self._layouts:
            h5 = self.file(slide).suffix in H5_SUFFIXES
            self._layouts[slide] = _layout_of_h5(self.file(slide)) if h5 else _layout(self.read(slide))
        return self._layouts[slide]

    @property
    def mapped(self) -> bool:
        """Whether files are mapped into memory: ``.pt`` files that are zip archives. The first one stands for all."""
        first = self._files[self.slides[0]]
        return first.suffix not in H5_SUFFIXES and zipfile.is_zipfile(first)

    def holds_in_memory(self, slides: Iterable[str]) -> bool:
        """Whether ``read`` gives what lies in RAM for all of ``slides``."""
        return all(slide in self._kept for slide in slides)

    def keep_in_memory(self, slides: Iterable[str], processes: int = 1, pin: bool = False) -> int:
        """Reads the features of ``slides`` into RAM, from where later reads take them without a copy.

        Args:
            slides: names.
            processes: processes of this machine that do the same; each has a copy of its own.
            pin: page-locked memory, from which a GPU fetches a bag without help.

        Returns:
            Bytes that the features take in this process.

        Raises:
            UserError: when they do not fit into the free memory.
        """
        wanted = [slide for slide in dict.fromkeys(slides) if slide not in self._kept]
        needed, free = sum(self.file(s).stat().st_size for s in wanted) * processes, free_memory()
        if free is not None and needed > free:
            raise UserError(
                f"{self.path}: the features of {len(wanted)} slides take {needed / 2**30:.1f} GiB of RAM in "
                f"{processes} process(es), and {free / 2**30:.1f} GiB are free. Leave --persistence out: .pt files "
                "are mapped into memory, and what fits stays there."
            )
        for slide in wanted:
            values = read_features(self.file(slide)).values
            self._kept[slide] = values.pin_memory() if pin else values.clone()
        return sum(v.nbytes for v in self._kept.values())

    def check(self, slides: Iterable[str], faults: Faults) -> None:
        """Notes every slide whose file is damaged, holds no instances, or features of another width."""
        width = self.width
        for slide in dict.fromkeys(slides):
            try:
                count, other, _ = self.layout(slide)
            except UserError as error:
                faults.add(str(error))
                continue
            if count == 0:
                faults.add(f"{self.file(slide)}: holds no instance. Take slide {slide!r} out of the labels.")
            elif other != width:
                faults.add(f"{self.file(slide)}: features have width {other}, those of {self.slides[0]!r} {width}.")

    def coords(self, slide: str) -> NDArray[np.int64] | None:
        """(N, 2) level-0 px corners: from the file, else from ``h5_files/`` or ``patches/`` beside it; None
        if nowhere.

        Raises:
            UserError: unknown slide, or a damaged file.
        """
        for file in (self.file(slide), *self._beside(slide)):
            found = read_coords(file)
            if found is not None:
                return found
        return None

    def _beside(self, slide: str) -> list[Path]:
        """Other files of a slide that may hold its coordinates."""
        places = [self.path / place / f"{slide}.h5" for place in ("h5_files", "patches")]
        return [place for place in places if place != self.file(slide) and place.is_file()]

    def files(self, with_coordinates: bool = False) -> list[Path]:
        """All files that are read, those that may hold coordinates too where these are asked for."""
        beside = [file for slide in self.slides for file in self._beside(slide)] if with_coordinates else []
        return [*self._files.values(), *beside]

    @property
    def width(self) -> int:
        """D, from the first file."""
        return self.layout(self.slides[0])[1]

    @property
    def fingerprint(self) -> str:
        """Short id of what the folder holds: names and sizes of its files."""
        digest = hashlib.sha256()
        for slide, file in self._files.items():
            digest.update(f"{slide}\0{file.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]


class _Counts(Mapping[str, int]):
    """Patches per slide, read when asked for: a cohort may have thousands of files on a slow disk."""

    def __init__(self, folder: FeatureFolder) -> None:
        self._folder = folder

    def __getitem__(self, slide: str) -> int:
        if slide not in self._folder._files:
            raise KeyError(slide)
        return self._folder.layout(slide)[0]

    def __iter__(self) -> Any:
        return iter(self._folder.slides)

    def __len__(self) -> int:
        return len(self._folder.slides)

    def __contains__(self, slide: object) -> bool:
        return slide in self._folder._files


def _layout(values: torch.Tensor) -> tuple[int, int, torch.dtype]:
    return int(values.shape[0]), int(values.shape[1]), values.dtype


def _layout_of_h5(path: Path) -> tuple[int, int, torch.dtype]:
    """(N, D) and the type, without reading the values where they are stored as usual."""
    try:
        with h5py.File(path, "r") as file:
            name = next((n for n in FEATURE_NAMES if n in file), None)
            if name is not None and file[name].ndim >= 2:
                empty = torch.from_numpy(np.empty(0, file[name].dtype))
                return int(file[name].shape[-2]), int(file[name].shape[-1]), empty.dtype
    except (OSError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: is not a readable HDF5 file of features: {error}") from error
    return _layout(read_features(path).values)
