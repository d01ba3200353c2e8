"""What is asked of one slide, and what came of it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magnification import Optics, Plan, Request
from params import SlideParams
from slide import Slide

from utils.errors import UserError

BEST_DOWNSAMPLE = 64
"""Segmentation and pictures use the level that OpenSlide calls best for this downsample."""

OUTPUTS = {"patches": ".h5", "masks": ".jpg", "stitches": ".jpg", "geojson": ".geojson"}
"""Folders of results, and the extension of a slide's file there."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What is to be made, and where."""

    save_dir: Path
    seg: bool = False
    patch: bool = False
    stitch: bool = False
    geojson: bool = False
    auto_skip: bool = True
    masks_dir: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One slide and everything that decides its result.

    ``old_area``: least tissue area of an old-format list, in px of that list's ``seg_level``.
    """

    path: Path
    params: SlideParams
    request: Request
    steps: Steps
    mpp: float | None = None
    old_area: float | None = None

    def output(self, folder: str, suffix: str) -> Path:
        """The slide's file in one of the output folders."""
        return self.steps.save_dir / folder / f"{self.path.stem}{suffix}"


@dataclass
class Outcome:
    """What happened to one slide. ``failed`` counts towards the exit status; ``facts`` are further columns."""

    slide_id: str
    status: str
    reason: str = ""
    failed: bool = False
    params: SlideParams | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def fail(self, status: str, reason: str) -> None:
        """Notes why there is no usable result, or an incomplete one."""
        self.status, self.reason, self.failed = status, reason, True


def check_file_name(path: Path) -> None:
    """Refuses a slide that no list could name.

    Raises:
        UserError: its name is not UTF-8.
    """
    name = os.fsencode(path.name)
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"its file name {name!r} is not UTF-8, as lists and results need it; rename the file") from None


def optics_of(slide: Slide, mpp: float | None) -> Optics:
    """The slide's geometry and scale; a given um/px overrides the file's."""
    return Optics(
        level_dimensions=slide.level_dimensions,
        mpp=mpp or slide.mpp,
        mpp_source="mpp_csv" if mpp else slide.mpp_source,
        objective_power=slide.objective_power,
    )


def resolved_params(slide: Slide, job: Job) -> SlideParams:
    """The parameters with levels of -1 and the area of an old-format list worked out for this slide.

    Raises:
        UserError: the slide has no such level.
    """
    params, levels = job.params, len(slide.level_dimensions)
    for name in ("seg_level", "vis_level"):
        if getattr(params, name) >= levels:
            raise UserError(
                f"{name} is {getattr(params, name)}, but the slide's levels are 0 to {levels - 1}; "
                f"give another --{name}, or -1"
            )
    if job.old_area is not None:
        x, y = slide.level_downsamples[params.seg_level]
        params = dataclasses.replace(params, a_t=int(job.old_area * x * y / 512**2), seg_level=-1, vis_level=-1)
    best = 0 if levels == 1 else slide.best_level(BEST_DOWNSAMPLE)
    return dataclasses.replace(
        params,
        seg_level=params.seg_level if params.seg_level >= 0 else best,
        vis_level=params.vis_level if params.vis_level >= 0 else best,
    )


def optics_facts(optics: Optics) -> dict[str, Any]:
    """Columns of the list: what a slide says of itself."""
    return {
        "width": optics.level_dimensions[0][0],
        "height": optics.level_dimensions[0][1],
        "levels": len(optics.level_dimensions),
        "level0_mpp": optics.mpp,
        "mpp_source": optics.mpp_source,
        "objective_power": optics.objective_power,
    }


def plan_facts(read_plan: Plan, request: Request) -> dict[str, Any]:
    """Columns of the list: what was asked for and what is read."""
    return {
        "requested_mpp": request.requested_mpp,
        "level0_mpp": read_plan.level0_mpp,
        "mpp_source": read_plan.mpp_source,
        "resolved_mpp": read_plan.resolved_mpp,
        "read_level": read_plan.level,
        "read_size_px": read_plan.read_size_px,
        "target_patch_size_px": read_plan.target_size_px,
    }
