"""What a cohort looks like: the split card for people; fingerprint, description and split csv for records."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import write_text

if TYPE_CHECKING:
    from datasets.labels.types import Cohort, Fold, Sample


def split_card(cohort: Cohort, fold: Fold, counts: Mapping[str, int] | None = None) -> str:
    """A table with one line per split: patients, slides, patches, bags, classes or events, missing slides.

    Args:
        cohort: what is learnt, and from which classes.
        fold: one of its folds.
        counts: slide name to its number of patches; without it the card says nothing about patches.
    """
    header = ["split", "patients", "slides", *(["patches"] if counts is not None else []), "bags"]
    header += ["events", "censored"] if cohort.task == "survival" else []
    header += [*_target_columns(cohort), "missing"]
    lines = [header]
    for split, samples in fold.splits().items():
        missing = len(fold.missing.get(split, ()))
        numbers = (f"{n:.6g}" if isinstance(n, float) else str(n) for n in _numbers(cohort, samples, counts))
        lines.append([split, *numbers, str(missing)])
    chosen = "test (validation equals test)" if fold.selection == "test" else fold.selection
    title = f"fold {fold.index}  seed {fold.seed}  {cohort.task}  epoch chosen on: {chosen}"
    if fold.bin_edges is not None:
        title += f"\nbin edges: {', '.join(f'{edge:.4f}' for edge in fold.bin_edges)}"
    return title + "\n" + _table(lines)


def _numbers(cohort: Cohort, samples: Sequence[Sample], counts: Mapping[str, int] | None) -> list[float]:
    slides = {slide for sample in samples for slide in sample.slides}
    numbers: list[float] = [len({sample.case for sample in samples}), len(slides)]
    if counts is not None:
        numbers.append(sum(counts[slide] for slide in slides))
    numbers.append(len(samples))
    if cohort.task == "survival":
        events = sum(int(sample.target["event"]) for sample in samples)
        numbers += [events, len(samples) - events]
    return numbers + _target_numbers(cohort, samples)


def _target_columns(cohort: Cohort) -> list[str]:
    return ["smallest", "mean", "largest"] if cohort.task == "regression" else list(cohort.class_names)


def _target_numbers(cohort: Cohort, samples: Sequence[Sample]) -> list[float]:
    """Bags per class or bin; multi-label: bags that have the label; regression: smallest value, mean and largest."""
    if cohort.task == "regression":
        values = [float(sample.target["value"]) for sample in samples]
        return [min(values), sum(values) / len(values), max(values)] if values else [math.nan] * 3
    if cohort.task == "multilabel":
        return [sum(sample.target[name] == 1 for sample in samples) for name in cohort.class_names]
    labels = Counter(int(sample.target["label"]) for sample in samples)
    return [labels[i] for i in range(cohort.n_classes)]


def _table(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def fingerprint(cohort: Cohort) -> str:
    """SHA-256 over task, classes and every sample of every fold, in order: equal only for equal data."""
    digest = hashlib.sha256(json.dumps([cohort.task, cohort.class_names]).encode())
    for fold in cohort.folds:
        digest.update(fold_fingerprint(fold).encode())
    return digest.hexdigest()


def fold_fingerprint(fold: Fold) -> str:
    """SHA-256 over the samples of one fold."""
    digest = hashlib.sha256(f"{fold.index} {fold.selection}\n".encode())
    for split, samples in fold.splits().items():
        for sample in samples:
            target = {key: float(value) for key, value in sorted(sample.target.items())}
            digest.update(json.dumps([split, sample.id, sample.case, sample.slides, target]).encode())
    return digest.hexdigest()


def describe(cohort: Cohort) -> dict[str, Any]:
    """The labels as ``results.json`` records them.

    Returns:
        task, classes (in output order), fingerprint, notes, and per fold: index, seed, selection, whether
        validation equals test, bin edges, fingerprint and, for each split, its numbers of patients, slides
        and bags, its classes or events, and what is missing.
    """
    return {
        "task": cohort.task,
        "classes": list(cohort.class_names),
        "fingerprint": fingerprint(cohort),
        "notes": list(cohort.notes),
        "folds": [_describe_fold(cohort, fold) for fold in cohort.folds],
    }


def _describe_fold(cohort: Cohort, fold: Fold) -> dict[str, Any]:
    keys = ["patients", "slides", "bags", *(["events", "censored"] if cohort.task == "survival" else [])]
    splits: dict[str, Any] = {}
    for split, samples in fold.splits().items():
        numbers = _numbers(cohort, samples, None)
        splits[split] = dict(zip(keys, numbers[: len(keys)], strict=True))
        kind = "values" if cohort.task == "regression" else "classes"
        splits[split][kind] = dict(zip(_target_columns(cohort), numbers[len(keys) :], strict=True))
        splits[split]["missing"] = list(fold.missing.get(split, ()))
    return {
        "index": fold.index,
        "seed": fold.seed,
        "selection": fold.selection,
        "validation_equals_test": fold.selection == "test",
        "bin_edges": None if fold.bin_edges is None else list(fold.bin_edges),
        "fingerprint": fold_fingerprint(fold),
        "splits": splits,
    }


def write_split(fold: Fold, path: str | Path) -> None:
    """Writes the fold as csv (case, slide, the targets, split), one line per slide, to save with a run."""
    samples = [(split, sample) for split, members in fold.splits().items() for sample in members]
    keys = list(dict.fromkeys(key for _, sample in samples for key in sample.target))
    lines = ([s.case, slide, *(s.target[key] for key in keys), split] for split, s in samples for slide in s.slides)
    write_text(path, csv_text(["case", "slide", *keys, "split"], lines))


def csv_text(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Comma-separated text with a header line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return stream.getvalue()
