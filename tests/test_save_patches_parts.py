"""The parts of save_patches.py: lists and names, tiles against OpenSlide, strips, resizing, options."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
for folder in (str(ROOT), str(ROOT / "CLAM")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from patch_jobs import make_plan, parse_shard, read_slide_ids  # noqa: E402
from patch_reading import PatchReader, strips  # noqa: E402
from patch_resize import TORCH_FROM_PATCHES, choose_kernel, resize  # noqa: E402
from patch_saving import _cuts  # noqa: E402
from patch_tiles import JpegTiles, TileError  # noqa: E402
from save_patches import main, make_header, parse_sizes, store_paths  # noqa: E402
from slide import RegionError  # noqa: E402
from slides import open_slide  # noqa: E402
from test_save_patches import Cohort, texture  # noqa: E402

from benchmarks.lmdb_writing import pyramid, write_pyramid  # noqa: E402
from datasets import jpeg  # noqa: E402
from utils.errors import UserError  # noqa: E402


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    path = tmp_path / "a.tif"
    write_pyramid(path, pyramid(texture(330, 250), 2), tile_px=64)
    return path


CORNERS = [(0, 0), (64, 128), (13, 7), (300, 230), (-20, -9), (329, 249), (400, 400), (-100, 0)]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("side", [64, 50, 200])
def test_tiles_give_the_pixels_of_openslide(slide: Path, level: int, side: int) -> None:
    with open_slide(slide) as handle:
        tiles = JpegTiles(slide, handle.level_dimensions)
        scale = 2**level
        for x, y in CORNERS:
            ours = tiles.read((x, y), level, side)
            assert np.array_equal(ours, handle.read_region((x * scale, y * scale), level, (side, side))), (x, y)
        tiles.close()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "oral-scc-06.tiff"])
def test_tiles_of_real_slides_are_those_of_openslide(real_data: Path, name: str) -> None:
    path = real_data / "wsi" / name
    with open_slide(path) as handle:
        tiles = JpegTiles(path, handle.level_dimensions)
        levels = [level for level in range(len(handle.level_dimensions)) if tiles.has(level)]
        assert 0 in levels, "level 0 of this slide is made of plain JPEG tiles"
        for level in levels[:2]:
            width, height = handle.level_dimensions[level]
            scale = round(handle.level_downsamples[level][0])
            for x, y in [(0, 0), (width // 2 + 3, height // 2 + 5), (width - 100, height - 100)]:
                theirs = handle.read_region((x * scale, y * scale), level, (256, 256))
                assert np.array_equal(tiles.read((x, y), level, 256), theirs), (level, x, y)
        tiles.close()


def test_cache_is_bounded(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patch_tiles.CACHE_BYTES", 3 * 64 * 64 * 3)
    with open_slide(slide) as handle:
        tiles = JpegTiles(slide, handle.level_dimensions)
        whole = tiles.read((0, 0), 0, 250)
        assert len(tiles._cache) <= 3
        assert np.array_equal(whole, handle.read_region((0, 0), 0, (250, 250)))
        tiles.close()


def test_other_formats_are_left_to_the_slide(tmp_path: Path, slide: Path) -> None:
    Image.fromarray(texture(100, 100)).save(tmp_path / "a.png")
    assert not JpegTiles(tmp_path / "a.png", ((100, 100),)).has(0)
    assert not JpegTiles(slide, ((331, 250),)).has(0)


def test_strips_give_what_single_reads_give(slide: Path) -> None:
    reader = PatchReader(slide)
    coords = np.array([[3, 3], [3, 43], [3, 83], [43, 3], [83, 3], [200, 100], [201, 140], [5, 5]])
    through_tiles = list(reader.read(coords, 0, 40))
    reader.tiles.close()
    through_strips = list(reader.read(coords, 0, 40))
    for (x, y), one, other in zip(coords.tolist(), through_tiles, through_strips, strict=True):
        single = reader.slide.read_region((x, y), 0, (40, 40))
        assert np.array_equal(one, single)  # type: ignore[arg-type]
        assert np.array_equal(other, single)  # type: ignore[arg-type]
    reader.close()


def test_strips_join_neighbours_in_line_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    column = [(0, y) for y in range(0, 500, 100)]
    corners = np.array([*column, (100, 0), (100, 100), (100, 350), (200, 350), (300, 351.4)], float)
    found = [(s.start, s.stop) for s in strips(corners, 100)]
    assert found == [(0, 5), (5, 7), (7, 9), (9, 10)]
    monkeypatch.setattr("patch_reading.MAX_STRIP_PX", 100 * 250)
    assert [(s.start, s.stop) for s in strips(np.array(column, float), 100)] == [(0, 2), (2, 4), (4, 5)]
    assert list(strips(np.zeros((0, 2)), 100)) == []


def test_corners_between_two_pixels_are_rounded_not_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "odd.tif"
    write_pyramid(path, pyramid(texture(331, 251), 2), tile_px=64)
    reader = PatchReader(path)
    coords = np.array([[4, 4], [105, 77], [201, 133]])
    whole = reader.tiles.read((0, 0), 1, 165)
    for through_tiles in (True, False):
        for (x, y), patch in zip(coords, reader.read(coords, 1, 30), strict=True):
            left, top = round(x / (331 / 165)), round(y / (251 / 125))
            if through_tiles:
                assert np.array_equal(patch, whole[top : top + 30, left : left + 30])
            else:
                assert np.abs(patch.astype(int) - whole[top : top + 30, left : left + 30]).mean() < 20  # type: ignore[union-attr]
        reader.tiles.close()


def test_a_level_that_is_not_there(slide: Path) -> None:
    with pytest.raises(RegionError, match="has 2 levels; the coordinates are for level 2"):
        list(PatchReader(slide).read(np.zeros((1, 2), np.int64), 2, 10))


def test_damaged_tiles_are_errors(slide: Path) -> None:
    data = bytearray(slide.read_bytes())
    data[8:30] = bytes(22)
    slide.write_bytes(data)
    tiles = JpegTiles(slide, ((330, 250), (165, 125)))
    with pytest.raises(TileError, match="tile 0"):
        tiles.read((0, 0), 0, 64)
    assert tiles.read((64, 0), 0, 64).any()


def test_a_tile_of_another_size_is_not_decoded(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = slide.read_bytes()
    place = data.index(b"\xff\xc0") + 5
    slide.write_bytes(data[:place] + 2 * (30_000).to_bytes(2, "big") + data[place + 4 :])
    tiles = JpegTiles(slide, ((330, 250), (165, 125)))
    monkeypatch.setattr(jpeg.backend(), "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(TileError, match="tile 0: the JPEG holds 30000 x 30000 px, not 64 x 64"):
        tiles.read((0, 0), 0, 64)


@pytest.mark.parametrize(("side", "target"), [(256, 224), (100, 33), (64, 96), (7, 7)])
def test_both_kernels_resize_as_pillow_does(side: int, target: int) -> None:
    image = texture(side + 8, side + 8)[4:-4, 4:-4]
    pillow = np.asarray(Image.fromarray(image).resize((target, target), Image.Resampling.BILINEAR)).astype(int)
    assert np.array_equal(resize(image, target, "pillow"), pillow)
    frozen = image.copy()
    frozen.flags.writeable = False
    for given in (image, frozen):
        ours = resize(given, target, "torch")
        assert ours.shape == (target, target, 3)
        assert np.abs(ours - pillow).max() <= 1


def test_kernel_depends_on_the_size_of_the_job() -> None:
    assert choose_kernel(TORCH_FROM_PATCHES - 1) == "pillow"
    assert choose_kernel(TORCH_FROM_PATCHES) == "torch"


@pytest.mark.parametrize("count", [0, 1, 64, 65, 2830, 100_000])
def test_tasks_cover_each_patch_once(count: int) -> None:
    cuts = _cuts(count, 2)
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(count))
    assert all(stop - start <= 1024 for start, stop in cuts)


@pytest.mark.parametrize(
    ("slide_id", "slide_ext", "name", "file"),
    [
        ("a.svs", None, "a", "a.svs"),
        ("a.svs", ".tif", "a", "a.tif"),
        ("a.svs", "tif", "a", "a.tif"),
        ("TCGA-01.4f2b-88.svs", None, "TCGA-01.4f2b-88", "TCGA-01.4f2b-88.svs"),
        ("a.ome.tiff", ".ome.tiff", "a.ome", "a.ome.tiff"),
        ("a.ome.tiff", None, "a.ome", "a.ome.tiff"),
        ("case 7", None, "case 7", "case 7.svs"),
        ("case 7", ".png", "case 7", "case 7.png"),
        ("é.PNG", None, "é", "é.PNG"),
    ],
)
def test_names_and_files(slide_id: str, slide_ext: str | None, name: str, file: str, tmp_path: Path) -> None:
    cohort = Cohort(tmp_path)
    cohort.names = [slide_id]
    cohort.write_csv()
    cohort.grid(name)
    job = make_plan(cohort.csv, tmp_path / "coords", cohort.slides, slide_ext).jobs[0]
    assert (job.name, job.slide.name, job.count) == (name, file, 20)


def test_order_is_that_of_the_list(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path)
    cohort.names = ["c.svs", "a.svs", "b.svs"]
    cohort.write_csv()
    for name in "abc":
        cohort.grid(name)
    plan = make_plan(cohort.csv, tmp_path / "coords", cohort.slides, None)
    assert [job.name for job in plan.jobs] == ["c", "a", "b"]


def test_faults_of_lists_and_coordinates_are_named(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path)
    cohort.names = ["a.svs", "b.svs", "a.tif", "c.svs"]
    cohort.write_csv()
    for name in "abc":
        cohort.grid(name)
    (tmp_path / "coords" / "patches" / "b.h5").write_bytes(b"junk")
    with pytest.raises(UserError) as caught:
        make_plan(cohort.csv, tmp_path / "coords", cohort.slides, None)
    assert "2 faults" in str(caught.value)
    assert "a.svs and a.tif" in str(caught.value)
    assert "b.h5" in str(caught.value)
    (tmp_path / "x.csv").write_text("slide,label\na,1\n")
    with pytest.raises(UserError, match="no column slide_id; its columns are slide, label"):
        read_slide_ids(tmp_path / "x.csv")
    (tmp_path / "y.csv").write_text("slide_id\nA.svs\n")
    with pytest.raises(UserError, match=r"none of its 1 slides .* Run CLAM/create_patches_fp\.py"):
        make_plan(tmp_path / "y.csv", tmp_path / "coords", cohort.slides, None)


@pytest.mark.parametrize("slide_id", ["../../precious", "..", ".", "...svs", "sub/case7", "a\\\\b"])
def test_names_that_lead_out_of_the_output_folder_are_refused(slide_id: str, tmp_path: Path) -> None:
    cohort = Cohort(tmp_path)
    cohort.add("a.svs")
    cohort.grid("a")
    precious = tmp_path / "precious" / "file"
    precious.parent.mkdir()
    precious.touch()
    cohort.grid("../../precious")
    cohort.names.append(slide_id)
    cohort.write_csv()
    with pytest.raises(UserError, match="no file name.*list slides by their file names"):
        make_plan(cohort.csv, tmp_path / "coords", cohort.slides, None)
    assert cohort.run("--save_img") == 2
    assert precious.is_file()


def test_sizes_names_and_shards() -> None:
    assert parse_sizes("256,224") == [256, 224]
    for text in ("a", "4", "256,256", ""):
        with pytest.raises(UserError, match="--img_size"):
            parse_sizes(text)
    out = Path("out")
    assert store_paths(out, "x", [0], None) == [out / "x.lmdb"]
    assert store_paths(out, "x", [256, 0], None) == [out / "x_256.lmdb", out / "x_full.lmdb"]
    assert store_paths(out, "x,y", [256, 224], "0/3") == [out / "x" / "0-of-3.lmdb", out / "y" / "0-of-3.lmdb"]
    for names in ("x,y,z", "x,x", "x,"):
        with pytest.raises(UserError, match="--lmdb_name"):
            store_paths(out, names, [256, 224], None)
    assert parse_shard("3/4") == (3, 4)
    for text in ("4/4", "1", "a/b", "-1/4"):
        with pytest.raises(UserError, match="--shard"):
            parse_shard(text)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path)
    cohort.names = ["a.svs", "b.svs"]
    cohort.write_csv()
    cohort.grid("a", target_patch_size_px=24, patch_level=1)
    cohort.grid("b", target_patch_size_px=32)
    jobs = make_plan(cohort.csv, tmp_path / "coords", cohort.slides, None).jobs
    with pytest.raises(UserError, match="patches of 24, 32 px: give --img_size"):
        make_header(jobs, 0, 80)
    header = make_header(jobs, 16, 80)
    assert (header.level, header.patch_size_px, header.image_size_px) == (None, 48, 16)


def test_all_faults_of_the_options_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--data_h5_dir", "no_h5", "--data_slide_dir", "no_slides", "--csv_path", "no.csv"]
    options += ["--patch_dir", str(tmp_path), "--img_quality", "0", "--workers", "0"]
    assert main(options) == 2
    for text in ("6 faults", "--save_lmdb", "--img_quality 0", "--workers 0", "no_h5", "no_slides", "no.csv"):
        assert text in caplog.text
    assert list(tmp_path.iterdir()) == []
