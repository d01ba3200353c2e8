"""The published label files load with the counts of the paper's protocol, and the published bins come out."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from datasets.labels import LabelOptions, load_cohort
from datasets.labels.report import fingerprint
from datasets.labels.types import Sample


def column(path: Path, name: str) -> list[str]:
    with path.open(encoding="utf-8", newline="") as stream:
        return [row[name] for row in csv.DictReader(stream)]


def labels(samples: tuple[Sample, ...]) -> list[int]:
    counts = Counter(int(sample.target["label"]) for sample in samples)
    return [counts[i] for i in sorted(counts)]


@pytest.fixture
def folder(real_data: Path) -> Path:
    return real_data / "labels"


@pytest.mark.parametrize(
    ("name", "key", "train", "val", "test"),
    [
        (
            "panda.csv",
            "panda",
            [1907, 1822, 925, 844, 831, 814],
            [272, 260, 132, 120, 119, 116],
            [545, 520, 264, 241, 237, 233],
        ),
        ("subtyping_tcga_brca.csv", "brca", [518, 138], [75, 20], [194, 40]),
        ("subtyping_tcga_brca_resample.csv", "brca", [518, 276], [75, 20], [194, 40]),
    ],
)
def test_classification_counts(
    folder: Path, name: str, key: str, train: list[int], val: list[int], test: list[int]
) -> None:
    options = LabelOptions(csv_path=str(folder / name), datasets=key, cv_fold=1, val_ratio=0.125)
    cohort = load_cohort(options, set(column(folder / name, "slide")))
    fold = cohort.folds[0]
    assert [labels(part) for part in (fold.train, fold.val, fold.test)] == [train, val, test]
    assert fold.selection == "val"


def test_val2test_appends_val_to_test_and_says_so(folder: Path) -> None:
    path = folder / "subtyping_tcga_brca_resample.csv"
    options = LabelOptions(csv_path=str(path), datasets="brca", cv_fold=1, val_ratio=0.125, val2test=True)
    cohort = load_cohort(options, set(column(path, "slide")))
    fold = cohort.folds[0]
    assert len(fold.train) == 794
    assert len({sample.id for sample in fold.train}) == 656
    assert fold.val is fold.test
    assert len(fold.test) == 329
    assert fold.selection == "test"
    assert any("Validation equals test" in note for note in cohort.notes)


def survival(folder: Path, **values: str) -> LabelOptions:
    return LabelOptions(
        csv_path=str(folder / "survival_tcga_brca_3fold"),
        datasets="surv_brca",
        cv_fold=3,
        val_ratio=0.0,
        val2test=True,
        random_seed=True,
        **values,  # type: ignore[arg-type]
    )


def wsi_slides(folder: Path) -> set[str]:
    lists = column(folder / "survival_tcga_brca_3fold" / "fold_0.csv", "WSI")
    return {name.removesuffix(".pt") for entry in lists for name in entry.split(";")}


def test_survival_folds(folder: Path) -> None:
    cohort = load_cohort(survival(folder), wsi_slides(folder))
    assert [len(fold.train) for fold in cohort.folds] == [671, 671, 672]
    assert [len(fold.test) for fold in cohort.folds] == [336, 336, 335]
    assert [sum(int(s.target["event"]) for s in fold.test) for fold in cohort.folds] == [54, 48, 44]
    assert [fold.seed for fold in cohort.folds] == [2021, 2121, 2221]
    cases = [sample.case for fold in cohort.folds for sample in fold.test]
    assert len(cases) == len(set(cases)) == 1007
    assert sum(len(sample.slides) > 1 for fold in cohort.folds for sample in fold.test) == 61


@pytest.mark.parametrize("index", [0, 1, 2])
def test_published_bins_on_all_rows(folder: Path, index: int, tmp_path: Path) -> None:
    """Edges are computed again (no Label column is given) and reproduce every stored label."""
    source = folder / "survival_tcga_brca_3fold" / f"fold_{index}.csv"
    with source.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    bare = tmp_path / "bare.csv"
    with bare.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["ID", "Event", "Status", "Split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    options = LabelOptions(csv_path=str(bare), datasets="surv", cv_fold=1, bins="published")
    cohort = load_cohort(options, {row["ID"] for row in rows})
    assert cohort.bin_edges == pytest.approx((24.3167, 42.6833, 79.0), abs=1e-4)
    fold = cohort.folds[0]
    found = {sample.id: int(sample.target["label"]) for sample in (*fold.train, *fold.test)}
    assert found == {row["ID"]: int(row["Label"]) for row in rows}
    assert len(found) == 1007


def test_default_bins_ignore_test_times(folder: Path) -> None:
    cohort = load_cohort(survival(folder), wsi_slides(folder))
    for fold in cohort.folds:
        events = [s.target["time"] for s in fold.train if s.target["event"]]
        assert fold.bin_edges is not None
        below = [sum(time < edge for time in events) / len(events) for edge in fold.bin_edges]
        assert below == pytest.approx([0.25, 0.5, 0.75], abs=1.5 / len(events))
    assert len({fold.bin_edges for fold in cohort.folds}) == 3
    assert fingerprint(cohort) != fingerprint(load_cohort(survival(folder, bins="published"), wsi_slides(folder)))


def test_barcodes_match_where_the_wsi_names_are_absent(folder: Path) -> None:
    cases = column(folder / "survival_tcga_brca_3fold" / "fold_0.csv", "ID")
    cohort = load_cohort(survival(folder), {f"{case}-01Z-00-DX1.ABC" for case in cases} | {"TCGA-XX-0000-01Z"})
    assert sum(len(part) for part in cohort.folds[0].splits().values()) == 1007
    assert any("by their barcode" in note for note in cohort.notes)
