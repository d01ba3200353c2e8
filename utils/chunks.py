"""How many things are divided into pieces of bounded size."""

from __future__ import annotations


def split_sizes(count: int, most: int) -> list[int]:
    """Sizes of the fewest pieces of at most ``most``: all of that size, but the last two share what is left for them.

    So no piece is a small rest, and nearly all are of one size: a compiler, and cuDNN's search for the fastest kernel,
    begin anew for every other one.

    >>> split_sizes(13, 4)
    [4, 4, 3, 2]
    """
    pieces = -(-count // most)
    if pieces < 2 or count % most == 0:
        return [most] * (count // most) or [count] * pieces
    left = count - (pieces - 2) * most
    return [most] * (pieces - 2) + [left - left // 2, left // 2]
