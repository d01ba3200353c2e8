"""One overall progress: a bar with an ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger("save_patches")

LINE_EVERY_S = 15.0


class Progress:
    """Counts patches and slides of the whole run."""

    def __init__(self, patches: int, slides: int) -> None:
        self.total_patches = patches
        self.total_slides = slides
        self.done_patches = 0
        self.passed_patches = 0
        self.done_slides = 0
        self._begin = self._line = time.monotonic()
        # Threads that tqdm starts would be in the way of forking.
        tqdm.monitor_interval = 0
        self._bar = tqdm(total=patches, unit=" patches", disable=not sys.stderr.isatty(), smoothing=0.05)

    def patches(self, count: int) -> None:
        self.done_patches += count
        self._bar.update(count)
        if self._bar.disable and time.monotonic() - self._line > LINE_EVERY_S:
            self._line = time.monotonic()
            log.info("%s", self.line())

    def slide(self, passed_patches: int = 0) -> None:
        """A slide is over; ``passed_patches`` of it needed no work."""
        self.done_slides += 1
        self.passed_patches += passed_patches
        self._bar.update(passed_patches)
        self._bar.set_postfix_str(f"slide {self.done_slides}/{self.total_slides}", refresh=False)

    def line(self) -> str:
        """'slides 3/10, patches 4,000/12,000, 1,500 patches/s, 0:00:05 left'."""
        rate = self.done_patches / max(time.monotonic() - self._begin, 1e-9)
        left = self.total_patches - self.done_patches - self.passed_patches
        seconds = int(left / rate) if rate else 0
        return (
            f"slides {self.done_slides}/{self.total_slides}, patches "
            f"{self.done_patches + self.passed_patches:,}/{self.total_patches:,}, {rate:,.0f} patches/s, "
            f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
        )

    def close(self) -> None:
        self._bar.close()
        log.info("%s", self.line())
