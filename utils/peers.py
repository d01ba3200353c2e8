"""The launchers of several machines agree: when to begin, that one of them failed, whether to begin again.

torchrun by itself does not. Its launchers count restarts each for itself (pytorch issues 108158, 135712), and one that
ends leaves the others waiting until a collective of their processes times out, half an hour later. So every attempt is
a torchrun without restarts, and the launchers tell each other through a store on machine 0 what they are doing: each
writes a record with a beat every half second and reads those of the others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.nodes import Nodes
from utils.stop import FAULT_STATUS, STOPPED_STATUS

BEAT_S = 0.5
"""Between two words of a launcher to machine 0."""
LOST_S = 20.0
"""A launcher that has not been heard of for this long is taken for dead."""
JOIN_S = 600.0
"""How long a machine waits for the others, and for machine 0 to answer."""
GRACE_S = {STOPPED_STATUS: 60.0}
"""How long processes may go on when another machine has ended, by its status: they may be saving."""
OTHER_GRACE_S = 5.0
"""The same after any other status."""
LAST_RESORT_S = 45.0
"""After that the launcher ends itself, should its processes not have ended."""
CLOSE_S = 5.0
"""How long the thread that talks to machine 0 is waited for."""


class LostError(Exception):
    """Another machine of the run is gone."""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended on one machine, or on all of them.

    Attributes:
        status: exit status.
        again: whether another attempt may help.
        cause: for people; empty where the processes were ended because of another machine.
    """

    status: int = 0
    again: bool = False
    cause: str = ""


def joint(endings: Sequence[Ending]) -> Ending:
    """The ending of an attempt on all machines: a fault of the input (2) beats a wish to stop (75), that a failure."""
    for status in (FAULT_STATUS, STOPPED_STATUS):
        found = next((e for e in endings if e.status == status), None)
        if found is not None:
            return found
    failed = [(number, e) for number, e in enumerate(endings) if e.status]
    if not failed:
        return Ending()
    reasons = [(number, e) for number, e in failed if e.cause] or failed[:1]
    causes = "; ".join(f"machine {number}: {e.cause}" for number, e in reasons)
    return Ending(reasons[0][1].status, all(e.again for _, e in failed), causes)


