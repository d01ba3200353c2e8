"""The Triton kernels of A+ in Triton's interpreter, on the CPU, against the N x N form in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interpreted import mend_interpreter, run_interpreted
from torch import Tensor

TILES = ((32, 16), (16, 32))


def cases() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Q and K in both memory layouts, V, and a mask with a whole first tile absent."""
    for bags, count, heads, width in ((2, 70, 2, 16), (1, 33, 1, 32), (1, 64, 2, 16)):
        v = torch.randn(bags, heads, count)
        mask = torch.rand(bags, count) > 0.4
        mask[:, :17], mask[:, -3:] = False, True
        yield torch.randn(bags, count, heads, 2, width), v, None
        yield torch.randn(bags, count, 2, heads, width).transpose(2, 3), v, mask


def reference(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float, grad: Tensor) -> tuple[Tensor, ...]:
    a, b = qk.double().requires_grad_(), v.double().requires_grad_()
    logits = torch.einsum("bihd,bjhd->bhij", *a.unbind(3)) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    out = torch.einsum("bhij,bhj->bhi", logits.softmax(-1), b)
    out.backward(grad.double())
    assert a.grad is not None
    assert b.grad is not None
    return out.detach(), a.grad, b.grad


def kernels(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float, grad: Tensor) -> tuple[Tensor, ...]:
    from modules import attention_plus_triton as own

    queries, keys = (own.Tiles(rows, cols, 4, 1) for rows, cols in TILES)
    out, lse = own.forward(qk, v, mask, scale, queries)
    # NaN shows what no kernel wrote.
    results = torch.full_like(qk, torch.nan), torch.full_like(v, torch.nan)
    for launch, tiles in ((own.launch_queries, queries), (own.launch_keys, keys)):
        launch(grad, (qk, v, mask), (out, lse), results, (scale, tiles))
    return out, *results


def compare_all() -> None:
    torch.manual_seed(0)
    for qk, v, mask in cases():
        grad, scale = torch.randn_like(v), qk.shape[-1] ** -0.5
        got = kernels(qk, v, mask, scale, grad)
        want = reference(qk, v, mask, scale, grad)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)


def test_kernels_and_gradients_equal_the_plain_form() -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [12, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("kernel", ["torch", "flash", "memo_effi"])
def test_every_kernel_on_the_gpu_equals_the_plain_form(dtype: torch.dtype, width: int, kernel: str) -> None:
    from modules.abmilx import propagate

    torch.manual_seed(0)
    qk = torch.randn(2, 300, 2, 2, width, device="cuda", dtype=dtype, requires_grad=True)
    v = torch.randn(2, 2, 300, device="cuda", requires_grad=True)
    mask = torch.rand(2, 300, device="cuda") > 0.4
    for present in (None, mask):
        qk.grad = v.grad = None
        out, grad = propagate(qk, v, present, width**-0.5, kernel), torch.randn_like(v)
        out.backward(grad)
        want = reference(qk.detach(), v.detach(), present, width**-0.5, grad)
        for a, b in zip((out, qk.grad, v.grad), want, strict=True):
            assert (a.double() - b).norm() < (1e-5 if dtype == torch.float32 else 1e-2) * b.norm()


if __name__ == "__main__":
    mend_interpreter()
    compare_all()
