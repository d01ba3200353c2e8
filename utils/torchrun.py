"""torchrun for one machine or several, with restarts: used by ``train_dist.sh``.

torchrun itself answers 1 for every process that ends with a status, dies of SIGUSR1, and starts a run with a fault in
its options again as often as one that was killed. Here the exit status is 0, 2 for a fault in what was given, 75 for a
run that was asked to stop and has saved, or another one for a failure; only failures are tried again.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]  # no module here may hide a library's
sys.path.insert(0, str(HERE.parent))

from utils.errors import UserError  # noqa: E402
from utils.nodes import Nodes, read_nodes  # noqa: E402
from utils.peers import Ending, LostError, Peers, signal_children, tell  # noqa: E402
from utils.stop import FAULT_STATUS, LAUNCHER, MARK, RESTARTS, STOPPED_STATUS  # noqa: E402

# Port 0 lets the rendezvous take a free port; the address keeps it off a host name that may not resolve.
ONE_MACHINE = ("--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")


def main(argv: list[str]) -> int:
    """Runs torchrun with ``argv`` on the machines that the environment names; returns the exit status.

    Args:
        argv: torchrun's arguments, without those that say which machines there are.
    """
    signal.signal(signal.SIGUSR1, _pass_on)
    try:
        nodes = read_nodes(os.environ)
        os.environ[RESTARTS] = str(nodes.restarts)
        return _run(nodes, argv)
    except UserError as error:
        tell(f"error: {error}")
        return FAULT_STATUS
    except LostError as error:
        tell(f"{error}, so the run ends. The same command on every machine goes on.")
        return 1


def _run(nodes: Nodes, argv: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException  # torch takes seconds to import

    try:
        if nodes.count == 1:
            return _attempts(nodes, None, argv).status
        peers = Peers(nodes, {"arguments": argv, "MAX_RESTARTS": nodes.restarts, "NNODES": nodes.count})
        try:
            ending = _attempts(nodes, peers, argv)
            peers.leave()
        finally:
            peers.close()
    except SignalException as error:
        return 128 + int(error.sigval)
    if ending.cause:
        tell(f"the run ends: {ending.cause}.")
    return ending.status


def _attempts(nodes: Nodes, peers: Peers | None, argv: list[str]) -> Ending:
    """Runs until the ending is not a failure, or no attempt is left."""
    for attempt in range(nodes.restarts + 1):
        if peers is None:
            ending = _attempt([*ONE_MACHINE, *argv])
        else:
            port = peers.meet(attempt)
            peers.begin(attempt)
            ending = peers.agree(attempt, _attempt([*_place(nodes, port, attempt), *argv]))
        left = nodes.restarts - attempt
        if not ending.again or not left:
            break
        tell(
            f"{ending.cause}. The run goes on from its last saved state, attempt {attempt + 2} of {nodes.restarts + 1}."
        )
    return ending


def _place(nodes: Nodes, port: int, attempt: int) -> list[str]:
    # A port of its own keeps an attempt away from what the one before left in torch's store.
    return [
        f"--nnodes={nodes.count}",
        f"--node-rank={nodes.rank}",
        "--rdzv-backend=static",
        f"--rdzv-endpoint={nodes.address}:{port}",
        f"--rdzv-id={attempt}",
        "--rdzv-conf=timeout=60",
    ]


def _attempt(argv: list[str]) -> Ending:
    """Runs torchrun once; the processes tell by a mark whether they stopped as asked or found a fault."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        mark = Path(folder) / "mark"
        os.environ[MARK], os.environ[LAUNCHER] = str(mark), str(os.getpid())
        # Where the processes have said why they end, torch's table of their numbers would be the last word.
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(lambda _: not mark.exists())
        try:
            torchrun([f"--log-dir={folder}", *argv])
            return Ending()
        except (ChildFailedError, SignalException) as error:
            marks = mark.read_text(encoding="ascii").split() if mark.exists() else []
            if isinstance(error, ChildFailedError):  # a mark may be missing: a full disk, a folder cleaned up
                marks.append(str(error.get_first_failure()[1].exitcode))
            for status in (FAULT_STATUS, STOPPED_STATUS):
                if str(status) in marks:
                    cause = "a fault in what was given" if status == FAULT_STATUS else "asked to stop"
                    return Ending(status, cause=cause)
            sys.stderr.write(f"{error}\n")
            if isinstance(error, SignalException):
                return Ending(128 + int(error.sigval), cause=f"the launcher got signal {int(error.sigval)}")
            rank, failure = error.get_first_failure()
            if failure.exitcode == -signal.SIGUSR1:  # it was asked before it could listen
                return Ending(STOPPED_STATUS, cause="asked to stop")
            how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with {failure.exitcode}"
            return Ending(1, again=True, cause=f"process {rank} {how}")
        except (RendezvousError, RuntimeError) as error:
            return Ending(1, again=True, cause=f"torchrun failed: {error}")


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Tells the processes only; torchrun, which would kill them after 30 seconds, hears of it when they have saved."""
    if not signal_children(signal.Signals(number)):
        os._exit(STOPPED_STATUS)  # nothing runs here yet, or any more


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
