"""The patching script as users meet it: lists, presets, bad slides, resuming, masks, shards."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "CLAM"))

import one_slide
import slide as slide_module
import survey
from batch import over_processes
from create_patches_fp import main
from params import SlideParams, find_preset, preset_names, read_preset
from process_list import Ledger, read_process_list

from utils.errors import UserError

GEOMETRY = ["--patch_size", "64", "--step_size", "64", "--a_t", "0.001", "--a_h", "0.001", "--workers", "1"]
EXACT = ["--mthresh", "1", "--close", "0"]
"""Contours as drawn: without the median filter, which rounds corners, and the closing."""


def tissue_image(box: tuple[int, int, int, int], size: tuple[int, int] = (400, 300)) -> np.ndarray:
    """Glass with one pink rectangle, box (x0, y0, x1, y1)."""
    image = np.full((size[1], size[0], 3), 243, np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = (200, 80, 150)
    return image


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "slides"
    folder.mkdir()
    for number, box in enumerate([(50, 50, 250, 200), (10, 20, 390, 280), (100, 100, 300, 250)]):
        Image.fromarray(tissue_image(box)).save(folder / f"s{number}.png")
    return folder


def run(source: Path, out: Path, *options: object) -> int:
    steps = ["--source", str(source), "--save_dir", str(out), "--seg", "--patch", *GEOMETRY]
    return main([*steps, *map(str, options)])


def table(out: Path, name: str = "process_list_autogen.csv") -> dict[str, dict[str, str]]:
    with (out / name).open(newline="") as file:
        return {row["slide_id"]: row for row in csv.DictReader(file)}


def coords(out: Path, name: str) -> list[list[int]]:
    with h5py.File(out / "patches" / f"{name}.h5") as file:
        return file["coords"][:].tolist()


def test_a_rectangle_gives_the_grid_one_expects(source, tmp_path):
    """Rectangle 50..249 x 50..199, corners every 64 px from 50; a patch needs a point at corner + 16 or + 48 in it.

    242 + 16 = 258 is beyond 249, 178 + 16 = 194 is within 199.
    """
    assert run(source, tmp_path, *EXACT) == 0
    assert coords(tmp_path, "s0") == [[x, y] for x in (50, 114, 178) for y in (50, 114, 178)]


def test_bad_slides_are_reported_and_the_others_done(source, tmp_path, caplog):
    (source / "broken.svs").write_bytes(b"not a slide")
    (source / "notes.txt").write_text("left alone")
    Image.fromarray(np.full((300, 400, 3), 243, np.uint8)).save(source / "blank.png")
    with caplog.at_level(logging.INFO):
        assert run(source, tmp_path) == 1
    rows = table(tmp_path)
    assert set(rows) == {"blank.png", "broken.svs", "s0.png", "s1.png", "s2.png"}
    assert rows["broken.svs"]["status"] == "failed"
    assert "broken.svs" in rows["broken.svs"]["reason"]
    assert rows["blank.png"]["status"] == "failed_seg"
    assert "--sthresh" in rows["blank.png"]["reason"]
    assert {rows[f"s{i}.png"]["status"] for i in range(3)} == {"processed"}
    assert [rows[n]["process"] for n in ("blank.png", "broken.svs", "s0.png")] == ["1", "1", "0"]
    assert "notes.txt" in caplog.text
    assert not (tmp_path / "patches" / "blank.h5").exists()
    assert (tmp_path / "masks" / "blank.jpg").exists()
    page = (tmp_path / "cohort.html").read_text()
    places = [page.index(f"<h2>{name}</h2>") for name in ("blank.png", "broken.svs", "s0.png")]
    assert places == sorted(places)
    assert page.count("data:image/jpeg;base64") == 4
    assert "src='http" not in page


def test_whatever_a_slide_raises_is_its_own_outcome(source, tmp_path, monkeypatch, caplog):
    original = survey.open_slide

    def odd(path):
        if path.stem == "s1":
            raise TypeError("odd metadata")
        return original(path)

    monkeypatch.setattr(survey, "open_slide", odd)
    monkeypatch.setattr(one_slide, "open_slide", odd)
    with caplog.at_level(logging.INFO):
        assert run(source, tmp_path) == 1
    assert [r["status"] for r in table(tmp_path).values()] == ["processed", "failed", "processed"]
    assert table(tmp_path)["s1.png"]["reason"] == "TypeError: odd metadata"
    assert "s1.png: TypeError: odd metadata" in caplog.text


def test_on_error_fail_stops_at_the_first(source, tmp_path):
    Image.fromarray(np.full((300, 400, 3), 243, np.uint8)).save(source / "a_blank.png")
    assert run(source, tmp_path, "--on_error", "fail") == 1
    assert [r["status"] for r in table(tmp_path).values()] == ["failed_seg", "tbp", "tbp", "tbp"]


def test_on_error_fail_stops_before_work_when_a_slide_does_not_open(source, tmp_path):
    (source / "z_broken.svs").write_bytes(b"not a slide")
    assert run(source, tmp_path / "out", "--on_error", "fail") == 2
    assert not (tmp_path / "out" / "patches").exists()


def test_no_patch_fits_is_said(source, tmp_path):
    assert run(source, tmp_path, "--patch_size", 512, "--use_padding", "false") == 1
    assert {r["status"] for r in table(tmp_path).values()} == {"no_patches"}
    assert "--patch_size" in table(tmp_path)["s0.png"]["reason"]


def test_a_corrupt_region_is_reported_and_the_rest_used(source, tmp_path, monkeypatch):
    """A tiled TIFF with one damaged tile: the slide is done without it, and every run says so."""
    monkeypatch.setattr(slide_module, "BLOCK_PX", 128)
    path = source / "t.tif"
    kinds = {"photometric": "rgb", "compression": "zlib", "tile": (128, 128), "metadata": None}
    tifffile.imwrite(path, tissue_image((20, 20, 380, 280)), **kinds)
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\xff" * count
    path.write_bytes(data)
    for status in ("processed", "already_exist"):
        assert run(source, tmp_path) == 1
        row = table(tmp_path)["t.tif"]
        assert (row["status"], row["corrupt_blocks"]) == (status, "1")
        assert "--seg_level" in row["reason"]
    found = coords(tmp_path, "t")
    # Tile 5 covers x 128..255, y 128..255.
    assert [c for c in found if c[0] > 256]
    assert not [c for c in found if 140 < c[0] < 180 and 140 < c[1] < 180]


def stamps(out: Path) -> list[int]:
    return [p.stat().st_mtime_ns for p in sorted((out / "patches").iterdir())]


def test_resume_by_parameters_not_by_existence(source, tmp_path):
    assert run(source, tmp_path) == 0
    first, before = coords(tmp_path, "s0"), stamps(tmp_path)
    assert run(source, tmp_path) == 0
    assert stamps(tmp_path) == before
    assert {r["status"] for r in table(tmp_path).values()} == {"already_exist"}
    assert int(table(tmp_path)["s0.png"]["patches"]) == len(first)
    assert run(source, tmp_path, "--step_size", 32) == 0
    assert all(a > b for a, b in zip(stamps(tmp_path), before, strict=True))
    assert len(coords(tmp_path, "s0")) > len(first)
    now = stamps(tmp_path)
    assert run(source, tmp_path, "--step_size", 32, "--no_auto_skip") == 0
    assert all(a > b for a, b in zip(stamps(tmp_path), now, strict=True))


def test_a_half_written_h5_does_not_count_as_done(source, tmp_path):
    assert run(source, tmp_path) == 0
    path, whole = tmp_path / "patches" / "s1.h5", coords(tmp_path, "s1")
    path.write_bytes(path.read_bytes()[:700])
    assert run(source, tmp_path) == 0
    assert coords(tmp_path, "s1") == whole
    assert [r["status"] for r in table(tmp_path).values()] == ["already_exist", "processed", "already_exist"]


def test_a_changed_slide_is_done_again(source, tmp_path):
    assert run(source, tmp_path) == 0
    Image.fromarray(tissue_image((0, 0, 64, 64), (500, 300))).save(source / "s1.png")
    assert run(source, tmp_path) == 0
    assert coords(tmp_path, "s1") == [[0, 0]]


def test_stale_results_do_not_survive_a_run_that_finds_nothing(source, tmp_path):
    assert run(source, tmp_path, "--stitch") == 0
    assert run(source, tmp_path, "--stitch", "--a_t", 100) == 1
    assert not list((tmp_path / "patches").iterdir())
    assert not list((tmp_path / "stitches").iterdir())


def test_process_list_restricts_and_parameterises(source, tmp_path):
    text = "slide_id,process,contour_fn,a_t\ns0.png,1,basic,\ns1.png,0,,\ns2.png,1,,100\n"
    (tmp_path / "mine.csv").write_text(text)
    assert run(source, tmp_path, "--process_list", "mine.csv") == 1
    rows = table(tmp_path)
    assert [rows[f"s{i}.png"]["status"] for i in range(3)] == ["processed", "tbp", "failed_seg"]
    assert [rows[f"s{i}.png"]["contour_fn"] for i in range(3)] == ["basic", "four_pt", "four_pt"]
    assert rows["s0.png"]["a_t"] == "0.001"
    assert coords(tmp_path, "s0")
    assert not (tmp_path / "patches" / "s1.h5").exists()
    # The list it wrote goes in again: what failed is tried again, what is done is left alone.
    assert run(source, tmp_path, "--process_list", "process_list_autogen.csv") == 1
    assert table(tmp_path)["s1.png"]["status"] == "tbp"


def test_process_list_of_a_spreadsheet_with_names_without_extension(source, tmp_path):
    (tmp_path / "mine.csv").write_text("slide_id;process;contour_fn\ns0;1;basic\ns1.png;0;\n")
    assert run(source, tmp_path, "--process_list", "mine.csv") == 0
    assert {name: row["status"] for name, row in table(tmp_path).items()} == {"s0.png": "processed", "s1.png": "tbp"}
    (tmp_path / "other.csv").write_text("slide;process\ns0.png;1\n")
    with pytest.raises(UserError, match="Its first line is 'slide;process'"):
        read_process_list(tmp_path / "other.csv", SlideParams())


def test_old_format_list_is_converted(source, tmp_path):
    """Column a: area in px of seg_level (0 here, 1 px = 1 level-0 px): 524,288 px are 2 units of 512 x 512."""
    (tmp_path / "old.csv").write_text("slide_id,process,status,seg_level,sthresh,a\ns0.png,1,tbp,0,20,524288\n")
    assert run(source, tmp_path, "--process_list", "old.csv") == 1
    row = table(tmp_path)["s0.png"]
    assert (row["a_t"], row["sthresh"], row["seg_level"], row["status"]) == ("2", "20", "0", "failed_seg")


def test_faults_of_a_list_come_all_at_once(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("slide_id,mthresh,contour_fn\na.svs,4,four_pt\nb.svs,x,four_pnt\n")
    with pytest.raises(UserError) as error:
        read_process_list(path, SlideParams())
    assert "row 2" in str(error.value)
    assert "row 3" in str(error.value)
    assert "mthresh is 4; it must be odd" in str(error.value)


@pytest.mark.parametrize("name", ["tcga", "tcga.csv", "bwh_biopsy", "bwh_resection", "tcga_nsclc"])
def test_presets_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_preset(name).is_file()


def test_preset_values_are_the_published_ones():
    tail = {"vis_level": -1, "seg_level": -1, "use_padding": True, "contour_fn": "four_pt", "use_otsu": False}
    numbers = ("sthresh", "mthresh", "close", "a_t", "a_h", "max_n_holes", "line_thickness")
    expected = {
        "bwh_biopsy": (15, 11, 2, 1, 1, 2, 50),
        "bwh_resection": (15, 11, 4, 100, 16, 8, 150),
        "tcga": (8, 7, 4, 16, 4, 8, 100),
        "tcga_nsclc": (8, 7, 4, 100, 16, 32, 120),
    }
    assert preset_names() == sorted(expected)
    for name, values in expected.items():
        found = read_preset(name)
        assert tuple(getattr(found, n) for n in numbers) == values
        assert {k: getattr(found, k) for k in tail} == tail


def test_own_preset_and_options_over_it(source, tmp_path):
    (tmp_path / "mine.csv").write_text("sthresh,a_t,contour_fn\n30,0.002,center\n")
    (tmp_path / "only.txt").write_text("s0\n")
    options = ["--preset", tmp_path / "mine.csv", "--a_t", "0.003", "--slide_list", tmp_path / "only.txt"]
    assert run(source, tmp_path, *options) == 0
    assert set(table(tmp_path)) == {"s0.png"}
    row = table(tmp_path)["s0.png"]
    assert (row["sthresh"], row["contour_fn"], row["a_t"]) == ("30", "center", "0.003")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "tgca"], "bwh_biopsy, bwh_resection, tcga, tcga_nsclc. Did you mean 'tcga'"),
        (["--contour_fn", "fourpt"], "contour_fn is 'fourpt'"),
        (["--mthresh", "8"], "mthresh is 8; it must be odd"),
        (["--patch_size", "0"], "--patch_size is 0; it must be above 0"),
        (["--shard", "4/4"], "--shard is 4/4"),
        (["--mpp_csv", "none.csv"], "--mpp_csv none.csv: there is no such file"),
        (["--process_list", "none.csv"], "there is no such file"),
        (["--masks", "nowhere"], "--masks nowhere: there is no such folder"),
    ],
)
def test_faults_of_the_user_end_with_a_sentence_and_status_2(source, tmp_path, caplog, options, message):
    assert run(source, tmp_path, *options) == 2
    assert message in caplog.text


def test_an_output_folder_that_cannot_be_made_ends_with_a_sentence_and_status_2(source, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert run(source, tmp_path / "file" / "out") == 2
    assert f"--save_dir {tmp_path / 'file' / 'out'}: cannot be written" in caplog.text


def test_a_list_that_cannot_be_written_ends_with_a_sentence_and_status_2(source, tmp_path, caplog, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "write_now_and_then", full)
    assert run(source, tmp_path) == 2
    assert "No space left on device" in caplog.text
    assert "the same command continues" in caplog.text


def test_patch_without_seg_and_slides_of_one_name(source, tmp_path, caplog):
    assert main(["--source", str(source), "--save_dir", str(tmp_path), "--patch"]) == 2
    assert "--patch needs contours" in caplog.text
    Image.fromarray(tissue_image((0, 0, 64, 64))).save(source / "s1.webp")
    assert run(source, tmp_path) == 2
    assert "s1.png and s1.webp" in caplog.text


def test_mpp_per_slide_from_a_csv(source, tmp_path):
    (tmp_path / "mpp.csv").write_text("slide_id,mpp\ns0,0.25\ns1.png,0.5\n")
    assert run(source, tmp_path, "--mpp", "0.5", "--mpp_csv", tmp_path / "mpp.csv", *EXACT) == 1
    rows = table(tmp_path)
    assert "--mpp_csv" in rows["s2.png"]["reason"]
    assert (tmp_path / "masks" / "s2.jpg").exists()
    with h5py.File(tmp_path / "patches" / "s0.h5") as file:
        found = dict(file["coords"].attrs)
    assert (found["patch_size"], found["target_patch_size_px"]) == (128, 64)
    assert (found["level0_mpp"], found["requested_mpp"], found["resolved_mpp"]) == (0.25, 0.5, 0.5)
    assert found["mpp_source"] == "mpp_csv"
    assert rows["s1.png"]["read_size_px"] == "64"
    assert coords(tmp_path, "s0") == [[50, 50], [178, 50]]


def test_own_masks_and_geojson_round_trip(source, tmp_path):
    assert run(source, tmp_path / "a", "--geojson") == 0
    exported = json.loads((tmp_path / "a" / "geojson" / "s0.geojson").read_text())
    ring = exported["features"][0]["geometry"]["coordinates"][0]
    assert ring[0] == ring[-1]
    assert run(source, tmp_path / "b", "--masks", tmp_path / "a" / "geojson") == 0
    for name in ("s0", "s1", "s2"):
        assert coords(tmp_path / "b", name) == coords(tmp_path / "a", name)


def test_mask_images_of_any_scale(source, tmp_path):
    masks = tmp_path / "masks_in"
    masks.mkdir()
    mask = np.zeros((150, 200), np.uint8)
    mask[50:100, 50:100] = 255
    mask[70:80, 70:80] = 0
    Image.fromarray(mask).save(masks / "s0.png")
    Image.fromarray(np.full((50, 500), 255, np.uint8)).save(masks / "s1.png")
    assert run(source, tmp_path, "--masks", masks, "--patch_size", 20, "--step_size", 20) == 1
    # The hole 140..160 (level 0) covers the centre (150, 150) of the patch at (140, 140) and no other.
    expected = [[x, y] for x in range(100, 199, 20) for y in range(100, 199, 20) if (x, y) != (140, 140)]
    assert coords(tmp_path, "s0") == expected
    rows = table(tmp_path)
    assert "proportions" in rows["s1.png"]["reason"]
    assert "holds no s2" in rows["s2.png"]["reason"]


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[1, 2]",
        '{"type": "Polygon"}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 9], [9, 9], [0, 0]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1e12, 9], [9, 9], [0, 0]]]}',
        '{"type": "Polygon", "coordinates": []}',
        '{"type": "FeatureCollection", "features": []}',
    ],
)
def test_damaged_geojson_is_named(source, tmp_path, content):
    masks = tmp_path / "masks_in"
    masks.mkdir()
    (masks / "s0.geojson").write_text(content)
    assert run(source, tmp_path, "--masks", masks) == 1
    row = table(tmp_path)["s0.png"]
    assert row["status"] in ("failed", "failed_seg")
    assert "s0.geojson" in row["reason"]


def test_a_name_that_is_not_utf8_costs_that_slide_only(source, tmp_path):
    name = os.fsdecode(b"M\xfcller.png")
    try:
        (source / "s1.png").rename(source / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert run(source, tmp_path, "--stitch") == 1
    rows = table(tmp_path)
    assert {key: row["status"] for key, row in rows.items()} == {
        "M\\udcfcller.png": "failed",
        "s0.png": "processed",
        "s2.png": "processed",
    }
    assert "b'M\\xfcller.png' is not UTF-8" in rows["M\\udcfcller.png"]["reason"]
    assert "rename the file" in (tmp_path / "cohort.html").read_text(encoding="utf-8")


def test_names_in_other_scripts_and_with_dots(source, tmp_path):
    (source / "s0.png").rename(source / "Gewebe Ä.組織.v2.png")
    assert run(source, tmp_path, "--stitch", "--geojson") == 0
    assert coords(tmp_path, "Gewebe Ä.組織.v2")
    for place in ("masks/{}.jpg", "stitches/{}.jpg", "geojson/{}.geojson"):
        assert (tmp_path / place.format("Gewebe Ä.組織.v2")).is_file()


def test_shards_cover_the_cohort_once(source, tmp_path):
    assert [run(source, tmp_path, "--shard", f"{i}/2") for i in range(2)] == [0, 0]
    names = [list(table(tmp_path, f"process_list_autogen_{i}of2.csv")) for i in range(2)]
    assert names == [["s0.png", "s2.png"], ["s1.png"]]
    before = stamps(tmp_path)
    assert run(source, tmp_path) == 0
    assert stamps(tmp_path) == before
    assert [r["status"] for r in table(tmp_path).values()] == ["already_exist"] * 3


def test_stitch_alone_draws_coordinates_that_are_there(source, tmp_path):
    assert run(source, tmp_path) == 0
    mask = (tmp_path / "masks" / "s0.jpg").stat().st_mtime_ns
    options = ["--source", str(source), "--save_dir", str(tmp_path), "--stitch", "--workers", "1"]
    assert main(options) == 0
    assert (tmp_path / "masks" / "s0.jpg").stat().st_mtime_ns == mask
    stitch = np.asarray(Image.open(tmp_path / "stitches" / "s0.jpg"))
    assert stitch[:40].max() < 20
    assert stitch[60:180, 60:180].mean() > 100


def double_or_die(number: int) -> int:
    if number == 3:
        os._exit(9)
    return 2 * number


def test_a_worker_that_dies_costs_its_own_job_only():
    found = dict(over_processes(double_or_die, list(range(6)), 2))
    assert found == {i: None if i == 3 else 2 * i for i in range(6)}


def test_two_processes_give_what_one_gives(source, tmp_path):
    (source / "broken.svs").write_bytes(b"not a slide")
    assert run(source, tmp_path / "one") == 1
    assert run(source, tmp_path / "two", "--workers", 2) == 1
    assert table(tmp_path / "one") == table(tmp_path / "two")
    for name in ("s0", "s1", "s2"):
        assert coords(tmp_path / "one", name) == coords(tmp_path / "two", name)
