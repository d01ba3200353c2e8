"""``--stage_to``: what a run reads is copied to a local disk, by one process of each machine.

The others do not wait in one long collective, which NCCL would give up after half an hour: all processes meet every few
seconds and tell each other whether they are done, have failed, or were asked to stop.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from datasets.staging import GIB, Copy, Stager, needed_bytes, plan_copy
from engine.setup import Setup, uses_positions
from engine.sources import contents, open_sources
from utils.dist import Processes
from utils.errors import UserError
from utils.stop import Stopped

log = logging.getLogger(__name__)

MEETING_S = 3.0


def staged(setup: Setup, processes: Processes) -> Setup:
    """``setup`` with sources that read from the copies; as it is without ``--stage_to``.

    Raises:
        UserError: when a machine has no room for the copies or cannot make them.
        Stopped: when a process was asked to stop.
    """
    if setup.config.data.stage_to is None:
        return setup
    folder = Path(setup.config.data.stage_to)
    copies = plan(setup)
    _copy_together(Stager(copies, folder) if processes.is_local_main else None, processes)
    places = {copy.root: copy.target for copy in copies}
    sources = open_sources(setup.config.data, setup.encoder is not None, _positions(setup), places)
    if sources.fingerprints != setup.sources.fingerprints:
        raise UserError(f"the copies in {folder} hold something else than what they were made of. Remove them.")
    return dataclasses.replace(setup, sources=sources)


def plan(setup: Setup) -> list[Copy]:
    """What ``--stage_to`` copies, and to where; nothing without the option."""
    data = setup.config.data
    if data.stage_to is None:
        return []
    found = contents(data, setup.sources, _positions(setup))
    prints = setup.sources.fingerprints
    return [plan_copy(root, files, prints[root], Path(data.stage_to)) for root, files in found.items()]


def report_plan(setup: Setup) -> None:
    """Logs what would be copied, for commands that write nothing; raises UserError where there is no room for it."""
    copies, folder = plan(setup), setup.config.data.stage_to
    if folder is not None:
        needed = needed_bytes(copies, Path(folder))
        total = sum(copy.size for copy in copies)
        log.info("stage_to: %.2f of %.2f GiB are to be copied to %s, by a run.", needed / GIB, total / GIB, folder)


def _positions(setup: Setup) -> bool:
    return uses_positions(setup.mil, setup.config.model) or setup.config.data.num_group_2d is not None


def _copy_together(stager: Stager | None, processes: Processes) -> None:
    """Returns when every machine has its copies; ``stager`` is None on processes that only wait."""
    while True:
        done, fault = stager is None, ""
        try:
            done = stager is None or stager.advance(MEETING_S)
        except UserError as error:
            fault = str(error)
        states = processes.gather((done, fault, processes.stop.by is not None))
        faults = [f for _, f, _ in states if f]
        stop = any(wish for _, _, wish in states)
        if stager is not None and (faults or stop):
            stager.close()
        if faults:
            raise UserError(faults[0])
        if all(d for d, _, _ in states):
            return
        if stop:
            raise Stopped
