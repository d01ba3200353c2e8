"""Where patches go: LMDB stores, one per image size, and folders of JPEGs."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from patch_jobs import Job
from patch_reading import Images

from datasets.store import SlideInfo, StoreHeader, StoreWriter


class StoreOutput:
    """One store with images of one size.

    Args:
        path: the LMDB file.
        header: how its patches are made; ``image_size_px`` is the size.
        size_px: the size as the options give it, 0 for 'as the coordinates say'.
    """

    def __init__(self, path: Path, header: StoreHeader, size_px: int) -> None:
        self.size_px = size_px
        self.header = header
        self.writer = StoreWriter(path, header)
        # The published program keeps this list to know what to skip; here the store itself knows.
        self._progress = path.with_name(f"{path.stem}_progress.txt")

    def key(self, job: Job) -> int:
        """The size that a worker is asked for."""
        return self.size_px or job.natural_px

    def is_done(self, job: Job, fingerprint: str) -> bool:
        info = self.writer.finished.get(job.name)
        return info is not None and info.fingerprint == fingerprint

    def begin(self, job: Job) -> None:
        self.writer.remove(job.name)

    def add(self, job: Job, images: Images) -> None:
        self.writer.add(job.name, images.start, images.jpegs[self.key(job)])

    def finish(self, job: Job, coords_px: NDArray[np.int64], info: SlideInfo) -> None:
        self.writer.finish(job.name, coords_px, info)
        with self._progress.open("a", encoding="utf-8") as file:
            file.write(f"{job.name}\n")

    def discard(self, job: Job) -> None:
        self.writer.discard(job.name)

    def close(self) -> None:
        self.writer.close()


class FolderOutput:
    """``imgs/<slide>/<i>.jpg`` at the size that was read; a slide's folder appears when it is complete.

    Args:
        folder: ``imgs``.
        quality: of the JPEGs.
        parameters: how they are made, as in a store's header.
    """

    def __init__(self, folder: Path, quality: int, parameters: Mapping[str, Any]) -> None:
        self.folder = folder
        self.quality = quality
        self.parameters = parameters
        self._in_work: set[Path] = set()

    def key(self, job: Job) -> int:
        """The size that a worker is asked for."""
        return job.patch_size_px

    def _work_folder(self, job: Job) -> Path:
        return self.folder / f".{job.name}.{os.getpid()}.tmp"

    def _made_as(self, job: Job, fingerprint: str) -> str:
        """What a folder says of itself: the slide's fingerprint, then what a store's header says for all its slides."""
        header = StoreHeader(image_size_px=self.key(job), jpeg_quality=self.quality, parameters=self.parameters)
        return f"{fingerprint}\n{json.dumps(dataclasses.asdict(header), sort_keys=True)}\n"

    def is_done(self, job: Job, fingerprint: str) -> bool:
        try:
            made_as = (self.folder / job.name / ".fingerprint").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return False
        return made_as == self._made_as(job, fingerprint)

    def begin(self, job: Job) -> None:
        prefix = f".{job.name}."
        for old in self.folder.glob(f"{glob.escape(prefix)}*.tmp"):
            if old.name[len(prefix) : -len(".tmp")].isdigit():  # slide a.b may be at work beside slide a
                shutil.rmtree(old, ignore_errors=True)
        self._work_folder(job).mkdir(parents=True)
        self._in_work.add(self._work_folder(job))

    def add(self, job: Job, images: Images) -> None:
        for index, data in enumerate(images.jpegs[self.key(job)], images.start):
            (self._work_folder(job) / f"{index}.jpg").write_bytes(data)

    def finish(self, job: Job, coords_px: NDArray[np.int64], info: SlideInfo) -> None:
        (self._work_folder(job) / ".fingerprint").write_text(self._made_as(job, info.fingerprint), encoding="utf-8")
        shutil.rmtree(self.folder / job.name, ignore_errors=True)
        os.replace(self._work_folder(job), self.folder / job.name)
        self._in_work.discard(self._work_folder(job))

    def discard(self, job: Job) -> None:
        shutil.rmtree(self._work_folder(job), ignore_errors=True)
        self._in_work.discard(self._work_folder(job))

    def close(self) -> None:
        for folder in self._in_work:
            shutil.rmtree(folder, ignore_errors=True)


Output = StoreOutput | FolderOutput
