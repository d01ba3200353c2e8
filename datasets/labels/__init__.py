"""Label csv files to the samples of every fold (``cohort`` has the way)."""

from datasets.labels.cohort import load_cohort
from datasets.labels.options import LabelOptions
from datasets.labels.types import Cohort, Fold, Sample

__all__ = [
    "Cohort",
    "Fold",
    "LabelOptions",
    "Sample",
    "load_cohort",
]
