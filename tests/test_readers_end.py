"""After an error that nobody expected, the reading processes end with the program, and the program ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny import make_tiny_cohort

import main

ROOT = Path(main.__file__).parent

FAULTY = """
import sys
import main
from engine.learner import Learner

def step(*words, **options):
    raise RuntimeError("a fault of the program")

Learner.step = step
main.main(sys.argv[1:])
"""


def test_a_fault_of_the_program_ends_it_in_spite_of_readers_that_wait_for_a_free_buffer(tmp_path: Path) -> None:
    tiny = make_tiny_cohort(tmp_path, patients=12)
    options = tiny.options("--model=e2e_timm:test_resnet_abmilx", "--num_workers=2", "--batch_size=2")
    done = subprocess.run(
        [sys.executable, "-c", FAULTY, *options, f"--output_path={tmp_path / 'out'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "RuntimeError: a fault of the program" in done.stderr
