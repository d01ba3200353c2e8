"""How things are divided into pieces of bounded size."""

from __future__ import annotations

import pytest

from utils.chunks import split_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 8, 512])
def test_pieces_are_full_but_the_last_two_and_none_is_a_small_rest(most: int) -> None:
    for count in (*range(30), 511, 513, 1000, 10_000):
        sizes = split_sizes(count, most)
        assert sum(sizes) == count
        assert len(sizes) == -(-count // most)
        assert set(sizes[:-2]) <= {most}
        assert all(2 * size >= most for size in sizes) or count < most
        assert sizes == sorted(sizes, reverse=True)
