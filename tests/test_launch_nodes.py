"""train_dist.sh on several machines (here: several launchers on one), restarts, and what the environment says."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.nodes import Nodes, read_nodes
from utils.peers import Ending, joint

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("launch.sh", "torchrun.py", "stop.py", "nodes.py", "peers.py", "errors.py")

MAIN = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from utils.stop import leave_mark
out, what = Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ["RANK"])
names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ABMILX_RESTARTS")
with open(out / f"rank{rank}", "a") as file:
    file.write("|".join(os.environ[n] for n in names) + "\\n")
attempts = len((out / f"rank{rank}").read_text().splitlines())
if what == "hang":
    time.sleep(300)
if what == "die once" and attempts == 1:
    if rank == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
if what == "save slowly":
    told = []
    signal.signal(signal.SIGUSR1, lambda *_: told.append("usr1"))
    signal.signal(signal.SIGTERM, lambda *_: (out / "term").touch())
    (out / f"ready{rank}").touch()
    while not told:
        time.sleep(0.05)
    time.sleep(2)
    leave_mark()
    time.sleep(0.3)
    os._exit(75)
if what == "fault":
    leave_mark(2)
    sys.exit(2)
if what == "stopped":
    leave_mark()
    sys.exit(75)
if what == "stopped without a mark":
    sys.exit(75)
if what == "fail" and rank == 1:
    sys.exit(7)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose main.py needs no torch and does what its second argument says."""
    folder = tmp_path_factory.mktemp("launch") / "a checkout"
    (folder / "utils").mkdir(parents=True)
    for name in ("train_dist.sh", *(f"utils/{part}" for part in PARTS)):
        shutil.copy(ROOT / name, folder / name)
    (folder / "main.py").write_text(MAIN)
    return folder


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}


def start(checkout: Path, processes: int, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = ["bash", str(checkout / "train_dist.sh"), str(processes), *arguments]
    return subprocess.Popen(
        command, env=environment(**variables), stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def start_two(checkout: Path, *arguments: str, **variables: str) -> list[subprocess.Popen[str]]:
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **variables}
    return [start(checkout, 1, *arguments, **place, NODE_RANK=str(rank)) for rank in (0, 1)]


def end(runs: list[subprocess.Popen[str]], seconds: float = 60) -> list[tuple[int, str]]:
    """Statuses and standard errors; whatever still runs at the end is killed."""
    try:
        return [(run.wait(timeout=seconds), run.stderr.read() if run.stderr else "") for run in runs]
    finally:
        for run in runs:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def wait_for(*paths: Path) -> None:
    for _ in range(600):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.1)
    raise AssertionError(f"{paths} did not appear")


def test_a_process_that_is_killed_starts_the_run_again_everywhere(checkout: Path, tmp_path: Path) -> None:
    ended = end(start_two(checkout, str(tmp_path), "die once", MAX_RESTARTS="1"))
    assert [status for status, _ in ended] == [0, 0]
    assert [len((tmp_path / f"rank{r}").read_text().splitlines()) for r in (0, 1)] == [2, 2]
    for _, text in ended:
        assert "machine 1: process 1 was ended by SIGKILL" in text
        assert "attempt 2 of 2" in text


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_dies_ends_the_other_within_a_minute(checkout: Path, tmp_path: Path, victim: int) -> None:
    """The processes hang and notice nothing, as in a collective of NCCL."""
    runs = start_two(checkout, str(tmp_path), "hang", MAX_RESTARTS="3")
    wait_for(tmp_path / "rank0", tmp_path / "rank1")
    children = subprocess.run(["pgrep", "-P", str(runs[victim].pid)], capture_output=True, text=True).stdout.split()
    for process in (runs[victim].pid, *map(int, children)):
        os.kill(process, signal.SIGKILL)
    begin = time.monotonic()
    status, text = end([runs[1 - victim]])[0]
    assert status == 1
    assert time.monotonic() - begin < 60
    assert "so the run ends" in text
    runs[victim].wait()


@pytest.mark.slow
def test_a_machine_0_that_is_silent_but_connected_ends_the_other_within_a_minute(
    checkout: Path, tmp_path: Path
) -> None:
    runs = start_two(checkout, str(tmp_path), "hang")
    wait_for(tmp_path / "rank0", tmp_path / "rank1")
    os.kill(runs[0].pid, signal.SIGSTOP)
    try:
        status, text = end([runs[1]])[0]
    finally:
        os.killpg(runs[0].pid, signal.SIGKILL)
        runs[0].wait()
    assert status == 1
    assert "machine 0 has not answered for 20 s, so the run ends" in text


