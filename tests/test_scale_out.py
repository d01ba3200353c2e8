"""The whole program on two machines (here: two launchers on one), with restarts and copies, equals one machine."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import Job
from tiny import TinyCohort, make_tiny_cohort

import main
from utils.stop import LAUNCHER, MARK, RESTARTS

ROOT = Path(main.__file__).parent
SMALL = ("--model=e2e_timm:test_resnet_abmilx", "--batch_size=2", "--num_workers=0")

Result = tuple[np.ndarray, dict[str, str], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=18)


def start(processes: int, options: list[str], cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **variables}
    command = ["bash", str(ROOT / "train_dist.sh"), str(processes), *options]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def start_two(options: list[str], folders: Sequence[Path] = (ROOT, ROOT), **variables: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    return [start(1, options, folders[rank], **place, NODE_RANK=str(rank)) for rank in (0, 1)]


def end(runs: list[subprocess.Popen[str]], seconds: float = 240) -> list[tuple[int, str]]:
    """Statuses and standard errors; whatever still runs at the end is killed."""
    try:
        return [(run.wait(timeout=seconds), run.stderr.read() if run.stderr else "") for run in runs]
    finally:
        for run in runs:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def folder(out: Path) -> Path:
    return out / "default" / "default"


def read(out: Path) -> Result:
    """Losses per epoch, test predictions by slide as written, final weights."""
    lines = (folder(out) / "metrics.jsonl").read_text().splitlines()
    with (folder(out) / "fold_0_test_predictions.csv").open() as file:
        rows = {row["id"]: str(row) for row in csv.DictReader(file)}
    weights = torch.load(folder(out) / "fold_0_last.pt", weights_only=True)["model"]
    return np.array([json.loads(line)["train_loss"] for line in lines]), rows, weights


def assert_equal(one: Result, other: Result) -> None:
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] == other[1]
    assert one[2].keys() == other[2].keys()
    for name, weight in one[2].items():
        assert torch.equal(weight, other[2][name]), name


@pytest.fixture(scope="module")
def one_machine(tiny: TinyCohort, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Two processes on one machine."""
    out = tmp_path_factory.mktemp("one")
    ((status, text),) = end([start(2, tiny.options(*SMALL, "--num_epoch=4", f"--output_path={out}"))])
    assert status == 0, text[-3000:]
    return read(out)


def wait_for_state(out: Path, run: subprocess.Popen[str]) -> None:
    """Waits until there is something to go on from."""
    while not (folder(out) / "fold_0_last.pt").exists():
        assert run.poll() is None, run.stderr.read() if run.stderr else ""
        time.sleep(0.02)


def child(run: subprocess.Popen[str]) -> int:
    words = ["pgrep", "-P", str(run.pid), "-f", "main.py"]
    return int(subprocess.run(words, capture_output=True, text=True).stdout.split()[-1])


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_two_machines_with_copies_equal_one(tiny: TinyCohort, one_machine: Result, tmp_path: Path) -> None:
    options = tiny.options(*SMALL, "--num_epoch=4", f"--output_path={tmp_path / 'out'}", f"--stage_to={tmp_path / 'd'}")
    ended = end(start_two(options))
    assert [status for status, _ in ended] == [0, 0], ended[0][1][-3000:] + ended[1][1][-3000:]
    assert_equal(read(tmp_path / "out"), one_machine)
    assert len(list((tmp_path / "d").rglob("*.lmdb"))) == 1
    assert all("are read from the copies in" in text for _, text in ended)
    names = {p.name for p in folder(tmp_path / "out").iterdir()}
    assert "results.json" in names
    assert not {n for n in names if n.endswith(".tmp")}
    assert "epoch 1/4" in ended[0][1]  # rank 0 speaks
    assert "epoch 1/4" not in ended[1][1]


@pytest.mark.slow
def test_a_killed_process_starts_two_machines_again_and_nothing_changes(
    tiny: TinyCohort, one_machine: Result, tmp_path: Path
) -> None:
    options = tiny.options(*SMALL, "--num_epoch=4", "--save_every_min=1e-9", f"--output_path={tmp_path}")
    runs = start_two(options, MAX_RESTARTS="1")
    wait_for_state(tmp_path, runs[0])
    os.kill(child(runs[1]), signal.SIGKILL)
    ended = end(runs)
    assert [status for status, _ in ended] == [0, 0], ended[0][1][-3000:] + ended[1][1][-3000:]
    assert "machine 1: process 1 was ended by SIGKILL" in ended[0][1]
    assert_equal(read(tmp_path), one_machine)
    log = (folder(tmp_path) / "log.txt").read_text()
    assert log.count("goes on") == 1


