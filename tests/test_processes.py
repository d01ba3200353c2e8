"""One process and several: equal losses, weights, predictions for the same global batch; no hang when one fails."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyCohort, make_tiny_cohort

import main

ROOT = Path(main.__file__).parent
LAYER_NORM_ENCODER = "--model=e2e_timm:test_convnext_abmilx"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=18)


def launch(processes: int, options: list[str], seconds: int = 300) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "train_dist.sh"), str(processes), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)


def read(out: Path) -> tuple[np.ndarray, dict[str, float], dict[str, torch.Tensor]]:
    """Losses per epoch, test scores by slide, final weights."""
    folder = out / "default" / "default"
    losses = [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with (folder / "fold_0_test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    score = "risk" if "risk" in rows[0] else "p_1"
    assert len({r["id"] for r in rows}) == len(rows)
    weights = torch.load(folder / "fold_0_last.pt", weights_only=True)["model"]
    return np.array(losses), {r["id"]: float(r[score]) for r in rows}, weights


@pytest.mark.parametrize("kind", ["classification", "survival"])
def test_two_processes_equal_one_for_the_same_global_batch(tiny, tmp_path, kind):
    """Bags of unequal length, an evaluation split that two processes cannot share evenly, accumulation, EMA."""
    options = tiny.options(
        LAYER_NORM_ENCODER, "--same_psize=0", "--accumulation_steps=2", "--dropout=0", "--test_type=both", "--mm=0.9"
    )
    if kind == "survival":
        options += ["--datasets=surv_tiny", f"--csv_path={tiny.survival_csv}"]
    runs = {}
    for processes, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(processes)
        done = launch(processes, [*options, f"--batch_size={batch}", f"--output_path={out}"])
        assert done.returncode == 0, done.stderr[-3000:]
        runs[processes] = read(out)
    np.testing.assert_allclose(runs[2][0], runs[1][0], rtol=1e-4)
    assert runs[2][1].keys() == runs[1][1].keys()
    for slide, score in runs[1][1].items():
        assert runs[2][1][slide] == pytest.approx(score, abs=1e-4)
    for name, weight in runs[1][2].items():
        torch.testing.assert_close(runs[2][2][name], weight, rtol=1e-3, atol=2e-4)


def test_a_killed_process_ends_the_run_within_a_minute(tiny, tmp_path):
    options = tiny.options(LAYER_NORM_ENCODER, "--num_epoch=500", "--batch_size=2", f"--output_path={tmp_path}")
    command = ["bash", str(ROOT / "train_dist.sh"), "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stderr is not None
    for line in run.stderr:
        if "epoch 1/" in line:
            break
    children = subprocess.run(
        ["pgrep", "-P", str(run.pid), "-f", "main.py"], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    begin = time.monotonic()
    os.kill(int(children[1]), 9)
    assert run.wait(timeout=60) != 0
    assert time.monotonic() - begin < 60
    assert "Signal 9" in run.stderr.read()


def test_a_fault_on_one_process_only_ends_the_run_and_is_shown(tiny, tmp_path):
    import lmdb

    broken = tmp_path / "broken.lmdb"
    broken.write_bytes(tiny.high.read_bytes())
    with lmdb.open(str(broken), subdir=False, map_size=1 << 26) as env, env.begin(write=True) as txn:
        txn.put(b"P00-0-1", txn.get(b"P00-0-1")[:200])
    options = tiny.options(LAYER_NORM_ENCODER, "--same_psize=0", "--batch_size=2", f"--dataset_root={broken}")
    done = launch(2, [*options, f"--output_path={tmp_path / 'out'}"], seconds=60)
    assert done.returncode != 0
    assert "P00-0" in done.stderr
