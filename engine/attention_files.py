"""What a head attends to, patch by patch: ``attention/fold_<k>/<slide>.csv`` (``--save_attention``).

``CLAM/heatmap.py`` draws the files onto the slides.

Shapes: N instances of a bag, D feature width.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from datasets.instances import Source
from datasets.labels.report import csv_text
from datasets.labels.types import Fold
from datasets.positions import Coordinates, grid_step_px
from engine.run_names import ending
from modules.heads import attention_weights
from modules.model import SlideModel
from utils.errors import UserError
from utils.files import MAKE_ROOM, write_text, writing

COLUMNS = ("patch", "x", "y", "edge_px", "attention")
"""Number of the patch on its slide; its corner and edge in level-0 px, empty where not known; the mean over the heads,
which sums to one over a bag."""


def check_attention(mil: nn.Module) -> None:
    """Refuses ``--save_attention`` for a head without attention over patches."""
    if not hasattr(mil, "attention"):
        raise UserError(f"save_attention: the head {type(mil).__name__} has none. Give --no_save_attention.")


class AttentionFiles:
    """Writes the files of the test bags of one fold while they are evaluated; each process writes those of its own.

    Args:
        folder: of the run.
        fold: whose test bags they are.
        source: what the bags are made of.
        coordinates: corners of the patches.
    """

    def __init__(self, folder: Path, fold: Fold, source: Source, coordinates: Coordinates) -> None:
        self.folder, self.fold, self.source, self.coordinates = folder, fold, source, coordinates

    def __call__(self, weights: str, model: SlideModel, position: int, features: Tensor, pos: Tensor | None) -> None:
        """Writes the bag at ``position`` of the test, as the set of weights ``weights`` sees it.

        Args:
            weights: name of the set.
            model: with these weights.
            position: of the bag.
            features: (N, D).
            pos: (N, 2) grid positions, for heads that use them.
        """
        places = None if pos is None else pos.unsqueeze(0)
        heads = attention_weights(model.mil, features.unsqueeze(0), None, places)[0]  # (heads, N)
        mean, begin = heads.float().mean(0).cpu().numpy(), 0
        for slide in self.fold.test[position].slides:
            count = self.source.count(slide)
            self._write(weights, slide, mean[begin : begin + count])
            begin += count

    def _write(self, weights: str, slide: str, attention: NDArray[np.float32]) -> None:
        corners = self.coordinates.coords(slide)
        places: list[tuple[object, ...]] = [("", "", "")] * len(attention)
        if corners is not None:
            edge = grid_step_px(corners)
            places = [(x, y, edge) for x, y in corners.tolist()]
        lines = [(i, *place, f"{a:.6g}") for i, (place, a) in enumerate(zip(places, attention, strict=True))]
        folder = self.folder / "attention" / f"fold_{self.fold.index}{ending(weights)}"
        path = folder / f"{_file_name(slide)}.csv"
        with writing(path, MAKE_ROOM):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, csv_text(COLUMNS, lines))


def _file_name(slide: str) -> str:
    """Without what would be a folder, as names come from stores."""
    return "".join("_" if sign in "/\\\0" else sign for sign in slide)
