"""Label files of regression and multi-label tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datasets.labels import Cohort, LabelOptions, load_cohort
from datasets.labels.report import describe, split_card, write_split
from utils.errors import UserError

NUMBERS = "case,slide,label,fold\np1,a,2.5,train\np2,b,-1e1,train\np3,c,0,val\np4,d,7,test\np5,e,7.5,test\n"
SEVERAL = "slide,case,ER,Scanner,PR,split\na,p1,1,x,0,train\nb,p2,0,y,1,train\nc,p3,1.0,x,,test\nd,p4,0,x,1,test\n"


def load(folder: Path, text: str, slides: str = "abcde", **values: Any) -> Cohort:
    path = folder / "labels.csv"
    path.write_text(text)
    return load_cohort(LabelOptions(**{"csv_path": str(path), "datasets": "mine", "cv_fold": 1} | values), slides)


def test_numbers_become_values(tmp_path: Path) -> None:
    cohort = load(tmp_path, NUMBERS, task="regression")
    fold = cohort.folds[0]
    assert [(s.id, dict(s.target)) for s in fold.train] == [("a", {"value": 2.5}), ("b", {"value": -10.0})]
    assert (cohort.task, cohort.class_names, fold.bin_edges) == ("regression", ("value",), None)
    assert describe(cohort)["folds"][0]["splits"]["test"]["values"] == {"smallest": 7.0, "mean": 7.25, "largest": 7.5}
    assert "7.25" in split_card(cohort, fold)


def test_a_label_that_is_no_number_is_a_fault_with_its_row_once_for_all_folds(tmp_path: Path) -> None:
    text = "slide,label\na,1\nb,high\nc,nan\nd,\ne,4\n"
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, task="regression", cv_fold=2)
    message = str(caught.value)
    assert message.count("row 3: the label 'high' is no number") == 1
    assert "row 4: the label 'nan' is no number" in message
    assert "row 5: the label is empty" in message


def test_equal_values_cannot_be_learnt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the train set holds one value only"):
        load(tmp_path, NUMBERS.replace("-1e1", "2.5"), task="regression")


def test_folds_spread_the_quarters_of_the_values(tmp_path: Path) -> None:
    text = "slide,label\n" + "".join(f"s{i},{i * i}\n" for i in range(40))
    path = tmp_path / "labels.csv"
    path.write_text(text)
    options = LabelOptions(csv_path=str(path), datasets="mine", task="regression", cv_fold=5)
    cohort = load_cohort(options, [f"s{i}" for i in range(40)])
    for fold in cohort.folds:
        quarters = [int(s.id[1:]) // 10 for s in fold.test]
        assert sorted(quarters) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not any("some test sets lack" in note for note in cohort.notes)


def test_columns_named_by_classes_become_labels_and_empty_cells_unknown(tmp_path: Path) -> None:
    cohort = load(tmp_path, SEVERAL, task="multilabel", classes=("PR", "ER"))
    train, test = cohort.folds[0].train, cohort.folds[0].test
    assert [dict(s.target) for s in train] == [{"PR": 0, "ER": 1}, {"PR": 1, "ER": 0}]
    assert dict(test[0].target) == {"PR": -1, "ER": 1}
    assert [s.case for s in train] == ["p1", "p2"]
    assert (cohort.task, cohort.class_names) == ("multilabel", ("PR", "ER"))
    assert describe(cohort)["folds"][0]["splits"]["test"]["classes"] == {"PR": 1, "ER": 1}
    assert any("the test set holds one value of PR only, so its AUC of PR" in note for note in cohort.notes)
    write_split(cohort.folds[0], tmp_path / "split.csv")
    again = load(
        tmp_path, (tmp_path / "split.csv").read_text().replace(",-1", ","), task="multilabel", classes=("PR", "ER")
    )
    assert [s.target for s in again.folds[0].test] == [s.target for s in test]


@pytest.mark.parametrize(
    ("change", "values", "sentence"),
    [
        (("0,y", "2,y"), {}, "row 3: label ER is '2'. Write 1, 0, or nothing"),
        (("ER", "er"), {}, "lack ER"),
        (("slide", "thing"), {}, r"lack slide \(or ID\)"),
        (("", ""), {"classes": ()}, "such as --classes=ER,PR,HER2"),
        (("", ""), {"n_classes": 5}, "n_classes is 5"),
        (("b,p2,0", "b,p2,1"), {}, "the train set holds one value of ER only"),
        (("", ""), {"task": "regression"}, "a regression has none"),
        (("", ""), {"task": "grading"}, "task is 'grading'"),
    ],
)
def test_faults_of_several_labels(
    tmp_path: Path, change: tuple[str, str], values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, SEVERAL.replace(*change, 1), **{"task": "multilabel", "classes": ("ER", "PR")} | values)


def test_the_rarest_label_is_spread_over_the_folds(tmp_path: Path) -> None:
    text = "slide,ER,PR\n" + "".join(f"s{i},{int(i < 30)},{int(i % 10 == 0)}\n" for i in range(40))
    path = tmp_path / "labels.csv"
    path.write_text(text)
    options = LabelOptions(csv_path=str(path), datasets="mine", task="multilabel", classes=("ER", "PR"), cv_fold=4)
    cohort = load_cohort(options, [f"s{i}" for i in range(40)])
    assert [sum(s.target["PR"] for s in fold.test) for fold in cohort.folds] == [1, 1, 1, 1]


def test_the_task_option_overrides_the_key(tmp_path: Path) -> None:
    text = "slide,label,split\na,x,train\nb,y,train\nc,x,test\nd,y,test\n"
    assert load(tmp_path, text, datasets="surv_mine", task="classification").task == "classification"
    text = "slide,time,event,split\na,1,1,train\nb,2,1,train\nc,3,1,train\nd,4,1,test\n"
    assert load(tmp_path, text, datasets="mine", task="survival", n_bins=2).task == "survival"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("numbers.csv", {"task": "regression"}),
        ("several_labels.csv", {"task": "multilabel", "classes": ("ER", "PR", "HER2")}),
    ],
)
def test_the_examples_load_without_a_remark_on_their_labels(name: str, values: dict[str, Any]) -> None:
    path = Path(__file__).resolve().parent.parent / "labels" / "examples" / name
    options = LabelOptions(csv_path=str(path), datasets="mine", cv_fold=1, **values)
    cohort = load_cohort(options, [f"slide-{i:02d}" for i in range(1, 8)])
    assert [len(samples) for samples in cohort.folds[0].splits().values()] == [3, 2, 2]
    assert not any("undefined" in note for note in cohort.notes)
