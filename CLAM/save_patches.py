r"""Patch coordinates to patches: one LMDB store per image size, and JPEG folders.

    python CLAM/save_patches.py --data_h5_dir OUT --data_slide_dir SLIDES \
        --csv_path OUT/process_list_autogen.csv --patch_dir STORES \
        --save_lmdb --img_size 256 --lmdb_name my_dataset_256_level0 --workers 6

The store is readable after every finished slide; the same command continues a stopped run. Exit status: 0
all slides done, 1 some slide failed (see <lmdb_name>_status.csv), 2 the options are at fault.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT / "CLAM", ROOT):
    # Before the installed packages: one of them is called "datasets", too.
    if str(_folder) not in sys.path[:2]:
        sys.path.insert(1, str(_folder))

from patch_jobs import Job, Plan, common, make_plan, parse_shard, take_shard  # noqa: E402
from patch_outputs import FolderOutput, Output, StoreOutput  # noqa: E402
from patch_pool import ReaderPool  # noqa: E402
from patch_resize import choose_kernel  # noqa: E402
from patch_saving import Outcome, Run, Settings, write_outcomes  # noqa: E402

from datasets.store import StoreHeader  # noqa: E402
from utils.errors import Faults, UserError  # noqa: E402

log = logging.getLogger("save_patches")

MIN_IMAGE_PX = 8

PARAMETERS = {"resize": "bilinear, antialiased", "chroma": "4:2:0", "order": "rgb"}
"""How images are made, beside their size and quality; part of what decides whether they are finished."""


def build_parser() -> argparse.ArgumentParser:
    """The published options and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_h5_dir", type=Path, required=True, help="folder that contains patches/, the coordinates")
    add("--data_slide_dir", type=Path, required=True, help="folder of the slides")
    add(
        "--slide_ext",
        help="extension of the slide files; default: the one in the list, .svs where it has none",
    )
    add(
        "--csv_path",
        type=Path,
        required=True,
        help="process_list_autogen.csv; slides with coordinates are used",
    )
    add("--patch_dir", type=Path, required=True, help="output folder")
    add(
        "--lmdb_name",
        default="data",
        help="store: <patch_dir>/<lmdb_name>.lmdb; with several sizes one name each, or _<size> is added",
    )
    add("--save_lmdb", action="store_true", help="write LMDB stores")
    add("--save_img", action="store_true", help="write imgs/<slide>/<i>.jpg at the size that was read")
    add(
        "--img_size",
        default="0",
        help="side in px of the stored images, or several: 256,224; 0: as the coordinates say",
    )
    add("--img_quality", type=int, default=80, help="JPEG quality, 1 to 100")
    add("--workers", type=int, default=2, help="processes that read and encode")
    add("--batch_size", type=int, default=256, help="accepted as published; work is cut to measure")
    add("--no_auto_skip", action="store_true", help="write finished slides again")
    add("--target_patch_size", type=int, default=224, help="accepted as published, without effect")
    add(
        "--shard",
        metavar="I/N",
        help="do slides I, I+N, ... (I from 0); store: <patch_dir>/<lmdb_name>/<I>-of-<N>.lmdb",
    )
    add(
        "--on_error",
        choices=("continue", "fail"),
        default="continue",
        help="when a slide fails: go on, or stop",
    )
    add(
        "--bad_region",
        choices=("fail", "blank"),
        default="fail",
        help="where a patch cannot be read: fail the slide, or store a black image and record its index",
    )
    return parser


def parse_sizes(text: str) -> list[int]:
    """[256, 224] of '256,224'."""
    try:
        sizes = [int(part) for part in str(text).split(",")]
    except ValueError:
        raise UserError(f"--img_size is {text!r}; write sizes in px as 256 or 256,224.") from None
    for size in sizes:
        if size != 0 and not MIN_IMAGE_PX <= size <= 16384:
            raise UserError(f"--img_size {size}: must be 0 (as the coordinates say) or {MIN_IMAGE_PX} to 16384 px.")
    if len(set(sizes)) < len(sizes):
        raise UserError(f"--img_size is {text}; each size once.")
    return sizes


def store_paths(patch_dir: Path, lmdb_name: str, sizes: Sequence[int], shard: str | None) -> list[Path]:
    """The store of each size.

    Raises:
        UserError: the number of names fits neither one nor the number of sizes.
    """
    names = lmdb_name.split(",")
    if len(names) == 1 and len(sizes) > 1:
        names = [f"{names[0]}_{size or 'full'}" for size in sizes]
    if len(names) != len(sizes) or len(set(names)) < len(names) or not all(names):
        raise UserError(f"--lmdb_name {lmdb_name}: give one name, or one for each of the {len(sizes)} sizes.")
    if shard is None:
        return [patch_dir / f"{name}.lmdb" for name in names]
    index, count = parse_shard(shard)
    return [patch_dir / name / f"{index}-of-{count}.lmdb" for name in names]


