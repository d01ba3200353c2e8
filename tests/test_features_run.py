"""Whole runs on features: CLAM and TRIDENT files, sampling, two magnifications, RAM, positions, several processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import lmdb
import numpy as np
import pytest
import torch
from tiny import make_tiny_cohort
from torch import Tensor

import main
import modules.heads  # noqa: F401  (fills the registry)
from modules.registry import mils

ROOT = Path(main.__file__).parent
WIDTH = 16
STEP_PX = 512


@dataclass(frozen=True)
class World:
    """``pt`` holds pt_files/ without coordinates, ``h5`` is a TRIDENT folder with them; ``low`` is a magnification."""

    pt: Path
    h5: Path
    low: Path
    coords: Path
    csv: Path

    def options(self, root: Path, out: Path, *extra: str) -> list[str]:
        return [
            f"--dataset_root={root}",
            f"--csv_path={self.csv}",
            f"--output_path={out}",
            *("--datasets=needles", "--cv_fold=1", "--model=abmil", "--inner_dim=32", "--n_heads=2", "--batch_size=2"),
            *("--num_epoch=10", "--lr=5e-3", "--act=gelu", "--num_workers=0", "--num_bootstrap=20", "--device=cpu"),
            *extra,
        ]


def features(rng: np.random.Generator, label: int, count: int) -> Tensor:
    """Noise in which a third of the instances of class 1 are shifted."""
    values = rng.normal(0, 1, (count, WIDTH)).astype(np.float32)
    values[: count // 3, :4] += 4 * label
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder, rng, rows = tmp_path_factory.mktemp("features"), np.random.default_rng(0), []
    for place in ("pt/pt_files", "h5", "low/pt_files", "coords/patches"):
        (folder / place).mkdir(parents=True)
    for i in range(24):
        slide, label, count = f"S{i:02d}", i % 2, 9 + i % 5
        values = features(rng, label, count)
        corners = np.stack([np.arange(count) % 4, np.arange(count) // 4], 1) * STEP_PX + 10240
        torch.save(values, folder / "pt/pt_files" / f"{slide}.pt")
        torch.save(features(rng, label, count // 3).half(), folder / "low/pt_files" / f"{slide}.pt")
        with h5py.File(folder / "h5" / f"{slide}.h5", "w") as file:
            file["features"], file["coords"] = values.numpy()[None], corners
        with h5py.File(folder / "coords/patches" / f"{slide}.h5", "w") as file:
            file["coords"] = corners
        rows.append((slide, slide, str(label), "train" if i < 14 else "val" if i < 18 else "test"))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("case", "slide", "label", "fold"), *rows])
    return World(folder / "pt", folder / "h5", folder / "low", folder / "coords", folder / "labels.csv")


def results(out: Path) -> dict:
    return json.loads((out / "default" / "default" / "results.json").read_text())


def auc(out: Path) -> float:
    return results(out)["folds"][0]["test"]["main"]["metrics"]["auc"]["value"]


def weights(out: Path) -> dict[str, Tensor]:
    return torch.load(out / "default" / "default" / "fold_0_last.pt", weights_only=True)["model"]


def assert_same(one: Path, other: Path) -> None:
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name
    assert results(one)["folds"] == results(other)["folds"]


def test_clam_and_trident_files_give_the_same_run(world: World, tmp_path: Path) -> None:
    assert main.main(world.options(world.pt, tmp_path / "pt")) == 0
    assert main.main(world.options(world.h5, tmp_path / "h5")) == 0
    assert_same(tmp_path / "pt", tmp_path / "h5")
    assert auc(tmp_path / "pt") == 1.0


def test_features_in_ram_and_reading_processes_change_nothing(world: World, tmp_path: Path) -> None:
    """With same_psize too, which the published program refused together with persistence."""
    options = ("--same_psize=6", "--num_epoch=2")
    assert main.main(world.options(world.pt, tmp_path / "mapped", *options)) == 0
    kept = world.options(world.pt, tmp_path / "kept", *options, "--persistence", "--num_workers=2")
    assert main.main(kept) == 0
    assert_same(tmp_path / "mapped", tmp_path / "kept")


@pytest.mark.parametrize("kind", ["zero", "random", "none"])
def test_bags_shorter_than_same_psize(world: World, tmp_path: Path, kind: str) -> None:
    assert main.main(world.options(world.pt, tmp_path, "--same_psize=12", f"--same_psize_pad_type={kind}")) == 0
    assert auc(tmp_path) == 1.0


def test_masked_rows_are_as_good_as_none(world: World, tmp_path: Path) -> None:
    """Zero rows are never seen, so zero and none are one; random duplicates are seen."""
    for kind in ("zero", "random", "none"):
        options = ("--same_psize=12", f"--same_psize_pad_type={kind}", "--num_epoch=1")
        assert main.main(world.options(world.pt, tmp_path / kind, *options)) == 0
    assert_same(tmp_path / "zero", tmp_path / "none")
    assert not torch.equal(*(weights(tmp_path / k)["mil.classifier.weight"] for k in ("zero", "random")))


def test_two_magnifications_of_different_precision(world: World, tmp_path: Path) -> None:
    options = ("--mul_scale_input", f"--dataset_sub_root={world.low}", "--same_psize=9", "--mul_scale_ratio=3")
    assert main.main(world.options(world.pt, tmp_path, *options)) == 0
    assert auc(tmp_path) == 1.0
    assert "3 low + 6 high" in (tmp_path / "default" / "default" / "log.txt").read_text()


@pytest.mark.parametrize("model", [("--model=vitmil", "--pos=sincos"), ("--model=2dmamba",)], ids=["vitmil", "2dmamba"])
def test_positions_come_from_the_features_or_from_h5_path(world: World, tmp_path: Path, model: tuple[str, ...]) -> None:
    short = ("--num_epoch=1", "--same_psize=6", *model)
    assert main.main(world.options(world.h5, tmp_path / "own", *short)) == 0
    assert main.main(world.options(world.pt, tmp_path / "given", *short, f"--h5_path={world.coords}")) == 0
    assert_same(tmp_path / "own", tmp_path / "given")


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (["--model=vitmil", "--pos=sincos"], ["coordinates of slide 'S00' are not known", "--h5_path"]),
        (["--model=2dmamba", "--h5_path=nowhere"], ["nowhere: there is no such folder of coordinates"]),
        (["--input_dim=1024"], ["input_dim is 1024, but the feature files have width 16"]),
        (["--mul_scale_input"], ["mul_scale_input needs --dataset_sub_root"]),
        (
            ["--model=e2e_r18_abmil", "--persistence", "--patch_shuffle"],
            ["persistence is for features", "patch_shuffle"],
        ),
    ],
)
def test_check_finds_what_a_run_would(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: list[str], sentences: list[str]
) -> None:
    assert main.main(["check", *world.options(world.pt, tmp_path, *change)]) == 2
    for sentence in sentences:
        assert sentence in caplog.text
    assert "Traceback" not in caplog.text


def test_check_names_every_bad_feature_file(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in (world.pt / "pt_files").iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    torch.save(torch.zeros(3, 5), bad / "S03.pt")
    torch.save(torch.zeros(0, WIDTH), bad / "S20.pt")
    (bad / "S07.pt").write_bytes(b"half")
    assert main.main(["check", *world.options(bad, tmp_path)]) == 2
    assert "features: 3 faults" in caplog.text
    for name in ("S03", "S07", "S20"):
        assert name in caplog.text


def test_check_of_sound_features(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main.main(["check", *world.options(world.pt, tmp_path)]) == 0
    assert "in order" in caplog.text


def test_several_processes_train_on_features(world: World, tmp_path: Path) -> None:
    """The published program refused this. A vitmil with positions, so that they too reach every process."""
    options = world.options(world.h5, tmp_path, "--model=vitmil", "--pos=sincos", "--num_epoch=2", "--batch_size=1")
    done = subprocess.run(
        ["bash", str(ROOT / "train_dist.sh"), "2", *options, "--persistence"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "default" / "default" / "fold_0_test_predictions.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == [f"S{i}" for i in range(18, 24)]


@pytest.mark.parametrize("name", mils.names())
def test_every_head_trains_on_features(world: World, tmp_path: Path, name: str) -> None:
    """The published program failed for most names (T33). Bags of unequal length, two per step."""
    options = world.options(world.h5, tmp_path, f"--model={name}", "--num_epoch=1")
    assert main.main(options) == 0
    assert 0 <= auc(tmp_path) <= 1


@pytest.mark.parametrize("recipe", ["fm_subtyping", "fm_panda"])
def test_two_column_labels(world: World, tmp_path: Path, recipe: str) -> None:
    """With random_fold the published program failed in the second fold (T35)."""
    labels = tmp_path / "two.csv"
    with world.csv.open() as file, labels.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("ID", "Label"), *((r["slide"], r["label"]) for r in csv.DictReader(file))])
    options = [o for o in world.options(world.pt, tmp_path, "--num_epoch=1") if not o.startswith("--cv_fold")]
    assert main.main([*options, f"-c={ROOT}/config/feat/{recipe}.yaml", f"--csv_path={labels}"]) == 0
    tested = [
        {row["id"] for row in csv.DictReader(path.open())}
        for path in sorted((tmp_path / "default" / "default").glob("fold_*_test_predictions.csv"))
    ]
    assert len(tested) == (3 if recipe == "fm_subtyping" else 1)
    assert len({frozenset(ids) for ids in tested}) == len(tested)


def test_positions_of_patches_come_from_the_stores(tmp_path: Path) -> None:
    """End to end, with two magnifications; the published program lost the positions in validation (T38)."""
    tiny = make_tiny_cohort(tmp_path, patients=12)
    model = ("--model=e2e_timm:test_resnet_vitmil", "--pos=sincos", "--num_epoch=1", "--batch_size=2")
    for size in (3, 100):
        options = tiny.options(
            *model, "--mul_scale_input", f"--dataset_sub_root={tiny.low}", f"--p_batch_size_v={size}"
        )
        assert main.main([*options, f"--output_path={tmp_path / str(size)}"]) == 0
    tables = [
        list(csv.DictReader((tmp_path / str(size) / "default/default/fold_0_test_predictions.csv").open()))
        for size in (3, 100)
    ]
    for one, other in zip(*tables, strict=True):
        assert one["id"] == other["id"]
        assert float(one["p_1"]) == pytest.approx(float(other["p_1"]), abs=1e-5)


def test_stores_of_the_published_program_have_no_positions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny = make_tiny_cohort(tmp_path, patients=12)
    with lmdb.open(str(tiny.high), subdir=False, map_size=1 << 26) as env, env.begin(write=True) as txn:
        for slide in ("P00-0", "P01-0"):
            assert txn.delete(f"__coords__/{slide}".encode())
    model = ("--model=e2e_timm:test_resnet_2dmamba", "--batch_size=1")
    assert main.main(["check", *tiny.options(*model)]) == 2
    assert "positions, which this MIL head needs: 2 faults" in caplog.text
    assert "coordinates of slide 'P00-0' are not known" in caplog.text
    assert "coordinates of slide 'P01-0' are not known" in caplog.text