@pytest.mark.parametrize(("what", "status"), [("fault", 2), ("stopped", 75), ("stopped without a mark", 75)])
def test_a_fault_or_a_stop_is_not_tried_again(checkout: Path, tmp_path: Path, what: str, status: int) -> None:
    assert end([start(checkout, 2, str(tmp_path), what, MAX_RESTARTS="5")])[0][0] == status
    assert len((tmp_path / "rank0").read_text().splitlines()) == 1


def test_processes_that_are_told_by_usr1_have_the_time_they_need(checkout: Path, tmp_path: Path) -> None:
    run = start(checkout, 1, str(tmp_path), "save slowly")
    wait_for(tmp_path / "ready0")
    run.send_signal(signal.SIGUSR1)
    assert end([run])[0][0] == 75
    assert not (tmp_path / "term").exists(), "torchrun was told, and would kill after 30 seconds"


def test_a_wish_to_stop_that_comes_before_anybody_listens_is_heeded(checkout: Path, tmp_path: Path) -> None:
    run = start(checkout, 2, str(tmp_path), "hang", MAX_RESTARTS="3")
    wait_for(tmp_path / "rank0", tmp_path / "rank1")
    run.send_signal(signal.SIGUSR1)
    assert end([run])[0][0] == 75


def test_a_wish_to_stop_while_other_machines_are_waited_for_is_heeded(checkout: Path, tmp_path: Path) -> None:
    place = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    run = start(checkout, 1, str(tmp_path), "hang", **place)
    assert run.stderr is not None
    for line in run.stderr:
        if "waits for" in line:
            break
    run.send_signal(signal.SIGUSR1)
    assert run.wait(timeout=30) == 75


def test_one_machine_tries_again_as_often_as_it_is_told(checkout: Path, tmp_path: Path) -> None:
    status, text = end([start(checkout, 2, str(tmp_path), "fail", MAX_RESTARTS="2")])[0]
    assert status == 1
    assert len((tmp_path / "rank1").read_text().splitlines()) == 3
    assert "process 1 ended with 7" in text


def test_machines_with_other_arguments_are_refused(checkout: Path, tmp_path: Path) -> None:
    place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    runs = [start(checkout, rank + 1, str(tmp_path), "record", **place, NODE_RANK=str(rank)) for rank in (0, 1)]
    for status, text in end(runs):
        assert status == 2
        assert "has other arguments than machine" in text
    assert not list(tmp_path.iterdir())


