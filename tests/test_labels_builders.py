"""The builders of label files on made-up tables, and the examples: what they write loads."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from datasets.labels import LabelOptions, load_cohort
from labels import build_panda, build_subtyping, build_survival
from labels.tables import oversample, read_slides

EXAMPLES = Path(__file__).resolve().parent.parent / "labels" / "examples"
DX = "-01Z-00-DX1.0A1B"


def case(i: int) -> str:
    return f"TCGA-AA-{i:04d}"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def write(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def panda_table(folder: Path, count: int = 60) -> Path:
    lines = ["image_id,data_provider,isup_grade,gleason_score"]
    return write(folder / "train.csv", lines + [f"img{i:03d},radboud,{i % 6},3+3" for i in range(count)])


def test_panda_divides_every_grade_in_the_wanted_shares(tmp_path: Path) -> None:
    out = tmp_path / "panda.csv"
    assert build_panda.main([str(panda_table(tmp_path)), str(out)]) == 0
    rows = rows_of(out)
    assert list(rows[0]) == ["case", "slide", "label", "fold"]
    found = Counter((row["label"], row["fold"]) for row in rows)
    assert all(found[str(g), s] == n for g in range(6) for s, n in (("train", 7), ("val", 1), ("test", 2)))
    options = LabelOptions(csv_path=str(out), datasets="panda", cv_fold=1)
    assert len(load_cohort(options, {row["slide"] for row in rows}).folds[0].test) == 12


def test_panda_only_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = panda_table(tmp_path), tmp_path / "out.csv"
    only = write(tmp_path / "only.txt", [f"img{i:03d}.tiff" for i in range(30)])
    assert build_panda.main([str(table), str(out), "--only", str(only)]) == 0
    first = out.read_text()
    assert len(rows_of(out)) == 30
    assert "left out 30 images: not in only.txt (img030, img031" in capsys.readouterr().out
    build_panda.main([str(table), str(out), "--only", str(only)])
    assert out.read_text() == first
    build_panda.main([str(table), str(out), "--only", str(only), "--seed", "1"])
    assert out.read_text() != first


def test_builders_run_as_scripts_from_anywhere(tmp_path: Path) -> None:
    script = EXAMPLES.parent / "build_panda.py"
    command = [sys.executable, str(script), str(panda_table(tmp_path)), "out.csv"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert len(rows_of(tmp_path / "out.csv")) == 60


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["image_id,grade", "a,1"], "no column for the grade: one of isup_grade is needed"),
        (["image_id,isup_grade", "a,7", "a,1"], "image 'a' occurs more than once"),
        (["image_id,isup_grade", "a,7"], "image 'a': isup_grade '7' is not 0 to 5"),
        (["image_id,isup_grade"], "holds no rows under a header"),
        (["image_id,isup_grade", "a,1"], "1 patients cannot be divided into 3 parts"),
    ],
)
def test_panda_faults(tmp_path: Path, lines: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_panda.main([str(write(tmp_path / "t.csv", lines)), str(tmp_path / "out.csv")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def people() -> list[tuple[str, bool, int]]:
    """24 patients: every second one died, at 30 days per number."""
    return [(case(i), i % 2 == 0, 30 * (i + 1)) for i in range(24)]


def gdc() -> list[str]:
    """GDC repeats patients and writes '-- for nothing."""
    names = "case_submitter_id project_id vital_status days_to_death days_to_last_follow_up primary_diagnosis"
    lines = [names.split()]
    for name, dead, days in people():
        status = "Dead" if dead else "Alive"
        times = (str(days), "'--") if dead else ("'--", str(days))
        lines.append([name, "TCGA-BRCA", status, *times, "Lobular carcinoma, NOS"])
        lines.append([name, "TCGA-BRCA", status, "'--", "'--", "'--"])
    lines.append([case(90), "TCGA-LUAD", "Alive", "'--", "9", "x"])
    lines.append([case(91), "TCGA-BRCA", "Not Reported", "'--", "9", "x"])
    lines.append([case(92), "TCGA-BRCA", "Dead", "'--", "9", "x"])
    return ["\t".join(line) for line in lines]


def cbioportal() -> list[str]:
    lines = ["#Patient\tMonths\tStatus", "PATIENT_ID\tOS_MONTHS\tOS_STATUS"]
    return lines + [f"{n}\t{days / 30}\t{'1:DECEASED' if dead else '0:LIVING'}" for n, dead, days in people()]


def xena() -> list[str]:
    lines = ["sample,OS,_PATIENT,OS.time"]
    return lines + [f"{name}-01,{int(dead)},{name},{days}" for name, dead, days in people()]


