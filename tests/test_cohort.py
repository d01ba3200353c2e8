"""The synthetic cohort: slides that OpenSlide reads, and a signal that colours do not give away."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import cohort
import numpy as np
import openslide
import pytest
from conftest import Slides
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

PATCH_PX = 64
Floats = NDArray[np.float64]
Bags = list[tuple[int, Floats]]


def patches(drawn: cohort.Drawn) -> Floats:
    """Patches (N, 64, 64, 3) in 0..255 that are mostly tissue."""
    starts = range(0, len(drawn.tissue), PATCH_PX)
    corners = [(slice(y, y + PATCH_PX), slice(x, x + PATCH_PX)) for y in starts for x in starts]
    return np.stack([drawn.image[c] for c in corners if drawn.tissue[c].mean() > 0.5]).astype(float)


def colours(bag: Floats) -> Floats:
    return bag.mean((0, 1, 2))


def spread_colours(bag: Floats) -> Floats:
    """Mean, deviation and extremes over the bag of the mean colours of its patches (12,)."""
    means = bag.mean((1, 2))
    return np.concatenate([means.mean(0), means.std(0), means.min(0), means.max(0)])


def texture(bag: Floats) -> Floats:
    """Mean difference of neighbouring pixels in units of contrast: low where nuclei are large (2,)."""
    grey = bag.mean(3)
    edges = np.abs(np.diff(grey, axis=2)).mean((1, 2)) / grey.std((1, 2))
    return np.quantile(edges, [0.1, 0.5])


@pytest.fixture(scope="module")
def bags() -> Bags:
    """Class and patches of 60 slides, one per patient."""
    found = []
    for number in range(60):
        rng = np.random.default_rng((11, number))
        found.append((number % 2, patches(cohort.draw_slide(rng, cohort.CLASSES[number % 2], 512))))
    return found


def held_out_auc(features: list[Floats], labels: list[int]) -> float:
    """AUC on the second half of a logistic regression fitted to the first."""
    half = len(labels) // 2
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(features[:half], labels[:half])
    return float(roc_auc_score(labels[half:], model.decision_function(features[half:])))


def test_openslide_reads_what_was_drawn(tmp_path: Path) -> None:
    image = cohort.draw_slide(np.random.default_rng(3), "tumor", 640).image
    cohort.write_pyramid(tmp_path / "a.tif", image, levels=3)
    with openslide.OpenSlide(tmp_path / "a.tif") as slide:
        assert slide.level_dimensions == ((640, 640), (320, 320), (160, 160))
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(0.5)
        assert float(slide.properties[openslide.PROPERTY_NAME_MPP_Y]) == pytest.approx(0.5)
        assert slide.properties["openslide.level[0].tile-width"] == "128"
        region = np.asarray(slide.read_region((100, 200), 0, (300, 150)).convert("RGB"))
        half = np.asarray(slide.read_region((0, 0), 1, (320, 320)).convert("RGB"))
    np.testing.assert_array_equal(region, image[200:350, 100:400])
    means_of_four = image.reshape(320, 2, 320, 2, 3).mean((1, 3))
    assert np.abs(half - means_of_four).max() <= 0.5


def test_csv_groups_patients_and_names_the_files(tiny_cohort: Slides) -> None:
    with tiny_cohort.csv.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "slide", "label", "fold"]
    assert sorted(r["slide"] for r in rows) == sorted(p.stem for p in tiny_cohort.folder.iterdir())
    for fold in ("train", "val", "test"):
        assert {r["label"] for r in rows if r["fold"] == fold} == {"normal", "tumor"}
    assert len({r["case"] for r in rows}) == len({(r["case"], r["fold"]) for r in rows})


def test_same_seed_draws_the_same_and_another_does_not() -> None:
    first, again, other = (cohort.draw_slide(np.random.default_rng(s), "tumor", 256).image for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_tumour_fills_the_announced_share_of_tumor_slides_only() -> None:
    for seed in range(5):
        drawn = cohort.draw_slide(np.random.default_rng(seed), "tumor", 512)
        assert 0.25 <= drawn.tumour.sum() / drawn.tissue.sum() <= 0.41
        assert not cohort.draw_slide(np.random.default_rng(seed), "normal", 512).tumour.any()


def test_both_kinds_of_nuclei_cover_the_same_share() -> None:
    rng = np.random.default_rng(0)
    normal, tumour = (cohort.draw_nuclei(rng, 2048, kind).mean() for kind in (cohort.NORMAL, cohort.TUMOUR))
    assert normal == pytest.approx(tumour, rel=0.02)


@pytest.mark.parametrize("features", [colours, spread_colours])
def test_colours_do_not_tell_the_classes_apart(bags: Bags, features: Callable[[Floats], Floats]) -> None:
    assert held_out_auc([features(bag) for _, bag in bags], [label for label, _ in bags]) < 0.8


def test_texture_tells_the_classes_apart(bags: Bags) -> None:
    assert held_out_auc([texture(bag) for _, bag in bags], [label for label, _ in bags]) > 0.95


@pytest.mark.parametrize("patients", ["4", "7"])
def test_too_few_or_odd_patients_are_refused(patients: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cohort.main([str(tmp_path), "--patients", patients])
    assert stop.value.code == 2
    assert f"--patients is {patients}, but must be even and at least 6" in capsys.readouterr().err
