"""CLAM/save_patches.py as a whole: exact pixels, continuing, faulty slides, shards, several sizes."""

from __future__ import annotations

import csv
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
for folder in (str(ROOT), str(ROOT / "CLAM")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import patch_pool  # noqa: E402
import patch_saving  # noqa: E402
from save_patches import main  # noqa: E402
from slides import open_slide  # noqa: E402

from benchmarks.lmdb_writing import pyramid, write_pyramid  # noqa: E402
from datasets import jpeg  # noqa: E402
from datasets.store import PatchStore  # noqa: E402

PATCH_PX = 48


def texture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours that differ everywhere."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


class Cohort:
    """Slides with coordinates in a folder, as create_patches_fp.py leaves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slides = folder / "slides"
        self.slides.mkdir(parents=True)
        (folder / "coords" / "patches").mkdir(parents=True)
        self.names: list[str] = []

    @property
    def csv(self) -> Path:
        return self.folder / "coords" / "process_list_autogen.csv"

    def add(self, name: str, image: np.ndarray | None = None, seed: int = 0) -> Path:
        """A slide; tiled JPEG pyramid for .tif and .svs, else an ordinary image."""
        path = self.slides / name
        image = texture(330, 250, seed) if image is None else image
        if path.suffix in (".tif", ".svs"):
            write_pyramid(path, pyramid(image, 2), tile_px=64)
        else:
            Image.fromarray(image).save(path)
        self.names.append(name)
        self.write_csv()
        return path

    def write_csv(self) -> None:
        with open(self.csv, "w", newline="") as file:
            csv.writer(file).writerows([["slide_id", "process", "status"], *([n, 0, "processed"] for n in self.names)])

    def grid(self, name: str, step: int = 50, columns: int = 5, rows: int = 4, **attributes: Any) -> np.ndarray:
        """Writes coordinates of a grid that begins at (7, 5)."""
        coords = np.array([(7 + x * step, 5 + y * step) for x in range(columns) for y in range(rows)]).reshape(-1, 2)
        with h5py.File(self.folder / "coords" / "patches" / f"{name}.h5", "w") as file:
            data = file.create_dataset("coords", data=coords)
            data.attrs.update({"patch_size": PATCH_PX, "patch_level": 0, "downsample": (1.0, 1.0), **attributes})
        return coords

    def options(self, *extra: str, out: str = "out") -> list[str]:
        return [
            *("--data_h5_dir", str(self.folder / "coords"), "--data_slide_dir", str(self.slides)),
            *("--csv_path", str(self.csv), "--patch_dir", str(self.folder / out), "--save_lmdb"),
            *("--workers", "1", *extra),
        ]

    def run(self, *extra: str, out: str = "out") -> int:
        return main(self.options(*extra, out=out))

    def statuses(self, name: str = "data", out: str = "out") -> dict[str, str]:
        with open(self.folder / out / f"{name}_status.csv", newline="") as file:
            return {row["slide_id"]: row["status"] for row in csv.DictReader(file)}


@pytest.fixture
def cohort(tmp_path: Path) -> Cohort:
    return Cohort(tmp_path)


def stored(path: Path, slide: str) -> list[bytes]:
    with PatchStore(path) as store:
        return store.read(slide, range(store.counts[slide]))


def expected(slide: Path, coords: np.ndarray, size: int, level: int = 0) -> list[bytes]:
    """Region by region through OpenSlide, Pillow's bilinear, quality 80."""
    images = []
    with open_slide(slide) as handle:
        for x, y in coords.tolist():
            patch = Image.fromarray(handle.read_region((x, y), level, (PATCH_PX, PATCH_PX)))
            images.append(jpeg.encode(np.asarray(patch.resize((size, size), Image.Resampling.BILINEAR)), 80))
    return images


@pytest.mark.parametrize("name", ["a.svs", "a.tif", "a.png"])
@pytest.mark.parametrize("size", [0, 32, 64])
def test_patches_are_those_of_the_slide(name: str, size: int, cohort: Cohort) -> None:
    """The last column runs over the slide's edge."""
    slide = cohort.add(name)
    coords = cohort.grid("a", columns=7)
    assert cohort.run("--img_size", str(size)) == 0
    path = cohort.folder / "out" / "data.lmdb"
    assert stored(path, "a") == expected(slide, coords, size or PATCH_PX)
    with PatchStore(path) as store:
        assert np.array_equal(store.coords("a"), coords)  # type: ignore[arg-type]
        assert store.image_size_px == (size or PATCH_PX)


def test_level_1_is_read_at_level_0_coordinates(cohort: Cohort) -> None:
    slide = cohort.add("a.svs", texture(512, 384))
    coords = cohort.grid("a", step=96, rows=3, patch_level=1, downsample=(2.0, 2.0)) - [1, 1]
    with h5py.File(cohort.folder / "coords" / "patches" / "a.h5", "r+") as file:
        file["coords"][:] = coords
    assert cohort.run("--img_size", "48") == 0
    assert stored(cohort.folder / "out" / "data.lmdb", "a") == expected(slide, coords, PATCH_PX, level=1)


def test_header_and_records(cohort: Cohort) -> None:
    slide = cohort.add("a.svs")
    facts = {"requested_mpp": 1.0, "resolved_mpp": 1.1, "level0_mpp": 0.55, "target_patch_size_px": 24}
    cohort.grid("a", level_dim=(330, 250), **facts)
    assert cohort.run("--img_quality", "70") == 0
    with PatchStore(cohort.folder / "out" / "data.lmdb") as store:
        header, info = store.header, store.info("a")
    assert header is not None
    assert info is not None
    assert (header.mpp, header.level, header.patch_size_px) == (1.0, 0, PATCH_PX)
    assert (header.image_size_px, header.jpeg_quality) == (24, 70)
    assert (info.count, info.mpp, info.level, info.patch_size_px) == (20, 1.1, 0, PATCH_PX)
    assert (info.source["file"], info.source["bytes"]) == ("a.svs", slide.stat().st_size)
    assert info.source["level_dimensions_px"] == [330, 250]


def test_resizing_changes_the_recorded_mpp(cohort: Cohort) -> None:
    cohort.add("a.svs")
    cohort.grid("a", resolved_mpp=0.5)
    assert cohort.run("--img_size", "24") == 0
    info = PatchStore(cohort.folder / "out" / "data.lmdb").info("a")
    assert info is not None
    assert info.mpp == 1.0


def test_several_sizes_in_one_pass_are_the_single_ones(cohort: Cohort) -> None:
    for name in ("a", "b"):
        cohort.add(f"{name}.svs", seed=ord(name))
        cohort.grid(name)
    assert cohort.run("--img_size", "32,24", "--lmdb_name", "my") == 0
    assert cohort.run("--img_size", "32,24", "--lmdb_name", "big,small") == 0
    assert cohort.run("--img_size", "24", out="single") == 0
    out = cohort.folder / "out"
    for name in ("a", "b"):
        single = stored(cohort.folder / "single" / "data.lmdb", name)
        assert stored(out / "my_24.lmdb", name) == stored(out / "small.lmdb", name) == single
        assert jpeg.image_size(stored(out / "my_32.lmdb", name)[0]) == (32, 32)


def test_finished_slides_are_skipped_and_changed_ones_written_again(cohort: Cohort) -> None:
    for name in ("a", "b"):
        cohort.add(f"{name}.svs", seed=ord(name))
        cohort.grid(name)
    assert cohort.run() == 0
    path = cohort.folder / "out" / "data.lmdb"
    before = stored(path, "a")
    coords = cohort.grid("b", columns=2)
    slide = cohort.add("c.svs", seed=9)
    cohort.grid("c")
    os.utime(slide.with_name("a.svs"), (1, 1))
    assert cohort.run() == 0
    assert cohort.statuses() == {"a": "skipped", "b": "done", "c": "done"}
    assert stored(path, "a") == before
    assert stored(path, "b") == expected(slide.with_name("b.svs"), coords, PATCH_PX)
    cohort.run("--no_auto_skip")
    assert set(cohort.statuses().values()) == {"done"}
    write_pyramid(slide, pyramid(texture(330, 250, 77), 2), tile_px=64)
    assert cohort.run() == 0
    assert cohort.statuses() == {"a": "skipped", "b": "skipped", "c": "done"}
    cohort.grid("a", patch_size=PATCH_PX // 2)
    assert cohort.run("--img_size", str(PATCH_PX)) == 0
    assert cohort.statuses() == {"a": "done", "b": "skipped", "c": "skipped"}


def test_faulty_slides_do_not_stop_the_others(cohort: Cohort, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "gone", "junk", "no_coords", "empty", "z"):
        cohort.add(f"{name}.svs", seed=ord(name[0]))
        if name != "no_coords":
            cohort.grid(name, columns=0 if name == "empty" else 5)
    (cohort.slides / "gone.svs").unlink()
    (cohort.slides / "junk.svs").write_bytes(b"II*\0 not a slide")
    assert cohort.run("--img_size", "16") == 1
    expected_states = {"a": "done", "gone": "failed", "junk": "failed", "empty": "failed", "z": "done"}
    assert cohort.statuses() == {**expected_states, "no_coords.svs": "no_coordinates"}
    assert "gone.svs" in caplog.text
    with PatchStore(cohort.folder / "out" / "data.lmdb") as store:
        assert sorted(store.slides) == ["a", "z"]
    assert cohort.run("--img_size", "16", "--on_error", "fail", out="other") == 2
    assert "failed" in cohort.statuses(out="other").values()


def test_a_slide_without_coordinates_fails_and_leaves_what_is_stored(cohort: Cohort) -> None:
    for name in "ab":
        cohort.add(f"{name}.svs", seed=ord(name))
        cohort.grid(name, columns=2 if name == "a" else 0)
    assert cohort.run() == 1
    assert cohort.statuses() == {"a": "done", "b": "failed"}
    path, status = cohort.folder / "out" / "data.lmdb", cohort.folder / "out" / "data_status.csv"
    assert PatchStore(path).slides == ["a"]
    assert "no patches" in status.read_text()
    assert "remove the slide from the list" in status.read_text()
    before = stored(path, "a")
    cohort.grid("a", columns=0)
    assert cohort.run() == 1
    assert cohort.statuses() == {"a": "failed", "b": "failed"}
    assert stored(path, "a") == before
    assert cohort.run("--on_error", "fail") == 2


def test_on_error_fail_stops_at_a_slide_that_is_not_there(cohort: Cohort) -> None:
    for name in "ab":
        cohort.add(f"{name}.svs")
        cohort.grid(name)
    (cohort.slides / "a.svs").unlink()
    assert cohort.run("--on_error", "fail") == 2
    assert "b" not in cohort.statuses()


def damage_tile(slide: Path) -> None:
    """Zeroes the middle of the file: tiles of level 0."""
    data = bytearray(slide.read_bytes())
    data[len(data) // 4 : len(data) // 4 + 900] = bytes(900)
    slide.write_bytes(data)


def test_a_corrupt_region_fails_the_slide_or_stays_black(cohort: Cohort) -> None:
    slide = cohort.add("a.svs")
    cohort.grid("a")
    damage_tile(slide)
    assert cohort.run() == 1
    assert cohort.statuses() == {"a": "failed"}
    assert "--bad_region blank" in (cohort.folder / "out" / "data_status.csv").read_text()
    assert PatchStore(cohort.folder / "out" / "data.lmdb").slides == []
    assert cohort.run("--bad_region", "blank") == 0
    with PatchStore(cohort.folder / "out" / "data.lmdb") as store:
        info = store.info("a")
        assert info is not None
        blank = info.source["blank_patches"]
        assert 0 < len(blank) < 20
        means = [jpeg.decode(data).mean() for data in store.read("a", range(20))]
    assert [index for index, mean in enumerate(means) if mean < 1] == blank


def test_shards_together_are_the_whole(cohort: Cohort) -> None:
    for name in "abcde":
        cohort.add(f"{name}.svs", seed=ord(name))
        cohort.grid(name, columns=2)
    assert cohort.run(out="whole") == 0
    assert [cohort.run("--shard", f"{i}/2") for i in (0, 1)] == [0, 0]
    whole, shards = PatchStore(cohort.folder / "whole" / "data.lmdb"), PatchStore(cohort.folder / "out" / "data")
    assert [f.name for f in shards.files] == ["0-of-2.lmdb", "1-of-2.lmdb"]
    assert (shards.fingerprint, shards.header) == (whole.fingerprint, whole.header)
    assert all(shards.read(s, range(8)) == whole.read(s, range(8)) for s in "abcde")
    assert cohort.run("--shard", "2/2") == 2


def test_jpeg_folders(cohort: Cohort) -> None:
    slide = cohort.add("a.svs")
    coords = cohort.grid("a")
    assert cohort.run("--save_img", "--img_size", "24") == 0
    folder = cohort.folder / "out" / "imgs" / "a"
    images = sorted(folder.glob("*.jpg"), key=lambda p: int(p.stem))
    assert [p.read_bytes() for p in images] == expected(slide, coords, PATCH_PX)
    assert [p.name for p in folder.parent.iterdir()] == ["a"]
    assert cohort.run("--save_img", "--img_size", "24") == 0
    assert cohort.statuses() == {"a": "skipped"}


def test_left_over_work_folders_are_those_of_the_same_slide(cohort: Cohort) -> None:
    cohort.add("a.svs")
    cohort.grid("a")
    images = cohort.folder / "out" / "imgs"
    own, other = images / ".a.123.tmp", images / ".a.b.123.tmp"
    own.mkdir(parents=True)
    other.mkdir()
    assert cohort.run("--save_img") == 0
    assert (own.exists(), other.exists()) == (False, True)


def test_an_extension_that_the_slides_do_not_have(cohort: Cohort, caplog: pytest.LogCaptureFixture) -> None:
    cohort.add("a.png")
    cohort.grid("a")
    assert cohort.run("--slide_ext", ".svs") == 2
    assert "1 of 1 slides: there is no a.svs" in caplog.text
    assert "give --slide_ext .png" in caplog.text
    assert cohort.run("--slide_ext", "png") == 0


def test_jpeg_folders_of_another_quality_are_written_anew(cohort: Cohort) -> None:
    cohort.add("a.svs")
    cohort.grid("a")
    options = [option for option in cohort.options("--save_img") if option != "--save_lmdb"]
    image = cohort.folder / "out" / "imgs" / "a" / "0.jpg"
    sizes = []
    for quality, status in ((80, "done"), (80, "skipped"), (10, "done")):
        assert main([*options, "--img_quality", str(quality)]) == 0
        assert cohort.statuses() == {"a": status}
        sizes.append(image.stat().st_size)
    assert sizes[2] < sizes[1] == sizes[0]
    # Folders of older versions hold the slide's fingerprint only: nothing says how their images were made.
    fingerprint = image.with_name(".fingerprint")
    fingerprint.write_text(fingerprint.read_text().split("\n")[0])
    assert main([*options, "--img_quality", "10"]) == 0
    assert cohort.statuses() == {"a": "done"}


def test_coordinates_of_trident_are_read(cohort: Cohort) -> None:
    cohort.add("a.svs")
    coords = np.array([[0, 0], [64, 64]])
    with h5py.File(cohort.folder / "coords" / "patches" / "a_patches.h5", "w") as file:
        data = file.create_dataset("coords", data=coords)
        data.attrs.update({"patch_size": 32, "patch_size_level0": 64, "level0_magnification": 40})
    assert cohort.run() == 0
    with PatchStore(cohort.folder / "out" / "data.lmdb") as store:
        assert store.image_size_px == 32
        info = store.info("a")
    assert info is not None
    assert info.patch_size_px == 64


@pytest.mark.parametrize("workers", ["1", "3"])
def test_order_does_not_depend_on_workers(workers: str, cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_saving, "TASK_PATCHES", (3, 5))
    slides = {name: cohort.add(f"{name}.svs", seed=ord(name)) for name in "ab"}
    coords = {name: cohort.grid(name) for name in "ab"}
    assert cohort.run("--workers", workers) == 0
    for name in "ab":
        assert stored(cohort.folder / "out" / "data.lmdb", name) == expected(slides[name], coords[name], PATCH_PX)


def test_spawned_workers_do_the_same(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_pool, "START_METHOD", "spawn")
    slide = cohort.add("a.svs")
    coords = cohort.grid("a")
    assert cohort.run("--img_size", "32") == 0
    assert stored(cohort.folder / "out" / "data.lmdb", "a") == expected(slide, coords, 32)


def test_a_worker_that_dies_costs_its_slides_only(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcdef":
        cohort.add(f"{name}.svs", seed=ord(name))
        cohort.grid(name)
    original = patch_pool.perform

    def deadly(task: Any, reader: Any) -> Any:
        if task.slide.stem == "b":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(task, reader)

    monkeypatch.setattr(patch_pool, "perform", deadly)
    assert cohort.run("--workers", "3") == 1
    statuses = cohort.statuses()
    assert statuses["b"] == "failed"
    assert list(statuses.values()).count("done") >= 4
    monkeypatch.setattr(patch_pool, "perform", original)
    assert cohort.run("--workers", "3") == 0
    assert len(PatchStore(cohort.folder / "out" / "data.lmdb").slides) == 6


@pytest.mark.parametrize("error", [IndexError("tuple index out of range"), TypeError("odd"), cv2.error("odd")])
def test_whatever_a_slide_raises_is_its_own_failure(
    error: Exception, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        cohort.add(f"{name}.png", seed=ord(name))
        cohort.grid(name)
    original = patch_pool.PatchReader

    def odd(path: Path) -> Any:
        if path.stem == "a":
            raise error
        return original(path)

    monkeypatch.setattr(patch_pool, "PatchReader", odd)
    assert cohort.run() == 1
    assert cohort.statuses() == {"a": "failed", "b": "done", "c": "done"}
    assert f"{type(error).__name__}: {error}" in (cohort.folder / "out" / "data_status.csv").read_text()


def test_when_all_workers_die_the_run_ends_with_the_remedy(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cohort.add("a.svs")
    cohort.grid("a")
    monkeypatch.setattr(patch_pool, "perform", lambda task, reader: os._exit(3))
    with caplog.at_level(logging.ERROR):
        assert cohort.run() == 2
    assert "fewer --workers" in caplog.text


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc, which is not here")
def test_killed_runs_continue_to_the_same_store_and_leave_no_process(cohort: Cohort) -> None:
    names = [f"s{number}" for number in range(40)]
    image = cohort.add("s0.svs").read_bytes()
    for name in names:
        (cohort.slides / f"{name}.svs").write_bytes(image)
        cohort.grid(name, step=12, columns=20, rows=10)
    cohort.names = [f"{name}.svs" for name in names]
    cohort.write_csv()
    command = [sys.executable, str(ROOT / "CLAM" / "save_patches.py"), *cohort.options("--workers", "2")]
    rng = np.random.default_rng(1)
    progress = cohort.folder / "out" / "data_progress.txt"
    finished: list[str] = []
    for _ in range(3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if progress.is_file() and len(progress.read_text().split()) > len(finished):
                break
            time.sleep(0.002)
        workers = children(process.pid)
        time.sleep(float(rng.uniform(0, 0.02)))
        process.kill()
        process.wait()
        before, finished = finished, PatchStore(cohort.folder / "out" / "data.lmdb").slides
        assert finished[: len(before)] == before
    assert 3 <= len(finished) < 40, "the kills came in the middle"
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.05)
    assert cohort.run("--workers", "2") == 0
    assert cohort.run(out="straight") == 0
    for name in names:
        straight = stored(cohort.folder / "straight" / "data.lmdb", name)
        assert stored(cohort.folder / "out" / "data.lmdb", name) == straight
