"""python -m datasets.store: info, verify, merge, subset, export."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest
from test_jpeg import of_claimed_size
from test_store import HEADER, patches, write, write_published

from datasets import jpeg
from datasets.store import PatchStore, SlideInfo, StoreHeader, StoreWriter
from datasets.store.__main__ import main, read_names
from datasets.store.verify import verify
from utils.errors import UserError

SLIDES = {"a": patches(1, 4), "b": patches(2, 2), "c": patches(3, 1)}


def same(one: PatchStore, other: PatchStore) -> bool:
    """Whether two stores hold the same slides, images, coordinates and records."""
    return sorted(one.slides) == sorted(other.slides) and all(
        one.read(s, range(one.counts[s])) == other.read(s, range(other.counts[s]))
        and np.array_equal(one.coords(s), other.coords(s))  # type: ignore[arg-type]
        and one.info(s) == other.info(s)
        for s in one.slides
    )


def test_merge_of_subsets_is_the_whole(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.lmdb", SLIDES)
    (tmp_path / "names.txt").write_text("c\n\na\n")
    assert main(["subset", str(whole), str(tmp_path / "one.lmdb"), "--slides", str(tmp_path / "names.txt")]) == 0
    assert main(["subset", str(whole), str(tmp_path / "two.lmdb"), "--slides", "b"]) == 0
    assert PatchStore(tmp_path / "one.lmdb").slides == ["c", "a"]
    assert main(["merge", *(str(tmp_path / f"{n}.lmdb") for n in ("back", "one", "two"))]) == 0
    assert same(PatchStore(whole), PatchStore(tmp_path / "back.lmdb"))
    assert PatchStore(tmp_path / "back.lmdb").header == HEADER


def test_the_same_command_again_copies_what_is_lacking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.lmdb", {"a": SLIDES["a"]})
    command = ["merge", str(tmp_path / "x.lmdb"), str(one)]
    assert main(command) == 0
    assert "1 slides copied, 0 were there already" in capsys.readouterr().out
    write(one, {"c": SLIDES["c"]})
    assert main(command) == 0
    assert "1 slides copied, 1 were there already" in capsys.readouterr().out
    assert main(["subset", str(one), str(tmp_path / "x.lmdb"), "--slides", "c,c,a"]) == 0
    assert "0 slides copied, 2 were there already" in capsys.readouterr().out
    assert same(PatchStore(tmp_path / "x.lmdb"), PatchStore(one))


@pytest.mark.parametrize(
    ("count", "fingerprint", "shift", "seed"), [(3, "f", 0, 1), (4, "g", 0, 1), (4, "f", 1, 1), (4, "f", 0, 2)]
)
def test_another_slide_of_the_same_name_is_not_there_already(
    count: int, fingerprint: str, shift: int, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def put(count: int, fingerprint: str, shift: int, seed: int) -> None:
        with StoreWriter(tmp_path / "one.lmdb", HEADER) as writer:
            coords = np.full((count, 2), shift)
            writer.put_slide("a", patches(seed, 4)[:count], coords, SlideInfo(fingerprint=fingerprint))
            writer.put_slide("b", SLIDES["b"])

    command = ["merge", str(tmp_path / "x.lmdb"), str(tmp_path / "one.lmdb")]
    put(4, "f", 0, 1)
    assert main(command) == main(command) == 0
    put(count, fingerprint, shift, seed)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"slide 'a': its 4 patches are not the {count} in" in told
    assert "slide 'b'" not in told
    assert PatchStore(tmp_path / "x.lmdb").read("a", range(4)) == patches(1, 4)
    put(4, "f", 0, 1)
    assert main(command) == 0


def test_many_long_names_are_names() -> None:
    names = [letter * 60 for letter in "abcde"]
    assert read_names(",".join(names)) == names


def test_published_files_become_stores_of_ours(tmp_path: Path) -> None:
    old = write_published(tmp_path / "old.lmdb", SLIDES)
    assert main(["merge", str(tmp_path / "new.lmdb"), str(old)]) == 0
    assert main(["merge", str(tmp_path / "new.lmdb"), str(old)]) == 0
    new = PatchStore(tmp_path / "new.lmdb")
    assert new.header == StoreHeader(image_size_px=16)
    assert all(new.read(s, range(len(SLIDES[s]))) == SLIDES[s] for s in SLIDES)


def test_what_cannot_be_merged_is_listed_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "x.lmdb", SLIDES)
    write(tmp_path / "y.lmdb", {"a": patches(0, 1), "b": patches(0, 1)}, StoreHeader(image_size_px=32))
    assert main(["merge", *(str(tmp_path / f"{n}.lmdb") for n in ("z", "x", "y"))]) == 2
    told = capsys.readouterr().err
    assert all(text in told for text in ("image_size_px: 32, not 16", "slide 'a' is in", "slide 'b' is in"))
    assert not (tmp_path / "z.lmdb").exists()
    assert main(["subset", str(tmp_path / "x.lmdb"), str(tmp_path / "z.lmdb"), "--slides", "a,B,d"]) == 2
    assert "2 faults" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "x.lmdb"), str(tmp_path / "x.lmdb")]) == 2


def damage(path: Path) -> None:
    """A missing patch, a cut JPEG, one of another size, and a count that is off."""
    values = {b"a-1": None, b"a-2": patches(0, 1)[0][:-30], b"b-0": jpeg.encode(np.zeros((8, 8, 3), np.uint8))}
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        for key, value in values.items():
            txn.put(key, value) if value is not None else txn.delete(key)
        txn.put(b"__coords__/c", b"\0" * 8)


def without_checksums(path: Path) -> None:
    """As stores were written before 2026-11-23."""
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        for slide in SLIDES:
            assert txn.delete(f"__crc32__/{slide}".encode())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sums", [True, False])
def test_verify_names_every_bad_patch(
    workers: int, sums: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.store.verify.CHUNK_PATCHES", 2)
    path = write(tmp_path / "x.lmdb", SLIDES)
    assert verify(path, workers).faults == []
    assert verify(path, workers).patches == 7
    damage(path)
    if not sums:
        without_checksums(path)
    faults = "\n".join(verify(path, workers).faults)
    assert "patch 1 of slide 'a' is missing" in faults
    assert f"patch 2 of slide 'a'{' is not what was written' if sums else ': truncated'}" in faults
    assert f"patch 0 of slide 'b' {'is not what' if sums else 'has 8 x 8 px, the header says 16'}" in faults
    assert "slide 'c' has 1 patches and 0.5 coordinates" in faults
    assert faults.count("\n") == 3


def test_damage_inside_of_a_patch_is_an_error_at_every_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", SLIDES)
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        value = bytearray(txn.get(b"a-1"))
        value[-40] ^= 1
        txn.put(b"a-1", bytes(value))
        txn.put(b"__crc32__/c", b"\0" * 6)
    with PatchStore(path) as store:
        assert store.read("a", [0, 2]) == [SLIDES["a"][i] for i in (0, 2)]
        with pytest.raises(UserError, match=r"x.lmdb: patch 1 of slide 'a' is not what was written \(its CRC-32"):
            store.read("a", [2, 1])
        with pytest.raises(UserError, match="slide 'c' has 1 patches and 1.5 checksums: damaged"):
            store.read("c", [0])
    assert main(["merge", str(tmp_path / "y.lmdb"), str(path)]) == 2


def test_verify_as_a_command_ends_with_status_1(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", SLIDES)
    damage(path)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "datasets.store", "verify", str(path), "--workers", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("slide 'a'") == 2
    assert "7 patches, 4 faults" in done.stdout


@pytest.mark.parametrize("published", [True, False])
def test_verify_does_not_decode_what_says_to_be_large(
    published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [patches(0, 1)[0], of_claimed_size(30_000)]
    path = (write_published if published else write)(tmp_path / "x.lmdb", {"a": images})
    decoded = []
    monkeypatch.setattr(jpeg, "decode", decoded.append)
    limit = "more than 4096 a side" if published else "the header says 16"
    assert verify(path).faults == [f"patch 1 of slide 'a' has 30000 x 30000 px, {limit}"]
    assert decoded == images[:1]


VERIFY_ENDLESSLY = """
import os, sys, time
sys.path.insert(0, {root!r})
from datasets.store import verify
def wait(store, slide, start, stop):
    if {dies} and slide == "b":
        os._exit(9)
    os.write(1, b"%d\\n" % os.getpid())  # in one piece, as both workers write
    time.sleep(0 if {dies} else 120)
    return []
