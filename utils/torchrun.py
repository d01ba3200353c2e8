"""torchrun with an exit status that says whether the run saved and stopped: used by ``train_dist.sh``.

torchrun itself answers 1 for every process that ends with a status, and dies of SIGUSR1.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]  # no module here may hide a library's
sys.path.insert(0, str(HERE.parent))


def main(argv: list[str]) -> int:
    """Runs torchrun with ``argv``; returns 0, 75 for a run that saved and stopped, or torchrun's status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from utils.stop import MARK, STATUS

    signal.signal(signal.SIGUSR1, _as_sigterm)
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder) / "stopped"
        os.environ[MARK] = str(mark)
        try:
            torchrun(argv)
        except (ChildFailedError, SignalException) as error:
            if mark.exists():
                return STATUS
            sys.stderr.write(f"{error}\n")
            return 128 + error.sigval if isinstance(error, SignalException) else 1
    return 0


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
