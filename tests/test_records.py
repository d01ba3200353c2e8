"""What a run leaves behind: results.json, TensorBoard, wandb offline, the published keys; the repository untouched."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyCohort, make_tiny_cohort

import main
import utils.lock
from engine import checkpoint
from engine.records import Records
from engine.trackers import epoch_values, fold_values, published_key, summary_values
from utils.errors import UserError

ROOT = Path(main.__file__).parent
OPTIONS = ("--model=e2e_timm:test_resnet_abmilx", "--num_epoch=1", "--no_early_stopping")

TEST_RESULT = {"main": {"metrics": {"accuracy_macro": {"value": 0.5, "std": 0.1}, "auc": {"value": 0.75, "std": 0.2}}}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        ("val_accuracy_macro", "val_acc"),
        ("val_accuracy_micro_ema", "val_acc_micro_ema"),
        ("val_kappa", "val_ck"),
        ("val_kappa_quadratic", "val_kappa_quadratic"),
        ("val_c_index", "val_cindex"),
        ("val_loss_ema", "val_loss_ema"),
        ("te_f1_macro", "te_fscore"),
        ("te_f1_macro_ema", "te_ema_fscore"),
        ("epoch", "val_epoch"),
        ("train_loss", "main_loss"),
        ("lr", "lr"),
    ],
)
def test_published_keys(ours: str, published: str) -> None:
    assert published_key(ours) == published


def line(epoch: int, auc: float | None, accuracy: float, loss: float = 1.0) -> dict[str, Any]:
    return {"epoch": epoch, "val_auc": auc, "val_accuracy_macro": accuracy, "val_loss": loss, "te_auc": 0.1 * epoch}


def test_the_best_values_are_those_of_one_epoch() -> None:
    """The published program took the best of each metric by itself (T49)."""
    history = [line(0, 0.5, 0.9), line(1, 0.8, 0.6), line(2, None, 0.7), line(3, 0.7, 0.8)]
    tracked = epoch_values(2, history, "auc")
    assert tracked["2-fold/val_auc"] == 0.7
    assert tracked["2-fold/val_best_auc"] == 0.8
    assert tracked["2-fold/val_best_acc"] == 0.6
    assert tracked["2-fold/best_te_main"] == 0.1
    assert "2-fold/val_best_epoch" not in tracked


def test_among_equal_epochs_the_lower_loss_is_the_best() -> None:
    history = [line(0, 0.8, 0.1, 2.0), line(1, 0.8, 0.2, 1.0), line(2, 0.8, 0.3, 3.0)]
    assert epoch_values(0, history, "auc")["0-fold/val_best_acc"] == 0.2


def test_standard_deviations_have_their_own_standard_deviations() -> None:
    """The published program exchanged those of accuracy and AUC (T47)."""
    assert fold_values({**TEST_RESULT, "ema": TEST_RESULT["main"]}) == {
        "test_acc": 0.5,
        "test_acc_std": 0.1,
        "test_auc": 0.75,
        "test_auc_std": 0.2,
        "test_acc_ema": 0.5,
        "test_acc_std_ema": 0.1,
        "test_auc_ema": 0.75,
        "test_auc_std_ema": 0.2,
    }
    over_folds = {"accuracy_macro": {"mean": 0.4, "sd": 0.3}, "auc": {"mean": 0.6, "sd": 0.7}}
    summary = {"summary": {"main": over_folds}, "folds": [{"test": TEST_RESULT}, {"test": TEST_RESULT}]}
    tracked = summary_values(summary)
    assert tracked["cross_val/acc_mean"] == 0.4
    assert tracked["cross_val/auc_std"] == 0.7
    assert tracked["cross_val/acc_std_mean"] == pytest.approx(0.1)
    assert tracked["cross_val/auc_std_mean"] == pytest.approx(0.2)
    over_folds["auc"]["sd"] = math.nan
    assert "cross_val/auc_std" not in summary_values(summary)


def test_results_json_says_what_made_it(tiny: TinyCohort, tmp_path: Path) -> None:
    assert main.main(tiny.options(*OPTIONS, "--title=t", f"--output_path={tmp_path}")) == 0
    folder = tmp_path / "default" / "t"
    found = json.loads((folder / "results.json").read_text())
    assert found["config"]["seed"] == 2021
    assert found["folds"][0]["seed"] == 2021
    assert found["folds"][0]["selected_on"] == "val"
    assert found["selection"] == {"metric": "auc", "split": ["val"]}
    assert list(found["stores"]) == [str(tiny.high)]
    assert all(found["stores"].values())
    assert found["cohort"]["fingerprint"]
    assert set(found["environment"]) >= {"command", "git_hash", "git_changed", "packages", "python", "gpu"}
    assert found["environment"]["packages"]["torch"]
    assert not (folder / "tensorboard").exists()
    assert not (folder / "wandb").exists()


def test_runs_need_no_tracker_package(
    tiny: TinyCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    reloaded = [name for name in sys.modules if name.startswith("engine.")]
    for name in reloaded:
        monkeypatch.delitem(sys.modules, name)
    options = tiny.options(*OPTIONS, f"--output_path={tmp_path}", "--resume=never")
    assert main.main(options) == 0
    for name in ("wandb", "tensorboard"):
        assert main.main([*options, f"--{name}"]) == 2
        assert f"pip install {name}" in caplog.text


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_tensorboard_and_wandb_offline_leave_the_repository_alone(
    tiny: TinyCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started inside a repository with changes, which the published program would have committed (T9)."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    git(work, "init", "-q")
    (work / "notes.txt").write_text("one")
    git(work, "add", "notes.txt")
    git(work, "commit", "-qm", "first")
    (work / "notes.txt").write_text("two")
    (work / "secret.txt").write_text("password")
    before = (git(work, "status", "--porcelain"), git(work, "rev-parse", "HEAD"))
    monkeypatch.chdir(work)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for place in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{place}_DIR", str(tmp_path / "wandb-own"))
    options = tiny.options(*OPTIONS, "--wandb", "--tensorboard", "--test_type=both_ema", f"--output_path={out}")
    assert main.main(options) == 0
    assert (git(work, "status", "--porcelain"), git(work, "rev-parse", "HEAD")) == before
    folder = out / "default" / "default"
    stored = b"".join(f.read_bytes() for f in folder.glob("wandb/offline-run-*/*.wandb"))
    for key in (b"0-fold/val_acc", b"0-fold/val_auc_ema", b"0-fold/main_loss", b"test_auc_std", b"cross_val/f1_mean"):
        assert key in stored, key
    assert b"password" not in stored
    assert not list(folder.glob("wandb/**/diff*.patch"))
    events = b"".join(f.read_bytes() for f in folder.glob("tensorboard/events*"))
    for key in (b"0-fold/val_acc", b"test_auc", b"cross_val/auc_mean"):
        assert key in events, key


def test_wandb_without_a_login_gets_a_sentence(
    tiny: TinyCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert main.main(tiny.options(*OPTIONS, "--wandb", f"--output_path={tmp_path}")) == 2
    assert "WANDB_MODE=offline" in caplog.text


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    records = Records(tmp_path, active=True)
    records.epoch(0, {"epoch": 0, "train_loss": 1.0})
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"fold": 0, "epoch": 1, "tra')
    records.forget(0, from_epoch=1)
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_an_epoch_says_how_many_patches_reach_the_head(tiny: TinyCohort, tmp_path: Path) -> None:
    padded = ("--same_psize=12", "--pad_enc_bs", "--model=e2e_timm:test_resnet_dsmil", "--test_type=both")
    assert main.main(tiny.options(*OPTIONS, *padded, f"--output_path={tmp_path}")) == 0
    line = json.loads((tmp_path / "default" / "default" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["patches_per_step"] == 4 * 12
    assert line["kept_per_step"] < 4 * 12
    assert line["pad_ratio"] == pytest.approx(1 - line["kept_per_step"] / 48)
    assert line["aux_loss"] > 0
    assert line["mm"] == 0.9997
    assert epoch_values(0, [line], "auc")["0-fold/keep_num"] == line["kept_per_step"]


HOLDER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from engine.records import Records
records = Records(Path(sys.argv[2]), active=True)
child = os.fork()  # as reading processes are
if child:
    print(child, flush=True)
time.sleep(60)
"""


