"""um/px from what files say about themselves."""

from __future__ import annotations

import math
from typing import Any

PLAUSIBLE_MPP = (0.04, 20.0)
"""Files claim 72 dpi (353 um/px) or 0: outside these um/px the entry is a placeholder and counts as missing."""


def openslide_mpp(properties: dict[str, str]) -> tuple[float | None, str | None]:
    """The mean um/px of x and y in OpenSlide's properties and where it stands; None where nothing plausible does."""
    x, y = (positive(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x and y and _plausible((x + y) / 2):
        return (x + y) / 2, "openslide.mpp"
    unit = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", ""))
    resolution = positive(properties.get("tiff.XResolution"))
    if unit and resolution and _plausible(unit / resolution):
        return unit / resolution, "tiff.XResolution"
    return None, None


def _plausible(mpp: float) -> bool:
    return PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]


def positive(text: Any) -> float | None:
    """A finite number above 0, or None."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None
