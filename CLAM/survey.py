"""A look at every slide before work starts: which um/px there are, and what will be read from each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs import Job, check_file_name, optics_of
from magnification import plan
from slides import open_slide

from utils.errors import told

OPENERS = 8
"""Opening a slide waits for the disk or the network, not for the processor."""


@dataclass(frozen=True)
class Finding:
    """What one slide says: its row of the table, or why it cannot be read as asked."""

    slide_id: str
    row: tuple[str, str, str, str] | None
    fault: str = ""


def look(job: Job) -> Finding:
    """Opens one slide and plans its reading, without reading pixels."""
    try:
        check_file_name(job.path)
        with open_slide(job.path) as slide:
            optics = optics_of(slide, job.mpp)
            power = f"{optics.objective_power:g}x" if optics.objective_power else "-"
            mpp = f"{optics.mpp:.4f}" if optics.mpp else "unknown"
            read = plan(optics, job.request)
    except Exception as error:  # noqa: BLE001 - one odd file must not keep the others from being looked at
        return Finding(job.path.name, None, told(error))
    size = f"{read.read_size_px} px"
    if read.target_size_px != read.read_size_px:
        size += f" to {read.target_size_px}"
    scale = f", {read.resolved_mpp:.4g} um/px" if read.resolved_mpp else ""
    return Finding(job.path.name, (mpp, optics.mpp_source or "-", power, f"level {read.level}, {size}{scale}"))


def survey(jobs: Sequence[Job]) -> list[Finding]:
    """Looks at every slide."""
    with ThreadPoolExecutor(OPENERS) as pool:
        return list(pool.map(look, jobs))


def table(findings: Sequence[Finding], most_faults: int = 10) -> str:
    """The um/px of the cohort as text: one line per kind of slide, then the slides that cannot be read as asked."""
    counts = Counter(f.row for f in findings if f.row)
    lines = [f"um/px found in {len(findings)} slides:"]
    head = ("slides", "um/px", "from", "objective", "read")
    rows = [head, *((str(n), *row) for row, n in counts.most_common())]
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    faults = [f for f in findings if f.fault]
    lines += [f"  {f.slide_id}: {f.fault}" for f in faults[:most_faults]]
    if len(faults) > most_faults:
        lines.append(f"  ... and {len(faults) - most_faults} more that cannot be read as asked")
    return "\n".join(lines)
