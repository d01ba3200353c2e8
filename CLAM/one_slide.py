"""One slide: from the file to its coordinates, pictures and an account of what happened."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from coords_file import fingerprint, read_attributes, read_coords, write_coords
from grid import Grid, region_coords
from jobs import Job, Outcome, check_file_name, optics_facts, optics_of, plan_facts, resolved_params
from magnification import Plan, plan
from params import SlideParams
from pictures import draw_mask, draw_stitch, save_jpeg
from regions import find_own_mask, read_own_regions, write_geojson
from slide import Slide
from slides import open_slide
from tissue import Scan, Tissue, find_tissue, scan_level

from utils.errors import UserError, told

log = logging.getLogger(__name__)

MOST_CORRUPT = 0.5
"""Share of a level's blocks: with fewer damaged the rest is used and the slide reported, with more it fails."""

COUNTED = ("patches", "contours", "tissue_fraction", "corrupt_blocks")
"""Facts of a finished slide that are read back from its h5."""


@dataclass(frozen=True)
class _Work:
    """An open slide with everything resolved."""

    slide: Slide
    job: Job
    params: SlideParams
    plan: Plan
    fingerprint: str


def process(job: Job) -> Outcome:
    """Does the steps for one slide. What is wrong with the slide becomes its outcome, never an exception."""
    outcome = Outcome(job.path.name, "failed", params=job.params)
    try:
        check_file_name(job.path)
        with open_slide(job.path) as slide:
            _process_open(slide, job, outcome)
    except Exception as error:  # noqa: BLE001 - libraries raise whatever they like over odd files
        log.debug("%s", job.path, exc_info=True)
        outcome.fail("failed", told(error))
    return outcome


def _process_open(slide: Slide, job: Job, outcome: Outcome) -> None:
    params = outcome.params = resolved_params(slide, job)
    optics = optics_of(slide, job.mpp)
    outcome.facts.update(optics_facts(optics))
    try:
        read_plan = plan(optics, job.request)
    except UserError:
        _save_mask(job, params, scan_level(slide, params.vis_level, False), Tissue((), 0.0))
        raise
    outcome.facts.update(plan_facts(read_plan, job.request))
    work = _Work(slide, job, params, read_plan, _fingerprint(slide, job, params, read_plan))
    if job.steps.auto_skip and job.steps.patch and _is_done(work, outcome):
        return
    _make(work, outcome)


def _make(work: _Work, outcome: Outcome) -> None:
    """Segmentation, coordinates and pictures of a slide that is not done yet."""
    slide, job, params = work.slide, work.job, work.params
    segment = job.steps.seg and not job.steps.masks_dir
    level = params.seg_level if segment else params.vis_level
    scan = scan_level(slide, level, segment)
    shown = scan if params.vis_level == level else scan_level(slide, params.vis_level, False)
    slide.release()
    if scan.corrupt_blocks > MOST_CORRUPT * scan.blocks:
        raise UserError(
            f"{scan.corrupt_blocks} of the {scan.blocks} blocks of level {scan.level} cannot be decoded; copy the file "
            "again, or give another --seg_level"
        )
    tissue = _tissue(work, scan)
    if job.steps.seg or not job.output("masks", ".jpg").is_file():
        _save_mask(job, params, shown, tissue)
    outcome.status = "processed"
    if job.steps.seg:
        outcome.facts.update(contours=len(tissue.regions), tissue_fraction=round(tissue.fraction, 4))
        _note_corrupt(scan, outcome)
        if not tissue.regions:
            _remove_outputs(job)
            outcome.fail("failed_seg", f"no tissue: {tissue.hint}")
            return
    if job.steps.geojson:
        write_geojson(job.output("geojson", ".geojson"), tissue.regions)
    if job.steps.patch:
        _write_patches(work, tissue, outcome)
    if job.steps.stitch:
        _write_stitch(job, shown)


def _tissue(work: _Work, scan: Scan) -> Tissue:
    steps = work.job.steps
    if not steps.seg:
        return Tissue((), 0.0)
    if steps.masks_dir:
        return read_own_regions(find_own_mask(steps.masks_dir, work.slide.name), work.slide.dimensions)
    return find_tissue(scan, work.params)


def _save_mask(job: Job, params: SlideParams, shown: Scan, tissue: Tissue) -> None:
    picture = draw_mask(shown.overview, shown.overview_scale, tissue.regions, params.line_thickness)
    save_jpeg(job.output("masks", ".jpg"), picture)


