"""Checkpoints in the published form, and weights that were trained on colours in the published order."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyCohort, make_tiny_cohort
from torch import Tensor

import main
from datasets.instances import PixelSource
from datasets.store import PatchStore
from engine.setup import build_model, prepare
from modules.model import SlideModel
from utils.options import parse

WRAPPED = {
    "bare": "{}",
    "ddp": "module.{}",
    "compiled": "_orig_mod.{}",
    "both": "module._orig_mod.{}",
}
"""How DDP and compile write a name."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=12)


def options_of(tiny: TinyCohort, out: Path, *extra: str) -> list[str]:
    return tiny.options("--script_mode=test", f"--output_path={out}", *extra)


def built(options: list[str], seed: int) -> SlideModel:
    """The model of these options with other weights than a run starts from."""
    config, _ = parse(options)
    torch.manual_seed(seed)
    model, _ = build_model(prepare(config), 2, 0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


def publish(out: Path, model: SlideModel, form: str, ema: bool = False) -> None:
    """Writes ``model`` as the published program does: the dict with its keys, prefixes included."""
    folder = out / "default" / "default"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {WRAPPED[form].format(name): value for name, value in model.state_dict().items()}
    if ema:
        torch.save({"teacher": weights, "epoch": 41}, folder / "fold_0_ema_model_best.pt")
    else:
        torch.save({"model": weights, "teacher": None, "epoch": 41}, folder / "fold_0_model_best.pt")


def predictions(out: Path, suffix: str = "") -> dict[str, list[float]]:
    with (out / "default" / "default" / f"fold_0_test{suffix}_predictions.csv").open() as file:
        return {row["id"]: [float(row["p_0"]), float(row["p_1"])] for row in csv.DictReader(file)}


def by_hand(tiny: TinyCohort, model: SlideModel, slide: str, order: str = "rgb") -> Tensor:
    """Probabilities (2,) of one slide, from decoded patches and the published normalisation."""
    store = PatchStore(tiny.high)
    patches = PixelSource(store).load(slide, np.arange(store.counts[slide])).float() / 255  # (n, S, S, 3) RGB
    if order == "bgr":
        patches = patches.flip(-1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((patches - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model(images, [len(images)])[0][0].softmax(-1)


@pytest.mark.parametrize("form", WRAPPED)
def test_a_published_checkpoint_is_tested_as_it_is(tiny: TinyCohort, tmp_path: Path, form: str) -> None:
    options = options_of(tiny, tmp_path)
    model = built(options, seed=5)
    publish(tmp_path, model, form)
    assert main.main(options) == 0
    found = predictions(tmp_path)
    for slide, values in found.items():
        torch.testing.assert_close(torch.tensor(values), by_hand(tiny, model, slide), rtol=1e-3, atol=1e-4)


def test_main_and_ema_files_are_both_tested(tiny: TinyCohort, tmp_path: Path) -> None:
    options = options_of(tiny, tmp_path, "--test_type=both_ema")
    models = {"": built(options, seed=5), "_ema": built(options, seed=6)}
    publish(tmp_path, models[""], "ddp")
    publish(tmp_path, models["_ema"], "ddp", ema=True)
    assert main.main(options) == 0
    slide = next(iter(predictions(tmp_path)))
    for suffix, model in models.items():
        values = torch.tensor(predictions(tmp_path, suffix)[slide])
        torch.testing.assert_close(values, by_hand(tiny, model, slide), rtol=1e-3, atol=1e-4)


def test_weights_of_another_model_are_refused_by_name(
    tiny: TinyCohort, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The published program loaded what fitted and left the rest as it was."""
    publish(tmp_path, built(options_of(tiny, tmp_path), seed=5), "ddp")
    assert main.main(options_of(tiny, tmp_path, "--inner_dim=64")) == 2
    assert "do not fit the model" in caplog.text
    assert "mil.feature" in caplog.text


def test_colours_in_the_published_order(tiny: TinyCohort, tmp_path: Path) -> None:
    """The published program decoded to BGR and applied the RGB mean and deviation (T6)."""
    options = options_of(tiny, tmp_path, "--channel_order=bgr")
    model = built(options, seed=7)
    publish(tmp_path, model, "bare")
    assert main.main(options) == 0
    found = predictions(tmp_path)
    differences = []
    for slide, values in found.items():
        expected = by_hand(tiny, model, slide, order="bgr")
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-3, atol=1e-4)
        differences.append(float((expected - by_hand(tiny, model, slide)).abs().max()))
    assert max(differences) > 1e-3


@pytest.mark.parametrize("form", ["ddp", "both"])
def test_enc_init_takes_the_encoder_of_a_published_checkpoint(tiny: TinyCohort, tmp_path: Path, form: str) -> None:
    options = [o for o in options_of(tiny, tmp_path) if not o.startswith("--script_mode")]
    model = built(options, seed=8)
    publish(tmp_path, model, form)
    folder = tmp_path / "default" / "default"
    for given in (folder, folder / "fold_0_model_best.pt"):
        started = built([*options, f"--enc_init={given}"], seed=9)
        assert started.encoder is not None
        assert model.encoder is not None
        for name, value in model.encoder.named_parameters():
            assert torch.equal(value, started.encoder.get_parameter(name)), name
        head = started.mil.state_dict()["classifier.weight"]
        assert not torch.equal(head, model.mil.state_dict()["classifier.weight"])
