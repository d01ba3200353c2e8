"""DAttentionX under torch.compile, torch.export and ONNX, and alone in a folder with nothing else of ours."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.abmilx import DAttentionX

VARIANTS: list[dict[str, Any]] = [{}, {"mil_norm": "ln", "ffn": True}, {"attn_plus_embed_new": True}]


def head(options: dict[str, Any]) -> DAttentionX:
    torch.manual_seed(0)
    return DAttentionX(8, 3, inner_dim=16, n_heads=4, **options).eval()


def bags(batch: int, count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch)
    mask = torch.rand(batch, count, generator=g) > 0.3
    mask[:, 0] = True
    return torch.randn(batch, count, 8, generator=g), mask


def export(options: dict[str, Any]) -> torch.export.ExportedProgram:
    batch, count = torch.export.Dim("batch", max=64), torch.export.Dim("count", max=10**6)
    return torch.export.export(head(options), bags(2, 20), dynamic_shapes=({0: batch, 1: count}, {0: batch, 1: count}))


@pytest.mark.skipif(
    torch.__version__ < "2.6", reason="torch 2.5 tells compilers other strides than SDPA's gradient has"
)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_compiles_to_one_graph(options: dict[str, Any]) -> None:
    model = head(options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, mask = bags(2, 20)
    torch.testing.assert_close(compiled(x, mask), model(x, mask))
    compiled(x, mask).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_exports_with_any_number_of_bags_and_instances(options: dict[str, Any]) -> None:
    x, mask = bags(3, 50)
    torch.testing.assert_close(export(options).module()(x, mask), head(options)(x, mask))


def test_exports_to_onnx(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("onnx", reason="the onnx package is not installed")
    pytest.importorskip("onnxscript", reason="the onnxscript package is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the onnxruntime package is not installed")
    path = tmp_path / "abmilx.onnx"
    torch.onnx.export(export({"mil_norm": "ln", "ffn": True}), dynamo=True).save(str(path))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x, mask = bags(3, 50)
    names = [i.name for i in session.get_inputs()]
    (logits,) = session.run(None, dict(zip(names, (x.numpy(), mask.numpy()), strict=True)))
    want = head({"mil_norm": "ln", "ffn": True})(x, mask).detach()
    torch.testing.assert_close(torch.from_numpy(logits), want, atol=1e-5, rtol=1e-4)


def test_works_when_copied_alone(tmp_path: pathlib.Path) -> None:
    source = pathlib.Path(__file__).parents[1] / "modules" / "abmilx.py"
    shutil.copy(source, tmp_path / "abmilx.py")
    code = "import torch, abmilx; print(tuple(abmilx.DAttentionX(8, 3)(torch.randn(5, 8)).shape))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 3)"
