"""``--full_bag`` in whole runs: the numbers of the plain run, several processes, kills, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from ranks import train
from test_resume import assert_same_run, kill_until_done, log_of
from tiny import TinyCohort, make_tiny_cohort

import main
from engine.training_options import check_training_options
from modules.model import SlideModel
from utils.options import parse

ROOT = Path(main.__file__).parent
BATCH_NORM_ENCODER = "--model=e2e_timm:test_resnet_abmilx"
LAYER_NORM_ENCODER = "--model=e2e_timm:test_convnext_abmilx"
WHOLE = ("--same_psize=0", "--p_batch_size=5", "--img_transform=strong", "--crop_size=28")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=18)


def folder(out: Path) -> Path:
    return out / "default" / "default"


def run(tiny: TinyCohort, out: Path, *extra: str) -> int:
    return main.main(tiny.options(BATCH_NORM_ENCODER, *WHOLE, f"--output_path={out}", *extra))


def epochs(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder(out) / "metrics.jsonl").read_text().splitlines()]


def assert_like(one: Path, other: Path) -> None:
    """Losses, patches per step and test scores agree as far as another order of sums allows."""
    assert len(epochs(one)) == len(epochs(other)) == 2
    for ours, theirs in zip(epochs(one), epochs(other), strict=True):
        for name in ("train_loss", "val_loss", "patches_per_step"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4), name
    scores = []
    for out in (one, other):
        with (folder(out) / "fold_0_test_predictions.csv").open() as file:
            scores.append([float(v) for row in csv.DictReader(file) for k, v in row.items() if k in ("p_1", "risk")])
    assert len(scores[0]) > 1
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("kind", ["classification", "survival"])
def test_a_run_has_the_numbers_of_the_plain_run(tiny: TinyCohort, tmp_path: Path, kind: str) -> None:
    """Two magnifications, several bags per step, dropout, augmentation, accumulation; patches read twice."""
    more = ["--mul_scale_input", f"--dataset_sub_root={tiny.low}", "--accumulation_steps=2", "--clip_grad=1"]
    if kind == "survival":
        more += ["--datasets=surv_tiny", f"--csv_path={tiny.survival_csv}"]
    assert run(tiny, tmp_path / "plain", *more) == 0
    assert run(tiny, tmp_path / "full", *more, "--full_bag", "--full_bag_keep=12", "--num_workers=2") == 0
    assert_like(tmp_path / "full", tmp_path / "plain")
    assert 0 < epochs(tmp_path / "full")[0]["data_wait"] < 1
    assert "at most 5 patches per encoder call; the first 12 patches" in log_of(tmp_path / "full")


def test_two_processes_equal_one_though_they_have_other_numbers_of_calls(tiny: TinyCohort, tmp_path: Path) -> None:
    more = [
        LAYER_NORM_ENCODER,
        *WHOLE,
        "--full_bag",
        "--full_bag_keep=10",
        "--dropout=0",
        "--no_drop_last",
        "--crop_size=32",
    ]
    more += ["--accumulation_steps=2", "--test_type=both", "--mm=0.9", "--clip_grad=1", "--num_epoch=1", "--lr=1e-3"]
    for world in (1, 2):
        train(tiny.options(*more, f"--batch_size={6 // world}"), world, tmp_path / str(world))
    assert epochs(tmp_path / "2")[0]["train_loss"] == pytest.approx(epochs(tmp_path / "1")[0]["train_loss"], rel=1e-4)
    states = [torch.load(folder(tmp_path / w) / "fold_0_last.pt", weights_only=True) for w in "12"]
    for part in ("model", "teacher"):
        for name, weight in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], weight, rtol=1e-3, atol=2e-4)


def test_killed_runs_go_on_to_the_same_end(tiny: TinyCohort, tmp_path: Path) -> None:
    more = [BATCH_NORM_ENCODER, *WHOLE, "--full_bag", "--full_bag_keep=6", "--batch_size=2"]
    more += ["--num_epoch=2", "--save_every_min=1e-9", "--accumulation_steps=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(tiny.options(*more), 1, whole)
    assert kill_until_done(killed, tiny.options(*more, f"--output_path={killed}")) >= 1
    assert_same_run(whole, killed)
    assert "after step" in log_of(killed)


def test_what_the_device_keeps_may_change_when_a_run_goes_on(tiny: TinyCohort, tmp_path: Path) -> None:
    assert run(tiny, tmp_path, "--full_bag", "--num_epoch=1") == 0
    assert run(tiny, tmp_path, "--full_bag", "--num_epoch=1", "--full_bag_keep=3") == 0
    assert "all 1 epochs are trained already" in log_of(tmp_path)


def test_the_dry_run_takes_the_largest_bags(tiny: TinyCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(tiny, tmp_path, "--full_bag", "--batch_size=2", "--dry_run") == 0
    assert "(16 instances)" in caplog.text  # no slide of the tiny cohort has more than 8
    assert not tmp_path.joinpath("default").exists()


def test_too_little_memory_names_bags_patches_and_options(
    tiny: TinyCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: SlideModel, instances: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SlideModel, "encode", full)
    assert run(tiny, tmp_path, "--full_bag", "--batch_size=1") == 2
    assert "training on P" in caplog.text
    assert "5 per encoder call). Give --amp, or lower --full_bag_keep (now 16384)" in caplog.text


@pytest.mark.parametrize("recipe", sorted((ROOT / "config" / "e2e").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_layer_fits_every_end_to_end_recipe(recipe: Path) -> None:
    config, _ = parse(["-c", f"{recipe},{ROOT / 'config' / 'full_bag.yaml'}"])
    check_training_options(config)
    assert config.train.full_bag


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--same_psize=4", "give --same_psize=0"),
        ("--max_patch_train=9", "give --max_patch_train=none"),
        ("--sel_type=ema", "give --sel_type=random"),
        ("--num_group_1d=2", "give --num_group_1d=none"),
        ("--pad_enc_bs", "give --no_pad_enc_bs"),
        ("--sync_bn", "would let them wait for each other"),
        ("--grad_checkpointing", "give --no_grad_checkpointing"),
        ("--torchcompile --torchcompile_mode=max-autotune", "give --torchcompile_mode=default"),
        ("--model=abmilx", "give a model e2e_<encoder>_<mil>"),
        ("--full_bag_keep=-1", "full_bag_keep is -1, but must be at least 0"),
        ("--no_full_bag --full_bag_keep=5", "nothing is kept without --full_bag"),
    ],
)
def test_what_it_cannot_go_with_is_refused(
    tiny: TinyCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, sentence: str
) -> None:
    assert run(tiny, tmp_path, "--full_bag", *change.split()) == 2
    assert sentence in caplog.text
    assert "Traceback" not in caplog.text
