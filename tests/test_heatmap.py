"""Attention files and what is drawn from them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import TinyCohort, make_tiny_cohort

import main
from datasets.store import PatchStore

sys.path.append(str(Path(__file__).resolve().parents[1] / "CLAM"))

import heatmap


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_patch_of_the_test_bags_has_its_attention(tiny: TinyCohort, tmp_path: Path) -> None:
    options = tiny.options(
        f"--output_path={tmp_path}", "--save_attention", "--test_type=both", "--num_epoch=1", "--mm=0.9"
    )
    assert main.main(options) == 0
    out, store = tmp_path / "default" / "default", PatchStore(tiny.high)
    tested = [row["id"] for row in rows_of(out / "fold_0_test_predictions.csv")]
    for weights in ("fold_0", "fold_0_ema"):
        files = sorted((out / "attention" / weights).iterdir())
        assert [file.stem for file in files] == sorted(tested)
        for file in files:
            rows, corners = rows_of(file), store.coords(file.stem)
            assert [row["patch"] for row in rows] == [str(i) for i in range(store.counts[file.stem])]
            assert sum(float(row["attention"]) for row in rows) == pytest.approx(1, abs=1e-4)
            assert corners is not None
            assert [[int(row["x"]), int(row["y"])] for row in rows] == corners.tolist()


def test_bags_of_several_slides_give_a_file_for_each(tiny: TinyCohort, tmp_path: Path) -> None:
    options = tiny.options(f"--output_path={tmp_path / 'run'}", "--num_epoch=1", "--bag_level=case")
    assert main.main(options) == 0
    run = tmp_path / "run" / "default" / "default"
    given = [f"-c={run / 'config.yaml'}", "--script_mode=predict", f"--checkpoint={run}", "--csv_path=none"]
    assert main.main([*given, "--save_attention", f"--output_path={tmp_path / 'new'}"]) == 0
    found = sorted(file.stem for file in (tmp_path / "new/default/default/attention/fold_0").iterdir())
    assert found == sorted(PatchStore(tiny.high).slides)


def test_a_head_without_attention_is_refused_before_training(
    tiny: TinyCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = tiny.options(f"--output_path={tmp_path}", "--save_attention", "--model=e2e_timm:test_resnet_meanP")
    assert main.main(options) == 2
    assert "save_attention: the head FeatureMean has none. Give --no_save_attention." in caplog.text


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A grey slide of 400 x 200 px and attention of two of its patches of 100 px."""
    (tmp_path / "slides").mkdir()
    Image.fromarray(np.full((200, 400, 3), 200, np.uint8)).save(tmp_path / "slides" / "s.one.png")
    folder = tmp_path / "attention"
    folder.mkdir()
    (folder / "s.one.csv").write_text("patch,x,y,edge_px,attention\n0,0,0,100,0.1\n1,300,100,100,0.9\n")
    return tmp_path


def run(folder: Path, *extra: str) -> int:
    return heatmap.main(
        [f"--attention={folder / 'attention'}", f"--source={folder / 'slides'}", f"--save_dir={folder / 'out'}", *extra]
    )


def test_most_attention_is_red_least_blue_and_the_rest_as_it_was(drawn: Path) -> None:
    assert run(drawn, "--strength=1", "--top=2") == 0
    picture = np.asarray(Image.open(drawn / "out" / "s.one_heatmap.jpg")).astype(int)
    assert picture.shape == (200, 400, 3)
    least, most, rest = picture[50, 50], picture[150, 350], picture[150, 50]
    assert least[2] > 100 > least[0]
    assert most[0] > 100 > most[2]
    assert np.abs(rest - 200).max() < 6
    assert Image.open(drawn / "out" / "s.one_top.jpg").size == (448, 224)


def test_one_file_and_no_top(drawn: Path) -> None:
    assert run(drawn, f"--attention={drawn / 'attention' / 's.one.csv'}", "--top=0") == 0
    assert [file.name for file in (drawn / "out").iterdir()] == ["s.one_heatmap.jpg"]


def test_a_slide_that_fails_is_named_and_the_others_are_drawn(drawn: Path, caplog: pytest.LogCaptureFixture) -> None:
    (drawn / "slides" / "two.png").write_bytes(b"no image")
    (drawn / "slides" / "three.png").write_bytes((drawn / "slides" / "s.one.png").read_bytes())
    (drawn / "attention" / "two.csv").write_text((drawn / "attention" / "s.one.csv").read_text())
    (drawn / "attention" / "three.csv").write_text("patch,x,y,edge_px,attention\n0,,,,1\n")
    assert run(drawn) == 1
    assert "two:" in caplog.text
    assert "the store or feature files hold no coordinates: give main.py --h5_path" in caplog.text
    assert (drawn / "out" / "s.one_heatmap.jpg").exists()


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--top=-1", "--strength=2"], "--strength is 2.0; it must lie between 0 and 1"),
        (["--attention=nowhere"], "holds no <slide>.csv"),
        (["--source=nowhere"], "there is no such folder"),
    ],
)
def test_faults_of_the_options(drawn: Path, caplog: pytest.LogCaptureFixture, extra: list[str], sentence: str) -> None:
    assert run(drawn, *extra) == 2
    assert sentence in caplog.text


def test_attention_without_its_slide_is_named(drawn: Path, caplog: pytest.LogCaptureFixture) -> None:
    (drawn / "attention" / "other.csv").write_text("")
    assert run(drawn) == 2
    assert "other: 0 slides of that name are in" in caplog.text
