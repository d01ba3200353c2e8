"""Trains and tests slide-level models: ``python main.py -c config.yaml --option=value ...``.

Without a subcommand it trains. ``main.py check ...`` reads and checks everything that the same run would read.
``main.py --list`` prints the encoders and MIL heads, ``main.py --help`` the options.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from utils.dist import processes
from utils.errors import UserError
from utils.log import set_up_logging
from utils.options import parse

log = logging.getLogger("main")


def train(argv: Sequence[str]) -> None:
    """Trains and tests every fold."""
    from engine import experiment

    config, notes = parse(argv)
    with processes(config.run.device) as own:
        set_up_logging(own.rank)
        experiment.run(config, own, notes)


def check(argv: Sequence[str]) -> None:
    """Checks options, stores, labels and splits, and trains nothing."""
    from engine import experiment

    config, _ = parse(argv)
    experiment.check(config)


def list_models(argv: Sequence[str]) -> None:
    """Prints the encoders and MIL heads."""
    from modules.listing import listing

    sys.stdout.write(listing() + "\n")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train, "check": check, "--list": list_models}


def main(argv: Sequence[str]) -> int:
    """Runs one command; returns 0, or 2 when the user's input is at fault. Other errors keep their traceback."""
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
        log.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
