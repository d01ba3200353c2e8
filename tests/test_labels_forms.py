"""Every accepted csv form, class names and their order, matching of names, bags."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from datasets.labels import Cohort, LabelOptions, load_cohort
from datasets.labels.columns import find_columns
from datasets.labels.report import describe, fingerprint, split_card, write_split

FOUR = "case,slide,label,fold\np1,a,IDC,train\np2,b,ILC,train\np3,c,IDC,val\np4,d,ILC,test\np5,e,IDC,test\n"
SURV = "ID,Event,Status,Split\n" + "".join(
    f"{i},{10 * i},{i % 2},{'test' if i > 9 else 'train'}\n" for i in range(1, 13)
)


def load(folder: Path, text: str, slides: Collection[str], **values: Any) -> Cohort:
    path = folder / "labels.csv"
    path.write_bytes(text.encode())
    values = {"datasets": "brca", "cv_fold": 1} | values
    return load_cohort(LabelOptions(csv_path=str(path), **values), slides)


def targets(cohort: Cohort, split: str = "train") -> list[tuple[str, float]]:
    return [(sample.id, sample.target["label"]) for sample in cohort.folds[0].splits()[split]]


def test_four_columns_by_position_whatever_their_names(tmp_path: Path) -> None:
    named = load(tmp_path, FOUR, "abcde")
    positional = load(tmp_path, FOUR.replace("case,slide,label,fold", "w,x,y,z"), "abcde")
    assert fingerprint(named) == fingerprint(positional)
    assert targets(named) == [("a", 0), ("b", 1)]
    assert named.class_names == ("IDC", "ILC")


def test_four_named_columns_in_another_order(tmp_path: Path) -> None:
    lines = [line.split(",") for line in FOUR.split()]
    swapped = "\n".join(",".join((s, f, c, label)) for c, s, label, f in lines)
    assert fingerprint(load(tmp_path, swapped, "abcde")) == fingerprint(load(tmp_path, FOUR, "abcde"))


def test_byte_order_mark_crlf_blank_lines_and_capitals_change_nothing(tmp_path: Path) -> None:
    odd = "\ufeff" + FOUR.replace("\n", "\r\n").replace("train", "Train ") + "\r\n , , ,\r\n"
    assert fingerprint(load(tmp_path, odd, "abcde")) == fingerprint(load(tmp_path, FOUR, "abcde"))


@pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs")])
def test_the_separators_of_excel_are_read_and_noted(tmp_path: Path, separator: str, name: str) -> None:
    plain = load(tmp_path, FOUR, "abcde")
    for text in (FOUR, "\ufeff\r\n" + FOUR.replace("\n", "\r\n"), FOUR.replace("case,slide", '"case","slide"')):
        cohort = load(tmp_path, text.replace(",", separator), "abcde")
        assert fingerprint(cohort) == fingerprint(plain)
        assert any(f"labels.csv is read as separated by {name}" in note for note in cohort.notes)
    assert not any("separated by" in note for note in plain.notes)


def test_semicolons_leave_commas_and_quoted_lists_in_cells(tmp_path: Path) -> None:
    lines = [line.split(",") for line in SURV.split()]
    text = "\n".join(";".join([*cells, "WSI" if n == 0 else f'"{cells[0]};x,{n}"']) for n, cells in enumerate(lines))
    slides = [*(str(i) for i in range(1, 12)), "x,12"]
    cohort = load(tmp_path, text, slides, datasets="surv", n_bins=2, missing="drop")
    assert cohort.folds[0].test[-1].slides == ("x,12",)


def test_byte_order_mark_does_not_hide_the_first_column(tmp_path: Path) -> None:
    text = "ID,Label,Split\na,IDC,train\nb,ILC,train\nc,IDC,test\n"
    assert fingerprint(load(tmp_path, "\ufeff" + text, "abc")) == fingerprint(load(tmp_path, text, "abc"))


def test_id_label_split_with_further_columns(tmp_path: Path) -> None:
    text = "Site,ID,Label,Split,Note\nx,a,IDC,train,1\nx,b,ILC,TRAIN,\nx,d,IDC,Test,\n"
    cohort = load(tmp_path, text, "abd")
    assert targets(cohort) == [("a", 0), ("b", 1)]
    assert cohort.folds[0].selection == "test"
    assert any("no case column" in note for note in cohort.notes)


def test_val_rows_by_default_and_the_published_meaning_of_zero(tmp_path: Path) -> None:
    default = load(tmp_path, FOUR, "abcde").folds[0]
    assert (default.selection, [s.id for s in default.val]) == ("val", ["c"])
    zero = load(tmp_path, FOUR, "abcde", val_ratio=0.0)
    assert (zero.folds[0].selection, zero.folds[0].val) == ("test", zero.folds[0].test)
    assert any("1 val rows are not used" in note for note in zero.notes)
    assert describe(zero)["folds"][0]["validation_equals_test"] is True


def test_a_word_for_nothing_may_be_named_as_a_class(tmp_path: Path) -> None:
    cohort = load(tmp_path, FOUR.replace("IDC", "None"), "abcde", datasets="mine", classes=("None", "ILC"))
    assert targets(cohort) == [("a", 0), ("b", 1)]


def test_a_class_without_training_rows_is_noted(tmp_path: Path) -> None:
    cohort = load(tmp_path, FOUR, "abcde", datasets="mine", classes=("IDC", "ILC", "DCIS"))
    assert any("No training row of any fold has the class DCIS" in note for note in cohort.notes)
    assert not any("No training row" in note for note in load(tmp_path, FOUR, "abcde").notes)


def test_two_columns_give_a_random_test_share(tmp_path: Path) -> None:
    text = "name,class\n" + "".join(f"s{i},{'IDC' if i % 4 else 'ILC'}\n" for i in range(40))
    slides = [f"s{i}" for i in range(40)]
    cohort = load(tmp_path, text, slides, val_ratio=0.25)
    fold = cohort.folds[0]
    assert [len(fold.train), len(fold.test), fold.selection] == [30, 10, "test"]
    assert sum(sample.target["label"] == 1 for sample in fold.test) in (2, 3)
    runs = load(tmp_path, text, slides, val_ratio=0.25, random_fold=True, cv_fold=3)
    drawn = [{sample.id for sample in fold.test} for fold in runs.folds]
    assert drawn[0] != drawn[1] != drawn[2]
    assert drawn[0] == {sample.id for sample in fold.test}
    assert [fold.seed for fold in runs.folds] == [2021, 2121, 2221]


def test_folder_of_folds(tmp_path: Path) -> None:
    for k, test in enumerate(("c", "d")):
        rows = [f"p{s},{s},{'IDC' if s in 'ac' else 'ILC'},{'test' if s == test else 'train'}" for s in "abcd"]
        (tmp_path / f"fold_{k}.csv").write_text("case,slide,label,fold\n" + "\n".join(rows))
    options = LabelOptions(csv_path=str(tmp_path), datasets="brca", cv_fold=2)
    assert [[s.id for s in fold.test] for fold in load_cohort(options, "abcd").folds] == [["c"], ["d"]]
    second = load_cohort(LabelOptions(csv_path=str(tmp_path), datasets="brca", cv_fold=2, fold_start=1), "abcd")
    assert [fold.index for fold in second.folds] == [1]


def test_repeated_rows_stay_repeated(tmp_path: Path) -> None:
    cohort = load(tmp_path, FOUR + "p2,b,ILC,train\np2,b,ILC,train\n", "abcde")
    assert targets(cohort) == [("a", 0), ("b", 1), ("b", 1), ("b", 1)]
    assert "bags" in split_card(cohort, cohort.folds[0])
    per_case = load(tmp_path, FOUR + "p2,b,ILC,train\np2,b,ILC,train\n", "abcde", bag="case")
    assert targets(per_case) == [("p1", 0), ("p2", 1), ("p2", 1), ("p2", 1)]


def test_numeric_ids_stay_text(tmp_path: Path) -> None:
    text = "case,slide,label,fold\n1,007,IDC,train\n2,08,ILC,train\n3,0009,IDC,test\n"
    cohort = load(tmp_path, text, ["007", "08", "0009"])
    assert targets(cohort) == [("007", 0), ("08", 1)]


@pytest.mark.parametrize(
    ("key", "values", "names"),
    [
        ("nsclc", ["LUSC", "LUAD", "LUAD"], ("LUAD", "LUSC")),
        ("call", ["tumor", "normal", "tumor"], ("normal", "tumor")),
        ("panda", ["5", "0", "2"], ("0", "1", "2", "3", "4", "5")),
        ("bio_x", ["2", "0.0", "0"], ("0", "1", "2")),
        ("mine", ["10", "9", "9"], ("9", "10")),
        ("mine", ["pear", "apple", "pear"], ("apple", "pear")),
    ],
)
def test_class_order(tmp_path: Path, key: str, values: list[str], names: tuple[str, ...]) -> None:
    rows = zip("abc", values, ("train", "train", "test"), strict=True)
    text = "case,slide,label,fold\n" + "".join(f"p{s},{s},{v},{split}\n" for s, v, split in rows)
    cohort = load(tmp_path, text, "abc", datasets=key)
    assert cohort.class_names == names
    spelt = [names.index(value.removesuffix(".0")) for value in values[:2]]
    assert [target for _, target in targets(cohort)] == spelt
    assert any("lasses" in note for note in cohort.notes)


def test_classes_option_sets_the_order_and_names_numbers(tmp_path: Path) -> None:
    text = FOUR.replace("IDC", "benign").replace("ILC", "malignant")
    assert targets(load(tmp_path, text, "abcde", classes=("malignant", "benign"))) == [("a", 1), ("b", 0)]
    numbers = FOUR.replace("IDC", "0").replace("ILC", "1")
    named = load(tmp_path, numbers, "abcde", classes=("benign", "malignant"))
    assert targets(named) == [("a", 0), ("b", 1)]
    assert named.class_names == ("benign", "malignant")


def test_extensions_are_removed_and_said(tmp_path: Path) -> None:
    cohort = load(tmp_path, FOUR.replace(",a,", ",a.svs,"), ["a", "b.pt", "c", "d", "e"])
    assert targets(cohort) == [("a", 0), ("b.pt", 1)]
    assert any("2 rows matched a slide after a file extension" in note for note in cohort.notes)


def test_slide1_does_not_take_slide10(tmp_path: Path) -> None:
    text = FOUR.replace(",a,", ",slide1,").replace(",b,", ",slide10,")
    cohort = load(tmp_path, text, ["slide1", "slide10", "slide11", "c", "d", "e"])
    assert targets(cohort) == [("slide1", 0), ("slide10", 1)]
    assert any("1 slides of the store have no row" in note for note in cohort.notes)


def test_barcodes_own_their_slides_only_at_a_boundary(tmp_path: Path) -> None:
    text = "ID,Label,Split\nTCGA-AA-0001,IDC,train\nTCGA-AA-0002-01Z-00-DX1,ILC,train\nTCGA-AA-0003,IDC,test\n"
    store = [
        "TCGA-AA-0001-01Z-00-DX1.U1",
        "TCGA-AA-0001-01Z-00-DX2.U2",
        "TCGA-AA-00011",
        "TCGA-AA-0002-01Z-00-DX1.U3",
        "TCGA-AA-0002-01Z-00-DX10.U4",
        "TCGA-AA-0003.U5",
    ]
    cohort = load(tmp_path, text, store)
    assert [sample.id for sample in cohort.folds[0].train] == [store[0], store[1], store[3]]
    assert {sample.case for sample in cohort.folds[0].train} == {"TCGA-AA-0001", "TCGA-AA-0002"}
    per_case = load(tmp_path, text, store, bag="case")
    assert per_case.folds[0].train[0].slides == (store[0], store[1])


def test_bag_levels_hold_the_same_slides(tmp_path: Path) -> None:
    text = FOUR + "p1,a2,IDC,train\n"
    store = ["a", "a2", "b", "c", "d", "e"]
    slide, case = (load(tmp_path, text, store, bag=bag) for bag in ("slide", "case"))
    assert [sample.slides for sample in case.folds[0].train] == [("a", "a2"), ("b",)]
    assert sorted(s.slides[0] for s in slide.folds[0].train) == ["a", "a2", "b"]
    assert any("1 of 5 patients have several slides" in note for note in case.notes)


def test_wsi_column_lists_the_slides_of_a_patient(tmp_path: Path) -> None:
    text = SURV.replace("Split", "Split,WSI").replace("train\n", "train,?\n").replace("test\n", "test,?\n")
    lines = [line.replace("?", f"x{line.split(',')[0]}.pt;y{line.split(',')[0]}.pt") for line in text.split("\n")]
    store = {f"{x}{i}" for i in range(1, 13) for x in "xy"}
    cohort = load(tmp_path, "\n".join(lines), store, datasets="surv", n_bins=2)
    assert cohort.folds[0].train[0].slides == ("x1", "y1")
    assert cohort.folds[0].train[0].id == "1"
    per_slide = load(tmp_path, "\n".join(lines), store, datasets="surv", n_bins=2, bag="slide")
    assert len(per_slide.folds[0].train) == 2 * len(cohort.folds[0].train)


def test_survival_columns_by_published_and_plain_names(tmp_path: Path) -> None:
    ids = [str(i) for i in range(1, 13)]
    published = load(tmp_path, SURV, ids, datasets="surv_x", n_bins=2)
    plain = SURV.replace("ID,Event,Status,Split", "case,time,event,fold")
    assert fingerprint(load(tmp_path, plain, ids, datasets="surv_x", n_bins=2)) == fingerprint(published)
    sample = published.folds[0].train[2]
    assert sample.target == {"label": 0, "time": 30.0, "event": 1}


def test_published_bins_use_a_label_column_as_it_stands(tmp_path: Path) -> None:
    text = "\n".join(line + (",Label" if n == 0 else ",1") for n, line in enumerate(SURV.strip().split("\n")))
    ids = [str(i) for i in range(1, 13)]
    stored = load(tmp_path, text, ids, datasets="surv", n_bins=2, bins="published")
    assert {sample.target["label"] for sample in stored.folds[0].train} == {1}
    assert any("stored Labels differ" in note for note in stored.notes)
    cut = load(tmp_path, text, ids, datasets="surv", n_bins=2)
    assert {sample.target["label"] for sample in cut.folds[0].train} == {0, 1}
    assert any("Label column is not used" in note for note in cut.notes)


def test_drop_leaves_out_what_the_store_lacks_and_counts_it(tmp_path: Path) -> None:
    cohort = load(tmp_path, FOUR, "abcd", missing="drop")
    fold = cohort.folds[0]
    assert [sample.id for sample in fold.test] == ["d"]
    assert fold.missing == {"train": (), "val": (), "test": ("e",)}
    assert any("'e'" in note and "left out" in note for note in cohort.notes)
    assert split_card(cohort, fold).splitlines()[-1].split()[-1] == "1"


def test_card_counts_by_hand(tmp_path: Path) -> None:
    cohort = load(tmp_path, FOUR + "p1,a2,IDC,train\np2,b,ILC,train\n", ["a", "a2", "b", "c", "d", "e"])
    counts = {"a": 1, "a2": 10, "b": 100, "c": 1000, "d": 3, "e": 4}
    lines = [line.split() for line in split_card(cohort, cohort.folds[0], counts).splitlines()[1:]]
    assert lines[0] == ["split", "patients", "slides", "patches", "bags", "IDC", "ILC", "missing"]
    assert lines[1] == ["train", "2", "3", "111", "4", "2", "2", "0"]
    assert lines[2] == ["val", "1", "1", "1000", "1", "1", "0", "0"]
    assert lines[3] == ["test", "2", "2", "7", "2", "1", "1", "0"]


def test_fingerprint_moves_with_any_label_and_not_with_the_file_name(tmp_path: Path) -> None:
    cohort = load(tmp_path, FOUR, "abcde")
    assert fingerprint(cohort) != fingerprint(load(tmp_path, FOUR.replace("c,IDC", "c,ILC"), "abcde"))
    (tmp_path / "other").mkdir()
    assert fingerprint(cohort) == fingerprint(load(tmp_path / "other", FOUR, "abcde"))


def test_a_written_split_loads_as_the_same_fold(tmp_path: Path) -> None:
    fold = load(tmp_path, FOUR, "abcde").folds[0]
    write_split(fold, tmp_path / "split.csv")
    text = (tmp_path / "split.csv").read_text()
    again = load(tmp_path, text, "abcde", datasets="mine").folds[0]
    assert (again.train, again.val, again.test) == (fold.train, fold.val, fold.test)


@pytest.mark.parametrize(
    ("header", "roles"),
    [
        ("a,b,c,d", {"case": 0, "id": 1, "label": 2, "split": 3}),
        ("case_id,slide_id,label,part", {"case": 0, "id": 1, "label": 2, "split": 3}),
        ("slide,case,label,fold", {"id": 0, "case": 1, "label": 2, "split": 3}),
        ("slide,case,label,site", {"id": 0, "case": 1, "label": 2}),
        ("slide,label,fold,site", {"id": 0, "label": 1, "split": 2}),
        ("ID,Label,Split,Group", {"id": 0, "label": 1, "split": 2}),
        ("ID,Label,Split,Patient", {"id": 0, "label": 1, "split": 2, "case": 3}),
    ],
)
def test_four_columns_go_by_position_unless_their_names_say_otherwise(header: str, roles: dict[str, int]) -> None:
    assert find_columns(header.split(","), survival=False) == roles
