"""Writing a store: readable after every finished slide, continued after a kill, growing as needed."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from datasets.store import layout, safe_pickle
from datasets.store.cut_off import check_length
from datasets.store.layout import SlideInfo, StoreHeader
from utils.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows; there LMDB files cannot be opened twice for writing anyway
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

START_MAP_BYTES = 64 << 20
# One transaction per 32 MB (some 2,500 patches of 256 px): memory stays bounded on slides of any size, and
# the cost of the flush to disk is spread over many patches.
FLUSH_BYTES = 32 << 20
# The published key list costs about 30 bytes per patch of the whole store, so it is rewritten after every
# slide only while the store is small, then each time the store has grown by a quarter, and when the writer
# closes: linear in all.
SMALL_KEY_LIST = 50_000
KEY_LIST_GROWTH = 1.25


class StoreWriter:
    """Writes slides into one LMDB file.

    After every finished slide the file is a valid store. A run that is killed loses the slides in work; the
    next writer removes what was left of them. Several slides may be in work at once (``add`` and ``finish``);
    ``put_slide`` does one in one go. Use as a context manager: leaving it completes the key list.

    Args:
        path: the LMDB file; made if absent, continued if it was made with an equal header.
        header: how the patches are made.
        map_bytes: first size of the memory map (address space, not disk); doubled whenever it is full.

    Raises:
        UserError: the file is in use by another writer, is cut off, was made with another header or by another
            program, or the disk is full (finished slides stay intact).
    """

    def __init__(self, path: str | Path, header: StoreHeader, map_bytes: int = START_MAP_BYTES) -> None:
        self.path = Path(path)
        self.header = header
        self.finished: dict[str, SlideInfo] = {}
        self._counts: dict[str, int] = {}
        self._in_work: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._sums: dict[str, dict[int, int]] = {}
        self._buffer: list[tuple[bytes, bytes]] = []
        self._buffer_bytes = 0
        self._listed = 0
        self._keys_lag = False
        self._failed = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path)
        try:
            self._env = self._open(map_bytes)
            self._begin(header)
        except BaseException:  # Ctrl-C must not leave the store locked either; raised again
            self._lock.close()
            raise

    def _open(self, map_bytes: int) -> Any:
        size = max(map_bytes, 2 * self.path.stat().st_size)
        try:
            # Exclusion is by our own lock, so no <name>-lock file is left beside the store.
            env = lmdb.open(str(self.path), subdir=False, map_size=size, lock=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise UserError(
                f"{self.path}: cannot be opened for writing: {error}. Close its readers in this program, "
                "or give another name if it is not an LMDB file."
            ) from error
        check_length(self.path, env)
        return env

    def _begin(self, header: StoreHeader) -> None:
        with self._env.begin() as txn:
            known, value, left = txn.stat()["entries"], txn.get(layout.HEADER), txn.get(layout.PENDING)
            old = None if value is None else layout.load_header(value)
            if known and old is None:
                raise UserError(
                    f"{self.path}: exists and was not written by this program (it has no header). Give another name."
                )
            if old is not None:
                self._continue(txn, old)
        if old is None:
            self._relist({}, {}, lambda txn: txn.put(layout.HEADER, layout.dump_record(header)))
        elif self.header != old:
            self._commit(lambda txn: txn.put(layout.HEADER, layout.dump_record(self.header)))
        for slide, count in json.loads(left or b"{}").items():
            log.info("%s: removing what a stopped run left of slide %s", self.path, slide)
            self._in_work[slide] = int(count)
            self.discard(slide)
        self._complete_keys()

    def _continue(self, txn: Any, old: StoreHeader) -> None:
        differences = self.header.differences(old)
        if differences:
            raise UserError(
                f"{self.path}: was made with other settings ({'; '.join(differences)}). "
                "Give another name, or the settings it was made with."
            )
        self.header = old.merged(self.header)
        counts = safe_pickle.load_counts(txn.get(layout.COUNTS))
        self._counts = {slide: counts[slide] for slide in safe_pickle.load_names(txn.get(layout.SLIDES))}
        for slide, count in self._counts.items():
            info = txn.get(layout.info_key(slide))
            self.finished[slide] = layout.load_info(info) if info else SlideInfo(count=count)
        listed = txn.get(layout.LISTED)
        self._listed = int(listed) if listed else 0
        # Stores of before 2026-11-23 keep the number while the list lags behind.
        self._keys_lag = self._listed != sum(self._counts.values()) or not listed

    def _relist(self, counts: dict[str, int], in_work: dict[str, int], work: Callable[[Any], None]) -> None:
        """Does ``work`` and changes the lists in one transaction; this object follows when that went through.

        Args:
            counts: patches per finished slide from then on.
            in_work: slides in work from then on.
            work: what else the transaction does.
        """
        total = sum(counts.values())
        keys_too = total <= SMALL_KEY_LIST or total >= KEY_LIST_GROWTH * self._listed

        def all_of_it(txn: Any) -> None:
            work(txn)
            txn.put(layout.COUNTS, pickle.dumps(counts, protocol=4))
            txn.put(layout.SLIDES, pickle.dumps(list(counts), protocol=4))
            txn.put(layout.LEN, pickle.dumps(total, protocol=4))
            _put_pending(txn, in_work)
            if keys_too:
                _put_keys(txn, counts)
            else:  # counts can change and their sum stay
                txn.delete(layout.LISTED)

        before = self._env.info()["last_txnid"]
        try:
            self._commit(all_of_it)
        finally:
            # Ctrl-C comes out of a commit mostly when that is through, so the file says whether it is.
            if self._env.info()["last_txnid"] != before:
                self._counts, self._in_work = counts, in_work
                self._listed, self._keys_lag = (total, False) if keys_too else (self._listed, True)

    def _complete_keys(self) -> None:
        if self._keys_lag:
            self._commit(lambda txn: _put_keys(txn, self._counts))
            self._listed, self._keys_lag = sum(self._counts.values()), False

    def _commit(self, work: Callable[[Any], None]) -> None:
        """Runs ``work`` in one transaction, all of it or nothing; doubles the map when it is full."""
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    work(txn)
                return
            except lmdb.MapFullError:
                size = 2 * self._env.info()["map_size"]
                log.debug("%s: growing the map to %d MB", self.path, size >> 20)
                self._env.set_mapsize(size)
            except (lmdb.Error, OSError) as error:
                self._failed = True
                raise UserError(
                    f"{self.path}: writing failed ({error}). Is the disk or the quota full? The "
                    f"{len(self.finished)} finished slides are intact; make room and run the same "
                    "command again to continue."
                ) from error

    def put_slide(
        self,
        slide: str,
        jpegs: Iterable[bytes],
        coords: NDArray[np.int64] | None = None,
        info: SlideInfo | None = None,
    ) -> None:
        """Writes a slide, atomically: it is listed when all of it is written. A slide of the same name is
        replaced.

        Args:
            slide: name, without extension.
            jpegs: the patches in order; may be a generator.
            coords: (N, 2) level-0 px of the upper left corners (x, y).
            info: what to record about the slide; its ``count`` is filled in.
        """
        self.remove(slide)
        try:
            for index, jpeg in enumerate(jpegs):
                self.add(slide, index, [jpeg])
            self.finish(slide, coords, info)
        except BaseException:  # nor leave half a slide; raised again
            if not self._failed:
                self.discard(slide)
            raise

    def add(self, slide: str, start: int, jpegs: Iterable[bytes]) -> None:
        """Adds patches ``start``, ``start + 1``, ... of a slide in work; each once, blocks in any order."""
        if slide in self._counts:
            raise UserError(f"{self.path}: slide {slide!r} is finished; remove it before writing it again.")
        if slide not in self._in_work:
            layout.check_name(slide)
            self._in_work[slide] = self._written[slide] = 0
            self._sums[slide] = {}
        end = start
        for index, jpeg in enumerate(jpegs, start):
            end = index + 1
            value = safe_pickle.pack_bytes(jpeg)
            self._buffer.append((layout.patch_key(slide, index), value))
            self._buffer_bytes += len(value)
            self._written[slide] += 1
            self._sums[slide][index] = layout.checksum(jpeg)
        self._in_work[slide] = max(self._in_work[slide], end)
        if self._buffer_bytes >= FLUSH_BYTES:
            self._commit(self._put_buffer)
            self._empty_buffer()

    def _put_buffer(self, txn: Any) -> None:
        for key, value in self._buffer:
            txn.put(key, value)
        _put_pending(txn, self._in_work)

    def _empty_buffer(self) -> None:
        self._buffer, self._buffer_bytes = [], 0

    def finish(self, slide: str, coords: NDArray[np.int64] | None = None, info: SlideInfo | None = None) -> None:
        """Lists a slide whose patches were all added: one transaction, after which readers see it."""
        count = self._in_work.get(slide, 0)
        written = self._written.get(slide, 0)
        if written != count or (coords is not None and len(coords) != count):
            wanted = count if coords is None else len(coords)
            raise UserError(f"{self.path}: slide {slide!r} has {written} of {wanted} patches; it cannot be finished.")
        layout.check_name(slide)
        record = SlideInfo(**{**(info or SlideInfo()).__dict__, "count": count})
        sums = self._sums.get(slide, {})

        def work(txn: Any) -> None:
            self._put_buffer(txn)
            txn.put(layout.info_key(slide), layout.dump_record(record))
            txn.put(layout.sums_key(slide), np.array([sums[i] for i in range(count)], dtype="<u4").tobytes())
            if coords is not None:
                txn.put(layout.coords_key(slide), _coords_bytes(coords))

        try:
            self._relist({**self._counts, slide: count}, _without(self._in_work, slide), work)
        finally:
            if slide in self._counts:
                self._empty_buffer()
                self._written.pop(slide, None)
                self._sums.pop(slide, None)
                self.finished[slide] = record

    def holds(
        self,
        slide: str,
        count: int,
        fingerprint: str,
        coords: NDArray[np.int64] | None,
        sums: NDArray[np.uint32] | None,
    ) -> bool:
        """Whether a finished slide has these patches; checksums are compared where both are known."""
        record = self.finished.get(slide)
        if record is None or (record.count, record.fingerprint) != (count, fingerprint):
            return False
        with self._env.begin() as txn:
            places, written = txn.get(layout.coords_key(slide)), txn.get(layout.sums_key(slide))
        same = sums is None or written is None or written == sums.astype("<u4").tobytes()
        return same and places == (None if coords is None else _coords_bytes(coords))

    def discard(self, slide: str) -> None:
        """Drops a slide in work: what was written of it is deleted."""
        count = self._in_work.get(slide)
        self._written.pop(slide, None)
        self._sums.pop(slide, None)
        if count is None:
            return
        in_work = _without(self._in_work, slide)
        stems = {layout.patch_key(slide, index) for index in range(count)}
        kept = [(key, value) for key, value in self._buffer if key not in stems]
        self._buffer, self._buffer_bytes = kept, sum(len(value) for _, value in kept)

        def work(txn: Any) -> None:
            for key in stems:
                txn.delete(key)
            _put_pending(txn, in_work)

        self._commit(work)
        self._in_work = in_work

    def remove(self, slide: str) -> None:
        """Removes a slide, finished or in work; does nothing where there is none."""
        self.discard(slide)
        count = self._counts.get(slide)
        if count is None:
            return

        def work(txn: Any) -> None:
            txn.delete(layout.info_key(slide))
            txn.delete(layout.sums_key(slide))
            txn.delete(layout.coords_key(slide))

        try:
            # Unlisted in the same transaction as it becomes pending, so that a kill between the two steps leaves
            # no orphan.
            self._relist(_without(self._counts, slide), {**self._in_work, slide: count}, work)
        finally:
            if slide not in self._counts:
                self.finished.pop(slide, None)
        self.discard(slide)

    def close(self) -> None:
        """Completes the key list and releases the file; slides in work are dropped."""
        try:
            if not self._failed:
                for slide in list(self._in_work):
                    self.discard(slide)
                self._complete_keys()
        finally:
            self._env.close()
            self._lock.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The error under way says more than one from closing after it.
        with contextlib.suppress(UserError):
            self.close()


def _coords_bytes(coords: NDArray[np.int64]) -> bytes:
    return np.ascontiguousarray(coords, dtype="<i8").tobytes()


def _put_keys(txn: Any, counts: dict[str, int]) -> None:
    txn.put(layout.KEYS, layout.pickle_keys(counts.items()))
    txn.put(layout.LISTED, b"%d" % sum(counts.values()))


def _put_pending(txn: Any, in_work: dict[str, int]) -> None:
    txn.put(layout.PENDING, json.dumps(in_work).encode())


def _without(slides: dict[str, int], slide: str) -> dict[str, int]:
    return {name: count for name, count in slides.items() if name != slide}


def _take_lock(path: Path) -> IO[bytes]:
    """Opens the file and holds it for one writer; the lock ends with the process, even a killed one."""
    try:
        handle = open(path, "ab")  # noqa: SIM115 - held until close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}.") from error
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise UserError(f"{path}: another process is writing to it. Wait for it, or give another name.") from error
        except OSError as error:
            log.warning("%s: the file system has no locks (%s); let only one process write here", path, error.strerror)
    return handle
