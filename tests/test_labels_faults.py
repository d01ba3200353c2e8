"""Bad label files: one message with every fault, each a sentence with row numbers and a remedy."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from datasets.labels import LabelOptions, load_cohort
from utils.config import DataConfig, ModelConfig, TrainConfig
from utils.errors import UserError

HEAD = "case,slide,label,fold\n"
GOOD = HEAD + "p1,a,IDC,train\np2,b,ILC,train\np3,c,IDC,test\np4,d,ILC,test\n"
SURV = "ID,Event,Status,Split\n" + "".join(
    f"{i},{10 * i},{i % 2},{'test' if i > 9 else 'train'}\n" for i in range(1, 13)
)


def fault(folder: Path, text: str, slides: Collection[str] = "abcd", **values: Any) -> str:
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    values = {"datasets": "brca", "cv_fold": 1} | values
    with pytest.raises(UserError) as caught:
        load_cohort(LabelOptions(csv_path=str(path), **values), slides)
    return str(caught.value)


def surv_fault(folder: Path, text: str, **values: Any) -> str:
    values = {"datasets": "surv", "n_bins": 2} | values
    return fault(folder, text, [str(i) for i in range(1, 13)], **values)


def test_the_good_csv_is_good(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(GOOD)
    cohort = load_cohort(LabelOptions(csv_path=str(tmp_path / "labels.csv"), datasets="brca", cv_fold=1), "abcd")
    assert len(cohort.folds[0].train) == 2


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    text = HEAD + "p1,a,IDC,train\np2,b,DCIS,train\np3,c,IDC,tset\np1,d,ILC,test\np5,zz,ILC,test\n,e,IDC,test\n"
    message = fault(tmp_path, text)
    for part in (
        "row 3: label 'DCIS' is outside the classes (IDC, ILC)",
        "row 4: split 'tset' is not one of train, val, test",
        "row 7: the case is empty",
        "1 patient is on both sides of a split: p1 (train row 2, test row 5)",
        "'zz'",
        "--missing=drop",
    ):
        assert part in message


def test_rows_with_the_same_fault_make_one_sentence(tmp_path: Path) -> None:
    text = GOOD + "".join(f"q{i},x{i},IDC,hold\n" for i in range(9))
    message = fault(tmp_path, text, ["a", "b", "c", "d", *(f"x{i}" for i in range(9))])
    assert "rows 6, 7, 8, 9, 10, ... (9 rows): split 'hold'" in message
    assert message.count("hold") == 1


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty. It needs a header line"),
        (HEAD, "no row under the header"),
        ("a,b,c\n1,2,3\n", "Accepted forms: case,slide,label,fold"),
        (GOOD.replace(",", ";", 1).replace(",", "\t"), "'case;slide\\tlabel\\tfold' is not clear. Save it with commas"),
        ("sep=;\n" + GOOD.replace(",", ";"), "'sep=;' is not clear. Save it with commas"),
        (GOOD + "p9,x\n", "row 6: 2 cells, but the header has 4"),
        (GOOD.removeprefix(HEAD), "row 1 looks like data"),
        ("slide,slide,label,fold\na,a,IDC,train\n", "names slide more than once"),
        (GOOD.replace("p1,a,IDC", "p1,a,"), "row 2: the label is empty"),
        (GOOD.replace("p1,a", "p1,"), "row 2: the slide ID is empty"),
        (GOOD.replace("train", "val"), "the train set is empty"),
        (GOOD.replace("test", "train"), "the test set is empty"),
        (GOOD.replace("b,ILC", "b,IDC"), "the train set holds one class only"),
        (GOOD + "p1,a,ILC,train\n", "slide 'a' has different targets in rows 2, 6"),
        (GOOD + "p9,a,IDC,train\n", "belongs to patient 'p1' by row 2 and to 'p9' by row 6"),
        (GOOD.replace("b,ILC", "b,Ilc"), "Did you mean 'ILC'"),
    ],
)
def test_faults_of_the_csv(tmp_path: Path, text: str, part: str) -> None:
    assert part in fault(tmp_path, text)


@pytest.mark.parametrize("word", ["NA", "n/a", "#N/A", "nan", "NaN", "None", "null"])
@pytest.mark.parametrize("datasets", ["mine", "brca"])
def test_words_for_nothing_are_no_class(tmp_path: Path, word: str, datasets: str) -> None:
    message = fault(tmp_path, GOOD + f"p9,e,{word},train\n", "abcde", datasets=datasets)
    assert f"row 6: the label is {word!r}, which counts as empty" in message
    assert "outside the classes" not in message


def test_labels_that_differ_in_spelling_only_are_no_classes(tmp_path: Path) -> None:
    assert "the labels 'IDC' and 'idc' differ in spelling only" in fault(
        tmp_path, GOOD.replace("c,IDC", "c,idc"), datasets="mine"
    )
    numbers = GOOD.replace("c,IDC", "c,1.0").replace("IDC", "1").replace("ILC", "2")
    assert "the labels '1' and '1.0' differ in spelling only" in fault(tmp_path, numbers, datasets="mine")


def test_missing_slides_come_with_counts_and_near_names(tmp_path: Path) -> None:
    message = fault(tmp_path, GOOD, ["A", "b", "cc", "d-1"])
    assert "3 of 4 rows (1 train, 2 test) name slides that are not among the 4 of the store" in message
    assert "row 2 'a' (closest: 'A')" in message
    assert "row 5 'd' (closest: 'd-1')" in message
    numbers = fault(tmp_path, GOOD.replace(",a,", ",7,"), ["007", "b", "c", "d"])
    assert "'7' (closest: '007')" in numbers


@pytest.mark.parametrize(
    ("cell", "slide", "hint"),
    [
        ("1", "001", "The leading zeros were lost ('1' for '001'), as spreadsheets do: make the column text."),
        ("1.0", "001.svs", "The leading zeros were lost ('1.0' for '001.svs')"),
        ("1.0", "1", "Names were turned into numbers ('1.0' for '1'), as spreadsheets do: make the column text."),
        ("1", "10", ""),
        ("001", "1", ""),
        ("A1", "A01", ""),
    ],
)
def test_names_that_a_spreadsheet_took_for_numbers(tmp_path: Path, cell: str, slide: str, hint: str) -> None:
    message = fault(tmp_path, GOOD.replace(",a,", f",{cell},"), [slide, "b", "c", "d"])
    assert f"row 2 {cell!r}" in message
    assert hint in message if hint else "spreadsheets" not in message


def test_dropping_a_whole_split_is_a_fault(tmp_path: Path) -> None:
    message = fault(tmp_path, GOOD, "ab", missing="drop")
    assert "none of the 2 rows of the test set has a slide in the store" in message


def test_dropping_may_not_leave_one_class(tmp_path: Path) -> None:
    assert "train set holds one class only" in fault(tmp_path, GOOD, "acd", missing="drop")


def test_a_name_that_fits_two_slides_is_refused(tmp_path: Path) -> None:
    assert "row 2: 'a' fits 2 slides of the store (a.svs, a.tif)" in fault(
        tmp_path, GOOD, ["a.svs", "a.tif", "b", "c", "d"]
    )


def test_a_slide_named_by_patient_and_by_name_is_refused(tmp_path: Path) -> None:
    text = "ID,Label,Split\nTCGA-AA-0001,IDC,train\nTCGA-AA-0001-01Z,IDC,train\nb,ILC,train\nc,IDC,test\n"
    message = fault(tmp_path, text, ["TCGA-AA-0001-01Z", "b", "c"])
    assert "is meant by 'TCGA-AA-0001' (row 2) and by 'TCGA-AA-0001-01Z' (row 3)" in message


def test_leakage_through_barcodes_without_a_case_column(tmp_path: Path) -> None:
    text = "ID,Label,Split\nTCGA-AA-0001-01Z,IDC,train\nTCGA-AA-0001-02Z,IDC,test\nb,ILC,train\nc,IDC,test\n"
    message = fault(tmp_path, text, ["TCGA-AA-0001-01Z", "TCGA-AA-0001-02Z", "b", "c"])
    assert "TCGA-AA-0001 (train row 2, test row 3)" in message


def test_val_and_test_may_share_patients_only_where_they_are_one_set(tmp_path: Path) -> None:
    text = GOOD + "p4,e,ILC,val\n"
    assert "p4 (val row 6, test row 5)" in fault(tmp_path, text, "abcde")
    path = tmp_path / "labels.csv"
    options = LabelOptions(csv_path=str(path), datasets="brca", cv_fold=1, val2test=True)
    assert len(load_cohort(options, "abcde").folds[0].test) == 3


def test_one_patient_with_two_labels_cannot_be_one_bag(tmp_path: Path) -> None:
    message = fault(tmp_path, GOOD + "p1,e,ILC,train\n", "abcde", bag="case")
    assert "patient 'p1' has different targets in rows 2, 6" in message
    assert "--bag_level=slide" in message


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("1,10,1", "1,,1", "row 2: the survival time is missing"),
        ("1,10,1", "1,-3,1", "row 2: the survival time is no number of 0 or more (here '-3')"),
        ("1,10,1", "1,nan,1", "row 2: the survival time is no number of 0 or more (here 'nan')"),
        ("1,10,1", "1,10,gone", "row 2: the status is 'gone'. Write 1 where the event happened"),
        ("1,10,1", "1,10,2", "row 2: the status is '2'"),
        ("Status", "Stat", "needs the column Status (1 = event, 0 = censored)"),
        (",1,train", ",0,train", "the train set holds no event"),
    ],
)
def test_survival_faults(tmp_path: Path, old: str, new: str, part: str) -> None:
    assert part in surv_fault(tmp_path, SURV.replace(old, new))


def test_words_for_events_are_read_and_faults_of_rows_come_without_their_consequences(tmp_path: Path) -> None:
    words = SURV.replace(",1,train", ",DECEASED,train").replace(",0,", ",0:LIVING,")
    (tmp_path / "words.csv").write_text(words, encoding="utf-8")
    (tmp_path / "plain.csv").write_text(SURV, encoding="utf-8")
    cohorts = [
        load_cohort(
            LabelOptions(csv_path=str(tmp_path / f"{name}.csv"), datasets="surv", cv_fold=1),
            [line.split(",")[0] for line in SURV.split("\n")[1:] if line],
        )
        for name in ("words", "plain")
    ]
    assert cohorts[0].folds == cohorts[1].folds
    message = surv_fault(tmp_path, SURV.replace(",1,train", ",gone,train"))
    assert "the status is 'gone'" in message
    assert "1 fault" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,IDC\nb,ILC\nc,IDC\nd,ILC\n", "row 1 looks like data (a, IDC)"),
        (",train,val,test\n0,a,c,d\n1,b,,\n", "is a table of CLAM's splits"),
    ],
)
def test_files_without_the_header_that_is_needed(tmp_path: Path, text: str, part: str) -> None:
    assert part in fault(tmp_path, text, datasets="mine")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_decimal_commas_are_refused_not_guessed(tmp_path: Path, separator: str) -> None:
    text = SURV.replace(",", separator).replace(f"1{separator}10{separator}", f"1{separator}3,5{separator}", 1)
    message = surv_fault(tmp_path, text)
    assert "row 2: the survival time is no number of 0 or more (here '3,5')" in message
    assert "Write a point for the decimal comma." in message
    numbers = GOOD.replace("IDC", "1.5").replace("ILC", "2.5").replace(",", separator).replace("1.5", "1,5", 1)
    message = fault(tmp_path, numbers, datasets="mine", task="regression")
    assert "row 2: the label '1,5' is no number" in message
    assert "Write a point for the decimal comma." in message


def test_utf16_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(GOOD.replace(",", "\t").encode("utf-16"))
    with pytest.raises(UserError, match="cannot be read as csv .* Save it as comma-separated UTF-8 text"):
        load_cohort(LabelOptions(csv_path=str(tmp_path / "labels.csv"), cv_fold=1), "abcd")


def test_too_few_events_for_the_bins(tmp_path: Path) -> None:
    few = SURV.replace(",1,train", ",0,train", 4)
    assert "1 events at 1 distinct times cannot be cut into 4 bins" in surv_fault(tmp_path, few, n_bins=4)


def test_a_stored_label_that_is_no_bin(tmp_path: Path) -> None:
    lines = SURV.strip().split("\n")
    text = "\n".join([lines[0] + ",Label", lines[1] + ",-1", *(line + ",1" for line in lines[2:])])
    assert "row 2: the Label is not a bin from 0 to 1" in surv_fault(tmp_path, text, bins="published")


def test_number_of_classes_that_does_not_fit(tmp_path: Path) -> None:
    assert "holds 2 classes (IDC, ILC), but n_classes is 3" in fault(tmp_path, GOOD, datasets="mine", n_classes=3)
    assert "classes names 2 (x, y), but n_classes is 3" in fault(tmp_path, GOOD, classes=("x", "y"), n_classes=3)
    numbers = GOOD.replace("IDC", "0").replace("ILC", "2")
    assert "label '2' is outside the classes (0 to 1)" in fault(tmp_path, numbers, datasets="bio_x", n_classes=2)


def test_splits_that_cannot_be_made(tmp_path: Path) -> None:
    assert "no split column" in fault(tmp_path, "ID,Label\na,IDC\nb,ILC\n")
    assert "4 patients cannot make 9 folds" in fault(tmp_path, GOOD, cv_fold=9)
    assert "the val set is empty" in fault(tmp_path, GOOD, cv_fold=2, val_ratio=0.01)


def test_folder_without_the_fold(tmp_path: Path) -> None:
    (tmp_path / "fold_0.csv").write_text(GOOD)
    with pytest.raises(UserError, match=r"holds fold_0.csv; folds 0 to 1 are asked for, so fold_1.csv is missing"):
        load_cohort(LabelOptions(csv_path=str(tmp_path), datasets="brca", cv_fold=2), "abcd")


def test_no_such_file_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_cohort(LabelOptions(csv_path=str(tmp_path / "no.csv"), cv_fold=1), "abcd")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00,\x80")
    with pytest.raises(UserError, match="cannot be read as csv"):
        load_cohort(LabelOptions(csv_path=str(tmp_path / "bytes.csv"), cv_fold=1), "abcd")


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"cv_fold": 0}, "cv_fold is 0"),
        ({"fold_start": 1}, "fold_start is 1, but with cv_fold 1 the folds are 0 to 0"),
        ({"val_ratio": 1.5}, "val_ratio is 1.5"),
        ({"missing": "ignore"}, "missing is 'ignore'; use one of error, drop"),
        ({"bag": "lobe"}, "bag_level is 'lobe'"),
        ({"bins": "test"}, "surv_bins is 'test'"),
        ({"classes": ("a", "a")}, "classes names a class twice"),
    ],
)
def test_bad_options(tmp_path: Path, values: dict[str, Any], part: str) -> None:
    assert part in fault(tmp_path, GOOD, **values)


def test_options_come_from_the_configuration() -> None:
    data = DataConfig(csv_path="x.csv", datasets="surv_brca", classes="a, b ,", cv_fold=3, val2test=True)
    options = LabelOptions.from_config(data, ModelConfig(n_classes=4), TrainConfig(seed=7))
    assert (options.classes, options.n_bins, options.seed) == (("a", "b"), 4, 7)
    assert (options.bag_level, options.val2test, options.cv_fold) == ("case", True, 3)
    with pytest.raises(UserError, match="csv_path is not set"):
        LabelOptions.from_config(DataConfig(), ModelConfig(), TrainConfig())


def test_two_times_are_refused(tmp_path: Path) -> None:
    text = "\n".join(line + (",survival_months" if n == 0 else ",7") for n, line in enumerate(SURV.strip().split("\n")))
    assert "Event, Status and survival_months" in surv_fault(tmp_path, text)
