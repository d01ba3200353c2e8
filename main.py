"""Trains and tests slide-level models: ``python main.py -c config.yaml --option=value ...``.

Without a subcommand it trains. ``main.py check ...`` reads and checks everything that the same run would read
(with ``--processes=N``: a run of N processes), ``main.py bench ...`` measures what limits it. ``main.py --list`` prints
the encoders and MIL heads, ``main.py --help`` the options.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from utils.dist import lost_peer, planned_processes, processes
from utils.errors import UserError
from utils.log import set_up_logging
from utils.options import parse
from utils.stop import FAULT_STATUS, STOPPED_STATUS, Stopped, leave_mark, says_first

log = logging.getLogger("main")


def train(argv: Sequence[str]) -> None:
    """Trains and tests every fold."""
    from engine import experiment

    config, notes = parse(argv)
    with processes(config.run.device) as own:
        set_up_logging(own.rank)
        experiment.run(config, own, notes)


def check(argv: Sequence[str]) -> None:
    """Checks options, stores, labels and splits for a run of ``--processes`` N processes, and trains nothing."""
    from engine import experiment

    world, rest = planned_processes(argv)
    config, _ = parse(rest)
    experiment.check(config, world)


def bench(argv: Sequence[str]) -> None:
    """Measures what limits the same run, disk, decoding or the device, and says what to change."""
    from engine.bench.run import bench as measure
    from engine.bench.run import split_arguments

    seconds, options = split_arguments(argv)
    config, _ = parse(options)
    with processes(config.run.device) as own:
        set_up_logging(own.rank)
        measure(config, own, seconds)


def list_models(argv: Sequence[str]) -> None:
    """Prints the encoders and MIL heads."""
    from modules.listing import listing

    sys.stdout.write(listing() + "\n")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "check": check,
    "bench": bench,
    "--list": list_models,
}


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Returns:
        0; 2 when the user's input is at fault; 75 when the run was asked to stop and has saved; 130 after a second
        Ctrl-C. Other errors keep their traceback.
    """
    set_up_logging()
    known = bool(argv) and argv[0] in COMMANDS
    command, rest = (COMMANDS[argv[0]], argv[1:]) if known else (train, argv)
    try:
        if argv and not known and not argv[0].startswith("-"):
            raise UserError(
                f"there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}, and options start with --"
            )
        command(rest)
    except UserError as error:
        if says_first(str(error)):
            log.error("error: %s", error)
        leave_mark(FAULT_STATUS)
        return FAULT_STATUS
    except Stopped:
        log.info("stopped as asked")
        leave_mark()
        return STOPPED_STATUS
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        log.error("ends, because another process of the run has ended: what that one said is the cause")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