verify._check_chunk = wait
verify.verify({path!r}, 2)
"""


def start_verify(path: Path, dies: bool) -> subprocess.Popen[str]:
    code = VERIFY_ENDLESSLY.format(root=str(Path(__file__).resolve().parents[1]), path=str(path), dies=dies)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_of_verify_end_with_it(number: signal.Signals, tmp_path: Path) -> None:
    process = start_verify(write(tmp_path / "x.lmdb", SLIDES), dies=False)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(number)
    try:
        # Workers hold the same pipe, which ends with the last of them.
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        raise
    assert process.returncode == -number


def test_a_process_of_verify_that_dies_is_a_sentence(tmp_path: Path) -> None:
    told = start_verify(write(tmp_path / "x.lmdb", SLIDES), dies=True).communicate(timeout=60)[1]
    assert "UserError" in told
    assert "x.lmdb: one of 2 processes died before all patches were checked" in told


def test_verify_of_an_empty_store_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(write(tmp_path / "x.lmdb", {})), "--workers=1"]) == 1
    assert "the store holds no slide" in capsys.readouterr().out


def test_verify_reads_published_files(tmp_path: Path) -> None:
    assert verify(write_published(tmp_path / "old.lmdb", SLIDES)).faults == []


def test_info_for_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.lmdb", SLIDES)
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["slides"], facts["patches"], facts["image_size_px"]) == (3, 7, 16)
    assert facts["header"]["mpp"] == 0.5
    assert main(["info", str(path)]) == 0
    told = capsys.readouterr().out
    assert "3 slides, 7 patches" in told
    assert "jpeg_quality: 80" in told
    assert main(["info", str(write(tmp_path / "none.lmdb", {}))]) == 0
    assert main(["info", str(tmp_path / "nothing.lmdb")]) == 2


INFO = SlideInfo(
    mpp=1.0,
    level=1,
    patch_size_px=32,
    source={"downsample": [2.0, 2.0], "level_dimensions_px": [500, 400], "level0_mpp": 0.25},
)


def test_export_to_clam(tmp_path: Path) -> None:
    coords = np.array([[0, 0], [64, 0], [128, 64]])
    with StoreWriter(tmp_path / "x.lmdb", StoreHeader(image_size_px=16)) as writer:
        writer.put_slide("a", SLIDES["a"][:3], coords, INFO)
    assert main(["export", str(tmp_path / "x.lmdb"), str(tmp_path / "out")]) == 0
    images = sorted((tmp_path / "out" / "imgs" / "a").iterdir())
    assert [p.name for p in images] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [p.read_bytes() for p in images] == SLIDES["a"][:3]
    with h5py.File(tmp_path / "out" / "patches" / "a.h5") as file:
        assert file["coords"].dtype == np.int64
        assert np.array_equal(file["coords"], coords)
        found = dict(file["coords"].attrs)
    assert (found["patch_size"], found["patch_level"], found["name"]) == (32, 1, "a")
    assert found["downsample"].tolist() == [2.0, 2.0]


def test_export_to_trident(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.lmdb", StoreHeader(image_size_px=16)) as writer:
        writer.put_slide("a", SLIDES["a"], np.zeros((4, 2), np.int64), INFO)
    assert main(["export", str(tmp_path / "x.lmdb"), str(tmp_path / "out"), "--layout", "trident"]) == 0
    with h5py.File(tmp_path / "out" / "patches" / "a_patches.h5") as file:
        found = dict(file["coords"].attrs)
    expected = {
        "patch_size": 16,
        "patch_size_level0": 64,
        "level0_magnification": 40,
        "target_magnification": 10,
        "overlap": 0,
        "level0_width": 1000,
        "level0_height": 800,
        "name": "a",
    }
    assert found == expected


@pytest.mark.parametrize("name", ["../evil", "..", "/tmp/evil", "a\\b"])
def test_names_in_a_store_do_not_choose_where_files_go(name: str, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "x.lmdb", StoreHeader()) as writer:
        writer.put_slide(name, SLIDES["c"])
    assert main(["export", str(tmp_path / "x.lmdb"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_subset_needs_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "x.lmdb", SLIDES)
    assert main(["subset", str(path), str(tmp_path / "y.lmdb")]) == 2
    assert "needs --slides" in capsys.readouterr().err
