"""Slides to patch coordinates: tissue segmentation, contours, a grid of patches, pictures and a cohort page.

    python CLAM/create_patches_fp.py --source SLIDES --save_dir OUT --mpp 0.5 --preset tcga --seg --patch --stitch

Exit status: 0 all slides done, 1 some slide failed (see process_list_autogen.csv), 2 the options are at fault
or the results cannot be written.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT / "CLAM", ROOT):
    # Before the installed packages: one of them is called "datasets", too.
    if str(_folder) not in sys.path[:2]:
        sys.path.insert(1, str(_folder))

from batch import over_processes  # noqa: E402
from cohort_page import write_cohort_page  # noqa: E402
from jobs import OUTPUTS, Job, Outcome, Steps  # noqa: E402
from leftovers import remove_leftovers  # noqa: E402
from magnification import Request  # noqa: E402
from one_slide import process  # noqa: E402
from params import PARAM_NAMES, SlideParams, read_preset, typed  # noqa: E402
from process_list import Ledger, Row  # noqa: E402
from survey import survey, table  # noqa: E402
from tqdm import tqdm  # noqa: E402
from tqdm.contrib.logging import logging_redirect_tqdm  # noqa: E402
from worklist import choose_rows, read_mpp_csv  # noqa: E402

from utils.cores import usable_cores  # noqa: E402
from utils.errors import UserError  # noqa: E402

log = logging.getLogger("create_patches_fp")


def build_parser() -> argparse.ArgumentParser:
    """The options; every parameter of a preset is an option too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--source", type=Path, required=True, help="folder of slides")
    files.add_argument("--save_dir", type=Path, required=True, help="output: patches/ masks/ stitches/ and the list")
    files.add_argument("--preset", help="shipped name (bwh_biopsy, bwh_resection, tcga, tcga_nsclc) or a csv of yours")
    files.add_argument("--process_list", help="csv in save_dir that restricts and parameterises the slides")
    files.add_argument("--slide_list", type=Path, help="text file of slide names, one a line: only these are done")
    files.add_argument(
        "--mpp_csv", type=Path, help="csv slide_id,mpp: um/px of level 0 for slides; overrides the file's"
    )
    files.add_argument("--masks", type=Path, metavar="DIR", help="own tissue: <slide>.png (non-zero) or .geojson")
    steps = parser.add_argument_group("steps")
    steps.add_argument("--seg", action="store_true", help="find tissue")
    steps.add_argument("--patch", action="store_true", help="write coordinates")
    steps.add_argument("--stitch", action="store_true", help="write pictures of the kept patches")
    steps.add_argument("--geojson", action="store_true", help="write contours for QuPath")
    steps.add_argument("--no_auto_skip", action="store_true", help="redo slides that are done with the same parameters")
    patches = parser.add_argument_group("patches")
    patches.add_argument("--patch_size", type=int, default=256, help="px of the level, or as stored with --mpp")
    patches.add_argument("--step_size", type=int, default=256, help="px, as patch_size; less than it: overlap")
    scale = patches.add_mutually_exclusive_group()
    scale.add_argument("--patch_level", type=int, default=0, help="pyramid level to read")
    scale.add_argument("--mpp", type=float, help="um/px wanted, instead of a level")
    scale.add_argument("--magnification", type=float, help="magnification wanted, instead of a level; 20 is 0.5 um/px")
    patches.add_argument(
        "--published_step",
        action="store_true",
        help="truncate a level's downsample (3.99 to 3), as published",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--workers", type=int, default=usable_cores(), help="slides at once")
    run.add_argument("--on_error", choices=("continue", "fail"), default="continue", help="fail: stop at the first")
    run.add_argument("--shard", metavar="I/N", help="do slides I, I+N, ... of the sorted list; I from 0 to N-1")
    _add_params(parser.add_argument_group("parameters (defaults < preset < these < process list)"))
    return parser


def _add_params(group: argparse._ArgumentGroup) -> None:
    for field in dataclasses.fields(SlideParams):
        names = [f"--{field.name}"] + (["--otsu"] if field.name == "use_otsu" else [])
        text = f"{field.metadata['help']} ({field.default})"
        if isinstance(field.default, bool):
            group.add_argument(*names, nargs="?", const="true", metavar="BOOL", help=text, dest=field.name)
        else:
            group.add_argument(*names, help=text, metavar="X")


def params_of(args: argparse.Namespace) -> SlideParams:
    """Defaults, then the preset, then the options given."""
    base = read_preset(args.preset) if args.preset else SlideParams()
    given = {n: typed(n, getattr(args, n)) for n in PARAM_NAMES if getattr(args, n) is not None}
    params = dataclasses.replace(base, **given)
    params.check("options")
    return params


def request_of(args: argparse.Namespace) -> Request:
    """The patch geometry asked for.

    Raises:
        UserError: a size or scale is not positive.
    """
    for name in ("patch_size", "step_size", "mpp", "magnification", "workers"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name} is {value}; it must be above 0.")
    return Request(
        patch_size_px=args.patch_size,
        step_size_px=args.step_size,
        patch_level=args.patch_level,
        mpp=args.mpp,
        magnification=args.magnification,
        published_step=args.published_step,
    )


def jobs_of(args: argparse.Namespace, rows: Sequence[Row]) -> list[Job]:
    """One job per row that is to be done."""
    if args.patch and not (args.seg or args.masks):
        raise UserError("--patch needs contours: give --seg too, or --masks DIR.")
    if args.masks and not args.masks.is_dir():
        raise UserError(f"--masks {args.masks}: there is no such folder. Give the one with a mask per slide.")
    steps = Steps(
        save_dir=args.save_dir,
        seg=args.seg or args.masks is not None,
        patch=args.patch,
        stitch=args.stitch,
        geojson=args.geojson,
        auto_skip=not args.no_auto_skip,
        masks_dir=args.masks,
    )
    mpp = read_mpp_csv(args.mpp_csv) if args.mpp_csv else {}
    request = request_of(args)
    return [
        Job(
            path=args.source / row.slide_id,
            params=row.params,
            request=request,
            steps=steps,
            mpp=mpp.get(row.slide_id, mpp.get(Path(row.slide_id).stem)),
            old_area=row.old_area,
        )
        for row in rows
    ]


def run(args: argparse.Namespace) -> int:
    """Does the work; returns the exit status."""
    rows = choose_rows(args, params_of(args))
    todo = [row for row in rows if row.todo]
    jobs = jobs_of(args, todo)
    if args.step_size != args.patch_size:
        kind = "overlap" if args.step_size < args.patch_size else "leave gaps"
        log.info("Patches of %d px every %d px: they %s.", args.patch_size, args.step_size, kind)
    findings = survey(jobs)
    log.info("%s", table(findings))
    if args.on_error == "fail" and any(f.fault for f in findings):
        raise UserError("Stopped before work, as --on_error fail asks: slides above cannot be read as asked.")
    shard = f"_{args.shard.replace('/', 'of')}" if args.shard else ""
    list_name, page_name = f"process_list_autogen{shard}.csv", f"cohort{shard}.html"
    try:
        _prepare(args.save_dir, jobs, (list_name, page_name))
        ledger = Ledger(args.save_dir / list_name, rows)
    except OSError as error:
        raise UserError(f"--save_dir {args.save_dir}: cannot be written: {error}. Give another folder.") from error
    try:
        _work(jobs, todo, ledger, args)
    finally:
        ledger.write()
    page = write_cohort_page(args.save_dir, rows, page_name)
    return _report(todo, ledger.path, page)


def _prepare(save_dir: Path, jobs: Sequence[Job], files: Sequence[str]) -> None:
    """Makes the folders of the results, and removes what a killed run left half-written in them."""
    remove_leftovers(save_dir, files)
    for folder, suffix in OUTPUTS.items():
        if folder != "geojson":
            (save_dir / folder).mkdir(parents=True, exist_ok=True)
        remove_leftovers(save_dir / folder, (job.output(folder, suffix).name for job in jobs))


def _work(jobs: Sequence[Job], todo: Sequence[Row], ledger: Ledger, args: argparse.Namespace) -> None:
    """Processes the jobs and enters the outcomes into their rows."""
    with tqdm(total=len(jobs), unit="slide", disable=not sys.stderr.isatty()) as bar, logging_redirect_tqdm():
        for index, result in over_processes(process, jobs, args.workers):
            outcome = result or _died(jobs[index])
            todo[index].take(outcome)
            bar.update()
            _say(outcome, f"{bar.n if not bar.disable else sum(r.status != 'tbp' for r in todo)}/{len(jobs)}")
            ledger.write_now_and_then()
            if outcome.failed and args.on_error == "fail":
                log.error("Stopped at the first failure, as --on_error fail asks.")
                return


def _report(todo: Sequence[Row], list_path: Path, page: Path) -> int:
    """Says how it went; returns the exit status."""
    failed = [row for row in todo if row.todo]
    patches = sum(int(float(row.facts.get("patches") or 0)) for row in todo)
    log.info("%d slides, %d patches; look at %s", len(todo), patches, page)
    if failed:
        log.error("%d of %d slides failed or were not done; reasons in %s", len(failed), len(todo), list_path)
    return 1 if failed else 0


def _died(job: Job) -> Outcome:
    reason = "its process died (out of memory, or a crash in the image library); try --workers 1"
    return Outcome(job.path.name, "failed", reason, failed=True, params=job.params)


def _say(outcome: Outcome, place: str) -> None:
    if outcome.failed:
        log.error("%s %s: %s: %s", place, outcome.slide_id, outcome.status, outcome.reason)
    else:
        log.info(
            "%s %s: %s, %s patches",
            place,
            outcome.slide_id,
            outcome.status,
            outcome.facts.get("patches", "-"),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the options and runs; faults of the user or of the disk end in a sentence and status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run(build_parser().parse_args(argv))
    except UserError as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s. Finished slides are kept; the same command continues.", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
