"""Errors that users read: a sentence with the object, the value, the limit and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

MARGIN = 0.2
"""Names within this distance of the best one are suggested, too; in units of difflib's ratio."""


class UserError(Exception):
    """A fault in what the user gave (an option, a file, a label).

    Programs print the message without a traceback and exit with status 2.
    """


def told(error: Exception) -> str:
    """What users read of an error: the sentence of a UserError, of others the kind too."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Faults:
    """Collects faults so that all of them are reported at once.

    >>> faults = Faults("labels.csv")
    >>> faults.add("row 3: label 'tumour' is not one of normal, tumor")
    >>> faults.raise_if_any()
    Traceback (most recent call last):
        ...
    utils.errors.UserError: labels.csv: 1 fault
      row 3: label 'tumour' is not one of normal, tumor
    """

    def __init__(self, subject: str, most: int = 20) -> None:
        self.subject = subject
        self.most = most
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        self.messages.append(message)

    def raise_if_any(self) -> None:
        """Raises one UserError that lists every fault (the first ``most`` in full, then a count)."""
        if not self.messages:
            return
        count = len(self.messages)
        lines = [f"{self.subject}: {count} fault{'s' if count > 1 else ''}"]
        lines += [f"  {message}" for message in self.messages[: self.most]]
        if count > self.most:
            lines.append(f"  ... and {count - self.most} more")
        raise UserError("\n".join(lines))


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like ``name``, best first; empty when nothing is close.

    >>> nearest("dropot", ["opt", "dropout"])
    ['dropout']
    """
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    likeness = [difflib.SequenceMatcher(None, word, name).ratio() for word in close]
    # Beside a name that fits, those that share a few letters only lead astray.
    return [word for word, ratio in zip(close, likeness, strict=True) if ratio >= likeness[0] - MARGIN]


def did_you_mean(name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """A sentence to append to an 'unknown name' error, or the empty string.

    Args:
        name: what was given.
        known: what there is.
        aliases: other words -> the known names that they mean.

    >>> did_you_mean("lerning_rate", ["lr", "log_iter"], {"learning_rate": "lr"})
    " Did you mean 'lr'?"
    """
    aliases = aliases or {}
    close = dict.fromkeys(aliases.get(word, word) for word in nearest(name, [*known, *aliases]))
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