def _write_patches(work: _Work, tissue: Tissue, outcome: Outcome) -> None:
    grid = Grid(
        patch_px=work.plan.patch_px,
        step_px=work.plan.step_px,
        slide_px=work.slide.dimensions,
        contour_fn=work.params.contour_fn,
        use_padding=work.params.use_padding,
    )
    coords = np.concatenate([region_coords(r, grid) for r in tissue.regions])
    outcome.facts["patches"] = len(coords)
    if len(coords) == 0:
        _remove_outputs(work.job)
        outcome.fail(
            "no_patches",
            f"no patch of {grid.patch_px[0]} x {grid.patch_px[1]} level-0 px passes contour_fn "
            f"{grid.contour_fn} in "
            f"{len(tissue.regions)} pieces of tissue; lower --patch_size, give --use_padding true, "
            f"or another "
            "--contour_fn",
        )
        return
    write_coords(work.job.output("patches", ".h5"), coords, _attributes(work, outcome.facts))


def _attributes(work: _Work, facts: dict[str, Any]) -> dict[str, Any]:
    size = work.slide.level_dimensions[work.plan.level]
    return {
        "patch_size": work.plan.read_size_px,
        "patch_level": work.plan.level,
        "downsample": work.slide.level_downsamples[work.plan.level],
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": work.slide.name,
        "save_path": str(work.job.steps.save_dir / "patches"),
        "target_patch_size_px": work.plan.target_size_px,
        "patch_size_level0_px": work.plan.patch_px,
        "step_size_level0_px": work.plan.step_px,
        "requested_mpp": work.job.request.requested_mpp,
        "requested_magnification": work.job.request.magnification,
        "level0_mpp": work.plan.level0_mpp,
        "mpp_source": work.plan.mpp_source,
        "resolved_mpp": work.plan.resolved_mpp,
        "slide_file": work.slide.path.name,
        "tissue_fraction": facts.get("tissue_fraction"),
        "contours": facts.get("contours"),
        "corrupt_blocks": facts.get("corrupt_blocks", 0),
        "fingerprint": work.fingerprint,
    }


def _write_stitch(job: Job, shown: Scan) -> None:
    """Draws the coordinates that the h5 holds, whoever wrote it."""
    attributes = read_attributes(job.output("patches", ".h5"))
    if attributes is None:
        return
    patch = attributes.get("patch_size_level0_px")
    if patch is None:
        patch = np.array(attributes["downsample"]) * attributes["patch_size"]
    coords = read_coords(job.output("patches", ".h5"))
    picture = draw_stitch(shown.overview, shown.overview_scale, coords, (int(patch[0]), int(patch[1])))
    save_jpeg(job.output("stitches", ".jpg"), picture)


def _remove_outputs(job: Job) -> None:
    """Results of an earlier run with other parameters must not pass for this one's."""
    for folder, suffix in (("patches", ".h5"), ("stitches", ".jpg"), ("geojson", ".geojson")):
        job.output(folder, suffix).unlink(missing_ok=True)


def _note_corrupt(scan: Scan, outcome: Outcome) -> None:
    if scan.corrupt_blocks:
        outcome.facts["corrupt_blocks"] = scan.corrupt_blocks
        outcome.fail(
            outcome.status,
            f"{scan.corrupt_blocks} blocks of level {scan.level} cannot be decoded and count as "
            f"background; copy the "
            "file again, or give another --seg_level",
        )


def _fingerprint(slide: Slide, job: Job, params: SlideParams, read_plan: Plan) -> str:
    mask = find_own_mask(job.steps.masks_dir, slide.name) if job.steps.masks_dir else None
    only_drawing = ("vis_level", "line_thickness")
    return fingerprint(
        {
            "params": {k: v for k, v in dataclasses.asdict(params).items() if k not in only_drawing},
            "plan": dataclasses.asdict(read_plan),
            "file": (slide.path.name, slide.path.stat().st_size, slide.level_dimensions),
            "mask": (mask.name, mask.stat().st_size, mask.stat().st_mtime_ns) if mask else None,
        }
    )


def _is_done(work: _Work, outcome: Outcome) -> bool:
    """Whether every output asked for is there and the coordinates are from these very parameters."""
    job = work.job
    attributes = read_attributes(job.output("patches", ".h5"))
    if attributes is None:
        return False
    if attributes.get("fingerprint") != work.fingerprint:
        log.info("%s: its h5 is of other parameters or another program; it is made anew.", job.path.name)
        return False
    wanted = [("masks", ".jpg", True), ("stitches", ".jpg", job.steps.stitch)]
    wanted.append(("geojson", ".geojson", job.steps.geojson))
    if not all(job.output(folder, suffix).is_file() for folder, suffix, asked in wanted if asked):
        return False
    outcome.status = "already_exist"
    outcome.facts.update({name: attributes[name] for name in COUNTED if attributes.get(name)})
    if attributes.get("corrupt_blocks"):
        outcome.fail(
            "already_exist",
            f"{attributes['corrupt_blocks']} blocks could not be decoded when its tissue was found "
            f"and count as "
            "background; copy the file again, or give another --seg_level",
        )
    return True
