"""The torch operators around the Triton kernels of A+, without a GPU: derivatives, tracing, and which one is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from modules import abmilx

own = pytest.importorskip("modules.attention_plus_triton", reason="no Triton for it", exc_type=ImportError)
SCALE = 0.3


def probabilities(qk: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, m, N, N) and the base-2 logarithm of the row sums."""
    logits = torch.einsum("bihd,bjhd->bhij", *qk.unbind(3)) * SCALE
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    return logits.softmax(-1), logits.logsumexp(-1) / math.log(2)


def forward(qk: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    p, lse = probabilities(qk, mask)
    return (p @ v.unsqueeze(-1)).squeeze(-1), lse


def backward(
    grad: Tensor, qk: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    p, _ = probabilities(qk, mask)
    slope = p * (v[:, :, None, :] - out.unsqueeze(-1)) * grad.unsqueeze(-1)
    queries = scale * torch.einsum("bhij,bjhd->bihd", slope, qk[..., 1, :])
    keys = scale * torch.einsum("bhij,bihd->bjhd", slope, qk[..., 0, :])
    return torch.stack((queries, keys), 3), (grad.unsqueeze(-2) @ p).squeeze(-2)


own.attention_plus.register_kernel("cpu")(forward)
own.attention_plus_backward.register_kernel("cpu")(backward)


def inputs(masked: bool) -> tuple[Tensor, Tensor, Tensor | None, float]:
    torch.manual_seed(0)
    qk = torch.randn(2, 6, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 6, [True, False] * 3]) if masked else None
    return qk, v, mask, SCALE


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_derivatives_of_the_output(masked: bool) -> None:
    """By finite differences: what the forward pass keeps is what the backward pass takes it for."""
    qk, v, mask, scale = inputs(masked)
    assert torch.autograd.gradcheck(lambda a, b: own.attention_plus(a, b, mask, scale)[0], (qk, v))


def test_the_operator_is_traced_as_it_runs() -> None:
    qk, v, mask, scale = inputs(True)
    single = qk.detach().float().requires_grad_(), v.detach().float().requires_grad_()
    results = torch.library.opcheck(own.attention_plus, (*single, mask, scale), raise_exception=False)
    assert list(results.values()) == ["SUCCESS"] * len(results)


class Recorder(TorchDispatchMode):
    """Notes the names of our operators that run below it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "abmilx":
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "width", "chosen"),
    [
        (torch.bfloat16, 64, ["attention_plus"]),
        (torch.float16, 24, ["attention_plus"]),
        (torch.float32, 64, []),
        (torch.bfloat16, 256, []),
    ],
)
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 aborts at pretended CUDA tensors without a GPU")
def test_our_operator_takes_half_precision_and_heads_up_to_128(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, chosen: list[str], needs_grad: bool
) -> None:
    monkeypatch.setattr(abmilx, "_own_kernel_width", lambda: max(own.PLANS))
    monkeypatch.setattr(abmilx, "_fused", lambda qkv, *rest: qkv[2])
    with FakeTensorMode(), Recorder() as recorder:
        qk = torch.empty(1, 100, 2, 2, width, device="cuda", dtype=dtype, requires_grad=needs_grad)
        v = torch.empty(1, 2, 100, device="cuda")
        out = abmilx.propagate(qk, v, None, SCALE)
    assert recorder.names == chosen
    assert out.shape == v.shape
