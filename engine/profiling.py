"""A trace of a few training steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger(__name__)

WARM_STEPS, TRACED_STEPS = 3, 4


class StepTrace:
    """Traces ``TRACED_STEPS`` steps after the first ``WARM_STEPS``; does nothing without a path.

    Args:
        path: the JSON file to write; None traces nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._profile: profile | None = None
        if path is not None:
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            plan = schedule(wait=WARM_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1)
            self._path = path
            self._profile = profile(activities=kinds, schedule=plan, on_trace_ready=self._write)
            self._profile.start()

    def _write(self, trace: Any) -> None:
        trace.export_chrome_trace(str(self._path))
        log.info("%d steps are traced in %s; open it in https://ui.perfetto.dev.", TRACED_STEPS, self._path)

    def step(self) -> None:
        """Called after every step."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Called after the last step of an epoch; a short epoch's trace is written with the steps that it has."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
