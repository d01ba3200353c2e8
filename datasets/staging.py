"""Copies of stores and feature folders on a local disk, made once per machine and used by every run there.

A copy lies in ``<folder>/<name>-<hash>``, where the hash is of the path, size, time of change and fingerprint of what
was copied: another content is another copy, so nothing that a run reads is ever replaced. Files are copied under
another name and renamed, so one that is there is whole. Nothing is removed: that is the user's to do.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.errors import UserError
from utils.files import atomic_path, free_bytes
from utils.log import duration

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
FLUSH_BYTES = 64 << 20
REPORT_S = 10.0
LOCK = ".abmilx-staging.lock"
GIB = 2**30


@dataclass(frozen=True)
class Item:
    """One file of a copy.

    Attributes:
        source: what is copied.
        name: its path inside of the copy.
        used: how many of its first bytes hold data.
        version: its size in bytes and time of change in ns.
    """

    source: Path
    name: str
    used: int
    version: tuple[int, int]


@dataclass(frozen=True)
class Copy:
    """What is copied, and to where.

    Attributes:
        root: the store or feature folder, as given.
        folder: where its files go.
        target: what to open in its place.
        items: its files.
    """

    root: str
    folder: Path
    target: Path
    items: tuple[Item, ...]

    def missing(self) -> list[Item]:
        """Files that are not there yet."""
        return [item for item in self.items if not _has(self.folder / item.name, item.used)]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(item.used for item in self.items)


def plan_copy(given: str, files: Iterable[tuple[Path, int]], fingerprint: str, folder: Path) -> Copy:
    """Where the files of a store or feature folder will lie under ``folder``; nothing is written.

    Args:
        given: path of a file, or of a folder of files.
        files: the file, or paths in the folder, each with how many of its first bytes hold data.
        fingerprint: id of the content, besides sizes and times.
        folder: the folder for copies.
    """
    root = Path(given)
    whole = root.resolve()
    digest = hashlib.sha256(f"{whole}\0{fingerprint}".encode())
    items = []
    for path, used in files:
        name = path.name if root.is_file() else path.relative_to(root).as_posix()
        items.append(Item(path, name, used, _version(path)))
        digest.update(f"\0{name}\0{items[-1].version}\0{used}".encode())
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", whole.stem)[:80]
    place = folder / f"{plain}-{digest.hexdigest()[:16]}"
    return Copy(given, place, place / root.name if root.is_file() else place, tuple(items))


def needed_bytes(copies: Iterable[Copy], folder: Path) -> int:
    """Bytes that have to be copied still.

    Raises:
        UserError: when the disk has less room.
    """
    needed = sum(item.used for copy in copies for item in copy.missing())
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"--stage_to={folder}: {needed / GIB:.2f} GiB are to be copied there, and {free / GIB:.2f} GiB are free. "
            "Remove copies that no run needs any more (nothing else removes them), give a larger disk, or leave "
            "--stage_to out."
        )
    return needed


class Stager:
    """Makes copies, a little at a time; one process per machine does it.

    Args:
        copies: what is to be there.
        folder: the folder for copies; made when missing.
    """

    def __init__(self, copies: Iterable[Copy], folder: Path) -> None:
        self._copies, self._folder = list(copies), folder
        self._work = self._steps()
        log.setLevel(logging.INFO)  # this process may be the speaker of its machine without being rank 0

    def advance(self, seconds: float) -> bool:
        """Works for about so long; returns whether everything is there.

        Raises:
            UserError: too little room, a folder that cannot be written to or belongs to someone else, a failed copy.
        """
        end = time.monotonic() + seconds
        while next(self._work, None) is not None:
            if time.monotonic() >= end:
                return False
        return True

    def close(self) -> None:
        """Gives up; a half-copied file is removed."""
        self._work.close()

    def _steps(self) -> Generator[str, None, None]:
        total = sum(copy.size for copy in self._copies)
        for copy in self._copies:
            _check_owner(copy.folder)
        if any(copy.missing() for copy in self._copies):
            _make_folder(self._folder)
            with _opened(self._folder / LOCK) as lock:
                yield from self._take(lock)
                yield from self._copy_missing()
        log.info(
            "%.2f GiB are read from the copies in %s. Remove them when no run needs them.", total / GIB, self._folder
        )

    def _take(self, lock: IO[bytes]) -> Iterator[str]:
        told = False
        while not _locked(lock, self._folder):
            if not told:
                log.info("another run copies into %s; waiting for it.", self._folder)
            told = True
            time.sleep(0.2)
            yield "waiting"

    def _copy_missing(self) -> Iterator[str]:
        progress = _Progress(needed_bytes(self._copies, self._folder), str(self._folder))
        for copy in self._copies:
            for item in copy.missing():
                _make_folder(copy.folder)
                _check_owner(copy.folder)
                target = copy.folder / item.name
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    for count in _copy_file(item, target):
                        progress.add(count)
                        yield "copied"
                except OSError as error:
                    raise UserError(
                        f"{item.source} could not be copied to {target}: {error.strerror}. Make room, give another "
                        "folder, or leave --stage_to out."
                    ) from error
        progress.finish()


class _Progress:
    """Bytes, speed and time that is left, a line every ten seconds."""

    def __init__(self, total: int, folder: str) -> None:
        self._total, self._folder, self._done = total, folder, 0
        self._begin = self._told = time.monotonic()
        log.info("staging: %.2f GiB to copy to %s", total / GIB, folder)

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told >= REPORT_S:
            self._told = now
            rate = self._done / (now - self._begin)
            log.info(
                "staging: %.2f of %.2f GiB (%.0f %%), %.0f MB/s, eta %s",
                self._done / GIB,
                self._total / GIB,
                100 * self._done / max(self._total, 1),
                rate / 1e6,
                duration((self._total - self._done) / max(rate, 1)),
            )

    def finish(self) -> None:
        seconds = time.monotonic() - self._begin
        log.info(
            "staging: %.2f GiB copied in %s, %.0f MB/s", self._done / GIB, duration(seconds), self._done / seconds / 1e6
        )


def _copy_file(item: Item, target: Path) -> Iterator[int]:
    """Copies the used bytes, holes left out; yields how many bytes each chunk moved on by."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):  # of a run that was killed
        left.unlink()
    with atomic_path(target) as temporary:
        with item.source.open("rb", buffering=0) as source, temporary.open("xb", buffering=0) as copy:
            position = flushed = 0
            for start, end in _extents(source.fileno(), item.used):
                yield start - position
                position = start
                source.seek(start)
                copy.seek(start)
                while position < end:
                    data = source.read(min(CHUNK_BYTES, end - position))
                    if not data:
                        raise OSError(errno.EIO, "the file became shorter while it was copied")
                    _write(copy, data)
                    position += len(data)
                    if position - flushed >= FLUSH_BYTES:
                        flushed = _let_go(source, copy, position)
                    yield len(data)
            yield item.used - position
            copy.truncate(item.used)
            _let_go(source, copy, item.used)
        if _version(item.source) != item.version:
            raise OSError(errno.EIO, "the file changed while it was copied")


