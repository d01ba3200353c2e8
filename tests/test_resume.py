"""Runs that are killed or asked to stop at any moment end with the numbers of an unbroken run."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import ROOT, Job
from tiny import TinyCohort, make_tiny_cohort

import main

SLOW_ENOUGH = ["--model=e2e_timm:test_resnet_abmilx", "--num_epoch=3", "--batch_size=2", "--save_every_min=1e-9"]
TIMING = ("train_seconds", "patches_per_s", "data_wait")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"))


def options(tiny: TinyCohort, out: Path, *extra: str) -> list[str]:
    return tiny.options(*SLOW_ENOUGH, f"--output_path={out}", *extra)


def folder(out: Path) -> Path:
    return out / "default" / "default"


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def equal(one: Any, other: Any) -> bool:
    """Equality to the bit of nested dictionaries, lists and tensors."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other or (one != one and other != other))


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    names = sorted(p.name for p in folder(one).iterdir())
    assert sorted(p.name for p in folder(other).iterdir()) == names
    for name in names:
        if name.endswith(".pt"):
            contents = [torch.load(folder(p) / name, weights_only=True) for p in (one, other)]
            for content in contents:
                content.pop("config")  # names the folder
            assert equal(*contents), name
        if name.endswith(".csv"):
            assert (folder(one) / name).read_text() == (folder(other) / name).read_text()
    folds = [json.loads((folder(p) / "results.json").read_text())["folds"] for p in (one, other)]
    assert folds[0] == folds[1]


def log_of(out: Path) -> str:
    return (folder(out) / "log.txt").read_text()


def kill_until_done(out: Path, arguments: list[str], world: int = 1, most: int = 10, seed: int = 0) -> int:
    """Starts a run again and again, killed at random moments; returns how often it was killed."""
    rng = random.Random(seed)
    for killed in range(most):
        job = Job(arguments, world)
        if job.follow_saves(folder(out), rng.randint(3, 12)):
            time.sleep(rng.uniform(0, 0.04))
            job.send(signal.SIGKILL)
        if job.wait() == [0] * world:
            return killed
    raise AssertionError(f"the run did not finish in {most} attempts")


