"""Whole runs of main.py for every task and its options, on small feature files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TinyCohort, make_tiny_cohort

import main

ROOT = Path(main.__file__).parent


@dataclass(frozen=True)
class Cohort:
    """A folder of features whose first columns carry the targets, and a csv for each task."""

    folder: Path

    def options(self, kind: str, out: Path, *extra: str) -> list[str]:
        return [
            f"--dataset_root={self.folder}",
            f"--csv_path={self.folder / kind}.csv",
            "--datasets=mine",
            "--cv_fold=1",
            "--model=abmil",
            "--inner_dim=32",
            "--dropout=0",
            "--batch_size=4",
            "--num_epoch=12",
            "--lr=3e-3",
            "--num_workers=0",
            "--num_bootstrap=20",
            "--device=cpu",
            f"--output_path={out}",
            *extra,
        ]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """48 slides of 6 features: two labels and a value in [0, 3) shift three of the eight columns."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "pt_files").mkdir()
    rng = np.random.default_rng(0)
    rows: dict[str, list[list[Any]]] = {"classes": [], "labels": [], "values": [], "survival": []}
    for i in range(48):
        er, pr, value = int(rng.random() < 0.5), int(rng.random() < 0.3), rng.uniform(0, 3)
        x = rng.normal(size=(6, 8)) * 0.3
        x[:, :3] += (2 * er, 2 * pr, value)
        torch.save(torch.tensor(x, dtype=torch.float32), folder / "pt_files" / f"s{i}.pt")
        split = ("train", "train", "train", "val", "test")[i % 5]
        rows["classes"].append([f"s{i}", ("low", "mid", "high")[int(value)], split])
        rows["labels"].append([f"s{i}", er, "" if i % 7 == 0 else pr, split])
        rows["values"].append([f"s{i}", 100 + 20 * value, split])
        rows["survival"].append([f"s{i}", 40 * np.exp(-value) * rng.uniform(0.8, 1.2), int(rng.random() < 0.8), split])
    headers = {"classes": ["label"], "labels": ["ER", "PR"], "values": ["label"], "survival": ["time", "event"]}
    for kind, lines in rows.items():
        with (folder / f"{kind}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["slide", *headers[kind], "split"], *lines])
    return Cohort(folder)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("pixels"))


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "default" / "default" / "results.json").read_text())


def measured(out: Path, metric: str) -> float:
    return results(out)["folds"][0]["test"]["main"]["metrics"][metric]["value"]


def predictions(out: Path) -> list[dict[str, str]]:
    with (out / "default" / "default" / "fold_0_test_predictions.csv").open() as file:
        return list(csv.DictReader(file))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "default" / "default" / "fold_0_last.pt", weights_only=True)["model"]


def test_regression_learns_and_predicts_in_the_unit_of_the_csv(cohort: Cohort, tmp_path: Path) -> None:
    assert main.main(cohort.options("values", tmp_path, "--task=regression", "--num_epoch=25")) == 0
    assert measured(tmp_path, "r2") > 0.7
    found = results(tmp_path)
    assert (found["task"], found["loss"], found["selection"]["metric"]) == ("regression", "mse", "r2")
    rows = predictions(tmp_path)
    assert all(abs(float(r["predicted"]) - float(r["value"])) < 25 for r in rows)
    errors = [abs(float(r["predicted"]) - float(r["value"])) for r in rows]
    assert sum(errors) / len(errors) == pytest.approx(measured(tmp_path, "mae"), rel=1e-5)
    best = torch.load(tmp_path / "default" / "default" / "fold_0_model_best.pt", weights_only=True)
    assert 100 < best["task_facts"]["mean"] < 160
    assert best["task_facts"]["sd"] > 1


def test_regression_folds_are_pooled(cohort: Cohort, tmp_path: Path) -> None:
    assert main.main(cohort.options("values", tmp_path, "--task=regression", "--cv_fold=2", "--num_epoch=25")) == 0
    pooled = results(tmp_path)["pooled"]["main"]["metrics"]
    folds = results(tmp_path)["summary"]["main"]
    assert pooled["mae"]["value"] == pytest.approx(folds["mae"]["mean"], rel=1e-5)
    assert pooled["r2"]["value"] > 0.5


