"""One slide: from the file to its coordinates, pictures and an account of what happened."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from coords_file import fingerprint, read_attributes, read_coords, write_coords
from grid import Grid, region_coords
from magnification import Optics, Plan, Request, plan
from params import SlideParams
from pictures import draw_mask, draw_stitch, save_jpeg
from regions import find_own_mask, read_own_regions, write_geojson
from slides import Slide, open_slide
from tissue import Scan, Tissue, find_tissue, scan_level

from utils.errors import UserError

log = logging.getLogger(__name__)

BEST_DOWNSAMPLE = 64
"""Segmentation and pictures use the level that OpenSlide calls best for this downsample."""


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
    """One slide and everything that decides its result."""

    path: Path
    params: SlideParams
    request: Request
    steps: Steps
    mpp: float | None = None
    old_area: float | None = None
    """Least area of an old-format list, in px of that list's ``seg_level``."""

    def output(self, folder: str, suffix: str) -> Path:
        """The slide's file in one of the output folders."""
        return self.steps.save_dir / folder / f"{self.path.stem}{suffix}"


@dataclass
class Outcome:
    """What happened to one slide. ``failed`` counts towards the exit status."""

    slide_id: str
    status: str
    reason: str = ""
    failed: bool = False
    params: SlideParams | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """Further columns: um/px, patches, tissue share, ..."""


def process(job: Job) -> Outcome:
    """Does the steps for one slide. Errors of the slide become an outcome, never an exception."""
    outcome = Outcome(job.path.name, "failed", params=job.params)
    try:
        with open_slide(job.path) as slide:
            _process_open(slide, job, outcome)
    except (UserError, OSError, MemoryError) as error:
        outcome.reason = (
            f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
        )
        outcome.failed = True
    return outcome


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
    params = job.params
    if job.old_area is not None:
        x, y = slide.level_downsamples[params.seg_level]
        area = int(job.old_area * x * y / 512**2)
        params = dataclasses.replace(params, a_t=area, seg_level=-1, vis_level=-1)
    levels = {}
    for name in ("seg_level", "vis_level"):
        level = getattr(params, name)
        if level >= len(slide.level_dimensions):
            raise UserError(f"{name} is {level}, but its levels are 0 to {len(slide.level_dimensions) - 1}.")
        single = len(slide.level_dimensions) == 1
        levels[name] = level if level >= 0 else (0 if single else slide.best_level(BEST_DOWNSAMPLE))
    return dataclasses.replace(params, **levels)


def _process_open(slide: Slide, job: Job, outcome: Outcome) -> None:
    params = outcome.params = resolved_params(slide, job)
    optics = optics_of(slide, job.mpp)
    outcome.facts.update(_optics_facts(optics))
    grid_plan = plan(optics, job.request)
    outcome.facts.update(_plan_facts(grid_plan, job.request))
    print_ = _fingerprint(slide, job, params, grid_plan)
    if job.steps.auto_skip and _is_done(job, print_, outcome):
        return
    scan = scan_level(slide, params.seg_level, job.steps.seg and not job.steps.masks_dir)
    tissue = _tissue(slide, job, params, scan)
    shown = scan if params.vis_level == params.seg_level else scan_level(slide, params.vis_level, False)
    picture = draw_mask(shown.overview, shown.overview_scale, tissue.regions, params.line_thickness)
    save_jpeg(job.output("masks", ".jpg"), picture)
    outcome.status = "processed"
    outcome.facts.update(contours=len(tissue.regions), tissue_fraction=round(tissue.fraction, 4))
    _note_corrupt(scan, outcome)
    if job.steps.seg and not tissue.regions:
        outcome.status, outcome.reason, outcome.failed = "failed_seg", f"no tissue: {tissue.hint}", True
        job.output("patches", ".h5").unlink(missing_ok=True)
        return
    if job.steps.geojson:
        write_geojson(job.output("geojson", ".geojson"), tissue.regions)
    if job.steps.patch:
        _write_patches(slide, job, (tissue, grid_plan, print_), outcome)
    if job.steps.stitch and not outcome.failed:
        _write_stitch(job, shown, grid_plan)


def _tissue(slide: Slide, job: Job, params: SlideParams, scan: Scan) -> Tissue:
    if not job.steps.seg:
        return Tissue((), 0.0)
    if job.steps.masks_dir:
        return read_own_regions(find_own_mask(job.steps.masks_dir, slide.name), slide.dimensions)
    return find_tissue(scan, params)


def _write_patches(slide: Slide, job: Job, found: tuple[Tissue, Plan, str], outcome: Outcome) -> None:
    tissue, grid_plan, print_ = found
    assert_params = outcome.params or job.params
    grid = Grid(
        patch_px=grid_plan.patch_px,
        step_px=grid_plan.step_px,
        slide_px=slide.dimensions,
        contour_fn=assert_params.contour_fn,
        use_padding=assert_params.use_padding,
    )
    coords = np.concatenate([region_coords(r, grid) for r in tissue.regions])
    outcome.facts["patches"] = len(coords)
    path = job.output("patches", ".h5")
    if len(coords) == 0:
        path.unlink(missing_ok=True)
        outcome.status, outcome.failed = "no_patches", True
        outcome.reason = (
            f"no patch of {grid_plan.patch_px[0]} x {grid_plan.patch_px[1]} level-0 px passes the contour test "
            f"{grid.contour_fn} in {len(tissue.regions)} pieces of tissue; lower --patch_size or give --use_padding"
        )
        return
    write_coords(path, coords, _attributes(slide, job, grid_plan, {**outcome.facts, "fingerprint": print_}))


