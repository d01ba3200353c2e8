"""Encoder and head joined: every head of the registry, bags of unequal length, chunks, frozen encoders."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import modules.heads  # noqa: F401  (fills the registry)
from modules.encoders import build_encoder
from modules.heads import build_mil
from modules.listing import listing
from modules.model import SlideModel, bare_name, pad
from modules.registry import encoders, mils
from utils.config import ModelConfig
from utils.errors import UserError

OPTIONS = ModelConfig(inner_dim=32, n_heads=2, n_layers=1, act="gelu", dropout=0.0)


def model_of(head: str, chunk: int = 512) -> SlideModel:
    torch.manual_seed(0)
    encoder = build_encoder("timm:test_convnext", pretrained=False)
    return SlideModel(build_mil(head, encoder.width, 3, OPTIONS), encoder, chunk)


@pytest.mark.parametrize("head", mils.names())
def test_every_head_trains_end_to_end_on_bags_of_unequal_length(head):
    model = model_of(head)
    patches, sizes = torch.randn(9, 3, 32, 32), [4, 2, 3]
    target = torch.tensor([0, 2, 1])
    logits, aux = model(patches, sizes, None, target, nn.functional.cross_entropy)
    assert logits.shape == (3, 3)
    loss = nn.functional.cross_entropy(logits, target) + (0 if aux is None else aux)
    loss.backward()
    first = next(model.encoder.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_chunks_of_the_encoder_change_nothing_without_batch_statistics():
    whole, parts = model_of("abmilx").eval(), model_of("abmilx", chunk=2).eval()
    patches = torch.randn(7, 3, 32, 32)
    torch.testing.assert_close(whole(patches, [7])[0], parts(patches, [7])[0])


def test_patches_that_are_not_kept_do_not_reach_the_head():
    model = model_of("abmilx").eval()
    patches = torch.randn(6, 3, 32, 32)
    keep = torch.tensor([True, True, False, True, True, False])
    some, _ = model(patches, [3, 3], keep)
    alone, _ = model(patches[keep], [2, 2])
    torch.testing.assert_close(some, alone)


def test_a_frozen_encoder_stays_as_it_is():
    encoder = build_encoder("timm:test_resnet", pretrained=False)
    model = SlideModel(build_mil("abmilx", encoder.width, 2, OPTIONS), encoder, freeze_encoder=True).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    logits, _ = model(torch.randn(4, 3, 32, 32), [2, 2])
    logits.sum().backward()
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


def test_pad_and_mask_say_which_instances_exist():
    x, mask = pad(torch.arange(5.0).view(5, 1), [2, 3])
    assert x[..., 0].tolist() == [[0, 1, 0], [2, 3, 4]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    assert pad(torch.zeros(4, 1), [2, 2])[1] is None


def test_prefixes_of_wrappers_are_removed():
    assert bare_name("module.encoder._orig_mod.model.conv1.weight") == "encoder.model.conv1.weight"
    assert bare_name("_orig_mod.module.mil.proj.weight") == "mil.proj.weight"
    assert bare_name("encoder.model.mixer.module.0.weight") == "encoder.model.mixer.module.0.weight"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_heads": 7}, "abmilx: inner_dim 32 is not a multiple"),
        ({"n_heads": 0}, "abmilx: inner_dim 32 is not a multiple"),
        ({"inner_dim": 0}, "inner_dim is 0"),
        ({"dropout": 2.0}, "dropout 2.0"),
    ],
)
def test_unfit_options_of_a_head_are_the_users_fault(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build_mil("abmilx", 8, 2, replace(OPTIONS, **changes))


def test_an_encoder_that_needs_two_patches_says_so() -> None:
    class Squeezing(nn.Module):
        width = 4

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.mean((2, 3), keepdim=True)).flatten(1)

    model = SlideModel(build_mil("meanmil", 3, 2, OPTIONS), Squeezing())
    model(torch.rand(2, 3, 4, 4), [2])
    with pytest.raises(UserError, match="cannot train on a step of one patch"):
        model(torch.rand(1, 3, 4, 4), [1])
    model.eval()
    model(torch.rand(1, 3, 4, 4), [1])


def test_the_list_names_every_encoder_and_head():
    text = listing()
    assert all(f"\n  {name} " in text for name in [*encoders.names(), *mils.names()])


def test_usual_numbers_of_patches_keep_their_graphs_when_others_have_come():
    used, made = [], []

    def backend(graph, example):
        number = len(made)
        made.append(any(isinstance(e, torch.SymInt) for e in example))

        def run(*args):
            used.append(number)
            return graph(*args)

        return run

    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = SlideModel(nn.Identity(), encoder, chunk=8).train()
    model.compile_encoder(backend=backend, fullgraph=True)
    sizes = [6, 5, 8, 6, 4, 8, 6, 7]
    for size in sizes:
        patches = torch.randn(size, 3, 16, 16)
        torch.testing.assert_close(model.encode(patches), encoder(patches))
    assert [made[number] for number in used] == [size not in (6, 8) for size in sizes]
    assert len(made) == 3
    assert set(model.state_dict()) == {f"encoder.{name}" for name in encoder.state_dict()}