def _version(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def _write(copy: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[copy.write(view) :]


def _extents(file: int, used: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what holds data, up to ``used``; everything where the file system does not know holes."""
    position = 0
    while position < used:
        try:
            start = os.lseek(file, position, os.SEEK_DATA)
            end = os.lseek(file, start, os.SEEK_HOLE)
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) != errno.ENXIO:  # that is: from here on there is nothing but a hole
                yield position, used
            return
        if start >= used:
            return
        yield start, min(end, used)
        position = end


def _let_go(source: IO[bytes], copy: IO[bytes], position: int) -> int:
    """Waits until the copy is on the disk, and keeps neither file in the page cache: what is read will be."""
    os.fsync(copy.fileno())
    if hasattr(os, "posix_fadvise"):
        for file in (source, copy):
            os.posix_fadvise(file.fileno(), 0, position, os.POSIX_FADV_DONTNEED)
    return position


def _has(path: Path, size: int) -> bool:
    try:
        facts = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_size == size


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--stage_to={folder}: cannot be made: {error.strerror}. Give another folder.") from error


def _check_owner(folder: Path) -> None:
    """Refuses a link, and a folder that another user made: it could hold anything."""
    try:
        facts = folder.lstat()
    except OSError:  # not there, or about to be reported when it is made
        return
    if not stat.S_ISDIR(facts.st_mode) or (hasattr(os, "getuid") and facts.st_uid != os.getuid()):
        raise UserError(f"{folder} belongs to another user, or is a link. Give --stage_to a folder of your own.")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("ab")
    except OSError as error:
        raise UserError(
            f"--stage_to={path.parent}: cannot be written to ({error.strerror}). Give a folder of your own."
        ) from error
    with file:
        yield file


def _locked(lock: IO[bytes], folder: Path) -> bool:
    """Takes the lock if it is free; it ends with the process, even a killed one."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"--stage_to={folder}: the file system has no locks ({error.strerror}). Give a folder on a local disk."
        ) from error
    return True
