"""From level, um/px or magnification to what is read: hand-computed cases and laws."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "CLAM"))

from magnification import Optics, Request, level_factors, nominal_downsample, plan

from utils.errors import UserError

FOUR_LEVELS = ((40_000, 32_000), (10_000, 8_000), (2_500, 2_000), (1_250, 1_000))


def optics(mpp: float | None = 0.25, power: float | None = None, levels=FOUR_LEVELS) -> Optics:
    return Optics(level_dimensions=levels, mpp=mpp, mpp_source="test" if mpp else None, objective_power=power)


@pytest.mark.parametrize(
    ("size0", "size", "factor"),
    [
        (4443, 2221, 2.0),  # TCGA: 2.0005, rounded down
        (3567, 1783, 2.0),
        (46_000, 718, 64.0),  # 718.75 rounded down: 64.07
        (1597, 400, 4.0),  # rounded up: 3.9925
        (3990, 1000, 3.99),  # no rounding explains it
        (1000, 400, 2.5),
        (500, 500, 1.0),
    ],
)
def test_nominal_downsample(size0, size, factor):
    assert nominal_downsample(size0, size) == pytest.approx(factor)


def test_a_downsample_of_3_99_is_not_truncated_unless_asked():
    """T59: published patches of 256 cover 768 level-0 px and overlap; they cover 256 x 3.99 = 1021."""
    low = optics(levels=((39_900, 39_900), (10_000, 10_000)))
    assert plan(low, Request(patch_level=1)).patch_px == (1021, 1021)
    assert plan(low, Request(patch_level=1)).step_px == (1021, 1021)
    old = plan(low, Request(patch_level=1, published_step=True))
    assert old.patch_px == old.step_px == (768, 768)
    assert level_factors(low, 1, published=True) == (3.0, 3.0)


def test_whole_downsamples_are_as_published():
    for level, factor in enumerate((1, 4, 16, 32)):
        for published in (True, False):
            request = Request(patch_level=level, patch_size_px=64, step_size_px=48, published_step=published)
            found = plan(optics(), request)
            assert found.patch_px == (64 * factor, 64 * factor)
            assert found.step_px == (48 * factor, 48 * factor)
            assert found.read_size_px == found.target_size_px == 64


@pytest.mark.parametrize(
    ("mpp0", "request_", "level", "read", "resolved"),
    [
        (0.25, {"mpp": 0.25}, 0, 256, 0.25),
        (0.25, {"mpp": 0.5}, 0, 512, 0.5),
        (0.25, {"mpp": 1.0}, 1, 256, 1.0),
        (0.25, {"mpp": 2.0}, 1, 512, 2.0),
        (0.499, {"magnification": 20}, 0, 256, 0.499),  # within 1 %: read as it is
        (0.265, {"magnification": 20}, 0, 483, 0.265 * 483 / 256),  # not rounded to 40x
        (0.2325, {"magnification": 10}, 1, 275, 0.2325 * 4 * 275 / 256),
        (0.25, {"mpp": 100.0}, 3, 3200, 100.0),
    ],
)
def test_requested_scale_is_resolved_per_slide(mpp0, request_, level, read, resolved):
    found = plan(optics(mpp0), Request(**request_))
    assert (found.level, found.read_size_px, found.target_size_px) == (level, read, 256)
    assert found.resolved_mpp == pytest.approx(resolved)
    assert found.step_px == found.patch_px


@pytest.mark.parametrize("seed", range(30))
def test_the_stored_pixel_is_as_large_as_asked(seed):
    """Whatever the slide: half a px of rounding in the read size, or 1 % of tolerance, and no upsampling."""
    rng = np.random.default_rng(seed)
    mpp0, wanted = float(rng.uniform(0.1, 0.6)), float(rng.uniform(0.61, 9))
    size = int(rng.choice([64, 224, 256]))
    found = plan(optics(mpp0), Request(patch_size_px=size, step_size_px=size // 2, mpp=wanted))
    covered = found.patch_px[0] * mpp0
    assert covered == pytest.approx(size * wanted, rel=0.0101 + 0.5 / found.read_size_px)
    assert found.read_size_px >= size * 0.99
    assert found.resolved_mpp == pytest.approx(covered / size, rel=1e-6)
    assert found.step_px[0] == pytest.approx(found.patch_px[0] / 2, abs=0.5)


def test_objective_power_serves_a_magnification_and_nothing_else():
    found = plan(optics(None, 40), Request(magnification=10))
    assert (found.level, found.read_size_px, found.mpp_source) == (1, 256, "objective power")
    with pytest.raises(UserError, match=r"only an objective power of 40.*--mpp_csv"):
        plan(optics(None, 40), Request(mpp=1.0))


def test_nothing_is_guessed():
    with pytest.raises(UserError, match="does not say its um/px.*--mpp_csv"):
        plan(optics(None), Request(mpp=0.5))
    with pytest.raises(UserError, match=r"0\.5 um/px \(test\), coarser than the 0\.25"):
        plan(optics(0.5), Request(mpp=0.25))
    with pytest.raises(UserError, match=r"no level 4.*levels 0 to 3"):
        plan(optics(), Request(patch_level=4))
