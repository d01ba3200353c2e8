"""Every recipe runs as it is on a tiny cohort, shortened by options only; the published commands parse and build."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import SIDE_PX, write_store

import main
from engine.setup import build_model, prepare
from utils.options import parse

ROOT = Path(__file__).resolve().parent.parent
PATIENTS = 18
WIDTH = 1024

SHORT = (
    "--num_epoch=1",
    "--num_workers=0",
    "--num_workers_test=0",
    "--num_bootstrap=10",
    "--batch_size=2",
    "--device=cpu",
)
SMALL = (*SHORT, f"--img_size={SIDE_PX}", f"--crop_size={SIDE_PX}", "--same_psize=4", "--no_enc_pt")
"""The cohort's patches are small, and ImageNet weights may be out of reach."""

CLASSES = {
    "panda": ("0", "1", "2", "3", "4", "5"),
    "brca": ("IDC", "ILC"),
    "nsclc": ("LUAD", "LUSC"),
    "call": ("normal", "tumor"),
    "ucsb": ("benign", "malignant"),
}

RECIPES = {
    "e2e/r18_panda": "panda",
    "e2e/r50_panda": "panda",
    "e2e/r18_brca_subtyping": "brca",
    "e2e/r50_brca_subtyping": "brca",
    "e2e/r18_brca_survival": "surv_brca",
    "e2e/r18_nsclc": "nsclc",
    "e2e/r18_camelyon": "call",
    "e2e/r18_luad_survival": "surv_luad",
    "e2e/r18_blca_survival": "surv_blca",
    "e2e/r18_ucsb": "ucsb",
    "feat/fm_panda": "panda",
    "feat/fm_subtyping": "brca",
    "feat/fm_survival": "surv_brca",
}
"""Recipe -> the data set that it is for."""


@dataclass(frozen=True)
class World:
    """Stores, features and label files of one cohort, for every data set."""

    folder: Path

    def labels(self, datasets: str) -> Path:
        """The label csv of a data set, or the folder of its folds; as published only for BRCA survival."""
        return self.folder / ("folds" if datasets == "surv_brca" else f"{datasets}.csv")

    def options(self, recipe: str, out: Path) -> list[str]:
        """The command line of a recipe on this cohort."""
        datasets = RECIPES[recipe]
        own = [f"-c={ROOT / 'config' / recipe}.yaml", f"--datasets={datasets}", f"--csv_path={self.labels(datasets)}"]
        own += [f"--output_path={out}"]
        if recipe.startswith("feat/"):
            return [*own, *SHORT, f"--dataset_root={self.folder / 'features'}", "--model=abmil"]
        roots = [f"--dataset_root={self.folder / 'high.lmdb'}", f"--dataset_sub_root={self.folder / 'low.lmdb'}"]
        return [*own, *SMALL, *roots, *(["--cv_fold=2"] if datasets == "ucsb" else [])]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    slides = {f"P{p:02d}": p % 2 for p in range(PATIENTS)}
    write_store(folder / "high.lmdb", slides, dict.fromkeys(slides, 4), seed=1)
    write_store(folder / "low.lmdb", slides, dict.fromkeys(slides, 2), seed=2)
    (folder / "features" / "pt_files").mkdir(parents=True)
    for slide in slides:
        torch.save(torch.randn(5, WIDTH), folder / "features" / "pt_files" / f"{slide}.pt")
    splits = ["train"] * 8 + ["val"] * 4 + ["test"] * 6
    for name, classes in CLASSES.items():
        rows = [(s, s, classes[p % len(classes)], splits[p]) for p, s in enumerate(slides)]
        write_csv(folder / f"{name}.csv", ("case", "slide", "label", "fold"), rows)
    for k in range(3):
        held = [
            (s, f"{5.5 + 3 * p:.1f}", str(int(p % 5 > 0)), "test" if p % 3 == k else "train")
            for p, s in enumerate(slides)
        ]
        write_csv(folder / "folds" / f"fold_{k}.csv", ("ID", "Event", "Status", "Split"), held)
    followed = [(s, f"{5.5 + 3 * p:.1f}", str(int(p % 5 > 0))) for p, s in enumerate(slides)]
    for name in ("surv_luad", "surv_blca"):
        write_csv(folder / f"{name}.csv", ("ID", "Event", "Status"), followed)
    return World(folder)


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def test_every_recipe_is_run_here() -> None:
    """The demonstration's recipe belongs to the demonstration, ablations are layers over these."""
    files = {f"{p.parent.name}/{p.stem}" for room in ("e2e", "feat") for p in (ROOT / "config" / room).glob("*.yaml")}
    assert files == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_unmodified(world: World, tmp_path: Path, recipe: str) -> None:
    assert main.main(world.options(recipe, tmp_path)) == 0
    found = json.loads((tmp_path / "default" / "default" / "results.json").read_text())
    datasets = RECIPES[recipe]
    survival = datasets.startswith("surv")
    assert found["task"] == ("survival" if survival else "classification")
    assert survival or tuple(found["classes"]) == CLASSES[datasets]
    assert len(found["folds"]) == {"surv": 3, "ucsb": 2}.get(datasets[:4], 3 if recipe == "feat/fm_subtyping" else 1)
    metric = "c_index" if survival else "accuracy_macro" if datasets == "panda" else "auc"
    assert found["selection"]["metric"] == metric
    for fold in found["folds"]:
        for result in fold["test"].values():
            assert 0 <= result["metrics"]["c_index" if survival else "accuracy_micro"]["value"] <= 1
    chosen = found["selection"]["split"]
    if recipe in ("e2e/r18_brca_subtyping", "e2e/r50_brca_subtyping", "e2e/r18_brca_survival"):
        assert chosen == ["test"]
    elif recipe == "e2e/r18_ucsb":
        assert chosen == ["none"]
    elif recipe.startswith("e2e/"):
        assert chosen == ["val"]


