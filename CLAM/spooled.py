"""Large PNG, JPEG and WebP files: decoded once into a nameless temporary file, in little memory.

OpenCV decodes into an array that is a memory map of that file. The decoders of PNG, baseline JPEG and lossy WebP
work row by row, so what they have written can leave memory while they go on: a thread unmaps it every few
milliseconds. The file has no name, so nothing is left behind whatever happens to the process.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from pixel_rows import Layout, PixelRows

from utils.errors import UserError

UNMAP_EVERY_S = 0.01
"""Decoders write up to 500 MB/s: 5 MB between two calls."""

SPARE_BYTES = 100_000_000
"""Left free on the disk for everybody else."""


def spool(path: Path, size_px: tuple[int, int], alpha: bool) -> PixelRows:
    """The pixels of an image file, decoded into a temporary file.

    Args:
        path: PNG, JPEG or WebP, 8 bits a sample.
        size_px: (width, height).
        alpha: whether some pixels may be transparent.

    Raises:
        UserError: the temporary folder has no room.
        OSError: the image is damaged.
    """
    layout = Layout(*size_px, "BGRA" if alpha else "BGR")
    size = layout.row_bytes * layout.height
    descriptor = temporary_room(path, size)
    with mmap.mmap(descriptor, size) as memory:
        fault = _decode(path, memory, layout)
    if fault:
        os.close(descriptor)
        raise OSError(fault)
    return PixelRows(descriptor, layout)


def temporary_room(path: Path, size: int) -> int:
    """A nameless file of ``size`` bytes in the temporary folder, for the pixels of ``path``; its descriptor.

    Raises:
        UserError: the folder has no room.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    remedy = "Free some, or set the environment variable TMPDIR to a folder on a larger disk."
    needed = f"{path}: decoding it takes {size / 1e9:.1f} GB of temporary disk space in {folder}"
    if size + SPARE_BYTES > free:
        raise UserError(f"{needed}, where {free / 1e9:.1f} GB are free. {remedy}")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _allocate(file.fileno(), size)
            return os.dup(file.fileno())
    except OSError as error:
        raise UserError(f"{needed}, which fails: {error.strerror}. {remedy}") from error


def _allocate(descriptor: int, size: int) -> None:
    """Takes the space now: a map of a file with holes kills the process when the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _decode(path: Path, memory: mmap.mmap, layout: Layout) -> str:
    """Decodes into ``memory``; says what is wrong, for an exception would keep the memory in use."""
    flags = cv2.IMREAD_UNCHANGED if layout.order == "BGRA" else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = np.frombuffer(memory, np.uint8).reshape(layout.height, layout.width, len(layout.order))
    try:
        with _unmapping(memory):
            decoded = cv2.imread(str(path), image, flags)
    except cv2.error as error:
        return f"OpenCV says: {error.err or error}"
    if decoded is None:
        return "its data are damaged or incomplete"
    return "" if decoded is image else f"it decodes to an array {decoded.shape} and not {image.shape}"


@contextmanager
def _unmapping(memory: mmap.mmap) -> Iterator[None]:
    """Takes written pages out of this process's memory now and then; they stay in the file."""
    if not hasattr(memory, "madvise"):
        yield
        return
    done = threading.Event()

    def work() -> None:
        while not done.wait(UNMAP_EVERY_S):
            memory.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
