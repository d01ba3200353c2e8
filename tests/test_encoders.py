"""Encoders: what they compute, which weights they take and refuse, and how models are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modules import encoder_weights
from modules.encoders import Encoder, build_encoder, load_encoder_weights
from modules.names import parse_model_name
from modules.registry import UnknownNameError, encoders
from utils.errors import UserError

DATA = Path(os.environ.get("ABMILX_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
WIDTHS = {"r18": 256, "r18a": 512, "r50": 1024, "r50v2": 1024, "uni": 1024, "chief": 768, "gigap": 1536}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def r18() -> Encoder:
    torch.manual_seed(0)
    return build_encoder("r18", pretrained=False).eval()


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_every_registered_encoder_gives_its_width(name: str) -> None:
    assert sorted(WIDTHS) == encoders.names()
    with torch.device("meta"):
        encoder = build_encoder(name, pretrained=False)
        assert encoder(torch.empty(2, 3, 224, 224)).shape == (2, WIDTHS[name])
    assert encoder.width == WIDTHS[name]
    assert (encoder.mean, encoder.std) == IMAGENET
    assert all(key.startswith("model.") for key in encoder.state_dict())


def test_parameter_counts_of_the_paper(r18: Encoder) -> None:
    assert sum(p.numel() for p in r18.parameters()) == 2_782_784  # 2.78 M, paper.md 3.2
    with torch.device("meta"):
        r50 = build_encoder("r50", pretrained=False)
    assert sum(p.numel() for p in r50.parameters()) == 8_543_296  # 8.54 M


def test_feature_is_the_mean_over_positions_of_the_third_stage(r18: Encoder) -> None:
    x = torch.randn(2, 3, 64, 64)
    m = r18.model
    y = m.maxpool(m.act1(m.bn1(m.conv1(x))))
    y = m.layer3(m.layer2(m.layer1(y)))
    torch.testing.assert_close(r18(x), y.flatten(2).mean(-1))


def test_normalisation_comes_from_the_models_own_configuration() -> None:
    encoder = build_encoder("timm:vit_tiny_patch16_224", pretrained=False, depth=1)
    assert (encoder.mean, encoder.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "timm:convnext_atto.d2_in1k"])
def test_any_timm_model_tells_its_true_width(name: str) -> None:
    encoder = build_encoder(name, pretrained=False).eval()
    assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, encoder.width)


def test_options_of_one_encoder_do_not_reach_the_next() -> None:
    small = build_encoder("r18", pretrained=False, out_indices=(2,))
    assert (small.width, build_encoder("r18", pretrained=False).width) == (128, 256)


def test_channels_last_and_compiled_give_the_same_features(r18: Encoder) -> None:
    x = torch.randn(2, 3, 32, 32)
    want = r18(x)
    last = r18.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), want, atol=1e-5, rtol=1e-4)
    compiled = torch.compile(r18, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want, atol=1e-5, rtol=1e-4)


class TestLoading:
    @pytest.fixture
    def weights(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        other = build_encoder("r18", pretrained=False).model
        return {k: v + 1 if v.is_floating_point() else v for k, v in other.state_dict().items()}

    @pytest.fixture
    def encoder(self) -> Encoder:
        return build_encoder("r18", pretrained=False)

    def check(self, encoder: Encoder, weights: dict[str, Tensor]) -> None:
        for name, value in encoder.model.state_dict().items():
            assert torch.equal(value, weights[name]), name

    @pytest.mark.parametrize(
        "prefix", ["", "module.", "_orig_mod.", "encoder.", "model.", "resnet.", "module._orig_mod.encoder.model."]
    )
    @pytest.mark.parametrize("container", [None, "model", "teacher", "state_dict"])
    def test_prefixes_and_containers(
        self, encoder: Encoder, weights: dict[str, Tensor], tmp_path: Path, prefix: str, container: str | None
    ) -> None:
        named = {prefix + k: v for k, v in weights.items()}
        torch.save({container: named, "epoch": 3} if container else named, tmp_path / "w.pt")
        report = load_encoder_weights(encoder, tmp_path / "w.pt")
        assert (len(report.loaded), report.missing, report.unexpected) == (len(weights), (), ())
        self.check(encoder, weights)

    def test_safetensors_and_what_is_left_over(
        self, encoder: Encoder, weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        del weights["conv1.weight"]
        save_file(weights | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
        report = load_encoder_weights(encoder, tmp_path / "w.safetensors")
        assert report.missing == ("conv1.weight",)
        assert report.unexpected == ("fc.weight",)
        assert "1 missing (conv1.weight)" in str(report)

    def test_a_folder_means_the_best_file_of_the_fold(
        self, encoder: Encoder, weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        torch.save(weights, tmp_path / "fold_2_model_best.pt")
        load_encoder_weights(encoder, tmp_path, fold=2)
        self.check(encoder, weights)
        with pytest.raises(UserError, match="fold_1_model_best.pt: there is no such file"):
            load_encoder_weights(encoder, tmp_path, fold=1)
        with pytest.raises(UserError, match="no fold is given"):
            load_encoder_weights(encoder, tmp_path)

    def test_the_head_of_an_end_to_end_checkpoint_is_left_alone(
        self, encoder: Encoder, weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        whole = {f"module.encoder.model.{k}": v for k, v in weights.items()} | {
            "module.mil.proj.weight": torch.zeros(1)
        }
        torch.save({"model": whole}, tmp_path / "w.pt")
        report = load_encoder_weights(encoder, tmp_path / "w.pt")
        assert report.unexpected == ()
        self.check(encoder, weights)

    def test_a_file_that_matches_nothing_is_refused(self, encoder: Encoder, tmp_path: Path) -> None:
        torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"none of its 1 tensors \(blocks.0.attn.qkv.weight\)"):
            load_encoder_weights(encoder, tmp_path / "w.pt")

    def test_other_shapes_are_listed_and_nothing_is_loaded(
        self, encoder: Encoder, weights: dict[str, Tensor], tmp_path: Path
    ) -> None:
        before = encoder.model.state_dict()["bn1.weight"].clone()
        torch.save(weights | {"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"conv1.weight \(8, 3, 7, 7\) instead of \(64, 3, 7, 7\)"):
            load_encoder_weights(encoder, tmp_path / "w.pt")
        assert torch.equal(encoder.model.state_dict()["bn1.weight"], before)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_broken_files_are_refused(self, encoder: Encoder, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"w{suffix}"
        path.write_bytes(b"not a checkpoint at all")
        with pytest.raises(UserError, match="cannot be read as tensors alone"):
            load_encoder_weights(encoder, path)

    def test_a_file_that_would_run_code_is_refused(self, encoder: Encoder, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, (f"touch {tmp_path}/ran",)

        torch.save({"model": Evil()}, tmp_path / "w.pt")
        with pytest.raises(UserError, match="cannot be read as tensors alone"):
            load_encoder_weights(encoder, tmp_path / "w.pt")
        assert not (tmp_path / "ran").exists()

    def test_older_swin_names_load_into_chief(self, tmp_path: Path) -> None:
        chief = build_encoder("chief", pretrained=False)
        old = {}
        for name, value in chief.model.state_dict().items():
            stage = name.split(".")[1] if ".downsample." in name else None
            name = name.replace(f"layers.{stage}.", f"layers.{int(stage) - 1}.") if stage else name
            old[name] = value + 1 if value.is_floating_point() else value
        old["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
        torch.save({"model": old}, tmp_path / "w.pth")
        report = load_encoder_weights(chief, tmp_path / "w.pth")
        assert (report.missing, report.unexpected) == ((), ())

    def test_the_published_trunk_loads_fully(self, encoder: Encoder) -> None:
        path = DATA / "weights" / "resnet18_imagenet_trunk.safetensors"
        if not path.is_file():
            pytest.skip(f"{path} is absent; set ABMILX_DATA")
        report = load_encoder_weights(encoder, path)
        assert (len(report.loaded), report.missing, report.unexpected) == (90, (), ())


class TestWithoutWeights:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(encoder_weights, "_reachable", lambda url: False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.delenv("UNI_CKPT_PATH", raising=False)

    @pytest.mark.parametrize("name", ["r18", "uni", "chief", "gigap", "timm:resnet18"])
    def test_a_sentence_names_the_two_ways_out(self, name: str) -> None:
        with pytest.raises(UserError, match="cannot be had.*--enc_init=FILE.*--no_enc_pt"):
            build_encoder(name)

    def test_uni_takes_the_file_of_its_environment_variable(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        small = {"depth": 1, "embed_dim": 24, "num_heads": 2}
        torch.manual_seed(1)
        source = build_encoder("uni", pretrained=False, **small)
        torch.save(source.model.state_dict(), tmp_path / "uni.bin")
        monkeypatch.setenv("UNI_CKPT_PATH", str(tmp_path / "uni.bin"))
        loaded = build_encoder("uni", **small)
        assert torch.equal(loaded.model.cls_token, source.model.cls_token)


@pytest.mark.parametrize("name", ["r19", "timm:resnet17"])
def test_unknown_encoders_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match=name.removeprefix("timm:")):
        build_encoder(name, pretrained=False)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("abmilx", (None, "abmilx")),
        ("clam_sb", (None, "clam_sb")),
        ("e2e_r18_abmilx", ("r18", "abmilx")),
        ("e2e_r50v2_clam_sb", ("r50v2", "clam_sb")),
        ("e2e_timm:convnext_tiny_abmilx", ("timm:convnext_tiny", "abmilx")),
        ("e2e_timm:vit_tiny_patch16_224.augreg_in21k_clam_mb", ("timm:vit_tiny_patch16_224.augreg_in21k", "clam_mb")),
    ],
)
def test_model_names(name: str, parts: tuple[str | None, str]) -> None:
    assert parse_model_name(name) == parts


@pytest.mark.parametrize(
    ("name", "hint"), [("abmlix", "'abmilx'"), ("e2e_r18_abmlx", "'e2e_r18_abmilx'"), ("e2e_timm:_abmil", "Heads: ")]
)
def test_unknown_model_names_get_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=hint):
        parse_model_name(name)
