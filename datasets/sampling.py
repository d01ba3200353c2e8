"""Regional sampling: orders of a bag's instances in which every region of the bag comes up early.

A training bag takes the first k instances of an order. Uniform sampling is a random permutation; in a regional one the
first instances are one random key of every region, in random order, and random extras follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.config import DataConfig

Order = NDArray[np.int64]


def bag_limit(data: DataConfig) -> int:
    """Instances that a training bag may have: the smaller one of same_psize and max_patch_train; 0: all."""
    return min((n for n in (data.same_psize, data.max_patch_train) if n), default=0)


@dataclass(frozen=True)
class Regions:
    """How a bag is divided.

    Attributes:
        groups: equal intervals of the list of instances, or rows and columns of a grid over the slide.
        grid: whether regions are cells of a grid, for which the positions of the instances are needed.
    """

    groups: int
    grid: bool = False

    def of(self, count: int, positions: NDArray[np.int64] | None = None) -> Order:
        """The region of each of ``count`` instances.

        Args:
            count: instances of the bag.
            positions: (count, 2) columns and rows, for grids.
        """
        if not self.grid or positions is None:
            return np.arange(count) * self.groups // max(count, 1)
        low, high = positions.min(axis=0), positions.max(axis=0)
        cells = (positions - low) * self.groups // (high - low + 1)  # (count, 2), 0 .. groups - 1
        return cells[:, 0] * self.groups + cells[:, 1]


def regional_order(regions: Order, rng: np.random.Generator) -> Order:
    """A random order that starts with one random instance of every region.

    Args:
        regions: (N,) region of each instance.
        rng: source of every choice.
    """
    order = rng.permutation(len(regions))
    keys = np.sort(np.unique(regions[order], return_index=True)[1])  # first of each region in a random order
    extra = np.ones(len(order), dtype=bool)
    extra[keys] = False
    return np.concatenate([order[keys], order[extra]])
