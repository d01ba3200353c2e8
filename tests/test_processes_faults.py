"""A fault on one process ends the whole run within a minute, with its cause and a status that is not 0."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from ranks import train_with_fault
from tiny import TinyCohort, make_tiny_cohort

import main

ROOT = Path(main.__file__).parent
ENCODER = "--model=e2e_timm:test_convnext_abmilx"

CAUSES = {
    "exception": ("RuntimeError: planted", 1),
    "memory": (" error: the device ran out of memory while", 2),
    "kill": ("", -signal.SIGKILL),
}
"""Fault -> what is said, and the status of the process."""

FAILING_RANK = {"train": 1, "val": 0, "test": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=18)


def fail(kind: str) -> None:
    sys.stderr.write("the fault begins\n")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if kind == "sleep":
        time.sleep(600)
    raise RuntimeError("planted")


def give_other_input(labels: str, rank: int) -> None:
    """Process 1 is started with another learning rate and label file."""
    given = main.main
    if rank == 1:
        main.main = lambda options: given([*options, "--lr=1e-3", f"--csv_path={labels}"])


def plant(kind: str, phase: str, on_rank: int, rank: int) -> None:
    """Makes this process fail in the second training step, or after the first part of a validation or test."""
    from engine.learner import Learner
    from engine.validation import Evaluator

    if rank != on_rank:
        return
    step, watched, steps = Learner.step, Evaluator._watched, iter(range(1000))

    def failing_step(self: Learner, *arguments: Any, **options: Any) -> torch.Tensor:
        if next(steps) == 1:
            fail(kind)
        return step(self, *arguments, **options)

    def failing_parts(self: Evaluator, split: str, *arguments: Any) -> Iterator[Any]:
        for part in watched(self, split, *arguments):
            yield part
            if split == phase:
                fail(kind)

    if phase == "train":
        Learner.step = failing_step  # type: ignore[method-assign]
    else:
        Evaluator._watched = failing_parts  # type: ignore[method-assign]


@pytest.mark.parametrize("phase", ["train", "val", "test"])
@pytest.mark.parametrize("kind", list(CAUSES))
def test_a_fault_on_one_process_ends_the_other(tiny: TinyCohort, tmp_path: Path, kind: str, phase: str) -> None:
    """Also where no launcher looks after the processes: what they do together fails when one is gone."""
    options = tiny.options(ENCODER, "--batch_size=2", "--num_epoch=1", "--num_workers=1")
    failing = FAILING_RANK[phase]
    codes, said = train_with_fault(options, tmp_path, functools.partial(plant, kind, phase, failing))
    cause, status = CAUSES[kind]
    assert codes[failing] == status, said
    assert codes[1 - failing] == 1, said
    assert cause in said
    assert said.count("Traceback") == (kind == "exception"), "the other process hides the cause"


def test_processes_with_other_options_or_labels_are_refused(tiny: TinyCohort, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text(tiny.csv.read_text().replace("P00,P00-0,0,train\n", ""))
    options = tiny.options(ENCODER, "--batch_size=2", "--num_epoch=1")
    codes, said = train_with_fault(options, tmp_path, functools.partial(give_other_input, str(labels)))
    assert codes == [2, 2], said
    assert "process 1 has other values than process 0 of lr (0.0002 -> 0.001), labels and splits (" in said


def launched(command: list[str], environment: dict[str, str]) -> tuple[int, str, float]:
    """Status and words of a launch, and the seconds from the fault, or else the start of the training, to its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stderr is not None
    lines, begin = [], time.monotonic()
    for line in run.stderr:
        lines.append(line)
        begin = time.monotonic() if "instances per training bag" in line or "the fault begins" in line else begin
    return run.wait(), "".join(lines), time.monotonic() - begin


@pytest.mark.slow
def test_the_launcher_ends_a_process_that_waits_for_a_killed_one(tiny: TinyCohort, tmp_path: Path) -> None:
    """The survivor notices nothing, as one that waits for a GPU would; SIGTERM does not end it."""
    script = tmp_path / "faulty.py"
    script.write_text(
        f"import os, sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
        "import main\nfrom test_processes_faults import plant\n"
        "rank = int(os.environ['RANK'])\n"
        "plant('kill' if rank else 'sleep', 'val', rank, rank)\nsys.exit(main.main(sys.argv[1:]))\n"
    )
    options = tiny.options(ENCODER, "--batch_size=2", "--num_epoch=1", f"--output_path={tmp_path}")
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    torchrun = [sys.executable, str(ROOT / "utils/torchrun.py"), "--nnodes=1", "--nproc-per-node=2", *rendezvous]
    status, said, seconds = launched([*torchrun, str(script), *options], {})
    assert status not in (0, 75), said
    assert "Signal 9" in said
    assert seconds < 60


@pytest.mark.slow
def test_a_patch_that_one_process_cannot_read_ends_the_run_and_is_named(tiny: TinyCohort, tmp_path: Path) -> None:
    broken = tmp_path / "broken.lmdb"
    broken.write_bytes(tiny.high.read_bytes())
    with lmdb.open(str(broken), subdir=False, map_size=1 << 26) as env, env.begin(write=True) as txn:
        txn.put(b"P00-0-1", txn.get(b"P00-0-1")[:200])
    options = tiny.options(ENCODER, "--same_psize=0", "--batch_size=2", f"--dataset_root={broken}")
    command = ["bash", str(ROOT / "train_dist.sh"), "2", *options, f"--output_path={tmp_path / 'out'}"]
    status, said, seconds = launched(command, {})
    assert status not in (0, 75), said
    assert "P00-0" in said
    assert seconds < 60


# Refused at the start


def refused(call: Callable[[], int], caplog: pytest.LogCaptureFixture) -> str:
    assert call() == 2
    return caplog.text


@pytest.mark.parametrize(
    ("world", "options", "sentence"),
    [
        ("9", ["--batch_size=2"], "fold 0: the training split has 16 bags, fewer than one step takes (9 process(es) x"),
        ("3", ["--batch_size=5", "--no_drop_last", "--sync_bn"], "the last step of an epoch has 1 of 16 bags"),
        ("many", [], "processes is 'many', but must be a number of 1 or more"),
        ("0", [], "processes is '0'"),
    ],
)
def test_check_knows_the_number_of_processes(
    tiny: TinyCohort, caplog: pytest.LogCaptureFixture, world: str, options: list[str], sentence: str
) -> None:
    words = ["check", f"--processes={world}", *tiny.options(ENCODER, *options)]
    assert sentence in refused(lambda: main.main(words), caplog)


def test_check_reads_the_number_of_processes_from_the_environment(
    tiny: TinyCohort, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    survival = tiny.options(ENCODER, "--datasets=surv_t", f"--csv_path={tiny.survival_csv}", "--loss=cox")
    words = ["check", *survival, "--batch_size=1"]
    assert "batch_size 1 x 1 process)" in refused(lambda: main.main(words), caplog)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(words) == 0


def test_training_refuses_what_check_refuses(tiny: TinyCohort, caplog: pytest.LogCaptureFixture) -> None:
    assert "fewer than one step takes" in refused(lambda: main.main(tiny.options(ENCODER, "--batch_size=17")), caplog)
