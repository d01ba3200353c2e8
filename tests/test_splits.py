"""Laws of random divisions: whole, disjoint, grouped by patient, stratified, a function of the seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datasets.labels import Cohort, LabelOptions, load_cohort
from datasets.labels.splits import partition
from datasets.labels.survival_bins import bin_names, bin_of, cut_edges
from utils.errors import UserError


def cohort_csv(folder: Path, patients: int = 60, survival: bool = False) -> list[str]:
    """Patients with one to three slides; a quarter of the patients is ILC (or has an event)."""
    header = "case,slide,time,event" if survival else "case,slide,label"
    lines, slides = [header], []
    for p in range(patients):
        for s in range(1 + p % 3):
            slides.append(f"p{p}_s{s}")
            rare = p % 4 == 0
            lines.append(f"p{p},{slides[-1]}," + (f"{p + 1},{int(rare)}" if survival else "ILC" if rare else "IDC"))
    (folder / "labels.csv").write_text("\n".join(lines))
    return slides


def folds(folder: Path, slides: list[str], **values: object) -> Cohort:
    options = LabelOptions(csv_path=str(folder / "labels.csv"), **({"datasets": "brca"} | values))  # type: ignore[arg-type]
    return load_cohort(options, slides)


def test_folds_are_whole_disjoint_and_grouped(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    cohort = folds(tmp_path, slides, val_ratio=0.2)
    tested = [sample.id for fold in cohort.folds for sample in fold.test]
    assert sorted(tested) == sorted(slides)
    for fold in cohort.folds:
        parts = [{s.case for s in part} for part in (fold.train, fold.val, fold.test)]
        assert sum(len(part) for part in parts) == len(set.union(*parts)) == 60
        assert len(fold.train) + len(fold.val) + len(fold.test) == len(slides)
        assert fold.selection == "val"


def test_folds_are_stratified(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    cohort = folds(tmp_path, slides)
    for fold in cohort.folds:
        classes = Counter(sample.target["label"] for sample in fold.test)
        assert classes[0] == pytest.approx(90 / 5, abs=2)
        assert classes[1] == pytest.approx(30 / 5, abs=2)


def test_survival_folds_are_stratified_by_event(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path, survival=True)
    cohort = folds(tmp_path, slides, datasets="surv", n_bins=2)
    events = [sum(int(s.target["event"]) for s in fold.test) for fold in cohort.folds]
    assert sum(events) == 15
    assert max(events) - min(events) <= 2
    assert all(len(s.slides) == 1 + int(s.case[1:]) % 3 for s in cohort.folds[0].test)


def test_same_seed_same_folds_other_seed_other_folds(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    first = folds(tmp_path, slides, val_ratio=0.2)
    assert folds(tmp_path, list(reversed(slides)), val_ratio=0.2).folds == first.folds
    assert folds(tmp_path, slides, val_ratio=0.2, seed=1).folds[0].test != first.folds[0].test


def test_random_seed_changes_the_run_and_not_the_test_folds(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    plain, seeded = folds(tmp_path, slides), folds(tmp_path, slides, random_seed=True)
    assert [fold.test for fold in plain.folds] == [fold.test for fold in seeded.folds]
    assert [fold.seed for fold in plain.folds] == [2021] * 5
    assert [fold.seed for fold in seeded.folds] == [2021, 2121, 2221, 2321, 2421]


def test_folds_do_not_depend_on_the_store(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    whole = folds(tmp_path, slides)
    part = folds(tmp_path, slides[::2], missing="drop")
    for a, b in zip(whole.folds, part.folds, strict=True):
        assert [s for s in a.test if s.id in slides[::2]] == list(b.test)


def test_val2test_in_folds_gives_the_validation_share_to_test(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    apart, merged = (folds(tmp_path, slides, val_ratio=0.2, val2test=flag).folds[0] for flag in (False, True))
    assert merged.train == apart.train
    assert {s.id for s in merged.test} == {s.id for s in (*apart.val, *apart.test)}
    assert (merged.val, merged.selection) == (merged.test, "test")


def test_a_split_column_is_not_used_for_folds_and_said(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    text = (tmp_path / "labels.csv").read_text().split("\n")
    (tmp_path / "labels.csv").write_text("\n".join([text[0] + ",fold", *(line + ",train" for line in text[1:])]))
    cohort = folds(tmp_path, slides)
    assert all(fold.test for fold in cohort.folds)
    assert any("split column is not used" in note for note in cohort.notes)


@pytest.mark.parametrize("seed", range(5))
def test_single_rows_divide_to_within_one_of_their_share(seed: int) -> None:
    strata = ["a"] * 37 + ["b"] * 11 + ["c"] * 5
    shares = [0.7, 0.1, 0.2]
    parts = partition([str(i) for i in range(53)], strata, shares, seed)
    for stratum in "abc":
        found = Counter(p for p, s in zip(parts, strata, strict=True) if s == stratum)
        for part, share in enumerate(shares):
            assert abs(found[part] - share * strata.count(stratum)) <= 1


def test_equal_shares_differ_by_at_most_one_row_per_stratum() -> None:
    strata = ["a"] * 53 + ["b"] * 12
    parts = partition([str(i) for i in range(65)], strata, [0.2] * 5, 0)
    for stratum in "ab":
        found = Counter(p for p, s in zip(parts, strata, strict=True) if s == stratum)
        assert max(found.values()) - min(found.values()) <= 1


def test_quartiles_by_hand() -> None:
    """Events at 1, 2, 3, 4, 5; the censored 100 does not move an edge."""
    edges = cut_edges([1, 2, 3, 4, 5, 100], [1, 1, 1, 1, 1, 0], 4)
    assert edges == (2.0, 3.0, 4.0)
    assert [bin_of(t, edges) for t in (0, 1.99, 2, 3, 4, 100)] == [0, 0, 1, 2, 3, 3]
    assert bin_names(edges) == ("[0, 2)", "[2, 3)", "[3, 4)", "[4, inf)")


def test_edges_need_distinct_event_times() -> None:
    with pytest.raises(UserError, match="cannot be cut into 4 bins"):
        cut_edges([1, 1, 1, 1, 2], [1, 1, 1, 1, 1], 4)
    with pytest.raises(UserError, match="0 events"):
        cut_edges([1, 2], [0, 0], 2)


def test_val_ratio_makes_a_validation_set_of_training_patients_where_the_csv_has_none(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    lines = (tmp_path / "labels.csv").read_text().split("\n")
    rows = [line + (",test" if line.split(",")[0] in {"p1", "p2", "p3", "p4"} else ",train") for line in lines[1:]]
    (tmp_path / "labels.csv").write_text("\n".join([lines[0] + ",fold", *rows]))
    (without,) = folds(tmp_path, slides, cv_fold=1).folds
    assert without.selection == "test"
    (fold,) = folds(tmp_path, slides, cv_fold=1, val_ratio=0.25).folds
    assert fold.selection == "val"
    assert fold.test == without.test
    assert {s.case for s in fold.train} | {s.case for s in fold.val} == {s.case for s in without.train}
    assert not {s.case for s in fold.train} & {s.case for s in fold.val}
    assert len(fold.val) == pytest.approx(len(without.train) / 4, abs=3)


def test_a_test_needs_no_train_and_val_rows(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    plain = (tmp_path / "labels.csv").read_text().split("\n")
    (tmp_path / "labels.csv").write_text("\n".join([plain[0] + ",fold", *(line + ",test" for line in plain[1:])]))
    with pytest.raises(UserError, match="the train set is empty"):
        folds(tmp_path, slides, cv_fold=1)
    cohort = folds(tmp_path, slides, cv_fold=3, training=False)
    for fold in cohort.folds:
        assert (fold.train, fold.selection) == ((), "another cohort")
        assert sorted(sample.id for sample in fold.test) == sorted(slides)
    assert "a test only, of 120 rows." in " ".join(cohort.notes)
    some = [line + (",val" if line.startswith("p1,") else ",test") for line in plain[1:]]
    (tmp_path / "labels.csv").write_text("\n".join([plain[0] + ",fold", *some]))
    sizes = [len(folds(tmp_path, slides, cv_fold=1, training=False, val2test=v).folds[0].test) for v in (False, True)]
    assert sizes == [118, 120]
    (tmp_path / "labels.csv").write_text("\n".join([plain[0] + ",fold", *(line + ",val" for line in plain[1:])]))
    with pytest.raises(UserError, match="the test set is empty"):
        folds(tmp_path, slides, cv_fold=1, training=False)


def test_without_training_a_csv_is_divided_as_it_was_for_it(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path)
    for values in ({}, {"val_ratio": 0.2}, {"cv_fold": 1, "val_ratio": 0.2}):
        assert folds(tmp_path, slides, training=False, **values).folds == folds(tmp_path, slides, **values).folds
    (whole,) = folds(tmp_path, slides, training=False, cv_fold=1).folds
    assert sorted(sample.id for sample in whole.test) == sorted(slides)


@pytest.mark.parametrize("values", [{"cv_fold": 1}, {"cv_fold": 1, "val_ratio": 0.125}, {"cv_fold": 3}])
def test_a_model_of_another_run_is_tested_on_all_rows_without_a_split(tmp_path: Path, values: dict[str, Any]) -> None:
    slides = cohort_csv(tmp_path)
    for fold in folds(tmp_path, slides, training=False, elsewhere=True, **values).folds:
        assert (fold.train, fold.selection) == ((), "another cohort")
        assert sorted(sample.id for sample in fold.test) == sorted(slides)


def test_survival_bins_of_a_test_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    slides = cohort_csv(tmp_path, survival=True)
    given = {"datasets": "surv", "cv_fold": 1, "training": False, "edges": {0: (10.0, 20.0)}, "n_bins": 3}
    cohort = folds(tmp_path, slides, **given)
    assert cohort.class_names == ("[0, 10)", "[10, 20)", "[20, inf)")
    assert {s.target["label"] for s in cohort.folds[0].test if s.target["time"] < 10} == {0}