@pytest.mark.slow
def test_a_killed_process_starts_one_machine_again(tiny: TinyCohort, one_machine: Result, tmp_path: Path) -> None:
    options = tiny.options(*SMALL, "--num_epoch=4", "--save_every_min=1e-9", f"--output_path={tmp_path}")
    run = start(2, options, MAX_RESTARTS="1")
    wait_for_state(tmp_path, run)
    os.kill(child(run), signal.SIGKILL)
    ((status, text),) = end([run])
    assert status == 0, text[-3000:]
    assert "attempt 2 of 2" in text
    assert_equal(read(tmp_path), one_machine)


def test_three_processes_go_on_to_the_bit_with_deterministic_algorithms(tiny: TinyCohort, tmp_path: Path) -> None:
    options = tiny.options(*SMALL, "--num_epoch=3", "--save_every_min=1e-9", "--deter_algo")
    assert Job([*options, f"--output_path={tmp_path / 'whole'}"], world=3).wait() == [0, 0, 0]
    arguments = [*options, f"--output_path={tmp_path / 'killed'}"]
    job = Job(arguments, world=3)
    assert job.follow_saves(folder(tmp_path / "killed"), 3)
    job.send(signal.SIGKILL)
    job.wait()
    assert Job(arguments, world=3).wait() == [0, 0, 0]
    assert "goes on in epoch" in (folder(tmp_path / "killed") / "log.txt").read_text()
    assert_equal(read(tmp_path / "killed"), read(tmp_path / "whole"))


@pytest.mark.slow
def test_a_launcher_that_is_killed_ends_its_processes_and_the_other_machine(tiny: TinyCohort, tmp_path: Path) -> None:
    runs = start_two(tiny.options(*SMALL, "--num_epoch=500", f"--output_path={tmp_path}"), MAX_RESTARTS="2")
    wait_for_state(tmp_path, runs[0])
    left = child(runs[1])
    os.kill(runs[1].pid, signal.SIGKILL)
    begin = time.monotonic()
    while alive(left):
        assert time.monotonic() - begin < 10, "the process outlived its launcher"
        time.sleep(0.05)
    ((status, text),) = end(runs[:1], seconds=60)
    assert status not in (0, 75)
    assert time.monotonic() - begin < 60
    assert "the run ends" in text


@pytest.mark.slow
def test_one_machine_that_is_asked_to_stop_stops_all(tiny: TinyCohort, tmp_path: Path) -> None:
    options = tiny.options(*SMALL, "--num_epoch=500", f"--output_path={tmp_path}")
    runs = start_two(options, MAX_RESTARTS="2")
    wait_for_state(tmp_path, runs[0])
    runs[1].send_signal(signal.SIGUSR1)
    assert [status for status, _ in end(runs)] == [75, 75]
    assert "saved after" in (folder(tmp_path) / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_folder_that_machines_do_not_share_is_refused(tiny: TinyCohort, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for place in folders:
        place.mkdir()
    ended = end(start_two(tiny.options(*SMALL, "--output_path=out"), folders, MAX_RESTARTS="3"))
    assert [status for status, _ in ended] == [2, 2]
    assert "is there for 1 of 2 processes. Give an --output_path on a disk that all machines" in ended[0][1]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_process_whose_launcher_is_gone_already_ends_at_once(tmp_path: Path) -> None:
    code = "from utils.dist import processes\nwith processes('cpu'): print('alive')"
    env = os.environ | {MARK: str(tmp_path / "mark"), LAUNCHER: "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_a_mark_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "gone" / "mark"))
    assert main.main(["--inner_dimm=3"]) == 2
    assert "there is no option '--inner_dimm'" in caplog.text


def test_main_tells_the_launcher_of_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    assert main.main(["--inner_dimm=3"]) == 2
    assert (tmp_path / "mark").read_text() == "2\n"


def test_a_fault_that_all_processes_find_is_said_once_and_last() -> None:
    env = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "train_dist.sh"), "2", "--inner_dimm=3", "--device=cpu"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("there is no option '--inner_dimm'") == 1
    assert "there is no option '--inner_dimm'" in done.stderr.splitlines()[-1]


def test_a_run_that_begins_anew_is_not_started_again(
    tiny: TinyCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RESTARTS, "5")
    options = tiny.options(*SMALL, f"--output_path={tmp_path}", "--num_epoch=1")
    assert main.main([*options, "--resume=never"]) == 2
    assert "--resume=never with MAX_RESTARTS=5: every restart would begin anew" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main.main(options) == 0