def _attributes(slide: Slide, job: Job, grid_plan: Plan, facts: dict[str, Any]) -> dict[str, Any]:
    size = slide.level_dimensions[grid_plan.level]
    return {
        "patch_size": grid_plan.read_size_px,
        "patch_level": grid_plan.level,
        "downsample": slide.level_downsamples[grid_plan.level],
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": slide.name,
        "save_path": str(job.steps.save_dir / "patches"),
        "target_patch_size_px": grid_plan.target_size_px,
        "patch_size_level0_px": grid_plan.patch_px,
        "step_size_level0_px": grid_plan.step_px,
        "requested_mpp": job.request.requested_mpp,
        "level0_mpp": grid_plan.level0_mpp,
        "mpp_source": grid_plan.mpp_source,
        "resolved_mpp": grid_plan.resolved_mpp,
        "slide_file": slide.path.name,
        "tissue_fraction": facts.get("tissue_fraction"),
        "contours": facts.get("contours"),
        "corrupt_blocks": facts.get("corrupt_blocks", 0),
        "fingerprint": facts["fingerprint"],
    }


def _write_stitch(job: Job, shown: Scan, grid_plan: Plan) -> None:
    path = job.output("patches", ".h5")
    if path.is_file():
        picture = draw_stitch(shown.overview, shown.overview_scale, read_coords(path), grid_plan.patch_px)
        save_jpeg(job.output("stitches", ".jpg"), picture)


def _note_corrupt(scan: Scan, outcome: Outcome) -> None:
    if scan.corrupt_blocks:
        outcome.failed = True
        outcome.facts["corrupt_blocks"] = scan.corrupt_blocks
        outcome.reason = (
            f"{scan.corrupt_blocks} blocks of level {scan.level} cannot be decoded and count as background; "
            "copy the file again or give another --seg_level"
        )


def _fingerprint(slide: Slide, job: Job, params: SlideParams, grid_plan: Plan) -> str:
    mask = find_own_mask(job.steps.masks_dir, slide.name) if job.steps.masks_dir else None
    return fingerprint(
        {
            "params": {
                k: v
                for k, v in dataclasses.asdict(params).items()
                if k not in ("vis_level", "line_thickness")
            },
            "plan": dataclasses.asdict(grid_plan),
            "file": (slide.path.name, slide.path.stat().st_size, slide.level_dimensions),
            "mask": (mask.name, mask.stat().st_size, mask.stat().st_mtime_ns) if mask else None,
        }
    )


def _is_done(job: Job, print_: str, outcome: Outcome) -> bool:
    """Whether every output asked for is there and the coordinates are from these very parameters."""
    attributes = read_attributes(job.output("patches", ".h5"))
    if not job.steps.patch or attributes is None:
        return False
    if attributes.get("fingerprint") != print_:
        log.info("%s: its h5 is from other parameters or another program, and is made anew.", job.path.name)
        return False
    wanted = [("masks", ".jpg")]
    wanted += [("stitches", ".jpg")] if job.steps.stitch else []
    wanted += [("geojson", ".geojson")] if job.steps.geojson else []
    if not all(job.output(*w).is_file() for w in wanted):
        return False
    outcome.status = "already_exist"
    for name in ("patches", "contours", "tissue_fraction", "corrupt_blocks"):
        if attributes.get(name) is not None:
            outcome.facts[name] = attributes[name]
    if attributes.get("corrupt_blocks"):
        outcome.failed = True
        outcome.reason = f"{attributes['corrupt_blocks']} blocks could not be decoded when it was segmented"
    return True


def _optics_facts(optics: Optics) -> dict[str, Any]:
    return {
        "width": optics.level_dimensions[0][0],
        "height": optics.level_dimensions[0][1],
        "levels": len(optics.level_dimensions),
        "level0_mpp": optics.mpp,
        "mpp_source": optics.mpp_source,
        "objective_power": optics.objective_power,
    }


def _plan_facts(grid_plan: Plan, request: Request) -> dict[str, Any]:
    return {
        "requested_mpp": request.requested_mpp,
        "level0_mpp": grid_plan.level0_mpp,
        "mpp_source": grid_plan.mpp_source,
        "resolved_mpp": grid_plan.resolved_mpp,
        "read_level": grid_plan.level,
        "read_size_px": grid_plan.read_size_px,
        "target_patch_size_px": grid_plan.target_size_px,
    }


def blank_corner() -> npt.NDArray[np.int64]:
    """No corners."""
    return np.empty((0, 2), np.int64)