@pytest.mark.parametrize("model", ["abmil", "dsmil"])
def test_multilabel_learns_also_with_auxiliary_losses(cohort: Cohort, tmp_path: Path, model: str) -> None:
    options = cohort.options(
        "labels", tmp_path, "--task=multilabel", "--classes=ER,PR", f"--model={model}", "--loss=bce"
    )
    assert main.main([*options, "--num_epoch=20"]) == 0
    assert measured(tmp_path, "auc") > 0.85
    assert {"auc_ER", "f1_PR", "f1_macro"} <= set(results(tmp_path)["folds"][0]["test"]["main"]["metrics"])
    assert {"ER", "PR", "p_ER", "p_PR"} <= set(predictions(tmp_path)[0])
    assert {r["PR"] for r in predictions(tmp_path)} == {"-1", "0", "1"}


@pytest.mark.parametrize("model", ["abmil", "dtfd"])
def test_cox_learns(cohort: Cohort, tmp_path: Path, model: str) -> None:
    options = cohort.options("survival", tmp_path, "--task=survival", "--loss=cox", f"--model={model}")
    assert main.main(options) == 0
    assert measured(tmp_path, "c_index") > 0.8
    assert results(tmp_path)["loss"] == "cox"
    assert "risk" in predictions(tmp_path)[0]


@pytest.mark.parametrize("kind", ["regression", "cox", "multilabel"])
def test_every_task_trains_end_to_end_from_pixels(pixels: TinyCohort, tmp_path: Path, kind: str) -> None:
    """The stripes' direction is the number, the label and the longer life; mixed precision and EMA on."""
    extra = {
        "regression": ["--task=regression"],
        "cox": ["--task=survival", "--loss=cox", f"--csv_path={pixels.survival_csv}"],
        "multilabel": ["--task=multilabel", "--classes=label"],
    }[kind]
    options = pixels.options("--model=e2e_timm:test_resnet_abmilx", "--num_epoch=10", "--lr=2e-3", "--amp", *extra)
    assert main.main([*options, "--test_type=both", "--mm=0.5", f"--output_path={tmp_path}"]) == 0
    found = results(tmp_path)["folds"][0]["test"]["main"]["metrics"]
    # Stripes tell 4 of the 6 pairs of test patients apart; within a direction the order of lives is chance.
    metric, least = {"regression": ("pearson", 0.75), "cox": ("c_index", 0.66), "multilabel": ("auc_label", 0.75)}[kind]
    assert found[metric]["value"] > least


def test_cox_with_one_bag_per_step_is_refused_before_training(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = cohort.options("survival", tmp_path, "--task=survival", "--loss=cox", "--batch_size=1")
    assert main.main(options) == 2
    assert "Raise --batch_size" in caplog.text


def test_cox_on_two_processes_trains_what_one_process_trains(cohort: Cohort, tmp_path: Path) -> None:
    """The risk set is the step's bags of all processes."""
    extra = ("--task=survival", "--loss=cox", "--num_epoch=2", "--lr=1e-3")
    assert main.main(cohort.options("survival", tmp_path / "one", *extra, "--batch_size=8")) == 0
    command = cohort.options("survival", tmp_path / "two", *extra, "--batch_size=4")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "train_dist.sh"), "2", *command], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    one.pop("mil.classifier.bias")  # it shifts all risks alike, so its gradient is rounding and Adam makes steps of it
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-5), name