class Peers:
    """The launchers of all machines, seen from one of them.

    Args:
        nodes: the machines.
        facts: what must be equal on all machines, by name.

    Raises:
        UserError: when machine 0 cannot listen or be reached, or two launchers have the same NODE_RANK.
    """

    def __init__(self, nodes: Nodes, facts: Mapping[str, Any]) -> None:
        self._nodes = nodes
        self._own: dict[str, Any] = {"facts": dict(facts), "attempt": -1, "port": 0, "endings": {}, "left": False}
        self._others: dict[int, dict[str, Any]] = {}
        self._heard: dict[int, float] = {}
        self._news = threading.Condition()
        self._lost = ""
        self._running: int | None = None
        self._kill_at: float | None = None
        self._closing = False
        self._store = _connect(nodes)
        own = uuid.uuid4().hex
        if self._store.compare_set(f"rank/{nodes.rank}", "", own).decode() != own:
            raise UserError(
                f"NODE_RANK={nodes.rank} is taken by another machine of the run. Number the {nodes.count} machines "
                f"from 0 to {nodes.count - 1}."
            )
        self._talked = time.monotonic()
        self._thread = threading.Thread(target=self._talk, name="peers", daemon=True)
        self._thread.start()
        # torch's store waits for ever for a machine 0 that does not answer and does not close its connections either
        threading.Thread(target=self._watch, name="peers' watch", daemon=True).start()

    # What the main thread asks

    def meet(self, attempt: int) -> int:
        """Waits until all machines are ready for ``attempt``; the port of machine 0 for its processes.

        Raises:
            UserError: when a machine does not come, or was started with other arguments.
            LostError: when one is gone.
        """
        self._say(attempt=attempt, port=_free_port() if self._nodes.rank == 0 else 0)
        missing = self._missing(attempt)
        if missing:
            tell(f"machine {self._nodes.rank} of {self._nodes.count} waits for machine(s) {_listed(missing)}")
        if not self._wait(lambda: not self._missing(attempt), JOIN_S):
            raise UserError(
                f"machine(s) {_listed(self._missing(attempt))} of {self._nodes.count} did not come within "
                f"{JOIN_S / 60:.0f} minutes. Start the same command on each machine, with NODE_RANK 0 to "
                f"{self._nodes.count - 1}."
            )
        self._check_facts()
        return int(self._own["port"] or self._others[0]["port"])

    def begin(self, attempt: int) -> None:
        """From now on the processes of this machine are ended when another machine fails."""
        self._kill_at, self._running = None, attempt

    def agree(self, attempt: int, ending: Ending) -> Ending:
        """States how ``attempt`` ended here; waits for the other machines and gives the ending of all.

        Raises:
            LostError: when a machine is gone.
        """
        self._running = None
        if self._kill_at is not None and ending.status not in (FAULT_STATUS, STOPPED_STATUS):
            ending = dataclasses.replace(ending, cause="", again=True)
        key = str(attempt)
        self._say(endings={**self._own["endings"], key: dataclasses.asdict(ending)})
        self._wait(lambda: len(self._endings(key)) == self._nodes.count - 1)
        everyone = {**self._endings(key), self._nodes.rank: ending}
        return joint([everyone[rank] for rank in sorted(everyone)])

    def leave(self) -> None:
        """Takes leave; machine 0 keeps the store until the others have left too."""
        with self._news:
            self._own["left"] = True
            if self._nodes.rank == 0:
                self._news.wait_for(lambda: self._lost or all(o["left"] for o in self._others.values()), 10)
            else:
                self._news.wait_for(lambda: self._lost or self._closing, 10)

    def close(self) -> None:
        """Ends the conversation: a thread that is inside of torch when Python ends aborts the program."""
        self._closing = True
        self._thread.join(CLOSE_S)

    # The conversation, in a thread of its own

    def _talk(self) -> None:
        try:
            while not self._closing:
                self._exchange()
                self._talked = time.monotonic()
                time.sleep(BEAT_S)
        except (RuntimeError, ValueError, KeyError, TypeError):  # torch's store raises RuntimeError
            with self._news:
                self._lost = self._lost or "machine 0 no longer answers"
                self._news.notify_all()

    def _watch(self) -> None:
        while not self._closing:
            if time.monotonic() - self._talked > LOST_S:
                with self._news:
                    self._lost = self._lost or f"machine 0 has not answered for {LOST_S:.0f} s"
                    self._news.notify_all()
            self._heed()
            time.sleep(BEAT_S)

    def _exchange(self) -> None:
        with self._news:
            self._own["beat"] = self._own.get("beat", 0) + 1
            text, left = json.dumps(self._own), self._own["left"]
        self._store.set(f"node/{self._nodes.rank}", text)
        for rank in range(self._nodes.count):
            key = f"node/{rank}"
            if rank != self._nodes.rank and (rank in self._others or self._store.check([key])):
                self._hear(rank, json.loads(self._store.get(key)))
        with self._news:
            self._closing = self._closing or (left and self._nodes.rank != 0)
            self._news.notify_all()

    def _hear(self, rank: int, record: dict[str, Any]) -> None:
        now = time.monotonic()
        with self._news:
            if record["beat"] != self._others.get(rank, {}).get("beat"):
                self._others[rank], self._heard[rank] = record, now
            elif now - self._heard[rank] > LOST_S and not record["left"]:
                self._lost = self._lost or f"machine {rank} has not been heard of for {LOST_S:.0f} s"

    def _heed(self) -> None:
        """Ends the processes of this machine when another one has failed, or is gone."""
        attempt, now = self._running, time.monotonic()
        if attempt is None:
            return
        if self._kill_at is None:
            failed = [e.status for e in self._endings(str(attempt)).values() if e.status]
            if failed or self._lost:
                self._kill_at = now + (0 if self._lost else min(GRACE_S.get(s, OTHER_GRACE_S) for s in failed))
        elif now > self._kill_at:
            signal_children(signal.SIGKILL)
            if now > self._kill_at + LAST_RESORT_S:
                tell(f"the processes of this machine do not end ({self._lost or 'another machine failed'}); leaving")
                os._exit(1)

    # Parts

    def _say(self, **changes: Any) -> None:
        with self._news:
            self._own.update(changes)

    def _wait(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        with self._news:
            came = self._news.wait_for(lambda: bool(self._lost) or condition(), seconds)
            if self._lost and not condition():
                raise LostError(self._lost)
        return came

    def _missing(self, attempt: int) -> list[int]:
        here = {rank for rank, other in self._others.items() if other["attempt"] >= attempt}
        return [r for r in range(self._nodes.count) if r not in here and r != self._nodes.rank]

    def _endings(self, attempt: str) -> dict[int, Ending]:
        return {r: Ending(**o["endings"][attempt]) for r, o in self._others.items() if attempt in o["endings"]}

    def _check_facts(self) -> None:
        for rank, other in self._others.items():
            for name, value in self._own["facts"].items():
                if other["facts"].get(name) != value:
                    raise UserError(
                        f"machine {rank} has other {name} than machine {self._nodes.rank} ({other['facts'].get(name)} "
                        f"and {value}). Start the same command on every machine."
                    )


def _connect(nodes: Nodes) -> Any:
    """The store on machine 0; waits until that machine listens."""
    from torch.distributed import TCPStore

    main = nodes.rank == 0
    if not main:
        _wait_for_main(nodes)
    try:
        return TCPStore(
            "localhost" if main else nodes.address,
            nodes.port,
            is_master=main,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if main:
            raise UserError(
                f"machine 0 cannot listen on port {nodes.port} ({reason}). Give another MASTER_PORT, the same on "
                "every machine."
            ) from error
        raise UserError(f"what answers at {nodes.address}:{nodes.port} is no launcher ({reason}).") from error


def _wait_for_main(nodes: Nodes) -> None:
    begin, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((nodes.address, nodes.port), timeout=5).close()
            return
        except OSError as error:
            waited = time.monotonic() - begin
            if waited > JOIN_S:
                raise UserError(
                    f"machine 0 did not answer at {nodes.address}:{nodes.port} for {JOIN_S / 60:.0f} minutes "
                    f"({error}). Start it with NODE_RANK=0 on the machine that MASTER_ADDR names, and let no firewall "
                    "close the ports between the machines."
                ) from error
            if waited > 5 and not told:
                tell(f"machine {nodes.rank} waits for machine 0 at {nodes.address}:{nodes.port} ({error})")
                told = True
            time.sleep(0.5)


def signal_children(number: signal.Signals) -> int:
    """Sends a signal to the processes that this one started; returns how many (0 where there is no /proc)."""
    own, told = os.getpid(), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            if parent == own:
                os.kill(int(path.parent.name), number)
                told += 1
        except (OSError, IndexError, ValueError):  # it has ended by itself
            continue
    return told


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")


def tell(sentence: str) -> None:
    """Writes a sentence of the launcher to standard error."""
    sys.stderr.write(f"train_dist.sh: {sentence}\n")
