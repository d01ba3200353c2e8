"""CLAM/create_patches_fp.py killed at any moment: the same command ends with the results of an undisturbed run."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
for folder in (str(ROOT), str(ROOT / "CLAM")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from leftovers import remove_leftovers  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds children in Linux's /proc")

SLIDES = 5
FOLDERS = ("patches", "masks", "stitches", "geojson")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    rng = np.random.default_rng(0)
    for number in range(SLIDES):
        image = np.full((1200, 1600, 3), 243, np.uint8)
        image[100 + 40 * number : 1000, 200:1400] = (200, 80, 150)
        noise = rng.integers(0, 12, image.shape, dtype=np.uint8)
        Image.fromarray(image - noise).save(folder / f"s{number}.png", compress_level=1)
    return folder


def start(source: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "CLAM" / "create_patches_fp.py"), "--source", str(source)]
    options = ["--save_dir", str(out), "--seg", "--patch", "--stitch", "--geojson", "--patch_size", "64"]
    sizes = ["--step_size", "64", "--a_t", "0.1", "--a_h", "0.1", "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options, *sizes], env=environment, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert start(source, out, 1).wait(60) == 0
    return out


def results(out: Path) -> dict[str, object]:
    """Every file of the results: pictures and outlines as bytes, coordinates with their attributes."""
    found: dict[str, object] = {}
    for folder in FOLDERS:
        for path in (out / folder).iterdir():
            name = f"{folder}/{path.name}"
            if path.suffix == ".h5":
                with h5py.File(path) as file:
                    attributes = {k: np.asarray(v).tolist() for k, v in file["coords"].attrs.items()}
                    attributes.pop("save_path")
                    found[name] = (file["coords"][:].tolist(), attributes)
            else:
                found[name] = path.read_bytes()
    return found


def facts(out: Path) -> list[tuple[str | None, ...]]:
    """The list, apart from the status, which says in which run a slide was done."""
    with (out / "process_list_autogen.csv").open(newline="") as file:
        return [
            tuple(row[k] for k in ("slide_id", "process", "reason", "patches", "a_t")) for row in csv.DictReader(file)
        ]


def count(out: Path) -> int:
    return sum(len(list((out / folder).glob("*"))) for folder in FOLDERS if (out / folder).is_dir())


def children(process: int) -> list[int]:
    try:
        return [
            int(c) for task in Path(f"/proc/{process}/task").iterdir() for c in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills the parent alone, and sees its children end."""
    family = children(process.pid)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL
    limit = time.monotonic() + 10
    while any(map(runs, family)):
        assert time.monotonic() < limit, "children outlive their parent"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_and_continued(workers, source, undisturbed, tmp_path):
    rng = random.Random(workers)
    kills = 0
    for _ in range(30):
        process, enough = start(source, tmp_path, workers), count(tmp_path) + rng.randint(0, 6)
        while count(tmp_path) < enough and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:
            break
        kill(process)
        kills += 1
        # As if killed while it wrote, which takes too little time to be met by chance.
        (tmp_path / "patches").mkdir(exist_ok=True)
        (tmp_path / "patches" / f".s{kills % SLIDES}.h5.{process.pid}.tmp").write_bytes(b"\x89HDF\r\n")
        for path in (tmp_path / "patches").glob("[!.]*.h5"):
            with h5py.File(path) as file:
                assert len(file["coords"]) > 0, "a half-written file has its final name"
    else:
        pytest.fail("the run never comes to its end")
    assert kills >= 2
    assert process.wait(60) == 0
    assert results(tmp_path) == results(undisturbed)
    assert facts(tmp_path) == facts(undisturbed)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in undisturbed.iterdir())


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_and_of_these_files_only(tmp_path):
    dead, parent = ended_process(), os.getppid()
    gone = [f".a.b.h5.{dead}.tmp", f".a.b.h5.{os.getpid()}.tmp"]
    kept = [
        f".a.b.h5.{parent}.tmp",
        f".c.h5.{dead}.tmp",
        f"a.b.h5.{dead}.tmp",
        ".a.b.h5.tmp",
        "a.b.h5",
        ".a.b.h5.x.tmp",
    ]
    for name in gone + kept:
        (tmp_path / name).touch()
    assert sorted(remove_leftovers(tmp_path, ["a.b.h5"])) == sorted(gone)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    assert remove_leftovers(tmp_path / "nowhere", ["a.b.h5"]) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say that a process is a zombie")
def test_a_process_that_has_ended_and_was_not_waited_for_keeps_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    while runs(process.pid):
        time.sleep(0.01)
    name = f".a.h5.{process.pid}.tmp"
    (tmp_path / name).touch()
    assert remove_leftovers(tmp_path, ["a.h5"]) == [name]
    process.wait()
