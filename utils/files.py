"""Files that are either whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.errors import UserError

DAMAGED = (
    RuntimeError, OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, AssertionError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip
"""What torch.load raises on files that are damaged, hostile or something else."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk, an exhausted quota and a limit on file sizes answer."""

MAKE_ROOM = "What was saved before is whole: make room, and the same command goes on from there."


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; renames it to ``path`` when the block succeeds.

    When the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_file_name(name: str) -> bool:
    """Whether ``name`` is a file or folder directly below another, so that nothing outside is written or removed."""
    return name not in ("", ".", "..") and not any(sign in name for sign in "/\\\0")


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turns what the disk refuses while the block runs into a sentence.

    Raises:
        UserError: with the path, the reason, the free room where that may be the reason, and ``remedy``.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer answers a full disk with an error of its own, behind which the disk's is found
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        free = f"; {free_bytes(path):,} bytes are free there" if cause.errno in FULL else ""
        raise UserError(f"{path} cannot be written ({cause.strerror or cause}{free}). {remedy}") from error


def free_bytes(path: Path) -> int:
    """Room on the disk of ``path``, which need not be there yet."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def unreadable(path: Path, error: BaseException, remedy: str) -> UserError:
    """What to say of a file that torch.load refused (``DAMAGED``); torch's own words advise to read it unsafely."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # torch seeks where a cut file ends
        return UserError(f"{path} cannot be read ({error.strerror}).")
    if any(words in str(error).lower() for words in ("unsupported global", "unsupported class")):
        return UserError(f"{path} holds more than plain data, and reading that would run what it says: {remedy}.")
    return UserError(f"{path} is damaged or something else ({path.stat().st_size:,} bytes): {remedy}.")


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` so that a reader sees the old file or the new one, never half of it.

    What UTF-8 cannot hold (other bytes in file names) is escaped, so that a report on such a file can be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically; NaN becomes null."""
    write_text(path, json.dumps(json_safe(value), indent=2, allow_nan=False) + "\n")


def json_safe(value: Any) -> Any:
    """``value`` with NaN and infinities replaced by None, so that every JSON reader takes it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    return value
