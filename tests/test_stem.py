"""Where the fused stem of a ResNet applies, and that nothing of a model changes by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from modules import stem
from modules.encoders import build_encoder
from modules.stem import fused_stem, has_standard_stem
from modules.sync_batchnorm import JoinedBatchNorm, synchronised


@pytest.fixture(scope="module")
def r18() -> nn.Module:
    torch.manual_seed(0)
    return build_encoder("r18", pretrained=False)


@pytest.mark.parametrize("size", [(14, 14), (10, 12), (2, 4)])
def test_convolution_over_blocks_is_the_convolution(size: tuple[int, int]) -> None:
    convolve_blocks = pytest.importorskip("benchmarks.stem", exc_type=ImportError).convolve_blocks
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    w = torch.randn(8, 3, 7, 7, dtype=torch.float64)
    want = functional.conv2d(x, w, stride=2, padding=3)
    torch.testing.assert_close(convolve_blocks(x, w), want, atol=1e-12, rtol=1e-12)


def test_resnet_trunks_have_the_stem_and_others_do_not() -> None:
    with torch.device("meta"):
        fused = {name: build_encoder(name, pretrained=False).fused_stem for name in ("r18", "r50", "chief", "uni")}
    assert fused == {"r18": True, "r50": True, "chief": False, "uni": False}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("conv1", nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=True)),
        ("conv1", nn.Conv2d(3, 64, 5, stride=2, padding=3, bias=False)),
        ("bn1", nn.SyncBatchNorm(64)),
        ("bn1", JoinedBatchNorm(nn.BatchNorm2d(64))),
        ("act1", nn.GELU()),
        ("maxpool", nn.MaxPool2d(2)),
        ("maxpool", nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    ],
)
def test_any_other_layer_makes_it_plain(r18: nn.Module, name: str, other: nn.Module) -> None:
    model = copy.deepcopy(r18.model)
    assert has_standard_stem(model)
    model[name] = other
    assert not has_standard_stem(model)


def test_outputs_of_several_stages_make_it_plain() -> None:
    import timm

    model = timm.create_model("resnet18", features_only=True, out_indices=(1, 3))
    assert not has_standard_stem(model)


def test_what_the_kernels_do_not_take_is_left_to_the_plain_modules(
    r18: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv, norm = r18.model.conv1, copy.deepcopy(r18.model.bn1)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    assert fused_stem(conv, norm, x) is None  # on a CPU
    monkeypatch.setattr(stem, "_runs_on", lambda x: True)
    half = x.half()
    assert stem._takes(norm, half)
    assert not stem._takes(norm, half.contiguous())
    assert not stem._takes(norm, x)
    assert not stem._takes(norm, half[:0])
    assert not stem._takes(norm, half.clone().requires_grad_())
    assert not stem._takes(copy.deepcopy(norm).half(), half)
    assert fused_stem(conv, norm, half[:1, :, :2, :2]) is None  # one pixel has no variance
    norm.momentum = None
    assert fused_stem(conv, norm, half) is None


def test_state_and_conversion_do_not_know_of_it(r18: nn.Module) -> None:
    plain = copy.deepcopy(r18)
    plain.fused_stem = False
    assert list(plain.state_dict()) == list(r18.state_dict())
    x = torch.randn(2, 3, 32, 32)
    r18.eval(), plain.eval()
    assert torch.equal(r18(x), plain(x))
    assert isinstance(synchronised(copy.deepcopy(r18)).model.bn1, JoinedBatchNorm)
