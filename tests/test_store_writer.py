"""Writing stores: kills at any moment, full disks, growing maps, replaced slides, two writers."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from test_store import patches

from datasets.store import PatchStore, SlideInfo, StoreHeader, StoreWriter, layout, writer
from datasets.store.verify import verify
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
HEADER = StoreHeader(image_size_px=8, parameters={"seed": 1})


def fake_jpegs(slide: int, count: int, size: int = 3000) -> list[bytes]:
    """Distinct values that look like JPEGs to the store."""
    return [b"\xff\xd8" + bytes([slide, i % 256]) * (size // 2) + b"\xff\xd9" for i in range(count)]


WRITE_MANY = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import numpy as np
from datasets.store import StoreWriter, writer
from test_store_writer import HEADER, fake_jpegs
writer.FLUSH_BYTES = 40_000
with StoreWriter({path!r}, HEADER, map_bytes=1 << 16) as store:
    for slide in range(40):
        if f"s{{slide}}" not in store.finished:
            store.put_slide(f"s{{slide}}", fake_jpegs(slide, 60), np.full((60, 2), slide))
            print(slide, flush=True)
"""


def start_writing(path: Path) -> subprocess.Popen[str]:
    code = WRITE_MANY.format(root=str(ROOT), tests=str(ROOT / "tests"), path=str(path))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_kills_at_random_moments_lose_the_slide_in_work_only(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    rng = np.random.default_rng(0)
    for _ in range(6):
        process = start_writing(path)
        assert process.stdout is not None
        told = [process.stdout.readline()]
        time.sleep(float(rng.uniform(0, 0.02)))
        process.send_signal(signal.SIGKILL)
        told += process.stdout.readlines()
        process.wait()
        with PatchStore(path) as store:
            known = {int(line) for line in told if line.strip()}
            assert known <= {int(slide[1:]) for slide in store.slides}
            for slide in store.slides:
                assert store.read(slide, range(60)) == fake_jpegs(int(slide[1:]), 60)
                assert (store.coords(slide) == int(slide[1:])).all()
    assert start_writing(path).wait() == 0
    with PatchStore(path) as store:
        assert sorted(store.slides) == sorted(f"s{n}" for n in range(40))
    assert entries(path) == 40 * 60 + 40 * 3 + len(layout.RECORDS), "a killed run has left patches behind"


def entries(path: Path) -> int:
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        return int(txn.stat()["entries"])


def test_store_is_readable_after_every_slide_while_writing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.lmdb", HEADER) as store:
        for slide in range(3):
            store.put_slide(f"s{slide}", fake_jpegs(slide, 2))
            code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom datasets.store import PatchStore\n"
            code += f"s = PatchStore({str(tmp_path / 'x.lmdb')!r}); print(s.counts, len(s.read('s{slide}', [0, 1])))"
            told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            assert told == f"{dict.fromkeys([f's{n}' for n in range(slide + 1)], 2)} 2\n"


def test_full_disk_leaves_finished_slides_intact(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    code = f"""
import resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from datasets.store import StoreWriter
from test_store_writer import HEADER, fake_jpegs
from utils.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
try:
    with StoreWriter({str(path)!r}, HEADER) as store:
        for slide in range(20):
            store.put_slide(f"s{{slide}}", fake_jpegs(slide, 30))
except UserError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    finished = int(told.split(" finished slides are intact")[0].split()[-1])
    assert "disk" in told
    assert 2 <= finished < 20
    with PatchStore(path) as store:
        assert store.slides == [f"s{n}" for n in range(finished)]
        assert all(store.read(f"s{n}", range(30)) == fake_jpegs(n, 30) for n in range(finished))
    with StoreWriter(path, HEADER) as again:
        assert sorted(again.finished) == sorted(store.slides)
        again.put_slide("more", fake_jpegs(1, 30))
    assert PatchStore(path).counts["more"] == 30


def test_map_grows_and_the_file_is_not_sparse(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, HEADER, map_bytes=1 << 16) as store:
        for slide in range(10):
            store.put_slide(f"s{slide}", fake_jpegs(slide, 50))
    assert PatchStore(path).read("s9", [49]) == fake_jpegs(9, 50)[49:]
    stored = 500 * 3000
    assert stored < path.stat().st_size < 3 * stored
    assert path.stat().st_blocks * 512 > 0.9 * stored


def broken(count: int) -> Iterator[bytes]:
    yield from fake_jpegs(0, count)
    raise ValueError("the slide ends here")


def test_a_slide_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FLUSH_BYTES", 10_000)
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, HEADER) as store:
        store.put_slide("good", fake_jpegs(1, 5))
        with pytest.raises(ValueError, match="ends here"):
            store.put_slide("bad", broken(20))
        store.put_slide("next", fake_jpegs(2, 5))
    assert PatchStore(path).counts == {"good": 5, "next": 5}
    assert entries(path) == 10 + 2 * 2 + len(layout.RECORDS)


def test_blocks_come_in_any_order_and_slides_mix(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    a, b = fake_jpegs(1, 6), fake_jpegs(2, 4)
    with StoreWriter(path, HEADER) as store:
        store.add("a", 4, a[4:])
        store.add("b", 0, b[:2])
        store.add("a", 0, a[:4])
        store.finish("a", np.zeros((6, 2), np.int64), SlideInfo(mpp=0.5))
        assert list(store.finished) == ["a"]
        store.add("b", 2, b[2:])
        store.finish("b")
    with PatchStore(path) as read:
        assert (read.read("a", range(6)), read.read("b", range(4))) == (a, b)


def test_an_incomplete_slide_cannot_be_finished(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.lmdb", HEADER) as store:
        store.add("a", 2, fake_jpegs(1, 2))
        with pytest.raises(UserError, match="has 2 of 4 patches"):
            store.finish("a")
        store.add("b", 0, fake_jpegs(1, 2))
        with pytest.raises(UserError, match="has 2 of 3 patches"):
            store.finish("b", np.zeros((3, 2), np.int64))
    assert PatchStore(tmp_path / "x.lmdb").slides == []


def test_replacing_a_slide_drops_its_surplus(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, HEADER) as store:
        store.put_slide("a", fake_jpegs(1, 9))
        store.put_slide("a-1", fake_jpegs(2, 3))
        store.put_slide("a", fake_jpegs(3, 2))
    with PatchStore(path) as read:
        assert read.read("a", range(2)) == fake_jpegs(3, 2)
        assert read.read("a-1", range(3)) == fake_jpegs(2, 3)
    assert entries(path) == 5 + 2 * 2 + len(layout.RECORDS)


def test_continuing_asks_for_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    StoreWriter(path, StoreHeader(image_size_px=8, level=0, patch_size_px=8)).close()
    with pytest.raises(UserError, match="image_size_px: 8, not 16"):
        StoreWriter(path, StoreHeader(image_size_px=16))
    with StoreWriter(path, StoreHeader(image_size_px=8, level=1, patch_size_px=8)) as store:
        assert store.header == StoreHeader(image_size_px=8, level=None, patch_size_px=8)
    assert PatchStore(path).header == StoreHeader(image_size_px=8, level=None, patch_size_px=8)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "old.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.put(b"a-0", pickle.dumps(b"x"))
    before = path.read_bytes()
    with pytest.raises(UserError, match="not written by this program"):
        StoreWriter(path, HEADER)
    assert path.read_bytes() == before
    (tmp_path / "text").write_text("hello " * 5000)
    with pytest.raises(UserError, match="cannot be opened"):
        StoreWriter(tmp_path / "text", HEADER)


def test_a_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.lmdb", HEADER):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom datasets.store import *\n"
        code += f"StoreWriter({str(tmp_path / 'x.lmdb')!r}, StoreHeader())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "another process is writing" in done.stderr


def test_key_list_is_right_at_the_end_and_not_rewritten_for_every_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SMALL_KEY_LIST", 20)
    made: list[int] = []
    original = layout.pickle_keys
    monkeypatch.setattr(layout, "pickle_keys", lambda counts: made.append(1) or original(counts))
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, HEADER) as store:
        for slide in range(60):
            store.put_slide(f"s{slide}", fake_jpegs(0, 5, 10))
    assert len(made) < 25
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        assert len(pickle.loads(txn.get(b"__keys__"))) == pickle.loads(txn.get(b"__len__")) == 300


def test_key_list_of_long_names() -> None:
    counts = [("x" * 300, 2), ("é", 1), ("none", 0)]
    assert pickle.loads(layout.pickle_keys(counts)) == [f"{s}-{i}".encode() for s, n in counts for i in range(n)]


@pytest.mark.parametrize("name", ["", "x" * 481])
def test_names_that_cannot_be_keys(name: str, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.lmdb", HEADER) as store:
        with pytest.raises(UserError, match="a store takes 1 to 480"):
            store.put_slide(name, fake_jpegs(0, 1))
        store.put_slide("x" * 480, fake_jpegs(0, 12), np.zeros((12, 2), np.int64))


def test_killed_key_list_is_reported_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SMALL_KEY_LIST", 0)
    monkeypatch.setattr(writer, "KEY_LIST_GROWTH", 1e9)
    path = tmp_path / "x.lmdb"
    child = os.fork()
    if child == 0:
        store = StoreWriter(path, HEADER)
        for slide in ("first", "second"):
            store.put_slide(slide, fake_jpegs(0, 3))
        os._exit(0)
    os.waitpid(child, 0)
    assert any("__keys__" in fault for fault in verify(path).faults)
    StoreWriter(path, HEADER).close()
    assert not any("__keys__" in fault for fault in verify(path).faults)


def key_faults(path: Path) -> list[str]:
    return [fault for fault in verify(path).faults if "__keys__" in fault]


@pytest.mark.parametrize("counts", [{"a": 9, "b": 11}, {"a": 10}], ids=["same sum", "same counts, another order"])
@pytest.mark.parametrize("killed", [True, False])
def test_key_list_follows_slides_that_are_written_anew(
    counts: dict[str, int], killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SMALL_KEY_LIST", 0)
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, HEADER) as store:
        for number, slide in enumerate("abc"):
            store.put_slide(slide, fake_jpegs(number, 10))
    child = os.fork()
    if child == 0:
        store = StoreWriter(path, HEADER)
        for slide, count in counts.items():
            store.put_slide(slide, fake_jpegs(7, count))
        if not killed:
            store.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert bool(key_faults(path)) == killed
    StoreWriter(path, HEADER).close()
    assert key_faults(path) == []


@pytest.mark.parametrize(
    ("step", "through", "left"),
    [("finish", True, "ab"), ("finish", False, "a"), ("remove", True, ""), ("remove", False, "a")],
)
def test_ctrl_c_leaves_a_slide_in_the_store_or_out_of_it(
    step: str, through: bool, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the transaction, or while it is brought to disk: then it comes when the transaction is through."""
    commit = StoreWriter._commit

    def interrupted(self: StoreWriter, work: Callable[[Any], None]) -> None:
        def stopped(txn: Any) -> None:
            work(txn)
            raise KeyboardInterrupt

        monkeypatch.setattr(StoreWriter, "_commit", commit)
        commit(self, work if through else stopped)
        raise KeyboardInterrupt

    path, jpegs = tmp_path / "x.lmdb", patches(0, 5)
    store = StoreWriter(path, StoreHeader(image_size_px=16))
    store.put_slide("a", jpegs)
    if step == "finish":
        store.add("b", 0, jpegs)
    monkeypatch.setattr(StoreWriter, "_commit", interrupted)
    with pytest.raises(KeyboardInterrupt), store:
        store.finish("b") if step == "finish" else store.remove("a")
    assert PatchStore(path).counts == dict.fromkeys(store.finished, 5) == dict.fromkeys(left, 5)
    assert [fault for fault in verify(path).faults if "holds no slide" not in fault] == []
    with StoreWriter(path, StoreHeader(image_size_px=16)) as again:
        again.put_slide("b", jpegs[:4])
    assert verify(path).faults == []


def test_what_a_stopped_run_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FLUSH_BYTES", 10_000)
    path = tmp_path / "x.lmdb"
    child = os.fork()
    if child == 0:
        store = StoreWriter(path, HEADER)
        store.put_slide("a", fake_jpegs(0, 3))
        store.add("b", 0, fake_jpegs(1, 9))
        store.add("c", 5, fake_jpegs(2, 4))
        os._exit(0)
    os.waitpid(child, 0)
    assert entries(path) > 3 + 2 + len(layout.RECORDS)
    assert any("slides in work" in fault for fault in verify(path).faults)
    StoreWriter(path, HEADER).close()
    assert entries(path) == 3 + 2 + len(layout.RECORDS)


def test_a_removed_slide_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with StoreWriter(path, HEADER) as store:
        store.put_slide("a", fake_jpegs(1, 5), np.zeros((5, 2), np.int64))
        store.remove("a")
        store.remove("never")
        assert store.finished == {}
    assert entries(path) == len(layout.RECORDS)
    assert len(PatchStore(path)) == 0