ABLATIONS = sorted(p.stem for p in (ROOT / "config/ablation").glob("*.yaml"))


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_one_option_and_build(world: World, tmp_path: Path, name: str) -> None:
    base = "e2e/r18_brca_subtyping"
    words = world.options(base, tmp_path)
    plain, _ = parse(words)
    words[0] += f",{ROOT / 'config/ablation' / name}.yaml"
    config, _ = parse(words)
    changed = {k for k, v in config.flat().items() if v != plain.flat()[k]}
    assert len(changed) == (0 if name == "no_ffn" else 1)
    build_model(prepare(config), 2, 0)


README = {
    "panda": """--datasets=panda --project=MyProjectName
        --dataset_root=$PATH_TO_HIGH_LEVEL_DATA --dataset_sub_root=$PATH_TO_LOW_LEVEL_DATA
        --csv_path=labels/panda.csv --model=e2e_r18_abmilx
        --output_path=results/panda_e2e_r18_abmilx -c=config/e2e/r18_panda.yaml
        --title=r18_panda_e2e_abmilx --wandb""",
    "brca": """--datasets=brca --project=MyProjectName
        --dataset_root=$PATH_TO_HIGH_LEVEL_DATA --dataset_sub_root=$PATH_TO_LOW_LEVEL_DATA
        --csv_path=labels/subtyping_tcga_brca_resample.csv --model=e2e_r18_abmilx
        --output_path=results/brca_subtyping_e2e_r18_abmilx -c=config/e2e/r18_brca_subtyping.yaml
        --title=r18_brca_subtyping_e2e_abmilx --wandb""",
    "surv_brca": """--datasets=surv_brca --project=MyProjectName
        --dataset_root=$PATH_TO_HIGH_LEVEL_DATA --dataset_sub_root=$PATH_TO_LOW_LEVEL_DATA
        --csv_path=labels/survival_tcga_brca_3fold --model=e2e_r18_abmilx
        --output_path=results/brca_survival_e2e_r18_abmilx -c=config/e2e/r18_brca_survival.yaml
        --title=r18_brca_survival_e2e_abmilx --wandb""",
    "features": """--datasets=panda --project=MyProjectName
        --output_path=results/panda_feat_abmil --dataset_root=$PATH_TO_FEATURES_DIRECTORY
        --csv_path=labels/panda.csv --model=abmil -c=config/feat/fm_panda.yaml
        --title=panda_feat_abmil --wandb""",
}
"""What stands after ``train_dist.sh 2`` and ``train.sh`` in the published README."""


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    return


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("name", README)
def test_the_published_commands_parse_and_build(world: World, name: str) -> None:
    """The paths stand for what the user has; nothing else is changed but the size of the patches."""
    datasets = "panda" if name == "features" else name
    paths = {
        "$PATH_TO_HIGH_LEVEL_DATA": world.folder / "high.lmdb",
        "$PATH_TO_LOW_LEVEL_DATA": world.folder / "low.lmdb",
        "$PATH_TO_FEATURES_DIRECTORY": world.folder / "features",
        "labels/panda.csv": world.labels("panda"),
        "labels/subtyping_tcga_brca_resample.csv": world.labels("brca"),
        "labels/survival_tcga_brca_3fold": world.labels("surv_brca"),
    }
    text = README[name]
    parse(shlex.split(text))
    for placeholder, path in paths.items():
        text = text.replace(placeholder, str(path))
    small = [] if name == "features" else [f"--img_size={SIDE_PX}", "--no_enc_pt"]
    config, _ = parse([*shlex.split(text), *small])
    assert config.run.wandb
    setup = prepare(config)
    assert setup.cohort.n_classes == {"panda": 6, "brca": 2, "surv_brca": 4}[datasets]
    model, _ = build_model(setup, setup.cohort.n_classes, 0)
    assert (model.encoder is None) == (name == "features")
