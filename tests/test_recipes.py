"""The published recipes: every file parses without a fault and gives the published values."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.errors import UserError
from utils.options import ALIASES, FIELDS, parse

ROOT = Path(__file__).resolve().parent.parent

KEYS = ("model", "num_epoch", "max_epoch", "patient", "batch_size", "same_psize", "mul_scale_ratio")
KEYS += ("opt", "lr", "weight_decay", "warmup_epochs")
PUBLISHED = {
    "r18_panda": ("e2e_r18_abmilx", 200, 120, 20, 8, 128, 4, "adam", 2e-4, 1e-5, 0),
    "r50_panda": ("e2e_r50v2_abmilx", 200, 200, 20, 4, 128, 4, "adamw", 2e-4, 1e-2, 0),
    "r18_brca_subtyping": ("e2e_r18_abmilx", 75, 50, 10, 3, 512, 4, "adamw", 8e-5, 0, 10),
    "r50_brca_subtyping": ("e2e_r50v2_abmilx", 125, 125, 10, 4, 128, 3, "adamw", 8e-5, 0, 10),
    "r18_brca_survival": ("e2e_r18_abmilx", 30, 20, 10, 2, 768, 10, "adamw", 8e-5, 5e-2, 5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_end_to_end_recipes_have_the_published_values(name: str) -> None:
    config, _ = parse(["-c", str(ROOT / f"config/e2e/{name}.yaml")])
    values = config.flat()
    assert tuple(values[k] for k in KEYS) == PUBLISHED[name]
    shared = {
        "seed": 2021,
        "img_size": 256,
        "crop_size": 224,
        "act": "gelu",
        "mil_bias": False,
        "mil_norm": "ln",
    }
    assert {k: values[k] for k in shared} == shared
    on = (
        "image_input",
        "mul_scale_input",
        "channels_last",
        "abx_attn_plus",
        "amp",
        "sync_bn",
        "pad_enc_bs",
    )
    assert all(values[k] is True for k in on)


@pytest.mark.parametrize("path", sorted((ROOT / "config").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_parses_and_can_be_overridden(path: Path) -> None:
    config, _ = parse(["-c", str(path), "--lr=0.5", "--no_amp"])
    assert config.train.lr == 0.5
    assert config.train.amp is False


def test_published_defaults_of_options_that_are_refused_change_nothing() -> None:
    given = ["--bootstrap_mode=test", "--attn_type=sa", "--epoch_start=0", "--same_psize_ratio=0.0", "--local-rank=1"]
    config, notes = parse([*given, "--model_ema=false"])
    assert config == parse([])[0]
    assert len(notes) == len(given) + 1
    for other in ("--bootstrap_mode=val", "--attn_type=rmsa", "--epoch_start=3", "--model_ema"):
        with pytest.raises(UserError, match=other.lstrip("-").split("=")[0]):
            parse([other])


def test_a_published_run_without_bootstrap() -> None:
    assert parse(["--bootstrap_mode=none"])[0].eval.num_bootstrap == 0


@pytest.mark.parametrize("recipe", ["e2e/r18_brca_survival", "feat/fm_survival"])
def test_the_published_survival_recipes_train_on_the_published_bins(recipe: str) -> None:
    assert parse(["-c", str(ROOT / f"config/{recipe}.yaml")])[0].data.surv_bins == "published"


@pytest.mark.parametrize(("published", "ours"), [("no_train", "test"), ("only_train", "no_test"), ("all", "all")])
def test_published_script_modes(published: str, ours: str) -> None:
    config, _ = parse([f"--script_mode={published}"])
    assert config.run.script_mode == ours


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lerning_rate=1", "Did you mean 'lr'?"),
        ("--learning-rate=1", "Did you mean 'lr'?"),
        ("--epochs=3", "Did you mean 'num_epoch'?"),
        ("--batch=3", "Did you mean 'batch_size'?"),
        ("--output=x", "Did you mean 'output_path'?"),
        ("--data_path=x", "Did you mean 'dataset_root'?"),
        ("--csv=x", "Did you mean 'csv_path'?"),
        ("--dropot=1", "Did you mean 'dropout'?"),
        ("--gpus=2", "train_dist.sh"),
    ],
)
def test_options_of_other_programs_lead_to_ours(given: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([given])
    assert meant in str(caught.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("--max_patch_train=-3", "max_patch_train is -3, but must be at least 1"),
        ("--attn_dropout=2", "attn_dropout is 2.0, but must be at most 1"),
        ("--ffn_ratio=-1", "ffn_ratio is -1.0, but must be above 0"),
        ("--mm=1", "mm is 1.0, but must be below 1"),
        ("--lr=inf", "'inf' is not a number"),
        ("--main_alpha=nan", "'nan' is not a number"),
        ("--batch_size=inf", "'inf' is not a whole number"),
        ("--batch_size=2.5", "'2.5' is not a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused_with_their_limit(given: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        parse([given])
    assert sentence in str(caught.value)


def test_whole_numbers_stay_exact() -> None:
    config, _ = parse(["--seed=9007199254740993", "--num_epoch=2e1", "--patient=3.0"])
    assert (config.train.seed, config.train.num_epoch, config.train.patient) == (9007199254740993, 20, 3)


def test_yaml_that_is_no_option_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text("2: 2\non: 3\n", encoding="utf-8")
    (tmp_path / "latin.yaml").write_bytes("title: Übung\n".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        parse(["-c", f"{tmp_path / 'keys.yaml'},{tmp_path / 'latin.yaml'}"])
    for part in ("there is no option '2'", "there is no option 'True'", "latin.yaml: cannot be read as YAML in UTF-8"):
        assert part in str(caught.value)


def test_aliases_are_no_options_and_mean_some() -> None:
    assert not set(ALIASES) & set(FIELDS)
    assert set(ALIASES.values()) <= set(FIELDS)


def test_an_option_without_its_value_is_one_sentence() -> None:
    with pytest.raises(UserError, match="argument --lr: expected one argument"):
        parse(["--lr"])
