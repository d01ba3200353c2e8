"""The cohort page: which slides are doubtful, and that they come first."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1] / "CLAM"))

from cohort_page import write_cohort_page
from params import SlideParams
from process_list import Row
from suspicion import flags_of


def row(name: str, status: str = "processed", **facts: object) -> Row:
    usual = {"patches": 1000, "contours": 4, "tissue_fraction": 0.3, "width": 9, "height": 9, "levels": 3}
    return Row(
        f"{name}.svs", SlideParams(), facts={**usual, "level0_mpp": 0.25, "resolved_mpp": 0.5, **facts}, status=status
    )


def healthy(count: int = 9) -> list[Row]:
    return [row(f"h{i}", patches=900 + 25 * i) for i in range(count)]


def texts(rows: list[Row]) -> list[list[str]]:
    return [[flag.text for flag in flags] for flags in flags_of(rows)]


def test_a_healthy_cohort_has_no_flags():
    assert texts(healthy()) == [[]] * 9


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        (row("x", patches=9), "few patches"),
        (row("x", patches=90_000), "many patches"),
        (row("x", tissue_fraction=0.97), "tissue 97%"),
        (row("x", tissue_fraction=0.001), "tissue 0.10%"),
        (row("x", resolved_mpp=0.25), "um/px 0.50 x the cohort's"),
        (row("x", level0_mpp=None), "um/px unknown"),
        (row("x", contours=1), "a single piece of tissue"),
        (row("x", "failed_seg", reason="no tissue: ..."), "no tissue"),
        (row("x", "failed", reason="cannot be opened"), "failed"),
        (row("x", "no_patches"), "no_patches"),
        (row("x", "tbp"), "not done"),
        (row("x", reason="2 blocks cannot be decoded"), "damaged"),
    ],
)
def test_an_odd_slide_is_flagged_and_the_others_are_not(odd, expected):
    assert texts([*healthy(), odd]) == [*([[]] * 9), [expected]]


def test_numbers_read_back_from_a_list_are_text():
    rows = [row(f"h{i}", patches=str(900 + 25 * i), tissue_fraction="0.3", contours="4") for i in range(9)]
    assert texts([*rows, row("x", patches="9", level0_mpp="")])[-1] == ["few patches", "um/px unknown"]


def test_the_page_holds_everything_and_the_worst_first(tmp_path):
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "masks" / "h1.jpg")
    rows = [*healthy(3), row("<b>&", "failed", reason="<script>"), row("z", tissue_fraction=0.95)]
    page = write_cohort_page(tmp_path, rows).read_text(encoding="utf-8")
    order = [page.index(f"<h2>{name}.svs</h2>") for name in ("&lt;b&gt;&amp;", "z", "h0", "h1", "h2")]
    assert order == sorted(order)
    assert "<script>" not in page
    assert page.count("data:image/jpeg;base64,") == 1
    assert "4 processed, 1 failed; 4,775 patches; 2 worth a look" in page
