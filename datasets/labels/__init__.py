"""Label csv files to the samples of every fold (``cohort`` has the way)."""

from datasets.labels.cohort import load_cohort
from datasets.labels.options import LabelOptions
from datasets.labels.report import describe, fingerprint, write_split
from datasets.labels.types import Cohort, Fold, Sample

__all__ = [
    "Cohort",
    "Fold",
    "LabelOptions",
    "Sample",
    "describe",
    "fingerprint",
    "load_cohort",
    "write_split",
]
