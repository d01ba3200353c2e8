"""What several tests share: the real data, where there is some, and a tiny synthetic cohort."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cohort import Cohort, make_cohort

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Slides:
    """A cohort on disk: the folder of its .tif slides and its label csv (case,slide,label,fold)."""

    folder: Path
    csv: Path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real slides and labels that ABMILX_DATA names (relative to the repository's root)."""
    folder = (ROOT / os.environ.get("ABMILX_DATA", "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ABMILX_DATA to the folder that holds wsi/, ucsb/ and labels/")
    return folder


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Slides:
    """Six patients with one slide each, 512 px wide, two levels: per split one slide of either class."""
    out = tmp_path_factory.mktemp("cohort")
    csv = make_cohort(out, Cohort(patients=6, slides_per_patient=1, side_px=512, levels=2))
    return Slides(out / "slides", csv)