def test_grading_reports_classes_and_selects_by_quadratic_kappa(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = ("--classes=low,mid,high", "--class_weights=balanced", "--best_metric=kappa_quadratic")
    assert main.main(cohort.options("classes", tmp_path, *extra)) == 0
    found = results(tmp_path)
    assert found["selection"]["metric"] == "kappa_quadratic"
    report = found["folds"][0]["test"]["main"]["report"]
    assert report["order"] == ["low", "mid", "high"]
    rows = predictions(tmp_path)
    confusion = np.zeros((3, 3), int)
    for row in rows:
        confusion[int(row["label"]), int(np.argmax([float(row[f"p_{c}"]) for c in report["order"]]))] += 1
    assert report["confusion"] == confusion.tolist()
    assert report["classes"]["mid"]["support"] == confusion[1].sum()
    assert "> high" in caplog.text
    best = torch.load(tmp_path / "default" / "default" / "fold_0_model_best.pt", weights_only=True)
    assert len(best["task_facts"]["class_weights"]) == 3


def test_class_weights_and_balanced_sampling_change_the_training(cohort: Cohort, tmp_path: Path) -> None:
    runs = {
        "none": [],
        "weights": ["--class_weights=1,1,4"],
        "sampling": ["--balanced_sampling"],
        "ones": ["--class_weights=1,1,1"],
    }
    for name, extra in runs.items():
        options = cohort.options("classes", tmp_path / name, "--classes=low,mid,high", "--num_epoch=1", *extra)
        assert main.main(options) == 0
    found = {name: torch.cat([v.flatten() for v in weights(tmp_path / name).values()]) for name in runs}
    assert torch.equal(found["none"], found["ones"])
    assert not torch.allclose(found["none"], found["weights"])
    assert not torch.allclose(found["none"], found["sampling"])


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--loss=asl"], "the published program never had it; give --loss=bce with --task=multilabel"),
        (["--loss=bce"], "Give --loss=ce, or --task=multilabel"),
        (["--loss=asll"], "'asll' is not one of"),
        (["--task=regression"], "is no number"),
        (["--bin_metric"], "softmax probability of class 1"),
        (["--class_weights=balance"], "give none, balanced, or 3 positive numbers"),
    ],
)
def test_refusals_are_sentences(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: list[str], sentence: str
) -> None:
    assert main.main(cohort.options("classes", tmp_path, *extra)) == 2
    assert sentence in caplog.text


KINDS = {
    "classes": ("classes", "--num_epoch=2"),
    "survival": ("survival", "--task=survival", "--num_epoch=2"),
    "cox": ("survival", "--task=survival", "--loss=cox", "--num_epoch=2"),
    "published bins": ("survival", "--task=survival", "--surv_bins=published", "--num_epoch=2"),
    "values": ("values", "--task=regression", "--num_epoch=2"),
    "labels": ("labels", "--task=multilabel", "--classes=ER,PR", "--num_epoch=2", "--test_type=ema", "--mm=0.5"),
}
"""Kind of label -> its csv and options of a run."""


