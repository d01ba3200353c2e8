"""The launchers: arguments, settings and exit status go through, wherever they are called from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAIN = """
import os, sys
from pathlib import Path
names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF")
names += ("CUDA_DEVICE_MAX_CONNECTIONS",)
line = "|".join([*sys.argv[2:], *(os.environ.get(n, "-") for n in names)])
Path(sys.argv[1], "rank" + os.environ.get("RANK", "")).write_text(line)
sys.exit(7 if "fail" in sys.argv and os.environ.get("RANK", "1") == "1" else 0)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose folder has a space in its name and whose main.py records how it was called."""
    folder = tmp_path / "a checkout"
    (folder / "utils").mkdir(parents=True)
    parts = ("launch.sh", "torchrun.py", "stop.py", "nodes.py", "peers.py", "errors.py")
    for name in ("train.sh", "train_dist.sh", *(f"utils/{part}" for part in parts)):
        shutil.copy(ROOT / name, folder / name)
    (folder / "main.py").write_text(MAIN)
    return folder


def call(
    script: Path, *arguments: str, cwd: Path, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    drop = ("OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
    env = {k: v for k, v in os.environ.items() if k not in drop} | {"PYTHON": sys.executable} | (settings or {})
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_train_passes_arguments_settings_and_status(checkout: Path, tmp_path: Path) -> None:
    done = call(checkout / "train.sh", str(tmp_path), "--title=two words", "fail", cwd=tmp_path)
    assert done.returncode == 7
    assert (tmp_path / "rank").read_text() == "--title=two words|fail|-|-|-|:4096:8|expandable_segments:True|-"


def test_train_names_a_missing_python(checkout: Path, tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "PYTHON": "/nowhere/python"}
    done = subprocess.run(["bash", str(checkout / "train.sh")], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "There is no Python at '/nowhere/python'" in done.stderr


def test_train_dist_starts_every_rank_and_passes_failure_on(checkout: Path, tmp_path: Path) -> None:
    done = call(checkout / "train_dist.sh", "2", str(tmp_path), "--title=two words", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        title, own, world, threads, *_, queues = (tmp_path / f"rank{rank}").read_text().split("|")
        assert (title, own, world, queues) == ("--title=two words", str(rank), "2", "32")
        assert 1 <= int(threads) <= 8
    settings = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    failed = call(checkout / "train_dist.sh", "2", str(tmp_path), "fail", cwd=tmp_path, settings=settings)
    assert failed.returncode != 0
    assert (tmp_path / "rank0").read_text().endswith("|1")


@pytest.mark.parametrize("count", [[], ["0"], ["-1"], ["two"], ["--datasets=panda"], ["1.5"]])
def test_train_dist_refuses_what_is_no_number_of_processes(checkout: Path, tmp_path: Path, count: list[str]) -> None:
    done = call(checkout / "train_dist.sh", *count, cwd=tmp_path)
    assert done.returncode == 2
    assert f"'{count[0] if count else ''}', but must be the number of processes" in done.stderr