@pytest.mark.parametrize("table", [gdc, cbioportal, xena])
def test_survival_from_every_table(tmp_path: Path, table: Callable[[], list[str]]) -> None:
    source = write(tmp_path / "clinical.txt", table())
    out = tmp_path / "folds"
    assert build_survival.main([str(source), str(out), "--study", "TCGA-BRCA"]) == 0
    files = [rows_of(out / f"fold_{k}.csv") for k in range(3)]
    found = {row["ID"]: (float(row["Event"]), row["Status"]) for row in files[0]}
    assert found == {name: (days / 30, str(int(dead))) for name, dead, days in people()}
    tests = [{row["ID"] for row in rows if row["Split"] == "test"} for rows in files]
    assert [len(test) for test in tests] == [8, 8, 8]
    assert len(set.union(*tests)) == 24
    deaths = [sum(int(row["Status"]) for row in rows if row["Split"] == "test") for rows in files]
    assert deaths == [4, 4, 4]


def test_built_survival_labels_are_the_published_bins(tmp_path: Path) -> None:
    write(tmp_path / "clinical.txt", gdc())
    slides = write(tmp_path / "slides.txt", [f"{case(i)}{DX}.svs" for i in range(24)] + [f"{case(3)}-01Z-00-DX2.X.svs"])
    out = tmp_path / "folds"
    build_survival.main([str(tmp_path / "clinical.txt"), str(out), "--slides", str(slides)])
    store = [name.removesuffix(".svs") for name in slides.read_text().split()]
    options = LabelOptions(csv_path=str(out), datasets="surv_brca", cv_fold=3, bins="published")
    cohort = load_cohort(options, store)
    assert not any("differ" in note for note in cohort.notes)
    assert max(len(sample.slides) for sample in (*cohort.folds[0].train, *cohort.folds[0].test)) == 2
    stored = Counter(row["Label"] for row in rows_of(out / "fold_0.csv") if row["Status"] == "1")
    assert stored == {"0": 3, "1": 3, "2": 3, "3": 3}