def test_folds_with_ema_and_accumulation_killed_at_random(tiny: TinyCohort, tmp_path: Path) -> None:
    extra = ["--cv_fold=2", "--random_fold", "--test_type=both_ema", "--mm=0.9", "--accumulation_steps=3"]
    extra += ["--clip_grad=1", "--encoder_lr=1e-4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert Job(options(tiny, whole, *extra)).wait() == [0]
    assert kill_until_done(killed, options(tiny, killed, *extra)) >= 2
    assert_same_run(whole, killed)
    assert "after step" in log_of(killed)
    assert "fold 1/2: all 3 epochs are trained already" in log_of(killed)


def test_two_processes_killed_at_random(tiny: TinyCohort, tmp_path: Path) -> None:
    extra = ["--test_type=both", "--mm=0.9", "--accumulation_steps=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert Job(options(tiny, whole, *extra), world=2).wait() == [0, 0]
    assert kill_until_done(killed, options(tiny, killed, *extra), world=2, seed=3) >= 1
    assert_same_run(whole, killed)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_asked_to_stop_saves_its_step_and_answers_75(
    tiny: TinyCohort, tmp_path: Path, world: int, by: signal.Signals
) -> None:
    workers = "--num_workers=1" if by == signal.SIGTERM and world == 1 else "--num_workers=0"
    job = Job(options(tiny, tmp_path, "--save_every_min=0", "--num_epoch=400", workers), world)
    assert job.follow_saves(folder(tmp_path), 1)
    time.sleep(0.03)
    job.send(by)
    assert job.wait() == [75] * world
    state = torch.load(folder(tmp_path) / "fold_0_last.pt", weights_only=True)
    assert state["progress"]["epoch"] >= 1
    assert f"{by.name}: saved after" in log_of(tmp_path)


def test_a_stopped_run_that_began_anew_goes_on_without_old_folds(tiny: TinyCohort, tmp_path: Path) -> None:
    arguments = options(tiny, tmp_path, "--cv_fold=2", "--random_fold", "--num_epoch=1")
    assert Job(arguments).wait() == [0]
    old = (folder(tmp_path) / "fold_1_last.pt").read_bytes()
    first = folder(tmp_path) / "fold_0_last.pt"
    first.unlink()
    job = Job([*arguments, "--resume=never"])
    while not first.exists():
        assert job.processes[0].is_alive()
        time.sleep(0.01)
    job.send(signal.SIGKILL)
    job.wait()
    behind = folder(tmp_path) / "fold_1_last.pt"
    assert not behind.exists() or behind.read_bytes() != old


def test_a_kill_between_state_and_best_weights_is_repaired(tiny: TinyCohort, tmp_path: Path) -> None:
    arguments = options(tiny, tmp_path, "--num_epoch=1")
    assert Job(arguments).wait() == [0]
    best = folder(tmp_path) / "fold_0_model_best.pt"
    before = torch.load(best, weights_only=True)
    best.unlink()
    (folder(tmp_path) / ".fold_0_last.pt.1.tmp").write_bytes(b"half")
    assert Job(arguments).wait() == [0]
    assert equal(torch.load(best, weights_only=True), before)
    assert [p.name for p in folder(tmp_path).glob(".*")] == [".lock"]


@pytest.mark.parametrize(("content", "size"), [("cut", "20,000"), ("garbage", "1,000"), ("empty", "0")])
def test_a_damaged_state_is_a_sentence(
    tiny: TinyCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, size: str
) -> None:
    path = folder(tmp_path) / "fold_0_last.pt"
    path.parent.mkdir(parents=True)
    torch.save({"model": torch.zeros(10_000)}, path)
    path.write_bytes({"cut": path.read_bytes()[:20_000], "garbage": b"garbage-\n" * 111 + b"!", "empty": b""}[content])
    assert main.main(options(tiny, tmp_path)) == 2
    assert f"{path} is damaged or something else ({size} bytes): remove it to start this fold anew." in caplog.text
    assert "weights_only" not in caplog.text


def test_other_data_or_another_number_of_processes_is_refused(tiny: TinyCohort, tmp_path: Path) -> None:
    arguments = options(tiny, tmp_path, "--num_epoch=400")
    job = Job(arguments)
    assert job.follow_saves(folder(tmp_path), 3)
    job.send(signal.SIGTERM)
    assert job.wait() == [75]
    assert Job(arguments, world=2).wait() == [2, 2]
    assert "in the middle of an epoch by 1 process(es), and there are 2 now" in log_of(tmp_path)
    assert Job([*arguments, f"--dataset_root={tiny.low}"]).wait() == [2]
    assert "was trained on other stores" in log_of(tmp_path)


def test_another_number_of_processes_goes_on_with_as_many_bags_per_step(tiny: TinyCohort, tmp_path: Path) -> None:
    arguments = options(tiny, tmp_path)
    assert Job([*arguments, "--num_epoch=2"]).wait() == [0]
    assert Job([*arguments, "--num_epoch=2"], world=2).wait() == [2, 2]
    assert "was trained with 2 bags per step (1 x batch_size 2), and 2 process(es) with batch_size 2 take 4" in log_of(
        tmp_path
    )
    assert "Give --batch_size=1" in log_of(tmp_path)
    assert Job([*arguments, "--num_epoch=2", "--batch_size=1"], world=2).wait() == [0, 0]


def test_a_refused_run_leaves_what_the_folder_says_of_itself(tiny: TinyCohort, tmp_path: Path) -> None:
    arguments = options(tiny, tmp_path, "--num_epoch=1")
    assert Job(arguments).wait() == [0]
    before = {p.name: p.read_bytes() for p in folder(tmp_path).iterdir() if p.name not in ("log.txt", ".lock")}
    for other in (["--n_heads=4"], ["--input_dim=7"], ["--input_dim=7", "--resume=never"]):
        assert Job([*arguments, *other]).wait() == [2]
    after = {p.name: p.read_bytes() for p in folder(tmp_path).iterdir() if p.name not in ("log.txt", ".lock")}
    assert after == before


def test_a_store_that_moved_is_the_same_store(tiny: TinyCohort, tmp_path: Path) -> None:
    arguments = options(tiny, tmp_path, "--num_epoch=1")
    assert Job(arguments).wait() == [0]
    shutil.copy(tiny.high, tmp_path / "moved.lmdb")
    assert Job([*arguments, f"--dataset_root={tmp_path / 'moved.lmdb'}"]).wait() == [0]
    assert "all 1 epochs are trained already" in log_of(tmp_path)


STOPPABLE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from utils.stop import STOPPED_STATUS, StopRequest, leave_mark
stop = StopRequest()
with stop.listening():
    Path(sys.argv[2]).touch()
    for _ in range(600):
        if stop.by:
            leave_mark()
            sys.exit(STOPPED_STATUS)
        time.sleep(0.05)
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_passes_the_wish_on_and_answers_75(tmp_path: Path, by: signal.Signals) -> None:
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(STOPPABLE)
    place = ["--nnodes=1", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command = [sys.executable, str(ROOT / "utils/torchrun.py"), *place, "--local-addr=127.0.0.1"]
    process = subprocess.Popen([*command, str(script), str(ROOT), str(started)])
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(by)
    assert process.wait(60) == 75
