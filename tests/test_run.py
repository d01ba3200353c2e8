"""Whole runs of main.py on a tiny cohort."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyCohort, make_tiny_cohort

import main
from datasets.jpeg import encode
from datasets.store import PatchStore, StoreWriter, tools

ROOT = Path(main.__file__).parent
ENCODER = "--model=e2e_timm:test_resnet_abmilx"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"))


def results(out: Path) -> dict:
    return json.loads((out / "default" / "default" / "results.json").read_text())


def last_weights(out: Path, fold: int = 0) -> dict:
    return torch.load(out / "default" / "default" / f"fold_{fold}_last.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    for k, v in last_weights(one)["model"].items():
        assert torch.equal(v, last_weights(other)["model"][k]), k
    assert results(one)["folds"] == results(other)["folds"]
    lines = [(p / "default" / "default" / "metrics.jsonl").read_text().splitlines() for p in (one, other)]
    timing = ("train_seconds", "patches_per_s", "data_wait")
    ours, theirs = ([{k: v for k, v in json.loads(x).items() if k not in timing} for x in text] for text in lines)
    assert ours == theirs


def test_end_to_end_learns_stripes_and_leaves_complete_records(tiny, tmp_path):
    options = tiny.options(
        "--mul_scale_input",
        f"--dataset_sub_root={tiny.low}",
        "--img_transform=weak",
        "--crop_size=28",
        "--num_epoch=6",
        "--lr=1e-3",
        "--mm=0.8",
        "--test_type=both_ema",
        f"--output_path={tmp_path}",
    )
    assert main.main(options) == 0
    found = results(tmp_path)
    assert found["folds"][0]["test"]["main"]["metrics"]["auc"]["value"] == 1.0
    assert found["selection"] == {"metric": "auc", "split": ["val"]}
    folder = tmp_path / "default" / "default"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
    best = torch.load(folder / "fold_0_model_best.pt", weights_only=True)
    assert set(best) >= {"model", "teacher", "epoch", "classes", "config"}
    assert all(k.startswith(("encoder.model.", "mil.")) for k in best["model"])
    with (folder / "fold_0_test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["id"] for r in rows} == {s["slide"] for s in csv.DictReader(tiny.csv.open()) if s["fold"] == "test"}
    assert all(abs(float(r["p_0"]) + float(r["p_1"]) - 1) < 1e-5 for r in rows)


def test_the_configuration_as_run_repeats_the_run(tiny, tmp_path):
    options = tiny.options(ENCODER, "--img_transform=strong", "--crop_size=28", "--num_workers=1")
    assert main.main([*options, f"--output_path={tmp_path / 'a'}"]) == 0
    saved = tmp_path / "a" / "default" / "default" / "config.yaml"
    assert main.main([f"-c={saved}", f"--output_path={tmp_path / 'b'}", "--num_workers=0"]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def command_line(options: list[str]) -> subprocess.Popen[str]:
    """The program in a process of its own; one thread, since sums depend on the number of threads."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_goes_on_to_the_same_end(tiny, tmp_path):
    options = tiny.options(ENCODER, "--num_epoch=4", "--test_type=both", "--mm=0.9", "--accumulation_steps=2")
    whole = command_line([*options, f"--output_path={tmp_path / 'whole'}"])
    process = command_line([*options, f"--output_path={tmp_path / 'killed'}"])
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch 2/4" in line:
            process.kill()
            break
    process.wait()
    assert last_weights(tmp_path / "killed")["progress"]["epoch"] < 4
    again = command_line([*options, f"--output_path={tmp_path / 'killed'}"])
    assert "goes on after epoch" in again.communicate()[1]
    whole.communicate()
    assert (whole.returncode, again.returncode) == (0, 0)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_other_options_in_the_same_folder_are_refused(tiny, tmp_path, caplog):
    options = tiny.options(ENCODER, "--num_epoch=1", f"--output_path={tmp_path}")
    assert main.main(options) == 0
    assert main.main([*options, "--lr=0.5"]) == 2
    assert "lr 0.0002 -> 0.5" in caplog.text
    assert main.main([*options, "--lr=0.5", "--resume=never"]) == 0


def test_two_processes_train_and_test_every_bag_once(tiny, tmp_path):
    options = tiny.options(ENCODER, "--batch_size=2", "--test_type=both_ema", f"--output_path={tmp_path}")
    done = subprocess.run(
        ["bash", str(ROOT / "train_dist.sh"), "2", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "default" / "default" / "fold_0_test_predictions.csv").open() as file:
        ids = [r["id"] for r in csv.DictReader(file)]
    expected = [s["slide"] for s in csv.DictReader(tiny.csv.open()) if s["fold"] == "test"]
    assert sorted(ids) == sorted(expected)


def test_a_failing_process_ends_the_run_with_a_status(tiny, tmp_path):
    options = tiny.options(ENCODER, "--batch_size=50", f"--output_path={tmp_path}")
    command = ["bash", str(ROOT / "train_dist.sh"), "2", *options]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "fewer than one step takes" in done.stderr


def test_survival_runs_and_says_that_validation_was_the_test_set(tiny, tmp_path, caplog):
    options = tiny.options(ENCODER, "--datasets=surv_tiny", f"--csv_path={tiny.survival_csv}", "--val2test")
    assert main.main([*options, f"--output_path={tmp_path}"]) == 0
    assert results(tmp_path)["folds"][0]["test"]["main"]["metrics"]["c_index"]["value"] is not None
    assert "chosen by c_index on the TEST set" in caplog.text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--lerning_rate=1"], "no option '--lerning_rate'. Did you mean 'lr'?"),
        (["--model=e2e_r18_abmilx2"], "abmilx"),
        (["--csv_path=nowhere.csv"], "nowhere.csv"),
        (["--dataset_root=nowhere.lmdb"], "there is no store nowhere.lmdb"),
        (["--mul_scale_input"], "mul_scale_input needs --dataset_sub_root"),
        (["--img_size=256"], "img_size is 256, but the training store holds 32 px"),
        (["--classes=benign"], "benign"),
        (["--best_metric=acc"], "there is no metric 'acc'"),
        (["--model_ema"], "test_type=ema"),
        (["--model=abmilx", "--image_input"], "names none"),
    ],
)
def test_bad_input_gets_a_sentence_and_status_2(tiny, tmp_path, caplog, change, sentence):
    assert main.main([*tiny.options(*change), f"--output_path={tmp_path}"]) == 2
    assert sentence in caplog.text
    assert "Traceback" not in caplog.text


