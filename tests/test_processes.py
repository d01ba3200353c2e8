"""Whole runs of 1, 2 and 3 processes: equal losses, weights, choices and predictions for the same global batch."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import train
from tiny import TinyCohort, make_tiny_cohort

LAYER_NORM_ENCODER = "--model=e2e_timm:test_convnext_abmilx"
GLOBAL_BATCH = 6
WORLDS = (1, 2, 3)

RUNS = {
    # 16 training bags: the last step has 4, which three processes share as 1, 1, 2
    "classification": [LAYER_NORM_ENCODER, "--no_drop_last", "--accumulation_steps=2", "--test_type=both", "--mm=0.9"]
    + ["--class_weights=balanced", "--clip_grad=0.5", "--same_psize=0"],
    "survival": [LAYER_NORM_ENCODER, "--datasets=surv_tiny", "--test_type=ema", "--mm=0.5"],
    "cox": [LAYER_NORM_ENCODER, "--datasets=surv_tiny", "--loss=cox"],
    "joined statistics": [
        "--model=e2e_timm:test_resnet_abmilx",
        "--sync_bn",
        "--mil_norm=bn",
        "--no_drop_last",
        "--lr=1e-3",
    ],
    "features": ["--model=dsmil", "--no_drop_last", "--same_psize=7", "--balanced_sampling", "--mil_norm=none"]
    + ["--num_epoch=10", "--lr=1e-2", "--seed=5", "--patient=2", "--max_epoch=1"],
}
"""Name of a run -> its options besides those of the tiny cohort."""


@dataclass(frozen=True)
class Outcome:
    """What a run left: metrics per epoch, test scores by bag, weights, summary."""

    epochs: list[dict[str, float]]
    scores: dict[str, list[float]]
    weights: dict[str, torch.Tensor]
    results: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, name: str = "") -> Outcome:
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        with (folder / f"fold_0_test{name}_predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        columns = [c for c in rows[0] if c == "risk" or c.startswith("p_")]
        assert len({r["id"] for r in rows}) == len(rows), "a bag was tested twice"
        weights = torch.load(folder / "fold_0_last.pt", weights_only=True)["model"]
        scores = {r["id"]: [float(r[c]) for c in columns] for r in rows}
        return cls(epochs, scores, weights, json.loads((folder / "results.json").read_text()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=18)


def features_of(tiny: TinyCohort, folder: Path) -> Path:
    """Features of unlike numbers of instances, by which the classes can be told apart now and then."""
    (folder / "pt_files").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, row in enumerate(csv.DictReader(tiny.csv.open())):
        values = rng.normal(0, 1, (4 + i % 7, 16)).astype(np.float32)
        values[:2, 0] += int(row["label"])
        torch.save(torch.from_numpy(values), folder / "pt_files" / f"{row['slide']}.pt")
    return folder


def options_of(tiny: TinyCohort, name: str, folder: Path) -> list[str]:
    options = tiny.options("--dropout=0", *RUNS[name])
    if "--datasets=surv_tiny" in options:
        options.append(f"--csv_path={tiny.survival_csv}")
    if name == "features":
        options.append(f"--dataset_root={features_of(tiny, folder / 'features')}")
    return options


@pytest.mark.parametrize("name", list(RUNS))
def test_several_processes_equal_one_for_the_same_global_batch(tiny: TinyCohort, tmp_path: Path, name: str) -> None:
    """Bags of unequal length, splits that processes cannot share evenly, steps with fewer bags than the others."""
    options, runs = options_of(tiny, name, tmp_path), {}
    suffix = "_ema" if "--test_type=ema" in options else ""
    for world in WORLDS:
        folder = train([*options, f"--batch_size={GLOBAL_BATCH // world}"], world, tmp_path / str(world))
        runs[world] = Outcome.read(folder, suffix)
    alone = runs[1]
    for world in WORLDS[1:]:
        assert len(runs[world].epochs) == len(alone.epochs)
        for own, whole in zip(runs[world].epochs, alone.epochs, strict=True):
            assert own.keys() == whole.keys()
            for key in {"train_loss", "val_loss" + suffix, "aux_loss", "grad_norm"} & own.keys():
                assert own[key] == pytest.approx(whole[key], rel=1e-3), key
        chosen = [
            [v["epoch"] for f in run.results["folds"] for v in f["test"].values()] for run in (runs[world], alone)
        ]
        assert chosen[0] == chosen[1]
        assert list(runs[world].scores) == list(alone.scores)
        scores = [np.array(list(run.scores.values())) for run in (runs[world], alone)]
        if name == "cox":  # its risks have no origin: the last bias has a gradient of rounding alone
            scores = [s - s.mean() for s in scores]
        np.testing.assert_allclose(*scores, atol=1e-3)
        own, whole = ([v.float().flatten() for v in run.weights.values()] for run in (runs[world], alone))
        # Adam makes full steps of a gradient that is zero but for rounding, as that of a bias before a norm.
        assert ((torch.cat(own) - torch.cat(whole)).abs() > 1e-3).float().mean() < 0.01
    if name == "features":
        assert 3 <= len(alone.epochs) < 10, "nothing was stopped early"


def test_evaluation_of_the_same_weights_is_the_same_to_the_bit(tiny: TinyCohort, tmp_path: Path) -> None:
    """More processes than some split has bags for; metrics with intervals, reports and predictions; with readers."""
    options = tiny.options("--model=e2e_r18_abmilx", "--num_epoch=1", "--val2test")
    first = train(options, 1, tmp_path / "1")
    found = {}
    for world in (1, 2, 3, 5):
        folder = tmp_path / f"again{world}"
        shutil.copytree(first.parent, folder / "default")
        readers = f"--num_workers={int(world == 5)}"
        again = train([*options, "--script_mode=test", readers], world, folder)
        results = json.loads((again / "results.json").read_text())
        found[world] = (again / "fold_0_test_predictions.csv").read_text(), results["folds"], results["summary"]
    assert found[2] == found[1]
    assert found[3] == found[1]
    assert found[5] == found[1]
