"""A wish to stop: signals of a scheduler or a person, turned into a flag that the loop reads between two steps."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

STOPPED_STATUS = 75
"""Exit status of a run that was asked to stop, saved, and goes on with the same command (EX_TEMPFAIL, sysexits.h)."""

FAULT_STATUS = 2
"""Exit status of a run that cannot begin or go on before the user has changed something."""

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""Kill and scancel, Ctrl-C, and what ``sbatch --signal=USR1@120`` sends before time is up."""

MARK = "ABMILX_STOPPED_MARK"
"""Environment variable with the path of a file in which processes tell the launcher how they ended."""

LAUNCHER = "ABMILX_LAUNCHER"
"""Environment variable with the number of the process that started this one."""

OTHERS_WAIT_S = 1.0
"""How long other processes leave process 0 to say what is wrong."""

RESTARTS = "ABMILX_RESTARTS"
"""Environment variable in which the launcher says how often it starts a run again whose processes die."""


class Stopped(Exception):
    """The run was asked to stop and has saved what it needs to go on."""


class StopRequest:
    """Whether somebody asked this process to stop.

    Attributes:
        by: name of the signal, or None.
    """

    def __init__(self) -> None:
        self.by: str | None = None
        self._since = 0.0

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # torchrun passes a Ctrl-C on to processes that the terminal has told already, so one within 2 s is no second.
        if self.by is not None and number == signal.SIGINT and time.monotonic() - self._since > 2:
            raise KeyboardInterrupt
        if self.by is None:
            self.by, self._since = signal.Signals(number).name, time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while the block runs; a second Ctrl-C ends the program at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def ignore_stop_signals() -> None:
    """For reading processes: a signal to the whole job must not take the data away from the step under way."""
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def leave_mark(status: int = STOPPED_STATUS) -> None:
    """Tells the launcher, where there is one, why the run ends: stopped as asked, or a fault in what was given."""
    path = os.environ.get(MARK)
    if path:
        # A full disk, a folder cleaned up: the exit status says the same.
        with contextlib.suppress(OSError), open(path, "a", encoding="ascii") as file:
            file.write(f"{status}\n")


def says_first(sentence: str) -> bool:
    """Whether this process is to say what is wrong: not where another one on this machine has said the same.

    Process 0 speaks at once, as its words go into the log file too; the others give it a moment.
    """
    path = os.environ.get(MARK)
    if not path:
        return True
    if os.environ.get("RANK", "0") != "0":
        time.sleep(OTHERS_WAIT_S)
    said = Path(f"{path}.{hashlib.sha256(sentence.encode()).hexdigest()[:16]}")
    try:
        said.touch(exist_ok=os.environ.get("RANK", "0") == "0")
    except FileExistsError:
        return False
    except OSError:  # a full disk, a folder cleaned up: better said twice than not at all
        return True
    return True
