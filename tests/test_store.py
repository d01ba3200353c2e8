"""Reading stores: round trips, published files, shards, other processes, and what is said of bad ones."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import lmdb
import numpy as np
import pytest

from datasets import jpeg
from datasets.store import PatchStore, SlideInfo, StoreHeader, StoreWriter
from utils.errors import UserError

HEADER = StoreHeader(mpp=0.5, level=0, patch_size_px=32, image_size_px=16, jpeg_quality=80, parameters={"a": [1, "b"]})


def patches(seed: int, count: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [jpeg.encode(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def write(path: Path, slides: dict[str, list[bytes]], header: StoreHeader = HEADER) -> Path:
    with StoreWriter(path, header) as writer:
        for slide, images in slides.items():
            coords = np.arange(2 * len(images)).reshape(-1, 2) * 1000
            writer.put_slide(slide, images, coords, SlideInfo(mpp=0.25, level=1, source={"file": f"{slide}.svs"}))
    return path


def write_published(path: Path, slides: dict[str, list[bytes]], value: object = bytes) -> Path:
    """The layout of the published program: pickled bytes, no header."""
    counts = {slide: len(images) for slide, images in slides.items()}
    keys = [f"{slide}-{i}".encode() for slide, n in counts.items() for i in range(n)]
    with lmdb.open(str(path), subdir=False, map_size=1 << 24, lock=False) as env, env.begin(write=True) as txn:
        for slide, images in slides.items():
            for index, image in enumerate(images):
                txn.put(f"{slide}-{index}".encode(), image if value is None else pickle.dumps(value(image)))  # type: ignore[operator]
        metadata = {"__keys__": keys, "__len__": len(keys), "__slide__": list(counts), "__pn__": counts}
        for name, content in metadata.items():
            txn.put(name.encode(), pickle.dumps(content))
    return path


SLIDES = {"b": patches(1, 3), "a-1": patches(2, 5), "a": patches(3, 12), "é ü": patches(4, 1), "none": []}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with PatchStore(write(tmp_path / "x.lmdb", SLIDES)) as store:
        assert store.slides == list(SLIDES)
        assert store.counts == {slide: len(images) for slide, images in SLIDES.items()}
        assert store.header == HEADER
        assert store.image_size_px == 16
        for slide, images in SLIDES.items():
            assert store.read(slide, range(len(images))) == images
            coords = store.coords(slide)
            assert coords is not None
            assert coords.dtype == np.int64
            assert coords.tolist() == [[2000 * i, 2000 * i + 1000] for i in range(len(images))]
        info = store.info("a")
        assert info == SlideInfo(count=12, mpp=0.25, level=1, source={"file": "a.svs"})


def test_order_of_reading_is_the_order_asked_for(tmp_path: Path) -> None:
    store = PatchStore(write(tmp_path / "x.lmdb", SLIDES))
    images = SLIDES["a"]
    assert store.read("a", [11, 1, 1, 10]) == [images[11], images[1], images[1], images[10]]
    assert store.read("a", np.array([2, 0])) == [images[2], images[0]]


def test_published_metadata_is_what_plain_readers_expect(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", SLIDES)
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
        counts = pickle.loads(txn.get(b"__pn__"))
        keys = pickle.loads(txn.get(b"__keys__"))
        assert counts == {slide: len(images) for slide, images in SLIDES.items()}
        assert pickle.loads(txn.get(b"__slide__")) == list(SLIDES)
        assert pickle.loads(txn.get(b"__len__")) == len(keys) == 21
        assert keys == [f"{slide}-{i}".encode() for slide, n in counts.items() for i in range(n)]
        assert all(pickle.loads(txn.get(key)).dtype == np.uint8 for key in keys)
    assert [p.name for p in tmp_path.iterdir()] == ["x.lmdb"]


@pytest.mark.parametrize(
    "value", [bytes, lambda data: np.frombuffer(data, np.uint8), None], ids=["bytes", "array", "raw"]
)
def test_published_files_are_read(value: object, tmp_path: Path) -> None:
    path = write_published(tmp_path / "old.lmdb", {"a": SLIDES["a"]}, value)
    store = PatchStore(path)
    assert store.read("a", range(12)) == SLIDES["a"]
    assert (store.header, store.coords("a"), store.info("a"), store.image_size_px) == (None, None, None, 16)


def test_shards_are_one_store(tmp_path: Path) -> None:
    whole = PatchStore(write(tmp_path / "x.lmdb", SLIDES))
    names = list(SLIDES)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in (0, 1):
        write(folder / f"{number}-of-2.lmdb", {name: SLIDES[name] for name in names[number::2]})
    shards = PatchStore(folder)
    assert sorted(shards.slides) == sorted(names)
    assert (shards.counts, shards.header, shards.fingerprint) == (whole.counts, whole.header, whole.fingerprint)
    assert all(shards.read(name, range(len(SLIDES[name]))) == SLIDES[name] for name in names)


def test_fingerprint_changes_with_slides_and_counts(tmp_path: Path) -> None:
    prints = [
        PatchStore(write(tmp_path / f"{number}.lmdb", slides)).fingerprint
        for number, slides in enumerate([{"a": patches(0, 2)}, {"a": patches(0, 3)}, {"b": patches(0, 2)}, {}])
    ]
    assert len(set(prints)) == 4
    assert PatchStore(write(tmp_path / "again.lmdb", {"a": patches(9, 2)})).fingerprint == prints[0]


def read_one(store: PatchStore) -> list[bytes]:
    return store.read("a", [7])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_a_store_that_was_in_use(method: str, tmp_path: Path) -> None:
    store = PatchStore(write(tmp_path / "x.lmdb", {"a": SLIDES["a"]}))
    assert read_one(store) == [SLIDES["a"][7]]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(read_one, (store,)) == [SLIDES["a"][7]]
    assert read_one(store) == [SLIDES["a"][7]]


def inherited(queue: multiprocessing.Queue[list[bytes]]) -> None:
    queue.put(read_one(OPENED[0]))


OPENED: list[PatchStore] = []


def test_a_forked_process_does_not_use_the_parents_handle(tmp_path: Path) -> None:
    store = PatchStore(write(tmp_path / "x.lmdb", {"a": SLIDES["a"]}))
    read_one(store)
    OPENED[:] = [store]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=inherited, args=(queue,))
    process.start()
    assert queue.get(timeout=20) == [SLIDES["a"][7]]
    process.join()
    assert read_one(store) == [SLIDES["a"][7]]


def test_two_readers_of_one_file_in_one_process(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", {"a": SLIDES["a"]})
    one, two = PatchStore(path), PatchStore(path)
    assert read_one(one) == read_one(two)
    one.close()
    assert read_one(two) == [SLIDES["a"][7]]


def test_missing_patch_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", {"a": SLIDES["a"]})
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.delete(b"a-4")
    with pytest.raises(UserError, match=r"x\.lmdb: patch 4 of slide 'a' is missing"):
        PatchStore(path).read("a", [0, 4])
    with pytest.raises(UserError, match="patch 12 of slide 'a'"):
        PatchStore(path).read("a", [12])


def test_unknown_slide_gets_near_matches(tmp_path: Path) -> None:
    store = PatchStore(write(tmp_path / "x.lmdb", {"TCGA-01": patches(0, 1)}))
    with pytest.raises(UserError, match="Did you mean 'TCGA-01'"):
        store.read("TCGA-1", [0])


def test_bad_files_get_a_sentence(tmp_path: Path) -> None:
    half = write_published(tmp_path / "half.lmdb", {"a": SLIDES["a"]})
    with lmdb.open(str(half), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.delete(b"__pn__")
    (tmp_path / "text.lmdb").write_text("x" * 10_000)
    (tmp_path / "empty.lmdb").touch()
    (tmp_path / "folder").mkdir()
    cases = {
        "half.lmdb": "no __pn__ entry, so the file is half-written",
        "text.lmdb": "not an LMDB file",
        "empty.lmdb": "it is empty",
        "folder": "holds no .lmdb file",
        "hlaf.lmdb": r"no such store .* Did you mean 'half.lmdb'",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            PatchStore(tmp_path / name)
        assert str(caught.value).count(str(tmp_path)) == 1


def test_a_file_that_is_no_store_gets_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "four.csv"
    path.write_text("case,slide,label,fold\n")
    with pytest.raises(UserError, match=r"four.csv: is not an LMDB file, so no store of patches. Give the store that"):
        PatchStore(path)

    def refuse(name: str, **_: object) -> None:
        raise lmdb.Error(f"{name}: Too many open files")

    monkeypatch.setattr("datasets.store.reader.lmdb.open", refuse)
    with pytest.raises(UserError, match=r"four.csv: cannot be opened as an LMDB file: Too many open files\.$"):
        PatchStore(path)


@pytest.mark.parametrize("folder", [True, False])
def test_a_file_that_was_cut_off_is_refused_not_read(folder: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "data.mdb", {"a": SLIDES["a"]})
    given = tmp_path if folder else path
    size = path.stat().st_size
    os.truncate(path, size + 5000)
    assert len(PatchStore(given).read("a", range(12))) == 12
    for left in (size - 1, size // 2, 8192, 5000):
        os.truncate(path, left)
        with pytest.raises(UserError, match=rf"data\.mdb: is {size - left:,} bytes shorter than it says: a copy"):
            PatchStore(given)
        with pytest.raises(UserError, match="shorter than it says"):
            StoreWriter(path, HEADER)


def test_a_whole_file_may_end_before_its_last_page(tmp_path: Path) -> None:
    """LMDB does not write pages at the end that were taken and freed within one transaction."""
    short = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        path = write_published(tmp_path / f"{seed}.lmdb", {"a": SLIDES["a"]})
        with lmdb.open(str(path), subdir=False, map_size=1 << 26, lock=False, sync=False) as env:
            for _ in range(30):
                with env.begin(write=True) as txn:
                    for key in rng.integers(0, 600, rng.choice([5, 50, 300])):
                        if rng.random() < 0.6:
                            txn.put(b"x%d" % key, bytes(rng.choice([5, 2000, 10_000])))
                        else:
                            txn.delete(b"x%d" % key)
                with env.begin() as txn:
                    held = sum(len(value) for _, value in txn.cursor())
                ends_early = path.stat().st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]
                if ends_early:
                    break
        assert held
        assert PatchStore(path).read("a", range(12)) == SLIDES["a"]
        if ends_early:
            short += 1
            os.truncate(path, path.stat().st_size // 2)
            with pytest.raises(UserError, match="shorter than it says"):
                PatchStore(path)
    assert short


def test_shards_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.lmdb", {"a": patches(0, 1)})
    write(tmp_path / "1.lmdb", {"a": patches(0, 1)})
    with pytest.raises(UserError, match=r"1\.lmdb: slide 'a' is also in .*0\.lmdb"):
        PatchStore(tmp_path)
    (tmp_path / "1.lmdb").unlink()
    write(tmp_path / "1.lmdb", {"b": patches(0, 1)}, StoreHeader(image_size_px=32))
    with pytest.raises(UserError, match="image_size_px: 32, not 16"):
        PatchStore(tmp_path)


@pytest.mark.parametrize(
    "record", [b"{", b"[]", b'{"image_size_px": "64"}', b'{"version": null}', b'{"parameters": 1}', b'{"level": true}']
)
def test_damaged_headers_are_refused(record: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", {"a": patches(0, 1)})
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.put(b"__header__", record)
    with pytest.raises(UserError, match=r"x\.lmdb: a record of the store"):
        PatchStore(path)


def test_unknown_fields_of_later_programs_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "x.lmdb", {"a": patches(0, 1)})
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.put(b"__header__", b'{"version": 1, "image_size_px": 16, "later": [1]}')
    assert PatchStore(path).header == StoreHeader(image_size_px=16)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="version 2 is newer than 1"):
        PatchStore(write(tmp_path / "x.lmdb", {}, StoreHeader(version=2)))