def test_machines_that_count_their_number_differently_are_refused(checkout: Path, tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    counts = ("2", "3")
    runs = [start(checkout, 1, str(tmp_path), "record", **place, NODE_RANK=str(r), NNODES=counts[r]) for r in (0, 1)]
    ended = end(runs)
    assert all(status != 0 for status, _ in ended)
    assert any("has other NNODES than machine" in text for _, text in ended)


def test_a_port_that_is_taken_is_named(checkout: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        place = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        status, text = end([start(checkout, 1, str(tmp_path), "record", **place)])[0]
    assert status == 2
    assert f"machine 0 cannot listen on port {port}" in text


# The environment

FOUR = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_NODEID": "2",
    "SLURM_JOB_NODELIST": "gpu[03-04,11]",
}


def test_nothing_set_is_one_machine() -> None:
    assert read_nodes({"PATH": "/bin"}) == Nodes()
    assert read_nodes({"NNODES": "1", "MASTER_ADDR": "node-a"}) == Nodes()
    assert read_nodes({"MAX_RESTARTS": "3"}).restarts == 3


def test_explicit_machines() -> None:
    assert read_nodes(FOUR) == Nodes(2, 1, "node-a", 29500)
    assert read_nodes({**SLURM, **FOUR}) == Nodes(2, 1, "node-a", 29500)


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_set_machines_are_refused(missing: str) -> None:
    with pytest.raises(UserError, match=rf"NNODES is 2, and there is no {missing}\. For several machines set NNODES"):
        read_nodes({k: v for k, v in FOUR.items() if k != missing})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"NNODES": "two"}, "NNODES is 'two', but must be a whole number from 1"),
        ({"NNODES": "0"}, "NNODES is '0', but must be"),
        ({"NODE_RANK": "2"}, "NODE_RANK is '2', but must be a whole number from 0 to 1"),
        ({"NODE_RANK": "-1"}, "NODE_RANK is '-1', but must be"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536', but must be a whole number from 1 to 65535"),
        ({"MASTER_ADDR": "a b"}, "MASTER_ADDR is 'a b', but must be a host name"),
        ({"MAX_RESTARTS": "often"}, "MAX_RESTARTS is 'often', but must be a whole number from 0 to 1000"),
        ({"NNODES": "1:4"}, "NNODES is '1:4', a range, but a run has a fixed number of machines.*such as NNODES=4"),
        ({"NNODES": "1", "NODE_RANK": "1"}, "NODE_RANK is '1', but must be 0"),
        ({"NNODES": ""}, "NODE_RANK, MASTER_ADDR, MASTER_PORT without NNODES"),
    ],
)
def test_nonsense_is_refused_with_the_limit(changes: Mapping[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_nodes({**FOUR, **changes})


def test_slurm_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert read_nodes(SLURM) == Nodes(3, 2, "gpu03", 15000 + 4711)
    assert read_nodes({**SLURM, "SLURM_JOB_NODELIST": "a-1.x,b2"}).address == "a-1.x"
    with pytest.raises(UserError, match=r"'\[1-2\]' cannot be read from it. Set MASTER_ADDR"):
        read_nodes({**SLURM, "SLURM_JOB_NODELIST": "[1-2]"})


def test_explicit_variables_beat_slurm_one_by_one() -> None:
    assert read_nodes({**SLURM, "MASTER_ADDR": "10.0.0.1"}) == Nodes(3, 2, "10.0.0.1", 19711)
    assert read_nodes({**SLURM, "MASTER_PORT": "4000", "MASTER_ADDR": "x"}).port == 4000
    assert read_nodes({**SLURM, "NNODES": "1"}) == Nodes()


def test_a_slurm_step_on_one_of_the_machines_is_one_machine() -> None:
    assert read_nodes({**SLURM, "SLURM_STEP_NUM_NODES": "1"}) == Nodes()


def test_slurm_without_srun_or_with_several_tasks_per_machine_is_refused() -> None:
    batch = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}
    with pytest.raises(UserError, match="the SLURM job has 3 machines.*Start it with srun --ntasks-per-node=1"):
        read_nodes(batch)
    with pytest.raises(UserError, match="srun starts 12 tasks on 3"):
        read_nodes({**SLURM, "SLURM_STEP_NUM_TASKS": "12"})


def test_two_slurm_machines_ask_scontrol_for_the_first(checkout: Path, tmp_path: Path) -> None:
    tools, out = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    out.mkdir()
    fake = tools / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames weird{1..2}" ] && echo 127.0.0.1 && echo 127.0.0.2\n')
    fake.chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(int(free_port()) % 15000),
        "SLURM_STEP_ID": "0",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "weird{1..2}",
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }
    runs = [start(checkout, 1, str(out), "record", **job, SLURM_NODEID=str(rank)) for rank in (0, 1)]
    assert [status for status, _ in end(runs)] == [0, 0]
    assert (out / "rank1").read_text() == "2|0|1|127.0.0.1|0\n"


def test_faults_of_the_environment_stop_the_launcher(checkout: Path, tmp_path: Path) -> None:
    status, text = end([start(checkout, 1, str(tmp_path), "record", NNODES="2")])[0]
    assert status == 2
    assert "there is no NODE_RANK, MASTER_ADDR, MASTER_PORT" in text
    assert not list(tmp_path.iterdir())


# The ending of all


def test_the_ending_of_all_machines() -> None:
    killed = Ending(1, again=True, cause="process 3 was ended by SIGKILL")
    because_of_it, fine = Ending(1, again=True), Ending()
    assert joint([fine, fine]) == fine
    assert joint([because_of_it, killed]) == Ending(1, True, "machine 1: process 3 was ended by SIGKILL")
    assert not joint([killed, Ending(143, cause="the launcher got signal 15")]).again
    assert joint([killed, Ending(75)]).status == 75
    assert joint([Ending(75), Ending(2)]).status == 2
