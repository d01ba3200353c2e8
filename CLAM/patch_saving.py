"""The run: tasks to the workers, images to the outputs, an outcome per slide."""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from patch_jobs import Job
from patch_outputs import Output, StoreOutput
from patch_pool import Ended, ReaderPool
from patch_progress import Progress
from patch_reading import Images, Task

from datasets.store import SlideInfo
from utils.errors import UserError
from utils.files import atomic_path

log = logging.getLogger("save_patches")

TASK_PATCHES = (64, 1024)
"""Fewest and most patches in a task. Large tasks share decoded tiles; small ones keep all workers busy to the
end.
"""


@dataclass(frozen=True)
class Settings:
    """How a run treats its slides."""

    quality: int = 80
    workers: int = 2
    skip_done: bool = True
    stop_at_error: bool = False
    blank_regions: bool = False
    kernel: str = "pillow"


@dataclass
class Outcome:
    """What became of a slide: done, skipped (finished before) or failed, and why."""

    slide: str
    status: str
    patches: int = 0
    reason: str = ""


@dataclass
class _Work:
    """A slide in work."""

    job: Job
    coords_px: NDArray[np.int64]
    fingerprint: str
    outputs: list[Output]
    tasks_left: int = 0
    patches_taken: int = 0
    blank: list[int] = field(default_factory=list)
    failed: bool = False


class Run:
    """Saves the patches of many slides.

    Args:
        jobs: the slides in order.
        outputs: the stores and folders to fill.
        settings: how.
    """

    def __init__(self, jobs: list[Job], outputs: list[Output], settings: Settings) -> None:
        self.jobs = jobs
        self.outputs = outputs
        self.settings = settings
        self.outcomes: list[Outcome] = []
        self._works: dict[int, _Work] = {}
        self._progress = Progress(sum(job.count for job in jobs), len(jobs))

    def save(self, pool: ReaderPool) -> list[Outcome]:
        """Does all slides; the outcomes are in ``outcomes`` also when it is stopped.

        Raises:
            UserError: the store cannot be written, no worker is left, or a slide failed and that is to stop
            the run.
        """
        try:
            for message in pool.run(self._tasks()):
                work = self._works[message.number]
                if isinstance(message, Images):
                    self._take(work, message)
                else:
                    self._end(work, message)
        finally:
            self._progress.close()
        return self.outcomes

    def _tasks(self) -> Iterator[Task]:
        number = 0
        for job in self.jobs:
            work = self._begin(job)
            if work is None:
                continue
            for start, stop in _cuts(job.count, self.settings.workers):
                if work.failed:
                    work.tasks_left -= 1
                    continue
                number += 1
                self._works[number] = work
                yield self._task(work, number, start, stop)
            if work.failed and not work.tasks_left:
                self._drop(work)

    def _task(self, work: _Work, number: int, start: int, stop: int) -> Task:
        job = work.job
        sizes = tuple(sorted({output.key(job) for output in work.outputs}))
        return Task(
            number=number,
            slide=job.slide,
            level=job.level,
            patch_size_px=job.patch_size_px,
            start=start,
            coords_px=work.coords_px[start:stop],
            sizes_px=sizes,
            quality=self.settings.quality,
            blank=self.settings.blank_regions,
            kernel=self.settings.kernel,
        )

    def _begin(self, job: Job) -> _Work | None:
        """Opens a slide's place in the outputs that lack it; None where there is nothing to do."""
        if not job.count:
            # Stored as done with 0 patches, nothing would say that the slide is missing.
            self._fail(
                job,
                f"no patches: {job.h5} holds no coordinates; remove the slide from the list, or patch it again with "
                "other segmentation parameters",
            )
            return None
        try:
            coords_px = job.coords_px()
            fingerprint = job.fingerprint(coords_px)
        except OSError as error:
            self._fail(job, str(error), job.count)
            return None
        lacking = [o for o in self.outputs if not (self.settings.skip_done and o.is_done(job, fingerprint))]
        if not lacking:
            self._note(Outcome(job.name, "skipped", job.count, "finished before"), job.count)
            return None
        work = _Work(job, coords_px, fingerprint, lacking, tasks_left=len(_cuts(job.count, self.settings.workers)))
        for output in lacking:
            output.begin(job)
        return work

    def _take(self, work: _Work, images: Images) -> None:
        count = len(next(iter(images.jpegs.values())))
        if not work.failed:
            work.blank += images.blank
            work.patches_taken += count
            for output in work.outputs:
                output.add(work.job, images)
            self._progress.patches(count)

    def _end(self, work: _Work, message: Ended) -> None:
        del self._works[message.number]
        work.tasks_left -= 1
        if message.error is not None and not work.failed:
            work.failed = True
            self._fail(work.job, message.error, work.job.count - work.patches_taken)
        if work.tasks_left == 0:
            self._drop(work) if work.failed else self._finish(work)

    def _drop(self, work: _Work) -> None:
        for output in work.outputs:
            output.discard(work.job)

    def _finish(self, work: _Work) -> None:
        job = work.job
        info = SlideInfo(
            mpp=job.resolved_mpp,
            level=job.level,
            patch_size_px=job.patch_size_px,
            source={**job.source(), **({"blank_patches": sorted(work.blank)} if work.blank else {})},
            fingerprint=work.fingerprint,
        )
        for output in work.outputs:
            mpp = job.mpp_at(output.key(job)) if isinstance(output, StoreOutput) else info.mpp
            output.finish(job, work.coords_px, dataclasses.replace(info, mpp=mpp))
        reason = f"{len(work.blank)} unreadable regions left black" if work.blank else ""
        self._note(Outcome(job.name, "done", job.count, reason))

    def _fail(self, job: Job, reason: str, patches_passed: int = 0) -> None:
        self._note(Outcome(job.name, "failed", reason=reason), patches_passed)
        if self.settings.stop_at_error:
            raise UserError(f"slide {job.name} failed: {reason}")

    def _note(self, outcome: Outcome, patches_passed: int = 0) -> None:
        self.outcomes.append(outcome)
        self._progress.slide(patches_passed)
        if outcome.status == "failed" or (outcome.status == "done" and outcome.reason):
            log.warning("slide %s %s: %s", outcome.slide, outcome.status, outcome.reason)


def _cuts(count: int, workers: int) -> list[tuple[int, int]]:
    """(start, stop) of the tasks of a slide."""
    least, most = TASK_PATCHES
    size = max(least, min(most, -(-count // (2 * workers))))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def write_outcomes(path: Path, outcomes: list[Outcome]) -> None:
    """One row per slide: slide_id, status, patches, reason."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "status", "patches", "reason"])
        writer.writerows([o.slide, o.status, o.patches, o.reason] for o in outcomes)
