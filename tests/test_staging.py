"""Copies on a local disk: equal to what was copied, made once, used again, never half there."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any, ClassVar

import lmdb
import numpy as np
import pytest
import torch
from tiny import TinyCohort, make_tiny_cohort

import datasets.staging as staging
import engine.staging
import main
from datasets.staging import LOCK, Stager, needed_bytes, plan_copy
from datasets.store import PatchStore
from utils.dist import Processes
from utils.errors import UserError
from utils.stop import Stopped


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=12)


def plan_store(path: Path, folder: Path) -> staging.Copy:
    store = PatchStore(path)
    files = list(zip(store.files, store.used_bytes, strict=True))
    store.close()
    return plan_copy(str(path), files, store.fingerprint, folder)


def make(copy: staging.Copy, folder: Path) -> Path:
    stager = Stager([copy], folder)
    while not stager.advance(0.5):
        pass
    return copy.target


def same(one: Path, other: Path) -> None:
    first, second = PatchStore(one), PatchStore(other)
    assert first.counts == second.counts
    assert first.fingerprint == second.fingerprint
    for slide, count in first.counts.items():
        assert first.read(slide, range(count)) == second.read(slide, range(count))


def test_a_copy_is_the_store(tiny: TinyCohort, tmp_path: Path) -> None:
    target = make(plan_store(tiny.high, tmp_path), tmp_path)
    same(tiny.high, target)
    assert target.is_relative_to(tmp_path)
    assert [p.name for p in target.parent.iterdir()] == ["high.lmdb"]


def test_shards_and_lmdb_folders_are_copied_as_they_are(tiny: TinyCohort, tmp_path: Path) -> None:
    shards, folder = tmp_path / "shards", tmp_path / "old form"
    shards.mkdir()
    folder.mkdir()
    shutil.copy(tiny.high, shards / "0.lmdb")
    (shards / "notes.txt").write_text("not read")
    shutil.copy(tiny.low, folder / "data.mdb")
    for source, names in ((shards, ["0.lmdb"]), (folder, ["data.mdb"])):
        target = make(plan_store(source, tmp_path / "local"), tmp_path / "local")
        assert [p.name for p in target.iterdir()] == names
        same(source, target)


def test_only_used_bytes_are_copied(tiny: TinyCohort, tmp_path: Path) -> None:
    """A file that another program made as long as its map: the end of it is a hole, or zeros."""
    store = tmp_path / "long.lmdb"
    shutil.copy(tiny.high, store)
    used = store.stat().st_size
    os.truncate(store, 1 << 30)
    target = make(plan_store(store, tmp_path / "local"), tmp_path / "local")
    assert target.stat().st_size <= used
    same(tiny.high, target)


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, size = tmp_path / "source", 64 << 20
    with source.open("wb") as file:
        file.write(b"a" * 5000)
        file.seek(40 << 20)
        file.write(b"b" * 5000)
        file.truncate(size)
    copy = plan_copy(str(source), [(source, size)], "", tmp_path / "local")
    target = make(copy, tmp_path / "local")
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 1 << 20


def test_a_file_system_that_knows_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 300)
    monkeypatch.delattr(os, "SEEK_DATA", raising=False)
    copy = plan_copy(str(source), [(source, 70_000)], "", tmp_path / "local")
    assert make(copy, tmp_path / "local").read_bytes() == source.read_bytes()[:70_000]


def test_a_copy_is_used_again_and_a_changed_store_is_copied_anew(tiny: TinyCohort, tmp_path: Path) -> None:
    store, local = tmp_path / "s.lmdb", tmp_path / "local"
    shutil.copy(tiny.high, store)
    first = make(plan_store(store, local), local)
    inode = first.stat().st_ino
    assert make(plan_store(store, local), local) == first
    assert first.stat().st_ino == inode
    with lmdb.open(str(store), subdir=False, lock=False, map_size=1 << 26) as env, env.begin(write=True) as txn:
        txn.put(b"P00-0-0", txn.get(b"P00-0-1"))
        sums = txn.get(b"__crc32__/P00-0")
        txn.put(b"__crc32__/P00-0", sums[4:8] + sums[4:])
    second = make(plan_store(store, local), local)
    assert second != first
    assert first.stat().st_ino == inode  # a run may be reading it
    same(store, second)


def test_stores_of_one_name_do_not_meet(tiny: TinyCohort, tmp_path: Path) -> None:
    for name, source in (("a", tiny.high), ("b", tiny.low)):
        (tmp_path / name).mkdir()
        shutil.copy(source, tmp_path / name / "x.lmdb")
    copies = [plan_store(tmp_path / name / "x.lmdb", tmp_path / "local") for name in "ab"]
    assert copies[0].folder != copies[1].folder
    assert {copy.folder.parent for copy in copies} == {tmp_path / "local"}


@pytest.mark.parametrize("name", ["..lmdb", "a b;$(x).lmdb", ".hidden", "ü" * 90])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    source, local = tmp_path / name, tmp_path / "local"
    source.write_bytes(b"x")
    copy = plan_copy(str(source), [(source, 1)], "", local)
    assert copy.folder.parent == local
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,100}", copy.folder.name)
    assert make(copy, local).resolve().is_relative_to(local.resolve())


def test_what_a_killed_run_left_is_replaced(tiny: TinyCohort, tmp_path: Path) -> None:
    copy = plan_store(tiny.high, tmp_path)
    copy.folder.mkdir()
    for pid in (1, os.getpid()):
        (copy.folder / f".high.lmdb.{pid}.tmp").write_bytes(b"half")
    same(tiny.high, make(copy, tmp_path))
    assert [p.name for p in copy.folder.iterdir()] == ["high.lmdb"]


def test_giving_up_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1000)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    copy = plan_copy(str(source), [(source, 100_000)], "", tmp_path / "local")
    stager = Stager([copy], tmp_path / "local")
    assert not any(stager.advance(0) for _ in range(3))
    stager.close()
    assert not any(p.is_file() for p in copy.folder.rglob("*"))


def test_two_runs_share_one_copy(tiny: TinyCohort, tmp_path: Path) -> None:
    copy = plan_store(tiny.high, tmp_path)
    with (tmp_path / LOCK).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        stager = Stager([copy], tmp_path)
        assert not stager.advance(0.3)
        assert copy.missing()
        copy.folder.mkdir()
        shutil.copy(tiny.high, copy.target)
        inode = copy.target.stat().st_ino
    assert stager.advance(5)
    assert copy.target.stat().st_ino == inode


def test_runs_at_the_same_time_copy_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, local = tmp_path / "source", tmp_path / "local"
    source.write_bytes(os.urandom(1 << 20))
    made: list[Path] = []
    copied = staging._copy_file
    monkeypatch.setattr(staging, "_copy_file", lambda item, target: made.append(target) or copied(item, target))
    copy = plan_copy(str(source), [(source, 1 << 20)], "", local)
    threads = [threading.Thread(target=make, args=(copy, local)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [copy.target]
    assert copy.target.read_bytes() == source.read_bytes()


def test_too_little_room_is_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(3 << 30)
    copy = plan_copy(str(source), [(source, 3 << 30)], "", tmp_path / "new" / "local")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9 << 30, 7 << 30, 2 << 30))
    with pytest.raises(UserError, match=r"3\.00 GiB are to be copied there, and 2\.00 GiB are free\. Remove copies"):
        needed_bytes([copy], tmp_path / "new" / "local")
    with pytest.raises(UserError, match=r"2\.00 GiB are free"):
        make(copy, tmp_path / "new" / "local")
    assert not copy.folder.exists()


def test_links_and_folders_of_others_are_refused(tiny: TinyCohort, tmp_path: Path) -> None:
    copy = plan_store(tiny.high, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy.folder.symlink_to(elsewhere)
    shutil.copy(tiny.low, elsewhere / "high.lmdb")
    with pytest.raises(UserError, match="belongs to another user, or is a link"):
        make(copy, tmp_path)


def test_a_store_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1000)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(50_000))
    copy = plan_copy(str(source), [(source, 50_000)], "", tmp_path / "local")
    stager = Stager([copy], tmp_path / "local")
    assert not any(stager.advance(0) for _ in range(3))
    os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match="the file changed while it was copied"):
        stager.advance(10)
    assert not any(p.is_file() for p in copy.folder.rglob("*"))


def test_progress_says_bytes_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(staging, "REPORT_S", 0.0)
    source = tmp_path / "source"
    source.write_bytes(bytes(8 << 20))
    with caplog.at_level(logging.INFO):
        make(plan_copy(str(source), [(source, 8 << 20)], "", tmp_path / "local"), tmp_path / "local")
    assert re.search(r"staging: 0\.00 of 0\.01 GiB \(50 %\), \d+ MB/s, eta \d+s", caplog.text)
    assert re.search(r"staging: 0\.01 GiB copied in \d+s, \d+ MB/s", caplog.text)


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(copy: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(staging, "_write", full)
    source = tmp_path / "source"
    source.write_bytes(b"x" * 5000)
    copy = plan_copy(str(source), [(source, 5000)], "", tmp_path / "local")
    with pytest.raises(UserError, match=r"could not be copied to .*: No space left on device\. Make room"):
        make(copy, tmp_path / "local")
    assert not any(p.is_file() for p in copy.folder.rglob("*"))


# Several processes


class Meeting(Processes):
    """One process whose peers say what they are told to."""

    others: ClassVar[list[tuple[bool, str, bool]]] = []

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


@pytest.mark.parametrize(
    ("other", "error"),
    [((False, "machine b is full", False), UserError("machine b is full")), ((False, "", True), Stopped())],
)
def test_all_processes_end_with_the_one_that_fails_or_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: tuple[bool, str, bool], error: Exception
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 5000)
    monkeypatch.setattr(staging, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(engine.staging, "MEETING_S", 0.0)
    monkeypatch.setattr(Meeting, "others", [other])
    copy = plan_copy(str(source), [(source, 5000)], "", tmp_path / "local")
    for stager in (None, Stager([copy], tmp_path / "local")):
        with pytest.raises(type(error), match=f"^{error}$"):
            engine.staging._copy_together(stager, Meeting(0, 2, torch.device("cpu")))
    assert not any(p.name == "source" for p in (tmp_path / "local").rglob("*"))


# Whole runs


def result(out: Path) -> tuple[list[float], str, dict[str, str]]:
    folder = out / "default" / "default"
    losses = [json.loads(line)["train_loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stores = json.loads((folder / "results.json").read_text())["stores"]
    return losses, (folder / "fold_0_test_predictions.csv").read_text(), stores


def run(options: list[str], out: Path, *extra: str) -> tuple[list[float], str, dict[str, str]]:
    assert main.main([*options, f"--output_path={out}", *extra]) == 0
    return result(out)


def test_a_run_on_copies_equals_a_run_on_the_stores(
    tiny: TinyCohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = tiny.options("--model=e2e_timm:test_resnet_abmilx", f"--dataset_sub_root={tiny.low}", "--mul_scale_input")
    local = tmp_path / "local"
    plain = run(options, tmp_path / "plain")
    read: list[Path] = []
    monkeypatch.setattr(
        PatchStore, "read", lambda self, *a, _read=PatchStore.read: read.append(self.path) or _read(self, *a)
    )
    assert run(options, tmp_path / "staged", f"--stage_to={local}") == plain
    assert set(read) == set(local.rglob("*.lmdb"))
    assert len(set(read)) == 2
    made = {p: p.stat().st_ino for p in local.rglob("*.lmdb")}
    run(options, tmp_path / "again", f"--stage_to={local}")
    assert {p: p.stat().st_ino for p in local.rglob("*.lmdb")} == made


def test_a_run_may_go_on_from_copies(tiny: TinyCohort, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = tiny.options("--model=e2e_timm:test_resnet_abmilx", "--num_epoch=1")
    run(options, tmp_path / "out")
    run(options, tmp_path / "out", f"--stage_to={tmp_path / 'local'}")
    assert "all 1 epochs are trained already" in capfd.readouterr().err


@pytest.mark.parametrize("form", ["pt", "h5 beside pt"])
def test_features_with_their_coordinates_are_staged(tmp_path: Path, form: str) -> None:
    import h5py

    rng, root = np.random.default_rng(0), tmp_path / "features"
    (root / "pt_files").mkdir(parents=True)
    (root / "h5_files").mkdir()
    rows = ["case,slide,label,fold"]
    for i in range(12):
        values = torch.from_numpy(rng.normal(i % 2, 1, (9, 8)).astype(np.float32))
        torch.save(values, root / "pt_files" / f"s{i}.pt")
        with h5py.File(root / "h5_files" / f"s{i}.h5", "w") as file:
            file["coords"] = np.stack([np.arange(9) * 256, np.zeros(9)], 1).astype(np.int64)
        rows.append(f"c{i},s{i},{i % 2},{'train' if i < 8 else 'val' if i < 10 else 'test'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    model = "vitmil" if form == "h5 beside pt" else "abmil"
    options = [
        f"--dataset_root={root}", f"--csv_path={tmp_path / 'labels.csv'}", "--datasets=x", "--cv_fold=1",
        f"--model={model}", "--num_epoch=1", "--num_workers=0", "--num_bootstrap=0", "--device=cpu",
        *(["--pos=sincos"] if model == "vitmil" else []),
    ]  # fmt: skip
    plain = run(options, tmp_path / "plain")
    assert run(options, tmp_path / "staged", f"--stage_to={tmp_path / 'local'}") == plain
    names = {p.name for p in (tmp_path / "local").rglob("s*.*")}
    assert len(names) == (24 if model == "vitmil" else 12)


def test_check_and_dry_run_say_what_would_be_copied(
    tiny: TinyCohort, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "local"
    options = tiny.options("--model=e2e_timm:test_resnet_abmilx", f"--stage_to={local}")
    assert main.main(["check", *options]) == 0
    assert re.search(r"stage_to: 0\.00 of 0\.00 GiB are to be copied to .*local", capfd.readouterr().err)
    assert main.main([*options, "--dry_run", f"--output_path={tmp_path / 'out'}"]) == 0
    assert "stage_to:" in capfd.readouterr().err
    assert not local.exists()


def test_a_fault_of_staging_is_a_sentence(tiny: TinyCohort, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    options = tiny.options("--model=e2e_timm:test_resnet_abmilx", f"--stage_to={tmp_path / 'file' / 'local'}")
    assert main.main([*options, f"--output_path={tmp_path / 'out'}"]) == 2
    assert "cannot be made: Not a directory. Give another folder." in capfd.readouterr().err
