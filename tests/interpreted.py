"""Runs a test file's ``main`` in Triton's interpreter, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.triton_version import require_triton

HERE = Path(__file__).parent


def run_interpreted(file: str) -> None:
    """Runs ``file`` as a program of its own, because Triton reads the variable when a kernel is defined."""
    try:
        require_triton()
    except ImportError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, file],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def mend_interpreter() -> None:
    """Triton's interpreter turns one-element arrays into integers in a way that NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):  # type: ignore[no-untyped-def]
        patch(tensor, *scope)
        put = scope[0].set_attr if scope else setattr  # Triton before 3.6 has no scopes
        put(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