def test_a_corrupt_patch_stops_the_run_naming_slide_and_patch(tiny, tmp_path, caplog):
    import lmdb

    broken = tmp_path / "broken.lmdb"
    broken.write_bytes(tiny.high.read_bytes())
    with lmdb.open(str(broken), subdir=False, map_size=1 << 26) as env, env.begin(write=True) as txn:
        txn.put(b"P00-0-2", txn.get(b"P00-0-2")[:200])
    options = tiny.options(ENCODER, "--same_psize=0", "--batch_size=1", f"--dataset_root={broken}")
    assert main.main([*options, f"--output_path={tmp_path}"]) == 2
    assert "P00-0" in caplog.text


def test_slides_without_patches_count_as_missing(tiny, tmp_path, caplog):
    store = tmp_path / "high.lmdb"
    store.write_bytes(tiny.high.read_bytes())
    with StoreWriter(store, PatchStore(store).header) as writer:
        writer.put_slide("P18-0", [], np.zeros((0, 2), np.int64))
    options = tiny.options(f"--dataset_root={store}", f"--output_path={tmp_path}")
    assert main.main(["check", *options]) == 2
    assert "hold no patches and count as missing, such as P18-0" in caplog.text
    assert main.main(["check", *options, "--missing=drop"]) == 0


def test_a_slide_that_one_store_lacks_is_named_with_that_store(tiny, tmp_path, caplog):
    low = tmp_path / "low.lmdb"
    tools.subset(tiny.low, low, [slide for slide in PatchStore(tiny.low).slides if slide != "P18-0"])
    options = tiny.options("--mul_scale_input", f"--dataset_sub_root={low}", f"--output_path={tmp_path}")
    assert main.main(["check", *options]) == 2
    assert f"such as: P18-0 is not in {low}." in caplog.text
    assert f"'P18-0' (not in {low})" in caplog.text


def test_an_empty_store_is_called_empty(tiny, tmp_path, caplog):
    empty = tmp_path / "empty.lmdb"
    with StoreWriter(empty, dataclasses.replace(PatchStore(tiny.low).header, image_size_px=16)):
        pass
    for change in (["--mul_scale_input", f"--dataset_sub_root={empty}"], [f"--dataset_root={empty}"]):
        caplog.clear()
        assert main.main(["check", *tiny.options(*change), f"--output_path={tmp_path}"]) == 2
        assert f"the store {empty} holds no slide. Write patches" in caplog.text
        assert "different size" not in caplog.text
        assert "not among" not in caplog.text


def test_stores_without_a_common_slide_are_refused(tiny, tmp_path, caplog):
    tools.subset(tiny.low, tmp_path / "low.lmdb", ["P00-0"])
    tools.subset(tiny.high, tmp_path / "high.lmdb", ["P01-0"])
    roots = [f"--dataset_sub_root={tmp_path / 'low.lmdb'}", f"--dataset_root={tmp_path / 'high.lmdb'}"]
    assert main.main(["check", *tiny.options("--mul_scale_input", *roots), f"--output_path={tmp_path}"]) == 2
    assert "no slide is in every store" in caplog.text


def test_n_classes_of_a_published_task_is_not_used(tiny, tmp_path, caplog):
    options = tiny.options("--datasets=panda_tiny", "--n_classes=2", f"--output_path={tmp_path}")
    assert main.main(["check", *options]) == 0
    assert "n_classes 2 is not used" in caplog.text


def test_the_published_three_store_layout_is_explained(tiny, tmp_path, caplog):
    small = tmp_path / "small.lmdb"
    header = dataclasses.replace(PatchStore(tiny.low).header, image_size_px=16)
    with StoreWriter(small, header) as writer:
        writer.put_slide("P00-0", [encode(np.zeros((16, 16, 3), np.uint8), 90)], np.zeros((1, 2), np.int64))
    options = tiny.options("--mul_scale_input", f"--dataset_sub_root={small}", f"--output_path={tmp_path}")
    assert main.main(["check", *options]) == 2
    assert "--dataset_test_root" in caplog.text


def test_check_reads_everything_and_trains_nothing(tiny, tmp_path, caplog):
    assert main.main(["check", *tiny.options(f"--output_path={tmp_path}")]) == 0
    assert "in order" in caplog.text
    assert not list(tmp_path.iterdir())


def test_all_faults_of_the_input_are_named_at_once(tiny, caplog):
    wrong = ["--model=e2e_r18_abmily", "--csv_path=no.csv", "--dataset_root=no.lmdb", "--mul_scale_input"]
    assert main.main(tiny.options(*wrong)) == 2
    for word in ("abmily", "no.csv", "no.lmdb", "--dataset_sub_root"):
        assert word in caplog.text