def test_survival_reports_every_drop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "clinical.txt", gdc())
    slides = write(tmp_path / "manifest.txt", ["id\tfilename\tmd5"] + [f"u\t{case(i)}{DX}.svs\tm" for i in range(20)])
    arguments = [str(source), str(tmp_path / "out"), "--study", "TCGA-BRCA", "--slides", str(slides)]
    assert build_survival.main(arguments) == 0
    said = capsys.readouterr().out
    for part in (
        "20 patients, 10 deaths",
        "left out 4 patients: no slide (TCGA-AA-0020",
        "left out 1 patients: another study than TCGA-BRCA (TCGA-AA-0090)",
        "left out 1 patients: no vital status (TCGA-AA-0091)",
        "left out 1 patients: no survival time (TCGA-AA-0092)",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (["patient_id,vital_status", "a,Dead"], "no column for the survival time"),
        (["patient_id,os.time", "a,3"], "no column for the vital status"),
        (["who,os,os.time", "a,1,3"], "no column for the patient"),
        (["patient_id,os,os.time", "a,1,x"], "'x' in the time column is not a number"),
        (["patient_id,os,os.time", "a,1,3", "a,0,3"], "patient a is both dead and alive"),
        (["patient_id,os,os.time", "a,1,-3"], "no patient is left"),
        (["patient_id,os,os.time", "a,1,3", "b,0,4"], "cannot be cut into 4 bins"),
    ],
)
def test_survival_faults(tmp_path: Path, lines: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_survival.main([str(write(tmp_path / "t.csv", lines)), str(tmp_path / "out")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def brca(folder: Path) -> tuple[Path, Path]:
    """30 patients, every third lobular, one mixed, one of both diagnoses, one without a slide."""
    lines = ["case_submitter_id\tprimary_diagnosis"]
    for i in range(30):
        kind = "Lobular carcinoma, NOS" if i % 3 == 0 else "Infiltrating duct carcinoma, NOS"
        lines.append(f"{case(i)}\t{kind}")
    lines += [f"{case(40)}\tInfiltrating duct and lobular carcinoma", f"{case(50)}\tLobular carcinoma, NOS"]
    lines += [f"{case(41)}\tLobular carcinoma, NOS", f"{case(41)}\tInfiltrating duct carcinoma, NOS"]
    names = [f"{case(i)}{DX}" for i in [*range(30), 40, 41]] + [
        f"{case(1)}-01Z-00-DX2.Z",
        f"{case(2)}-01A-01-TS1.Q",
    ]
    return write(folder / "c.tsv", lines), write(folder / "s.txt", [name + ".svs" for name in names])


def test_subtyping_and_its_oversampled_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, slides = brca(tmp_path)
    plain, twin = tmp_path / "plain.csv", tmp_path / "twin.csv"
    common = ["--slides", str(slides), "--shares", "0.6,0.2,0.2"]
    assert build_subtyping.main([str(table), str(plain), *common]) == 0
    said = capsys.readouterr().out
    assert "diagnosis Infiltrating duct and lobular carcinoma (TCGA-AA-0040)" in said
    assert "two classes (TCGA-AA-0041)" in said
    assert "no slide (TCGA-AA-0050)" in said
    rows = rows_of(plain)
    assert len(rows) == 31
    assert {row["label"] for row in rows if int(row["case"][-4:]) % 3 == 0} == {"ILC"}
    patients = Counter((row["fold"], row["label"]) for row in {row["case"]: row for row in rows}.values())
    assert patients["train", "ILC"] == 6
    build_subtyping.main([str(table), str(twin), *common, "--oversample", "2"])
    assert twin.read_text().startswith(plain.read_text())
    assert Counter((row["fold"], row["label"]) for row in rows_of(twin)[31:]) == {("train", "ILC"): 6}
    options = LabelOptions(csv_path=str(twin), datasets="brca", cv_fold=1)
    cohort = load_cohort(options, {row["slide"] for row in rows})
    assert sum("6 bags of the train set are repeated" in note for note in cohort.notes) == 1


def test_subtyping_by_project_and_by_a_given_diagnosis(tmp_path: Path) -> None:
    lines = ["bcr_patient_barcode,type,histological_type"]
    lines += [f"{case(i)},{'LUAD' if i % 2 else 'LUSC'},Lung something" for i in range(12)]
    table = write(tmp_path / "cdr.csv", lines)
    slides = write(tmp_path / "s.txt", [f"{case(i)}{DX}" for i in range(12)])
    out = tmp_path / "out.csv"
    assert build_subtyping.main([str(table), str(out), "--slides", str(slides), "--task", "nsclc"]) == 0
    assert Counter(row["label"] for row in rows_of(out)) == {"LUAD": 6, "LUSC": 6}
    mapped = [str(table), str(out), "--slides", str(slides), "--map", "lung something=ALL"]
    assert build_subtyping.main(mapped) == 0
    assert {row["label"] for row in rows_of(out)} == {"ALL"}


def test_slide_lists_of_every_kind_agree(tmp_path: Path) -> None:
    names = [f"{case(1)}{DX}.svs", f"{case(2)}{DX}.svs"]
    folder = tmp_path / "slides"
    (folder / "sub").mkdir(parents=True)
    (folder / names[0]).touch()
    (folder / "sub" / names[1]).touch()
    lists = [
        folder,
        write(tmp_path / "list.txt", names),
        write(tmp_path / "manifest.txt", ["id\tfilename", *(f"1\t{name}" for name in names)]),
    ]
    found = [read_slides(path, lambda name: True) for path in lists]
    assert found[0] == found[1] == found[2] == {case(1): [f"{case(1)}{DX}"], case(2): [f"{case(2)}{DX}"]}


def test_oversampling_touches_training_rows_of_the_rarest_class_only() -> None:
    rows = [[str(i), str(i), "ab"[i % 3 == 0], ("train", "test")[i > 8]] for i in range(12)]
    drawn = oversample(rows, 3, seed=0)[len(rows) :]
    assert len(drawn) == 6
    assert all(row in rows and row[2:] == ["b", "train"] for row in drawn)


@pytest.mark.parametrize(
    ("name", "values", "slides"),
    [
        (
            "four_columns.csv",
            {"datasets": "brca", "cv_fold": 1},
            ["01a", "01b", "02", "03", "04", "05", "06"],
        ),
        ("id_label_split.csv", {"datasets": "call", "cv_fold": 1}, ["01", "02", "03", "04", "05"]),
        ("two_columns.csv", {"datasets": "bio_x", "cv_fold": 2}, [f"{i:02d}" for i in range(1, 9)]),
        ("no_split.csv", {"datasets": "mine", "cv_fold": 3}, ["01a", "01b", "02", "03", "04", "05", "06"]),
        (
            "survival_folds",
            {"datasets": "surv_x", "cv_fold": 2, "bins": "published"},
            ["01a", "01b", *(f"{i:02d}" for i in range(2, 13))],
        ),
    ],
)
def test_examples_load(name: str, values: dict[str, object], slides: list[str]) -> None:
    options = LabelOptions(csv_path=str(EXAMPLES / name), **values)  # type: ignore[arg-type]
    cohort = load_cohort(options, [f"slide-{slide}" for slide in slides])
    assert all(fold.train and fold.test for fold in cohort.folds)
    assert not any("have no row" in note or "differ" in note for note in cohort.notes)
