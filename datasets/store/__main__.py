"""Command line of the patch store: ``python -m datasets.store {info,verify,merge,subset,export} ...``.

Exit status: 0 done, 1 verify found faults, 2 the command cannot be done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets.store import tools
from datasets.store.reader import PatchStore
from datasets.store.verify import verify
from utils.cores import usable_cores
from utils.errors import UserError

MOST_LINES = 50


def build_parser() -> argparse.ArgumentParser:
    """The five commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m datasets.store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="slides, patches, size and header of a store")
    info.add_argument("store", type=Path, help="LMDB file, or folder of LMDB files")
    info.add_argument("--json", action="store_true", help="for programs")
    check = commands.add_parser("verify", help="decode every patch; name the bad ones")
    check.add_argument("store", type=Path, help="LMDB file, or folder of LMDB files")
    check.add_argument("--workers", type=int, default=usable_cores(), help="processes; default: one per core")
    merge = commands.add_parser("merge", help="join stores (or folders of shards) into one file")
    merge.add_argument("target", type=Path, help="the new file; it comes first, as in 'merge all.lmdb part1.lmdb ...'")
    merge.add_argument("sources", type=Path, nargs="+", help="LMDB files, or folders of LMDB files")
    subset = commands.add_parser("subset", help="some slides into a store of their own")
    subset.add_argument("store", type=Path, help="LMDB file, or folder of LMDB files")
    subset.add_argument("target", type=Path, help="the new file")
    export = commands.add_parser("export", help="JPEG folders, and h5 coordinates for CLAM and TRIDENT")
    export.add_argument("store", type=Path, help="LMDB file, or folder of LMDB files")
    export.add_argument("target", type=Path, help="folder")
    export.add_argument("--layout", choices=tools.LAYOUTS, default="clam", help="naming of the h5 files")
    for command in (subset, export):
        command.add_argument("--slides", help="names, comma separated, or a text file with one a line")
    return parser


def read_names(text: str) -> list[str]:
    """Names from 'a,b' or from a text file."""
    if os.path.isfile(text):  # not Path.is_file, which raises where the names together are too long for a path
        names = Path(text).read_text(encoding="utf-8-sig").splitlines()
    else:
        names = text.split(",")
    return [name.strip() for name in names if name.strip()]


def describe(store: PatchStore) -> dict[str, object]:
    """What ``info`` tells."""
    return {
        "files": [str(file) for file in store.files],
        "bytes": sum(file.stat().st_size for file in store.files),
        "slides": len(store.slides),
        "patches": len(store),
        "image_size_px": store.image_size_px if len(store) else None,
        "fingerprint": store.fingerprint,
        "header": dataclasses.asdict(store.header) if store.header else None,
        "counts": store.counts,
    }


def show_info(store: PatchStore, as_json: bool) -> None:
    facts = describe(store)
    if as_json:
        _say(json.dumps(facts, indent=2))
        return
    counts = sorted(store.counts.values())
    _say(f"{store.path}: {len(store.slides)} slides, {len(store):,} patches in {len(store.files)} file(s)")
    if counts:
        _say(f"patches per slide: least {counts[0]}, median {counts[len(counts) // 2]}, most {counts[-1]}")
    _say(f"image size: {facts['image_size_px']} px; {sum(f.stat().st_size for f in store.files) / 1e6:,.1f} MB")
    _say(f"fingerprint: {store.fingerprint}")
    if store.header is None:
        _say("header: none (written by the published program)")
    else:
        for name, value in dataclasses.asdict(store.header).items():
            _say(f"  {name}: {value}")


def show_verify(path: Path, workers: int) -> int:
    report = verify(path, workers)
    for fault in report.faults[:MOST_LINES]:
        _say(fault)
    if len(report.faults) > MOST_LINES:
        _say(f"... and {len(report.faults) - MOST_LINES} more")
    _say(f"{path}: {report.patches:,} patches, {len(report.faults)} faults")
    return 1 if report.faults else 0


def run(args: argparse.Namespace) -> int:
    """Does one command; gives the exit status."""
    if args.command == "info":
        show_info(PatchStore(args.store), args.json)
    elif args.command == "verify":
        return show_verify(args.store, args.workers)
    elif args.command == "merge":
        _say_copied(args.target, tools.merge(args.target, args.sources))
    elif args.command == "subset":
        if not args.slides:
            raise UserError("subset needs --slides: names, comma separated, or a text file with one a line.")
        _say_copied(args.target, tools.subset(args.store, args.target, read_names(args.slides)))
    else:
        slides = read_names(args.slides) if args.slides else None
        _say(f"{args.target}: {tools.export(args.store, args.target, slides, args.layout)} slides")
    return 0


def _say_copied(target: Path, done: tools.Copied) -> None:
    _say(f"{target}: {done.copied} slides copied, {done.there} were there already")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs, and turns errors into sentences."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has enough; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
