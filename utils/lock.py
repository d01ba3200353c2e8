"""One program at a time in a folder: a lock that ends with its process, whatever ends that."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NAME = ".lock"
"""The file in the folder. Nobody removes it: another program may have locked it in the meantime."""

WAIT_S = 10.0
"""How long a program waits for the one before it, which a restart or a scheduler has killed a moment ago."""


class FolderLock:
    """Holds a folder until ``close()`` or the end of the process.

    It is a record lock of POSIX: unlike one of flock it is not inherited, so reading processes that outlive a killed
    run do not hold it. It would end if anything else in this process opened and closed the file.

    Raises:
        UserError: when another process holds the folder and still does some seconds later.
        OSError: when the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115 - held until close()
        try:
            self._wait()
            self._file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
            self._file.flush()
        except BaseException:  # raised again
            self.close()
            raise

    def _wait(self) -> None:
        begin = time.monotonic()
        while not self._taken():
            if time.monotonic() - begin >= WAIT_S:
                self._file.seek(0)
                owner = self._file.read() or "another process"
                raise UserError(
                    f"{self.folder} is in use by {owner}: wait until it has ended, or give another --title."
                )
            time.sleep(0.1)

    def _taken(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # what it raises where the lock is held depends on the system
            return False
        except OSError as error:
            log.warning(
                "%s: the file system has no locks (%s); let only one run write here", self.folder, error.strerror
            )
        return True

    def close(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk closing writes once more what could not be written
            self._file.close()