def make_header(jobs: Sequence[Job], size_px: int, quality: int) -> StoreHeader:
    """The header of a store, from all slides of the list, so that every shard has the same.

    Raises:
        UserError: with size 0 the slides would get images of different sizes.
    """
    natural = sorted({job.natural_px for job in jobs})
    if not size_px and len(natural) > 1:
        raise UserError(f"the coordinates are for patches of {', '.join(map(str, natural))} px: give --img_size.")
    return StoreHeader(
        mpp=common([job.requested_mpp for job in jobs]),
        level=common([job.level for job in jobs]),
        patch_size_px=common([job.patch_size_px for job in jobs]),
        image_size_px=size_px or natural[0],
        jpeg_quality=quality,
        parameters=PARAMETERS,
    )


def check(args: argparse.Namespace) -> None:
    """Refuses options that cannot work, all at once."""
    faults = Faults("save_patches.py")
    if not (args.save_lmdb or args.save_img):
        faults.add("nothing to write: give --save_lmdb, --save_img or both")
    if not 1 <= args.img_quality <= 100:
        faults.add(f"--img_quality {args.img_quality}: must be 1 to 100")
    if args.workers < 1:
        faults.add(f"--workers {args.workers}: must be at least 1")
    for option in ("data_h5_dir", "data_slide_dir"):
        if not getattr(args, option).is_dir():
            faults.add(f"--{option} {getattr(args, option)}: there is no such folder")
    if not args.csv_path.is_file():
        faults.add(f"--csv_path {args.csv_path}: there is no such file")
    faults.raise_if_any()


def open_outputs(args: argparse.Namespace, plan: Plan, sizes: Sequence[int]) -> list[Output]:
    """Opens what is to be written; closes what was opened when one cannot be."""
    outputs: list[Output] = []
    try:
        if args.save_lmdb:
            for path, size in zip(store_paths(args.patch_dir, args.lmdb_name, sizes, args.shard), sizes, strict=True):
                outputs.append(StoreOutput(path, make_header(plan.jobs, size, args.img_quality), size))
        if args.save_img:
            outputs.append(FolderOutput(args.patch_dir / "imgs", args.img_quality, PARAMETERS))
    except UserError:
        for output in outputs:
            output.close()
        raise
    return outputs


def save(args: argparse.Namespace) -> list[Outcome]:
    """Does what the options ask; gives an outcome for every slide of the list (of the shard)."""
    check(args)
    sizes = parse_sizes(args.img_size)
    store_paths(args.patch_dir, args.lmdb_name, sizes, args.shard)
    plan = make_plan(args.csv_path, args.data_h5_dir, args.data_slide_dir, args.slide_ext)
    jobs = take_shard(plan.jobs, args.shard)
    log.info(
        "%d slides, %d patches; %d slides without coordinates",
        len(jobs),
        sum(j.count for j in jobs),
        len(plan.skipped),
    )
    settings = Settings(
        quality=args.img_quality,
        workers=args.workers,
        skip_done=not args.no_auto_skip,
        stop_at_error=args.on_error == "fail",
        blank_regions=args.bad_region == "blank",
        kernel=choose_kernel(sum(job.count for job in plan.jobs)),
    )
    with ReaderPool(args.workers, settings.kernel) as pool:
        outputs = open_outputs(args, plan, sizes)
        run = Run(jobs, outputs, settings)
        try:
            run.save(pool)
        finally:
            for output in outputs:
                output.close()
            left_out = [Outcome(slide, "no_coordinates", reason=reason) for slide, reason in plan.skipped]
            write_outcomes(status_path(args), run.outcomes + left_out)
    return run.outcomes


def status_path(args: argparse.Namespace) -> Path:
    """Where the outcome of every slide is written."""
    name = args.lmdb_name.replace(",", "+") + (f"_{args.shard.replace('/', '-of-')}" if args.shard else "")
    return Path(args.patch_dir) / f"{name}_status.csv"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; gives its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args = build_parser().parse_args(argv)
    try:
        outcomes = save(args)
    except UserError as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        log.error("%s. Finished slides are kept; the same command continues.", error)
        return 2
    except KeyboardInterrupt:
        log.error("stopped. Finished slides are kept; the same command continues.")
        return 130
    counts = {status: sum(o.status == status for o in outcomes) for status in ("done", "skipped", "failed")}
    log.info("slides: %(done)d done, %(skipped)d finished before, %(failed)d failed", counts)
    for outcome in outcomes:
        if outcome.status == "failed":
            log.error("failed: %s: %s", outcome.slide, outcome.reason)
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