@contextmanager
def held(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process that holds ``folder``, and a child of it that outlives it."""
    command = [sys.executable, "-c", HOLDER, str(ROOT), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process, child
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("command", [[], ["--script_mode=test"], ["bench"]])
def test_a_folder_in_use_is_refused(
    tiny: TinyCohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: list[str],
) -> None:
    monkeypatch.setattr(utils.lock, "WAIT_S", 0.2)
    folder = tmp_path / "default" / "default"
    with held(folder) as (process, _):
        subcommand, extra = (command, []) if command == ["bench"] else ([], command)
        assert main.main([*subcommand, *tiny.options(*OPTIONS, *extra, f"--output_path={tmp_path}")]) == 2
        assert f"{folder} is in use by process {process.pid} on {os.uname().nodename} since 2" in caplog.text
        assert "wait until it has ended, or give another --title" in caplog.text
        assert [p.name for p in folder.iterdir()] == [".lock"]


def test_a_killed_run_leaves_its_folder_though_its_reading_processes_live(tmp_path: Path) -> None:
    with held(tmp_path) as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)  # lives
        Records(tmp_path, active=True).close()


def test_a_run_waits_some_seconds_for_one_that_is_ending(tmp_path: Path) -> None:
    with held(tmp_path) as (process, _):
        ender = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
        Records(tmp_path, active=True).close()
        assert ender.wait() == 0


def test_without_locks_in_the_file_system_a_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    Records(tmp_path, active=True).close()
    assert "the file system has no locks (No locks available); let only one run write here" in caplog.text


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing stops at ``size`` bytes of a file, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_is_a_sentence_and_the_one_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "fold_0_last.pt"
    checkpoint.save(path, {"model": torch.ones(3)})
    for size in (10, 100_000):  # in the beginning of the file, and in the tensors
        with (
            largest_file(size),
            pytest.raises(UserError, match=r"File too large; [0-9,]+ bytes are free there") as found,
        ):
            checkpoint.save(path, {"model": torch.zeros(100_000)})
        assert "What was saved before is whole: make room, and the same command goes on" in str(found.value)
    with largest_file(10), pytest.raises(UserError, match="cannot be written"):
        checkpoint.copy(path, tmp_path / "copy.pt")
    assert checkpoint.load(path)["model"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["fold_0_last.pt"]


def test_records_that_do_not_fit_are_sentences(tmp_path: Path) -> None:
    records = Records(tmp_path, active=True)
    with largest_file(10):
        for write in (
            lambda: records.epoch(0, {"epoch": 0, "train_loss": 1.0}),
            lambda: records.json("results.json", {"a": "b" * 100}),
            lambda: records.table("t.csv", ["id"], [["x" * 100]]),
            lambda: records.text("a.txt", "x" * 100),
        ):
            with pytest.raises(UserError, match="cannot be written"):
                write()


def test_an_output_path_that_is_a_file_is_a_sentence(
    tiny: TinyCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").write_text("")
    assert main.main(tiny.options(*OPTIONS, f"--output_path={tmp_path / 'out'}")) == 2
    expected = "out/default/default cannot be written (Not a directory). Give an --output_path that can be."
    assert expected in caplog.text


def test_a_folder_on_a_read_only_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\). Give an --output_path"):
        Records(tmp_path / "new", active=True)