def only_test_rows(cohort: Cohort, kind: str, path: Path, split: bool = True) -> Path:
    """A csv of the test rows alone, without those of class low, as another cohort may lack a class."""
    with (cohort.folder / f"{kind}.csv").open() as file:
        header, *rows = csv.reader(file)
    kept = [row for row in rows if row[-1] == "test" and row[1] != "low"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([row if split else row[:-1] for row in [header, *kept]])
    return path


@pytest.mark.parametrize(("kind", "split"), [*((kind, True) for kind in KINDS), ("classes", False)])
def test_another_cohort_is_tested_with_what_the_checkpoint_knows(
    cohort: Cohort, tmp_path: Path, kind: str, split: bool
) -> None:
    """Its rows are those of the own test, and so must the predictions be; classes, bins and scale are the model's."""
    (name, *extra), run = KINDS[kind], tmp_path / "run" / "default" / "default"
    assert main.main(cohort.options(name, tmp_path / "run", *extra)) == 0
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    table = only_test_rows(cohort, name, tmp_path / "other.csv", split)
    given = [f"-c={run / 'config.yaml'}", "--script_mode=test", f"--checkpoint={run}", f"--csv_path={table}"]
    assert main.main([*given, f"--output_path={tmp_path / 'other'}"]) == 0
    middle = "_ema" if kind == "labels" else ""
    found, own = (
        list(csv.DictReader((out / "default" / "default" / f"fold_0_test{middle}_predictions.csv").open()))
        for out in (tmp_path / "other", tmp_path / "run")
    )
    tested = {row["id"] for row in found}
    assert len(tested) > 3
    assert found == [row for row in own if row["id"] in tested]
    said = results(tmp_path / "other")
    assert said["classes"] == results(tmp_path / "run")["classes"]
    assert said["selection"]["split"] == ["another cohort"]
    assert f"Weights, order of the classes and survival bins are those of {run}." in said["cohort"]["notes"]
    assert said["folds"][0]["epochs"] is None
    seen = "no slide and no case of the test is among those that the model was trained on."
    assert f"fold 0: {seen}" in said["cohort"]["notes"]
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"} == before


KINDS_TO_PREDICT = ("classes", "survival", "values", "labels")


@pytest.mark.parametrize("kind", KINDS_TO_PREDICT)
def test_slides_without_labels_are_predicted(cohort: Cohort, tmp_path: Path, kind: str) -> None:
    """The scores are those of the test of the same slides, and all slides of the store have one without a csv."""
    name, *extra = KINDS[kind]
    assert main.main(cohort.options(name, tmp_path / "run", *extra)) == 0
    run, ending = tmp_path / "run" / "default" / "default", "_ema" if kind == "labels" else ""
    with (run / f"fold_0_test{ending}_predictions.csv").open() as file:
        tested = {row["id"]: row for row in csv.DictReader(file)}
    (tmp_path / "slides.csv").write_text("note,slide\n" + "".join(f"x,{slide}\n" for slide in tested))
    (tmp_path / "list.txt").write_text("".join(f"{slide}\n" for slide in tested))
    given = [f"-c={run / 'config.yaml'}", "--script_mode=predict", f"--checkpoint={run}"]
    for csv_path, count in ((tmp_path / "slides.csv", len(tested)), (tmp_path / "list.txt", len(tested)), ("none", 48)):
        assert main.main([*given, f"--csv_path={csv_path}", f"--output_path={tmp_path / 'new'}"]) == 0
        out = tmp_path / "new" / "default" / "default"
        for file_name in (f"fold_0_predictions{ending}.csv", f"predictions{ending}.csv"):
            with (out / file_name).open() as file:
                found = {row["id"]: row for row in csv.DictReader(file)}
            assert len(found) == count
            for slide, row in tested.items():
                names = [column for column in found[slide] if column not in ("id", "case")]
                assert found[slide]["case"] == row["case"]
                own, theirs = ([float(r[column]) for column in names] for r in (found[slide], row))
                assert own == pytest.approx(theirs, abs=1e-6)
        assert "label" not in next(iter(found.values()))
    assert sorted(path.name for path in out.glob("config*.yaml")) == ["config_predict.yaml"]
    assert not (out / "results.json").exists()


def test_several_models_predict_and_their_mean_is_written(cohort: Cohort, tmp_path: Path) -> None:
    assert main.main(cohort.options("classes", tmp_path / "run", "--cv_fold=2", "--num_epoch=1")) == 0
    run = tmp_path / "run" / "default" / "default"
    given = [f"-c={run / 'config.yaml'}", "--script_mode=predict", f"--checkpoint={run}", "--csv_path=none"]
    assert main.main([*given, f"--output_path={tmp_path / 'new'}"]) == 0
    tables = []
    for name in ("fold_0_predictions.csv", "fold_1_predictions.csv", "predictions.csv"):
        with (tmp_path / "new" / "default" / "default" / name).open() as file:
            rows = sorted(csv.reader(file))
        tables.append(np.array([row[2:] for row in rows if row[0] != "id"], dtype=float))
    np.testing.assert_allclose((tables[0] + tables[1]) / 2, tables[2], atol=1e-6)
    np.testing.assert_allclose(tables[2].sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ([], "--script_mode=predict needs --checkpoint"),
        (["--checkpoint={run}", "--csv_path={bad}"], "none of the columns wsi_name, label names slides"),
        (["--checkpoint={run}", "--csv_path={absent}"], "name slides that are not among the 48 of the store"),
        (["--checkpoint={run}", "--output_path={own}"], "holds a trained run"),
    ],
)
def test_a_prediction_that_cannot_be_is_a_sentence(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: list[str], sentence: str
) -> None:
    assert main.main(cohort.options("classes", tmp_path / "run", "--num_epoch=1")) == 0
    run = tmp_path / "run" / "default" / "default"
    (tmp_path / "bad.csv").write_text("wsi_name,label\ns1,low\n")
    (tmp_path / "absent.csv").write_text("slide\ns1\nnowhere\n")
    places = {"run": run, "bad": tmp_path / "bad.csv", "absent": tmp_path / "absent.csv", "own": tmp_path / "run"}
    given = [f"-c={run / 'config.yaml'}", "--script_mode=predict", f"--output_path={tmp_path / 'new'}"]
    assert main.main([*given, *(word.format(**places) for word in extra)]) == 2
    assert sentence in caplog.text


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_slide_of_numbers_that_are_none_is_named(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture, split: str
) -> None:
    with (cohort.folder / "classes.csv").open() as file:
        (slide, *_) = next(row for row in csv.reader(file) if row[-1] == split)
    shutil.copytree(cohort.folder / "pt_files", tmp_path / "pt_files")
    features = torch.load(tmp_path / "pt_files" / f"{slide}.pt", weights_only=True)
    features[0, 0] = torch.inf
    torch.save(features, tmp_path / "pt_files" / f"{slide}.pt")
    options = cohort.options("classes", tmp_path / "run", "--num_epoch=1", f"--dataset_root={tmp_path}")
    assert main.main(options) == 2
    assert f"{split} bags (with the main weights) are not finite: {slide}." in caplog.text


