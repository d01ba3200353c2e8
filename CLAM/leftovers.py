"""Half-written files that a killed run left: they have temporary names, so nothing reads them, and are removed here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.tmp")
"""The names of utils.files.atomic_path."""


def remove_leftovers(folder: Path, names: Iterable[str]) -> list[str]:
    """Removes temporary files of the given files, unless a running process of this machine is writing them.

    Args:
        folder: where they lie; it may be missing.
        names: the files that this run writes there; what belongs to other shards is left alone.

    Returns:
        The names of what was removed.
    """
    wanted = set(names)
    removed = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = TEMPORARY.fullmatch(path.name)
        if match and match["name"] in wanted and not _is_other_process(int(match["process"])):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _is_other_process(number: int) -> bool:
    """Whether a process of this number runs, apart from this one (which has written nothing yet)."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return not _is_zombie(number)


def _is_zombie(number: int) -> bool:
    """Whether a process has ended and its parent has not asked how; Linux says so."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
