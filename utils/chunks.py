"""How many things are divided into pieces of bounded size."""

from __future__ import annotations


def equal_split(count: int, most: int) -> list[int]:
    """Sizes of the fewest pieces of at most ``most``; they differ by one, and the larger ones come first.

    ``Tensor.tensor_split`` into as many pieces gives the same sizes.

    >>> equal_split(10, 4)
    [4, 3, 3]
    """
    pieces = -(-count // most)
    return [count // pieces + (i < count % pieces) for i in range(pieces)]