def test_patients_that_the_model_was_trained_on_are_named(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main.main(cohort.options("classes", tmp_path / "run", "--num_epoch=1")) == 0
    run = tmp_path / "run" / "default" / "default"
    with (run / "fold_0_split.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    names = json.loads((run / "results.json").read_text())["classes"]
    with (tmp_path / "other.csv").open("w") as file:
        file.write("case,slide,label\n" + "".join(f"{r['case']},{r['slide']},{names[int(r['label'])]}\n" for r in rows))
    given = [f"-c={run / 'config.yaml'}", "--script_mode=test", f"--checkpoint={run}"]
    given += [f"--csv_path={tmp_path / 'other.csv'}", "--val_ratio=0.3", f"--output_path={tmp_path / 'other'}"]
    assert main.main(given) == 0
    sentence = f"fold 0: {len(rows)} slides ({', '.join(sorted(r['slide'] for r in rows)[:5])}, ...) and"
    assert sentence in caplog.text
    assert any(note.startswith(sentence) for note in results(tmp_path / "other")["cohort"]["notes"])


def test_a_model_of_two_magnifications_is_tested_without_the_low_one(
    pixels: TinyCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = pixels.options(
        f"--dataset_sub_root={pixels.low}", "--mul_scale_input", f"--output_path={tmp_path / 'run'}"
    )
    assert main.main(options) == 0
    run = tmp_path / "run" / "default" / "default"
    given = [f"-c={run / 'config.yaml'}", "--script_mode=test", f"--checkpoint={run}", "--dataset_sub_root=gone.lmdb"]
    assert main.main([*given, f"--output_path={tmp_path / 'other'}"]) == 0
    assert "This test reads the high magnification only" in caplog.text
    found, own = (results(tmp_path / name)["folds"][0]["test"]["main"]["report"] for name in ("other", "run"))
    assert found == own
    predicted = [*given, "--script_mode=predict", "--csv_path=none", f"--output_path={tmp_path / 'predicted'}"]
    assert main.main(predicted) == 0
    tested, told = (
        {row["id"]: row["p_0"] for row in csv.DictReader((tmp_path / name).open())}
        for name in ("run/default/default/fold_0_test_predictions.csv", "predicted/default/default/predictions.csv")
    )
    assert {name: float(told[name]) for name in tested} == pytest.approx(
        {k: float(v) for k, v in tested.items()}, abs=1e-6
    )


def test_every_fold_is_tested_on_the_whole_other_cohort(cohort: Cohort, tmp_path: Path) -> None:
    options = cohort.options("classes", tmp_path / "run", "--cv_fold=2", "--num_epoch=1")
    assert main.main(options) == 0
    table = only_test_rows(cohort, "classes", tmp_path / "other.csv")
    run = tmp_path / "run" / "default" / "default"
    given = [*options, "--script_mode=test", f"--checkpoint={run}", f"--csv_path={table}"]
    assert main.main([*given, f"--output_path={tmp_path / 'other'}"]) == 0
    rows = len(table.read_text().splitlines()) - 1
    sizes = [f["splits"]["test"]["bags"] for f in results(tmp_path / "other")["cohort"]["folds"]]
    assert sizes == [rows, rows]
    one = [*given, f"--output_path={tmp_path / 'one'}", "--cv_fold=1", f"--checkpoint={run / 'fold_1_model_best.pt'}"]
    assert main.main(one) == 0
    metrics = results(tmp_path / "one")["folds"][0]["test"]["main"]["report"]
    assert metrics == results(tmp_path / "other")["folds"][1]["test"]["main"]["report"]


def test_a_test_of_another_cohort_that_cannot_be_is_a_sentence(
    cohort: Cohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = cohort.options("classes", tmp_path, "--num_epoch=1")
    assert main.main(options) == 0
    run = tmp_path / "default" / "default"
    table = only_test_rows(cohort, "classes", tmp_path / "other.csv")
    test = [*options, "--script_mode=test", f"--csv_path={table}"]
    there, new = f"--checkpoint={run}", "--title=new"
    values = f"--csv_path={only_test_rows(cohort, 'values', tmp_path / 'values.csv')}"
    cases = [
        (test, "holds a trained run, whose results a test on another cohort would replace. Give another --title"),
        ([*test, there, "--resume=never"], "holds a trained run"),
        ([*test, new], "to test a model of another run give --checkpoint=FOLDER"),
        ([*test, new, f"--checkpoint={tmp_path}"], "there is no such checkpoint"),
        ([*options, new, there], "says what --script_mode=test tests"),
        ([*test, new, there, "--n_heads=4"], f"(n_heads 8 -> 4). Give the same, such as -c {run}/config.yaml"),
        ([*test, new, there, "--task=regression", values], "was trained for classification, and the labels are"),
        ([*test, new, there, "--classes=high,mid,low"], "was trained on the classes high, low, mid, and the labels"),
        ([*test, new, there, "--test_type=ema"], "fold_0_ema_model_best.pt: there is no such checkpoint"),
        ([*test, new, f"{there}/fold_0_model_best.pt", "--test_type=ema"], "holds no ema weights"),
        ([*test, new, f"{there}/fold_0_model_best.pt", "--cv_fold=2"], "is one file, and there are 2 folds"),
        ([*test, new, there, "--dry_run"], "--dry_run measures training, and there are no train rows"),
        (["bench", *test, new, there], "bench measures training, and there are no train rows"),
        ([o for o in [*test, new] if "script_mode" not in o], "the train set is empty"),
    ]
    for given, sentence in cases:
        caplog.clear()
        assert main.main(given) == 2, sentence
        assert sentence in caplog.text, caplog.text
    assert main.main(["check", *test, new, there]) == 0


def test_a_test_leaves_the_options_of_the_training_alone(cohort: Cohort, tmp_path: Path) -> None:
    options = cohort.options("classes", tmp_path, "--num_epoch=1")
    assert main.main(options) == 0
    folder = tmp_path / "default" / "default"
    before = [(folder / name).read_bytes() for name in ("config.yaml", "environment.json")]
    assert main.main([*options, "--script_mode=test", "--num_bootstrap=30"]) == 0
    assert [(folder / name).read_bytes() for name in ("config.yaml", "environment.json")] == before
    assert "script_mode: test\n" in (folder / "config_test.yaml").read_text()
    assert "--script_mode=test" not in (folder / "environment.json").read_text()
    assert (folder / "environment_test.json").is_file()
    assert results(tmp_path)["folds"][0]["epochs"] == 1
