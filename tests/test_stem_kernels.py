"""The fused stem of a ResNet: its kernels in Triton's interpreter, on the CPU, against the four plain modules."""

from __future__ import annotations

import copy
import tempfile

import pytest
import torch
from interpreted import mend_interpreter, run_interpreted
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SIZES = ((14, 14), (10, 12), (7, 9), (1, 3))
LAST = torch.channels_last


def patches(height: int, width: int, count: int = 2) -> Tensor:
    """With a mean far from zero and a deviation far from one."""
    return (torch.randn(count, 3, height, width) * 0.3 + 4).contiguous(memory_format=LAST)


def layers(channels: int = 16) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight)  # of both signs
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        norm.bias[:3] = -10  # windows without anything positive
    return conv, norm


def plain(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    return functional.max_pool2d(functional.relu(norm(conv(x))), 3, 2, 1)


def outcome(run, x: Tensor, conv: nn.Module, norm: nn.Module) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Values, gradients of the parameters for a certain gradient of y, running statistics."""
    y = run(conv, norm, x)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype))
    gradients = [p.grad for p in (*conv.parameters(), *norm.parameters())]
    return [y.detach(), *gradients, *norm.buffers()]


def close(got: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).norm() <= tolerance * (b.double().norm() + 1e-3)


def whole_stem_equals_the_plain_modules(ops) -> None:  # type: ignore[no-untyped-def]
    for height, width in SIZES:
        x, (conv, norm) = patches(height, width), layers()
        exact = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()

        def fused(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
            y, mean, var, count, *_ = ops.stem(x, conv.weight, norm.weight, norm.bias, norm.eps, False)
            assert int(count) == x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean.detach(), 0.1)
            norm.running_var.lerp_(var.detach() * count / (count - 1), 0.1)
            return y

        close(outcome(fused, x, conv, norm), outcome(plain, x.double(), *exact), 2e-5)


def given_statistics_are_constants(ops) -> None:  # type: ignore[no-untyped-def]
    x, (conv, norm) = patches(10, 12), layers()
    norm.running_mean.normal_(3), norm.running_var.uniform_(0.5, 2)
    conv, norm = conv.eval(), norm.eval()
    exact = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()

    def fused(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        statistics = norm.running_mean, norm.running_var
        return ops.stem_fixed(x, conv.weight, *statistics, norm.weight, norm.bias, norm.eps)[0]

    close(outcome(fused, x, conv, norm), outcome(plain, x.double(), *exact), 2e-5)


def pooled(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and their places, and the same values before the maximum, by torch, of z with its own statistics."""
    from modules.stem_launch import Norm, pool

    one, zero = torch.ones(z.shape[1]), torch.zeros(z.shape[1])
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    z = z.to(dtype).contiguous(memory_format=LAST)
    y, where = pool(z, Norm(mean, var, one, zero, 1e-5))
    return y, where, functional.relu(functional.batch_norm(z, mean, var, one, zero))


def ties_go_to_the_first_maximum() -> None:
    """Few different values in half precision: nearly every window has several maxima."""
    for dtype in (torch.bfloat16, torch.float16):
        y, where, normed = pooled(torch.randint(0, 3, (2, 16, 9, 8)).float(), dtype)
        want, flat = functional.max_pool2d(normed, 3, 2, 1, return_indices=True)
        torch.testing.assert_close(y, want)
        rows, cols = flat // 8, flat % 8
        i, j = torch.arange(5)[:, None], torch.arange(4)[None, :]
        place = torch.where(want > 0, (rows - 2 * i + 1) * 3 + cols - 2 * j + 1, 9)
        assert torch.equal(where.long(), place)


def what_is_not_a_number_stays_visible() -> None:
    z = torch.randn(1, 16, 8, 8)
    z[0, 5, 3, 3] = torch.nan
    y, _, _ = pooled(z, torch.float32)
    assert torch.equal(y.isnan().flatten(2).any(-1)[0], torch.arange(16) == 5)


def module_switches_between_fused_and_plain() -> None:
    """``run_with_stem``: training, evaluation, autocast, recomputing, compiled; values of the plain path."""
    from modules import stem
    from modules.encoders import build_encoder
    from modules.model import frozen_statistics

    encoder = build_encoder("r18", pretrained=False, out_indices=(1,))
    reference = copy.deepcopy(encoder)
    assert encoder.fused_stem
    reference.fused_stem = False
    x, calls = patches(18, 18), []
    inner = stem.fused_stem
    stem.fused_stem = lambda *a: calls.append(inner(*a)) or calls[-1]

    def gradients(model: nn.Module, features: Tensor) -> list[Tensor]:
        model.zero_grad()
        features.square().sum().backward()
        return [features.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]

    stem._runs_on = lambda x: True
    close(gradients(encoder, encoder(x)), gradients(reference, reference(x)), 1e-6)  # float32 is not for it
    assert calls.pop() is None

    def again(x: Tensor) -> Tensor:
        return checkpoint(encoder, x, use_reentrant=False, context_fn=lambda: (_nothing(), frozen_statistics(encoder)))

    with torch.autocast("cpu", torch.float16):
        want = gradients(reference, reference(x))
        close(gradients(encoder, again(x)), want, 0.05)
        assert calls[-1].dtype == torch.float16
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    stem.fused_stem = inner
    with torch.autocast("cpu", torch.float16):
        close(gradients(encoder, compiled(x)), gradients(reference, reference(x)), 0.05)
    encoder.eval(), reference.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        close([encoder(x)], [reference(x)], 0.02)
    assert list(encoder.state_dict()) == list(reference.state_dict())


PATCHES = (2, 0, 3)
"""Of each of the processes that join their statistics."""


def joined_stem_equals_the_plain_modules_on_all_patches(rank: int, folder: str) -> None:
    """One of three processes, one of which has no patches; through ``fused_stem``, eagerly and compiled."""
    import torch.distributed as dist

    from modules import stem
    from modules.sync_batchnorm import JoinedBatchNorm

    prepare()
    stem._runs_on = lambda x: True
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(PATCHES))
    everything, (conv, norm) = patches(10, 12, sum(PATCHES)).half(), layers()
    exact = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    mine = slice(sum(PATCHES[:rank]), sum(PATCHES[: rank + 1]))
    compiled = torch.compile(stem.fused_stem, backend="aot_eager", fullgraph=True)
    want = exact[1](exact[0](everything.double()))
    want = functional.max_pool2d(functional.relu(want), 3, 2, 1)
    slope = torch.randn(want.shape, dtype=torch.float64)
    want.backward(slope)
    for run in (stem.fused_stem, compiled if PATCHES[rank] else stem.fused_stem):
        own_conv, own_norm = copy.deepcopy(conv), JoinedBatchNorm(copy.deepcopy(norm))
        y = run(own_conv, own_norm, everything[mine])
        assert y.shape == want[mine].shape
        y.backward(slope[mine].to(y.dtype))
        gradients = [p.grad for p in (*own_conv.parameters(), *own_norm.parameters())]
        for gradient in gradients:
            dist.all_reduce(gradient)
        close([y.detach(), *gradients], [want[mine].detach(), *(p.grad for m in exact for p in m.parameters())], 5e-3)
        close(list(own_norm.buffers()), list(exact[1].buffers()), 1e-3)
    dist.destroy_process_group()


def _nothing():  # type: ignore[no-untyped-def]
    import contextlib

    return contextlib.nullcontext()


def prepare() -> None:
    mend_interpreter()
    from modules import stem_launch, stem_triton  # noqa: F401  # the latter registers the operators

    torch.manual_seed(0)
    stem_launch.TILES.update({name: stem_launch.Tiles(16, 2, lines=2) for name in stem_launch.TILES})


def check_all() -> None:
    prepare()
    from modules import stem_launch

    whole_stem_equals_the_plain_modules(torch.ops.abmilx)
    given_statistics_are_constants(torch.ops.abmilx)
    ties_go_to_the_first_maximum()
    what_is_not_a_number_stays_visible()
    stem_launch.TILES.update({name: stem_launch.Tiles(64, 2, lines=8) for name in stem_launch.TILES})
    module_switches_between_fused_and_plain()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(joined_stem_equals_the_plain_modules_on_all_patches, (folder,), nprocs=len(PATCHES))


def test_kernels_and_gradients_equal_the_plain_modules() -> None:
    run_interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [224, 96, 50])
@pytest.mark.parametrize("compiled", [False, True])
def test_encoder_on_the_gpu_has_the_values_and_gradients_of_the_plain_one(
    dtype: torch.dtype, size: int, compiled: bool
) -> None:
    from modules.encoders import build_encoder

    torch.manual_seed(0)
    encoder = build_encoder("r18", pretrained=False).cuda()
    plain, exact = copy.deepcopy(encoder), copy.deepcopy(encoder).double()
    plain.fused_stem = exact.fused_stem = False
    x = patches(size, size, 8).cuda()
    if compiled:
        encoder.compile()

    def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", dtype, enabled=x.dtype != torch.float64):
            y = model(x)
        y.double().square().mean().backward()
        model.eval()
        with (
            torch.no_grad(),
            torch.autocast("cuda", dtype, enabled=x.dtype != torch.float64),
        ):
            return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers(), model(x)]

    want = outcome(exact, x.to(dtype).double())
    for got, usual, right in zip(outcome(encoder, x), outcome(plain, x), want, strict=True):
        error, allowed = ((a.double() - right.double()).norm() for a in (got, usual))
        assert error <= 1.2 * allowed + 1e-3 * right.double().norm() + 1e-5


if __name__ == "__main__":
    check_all()


def test_memory_for_maps_is_allocated_and_not_copied() -> None:
    """A map of the first layers has gigabytes: a copy of what nobody has written yet took an eighth of a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    launch = pytest.importorskip("modules.stem_launch", exc_type=ImportError)

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, w = patches(14, 14), torch.randn(16, 3, 7, 7)
    with Calls() as calls:
        z = launch.convolved_like(x, w)
        y, places = launch.pooled_like(z, z.dtype), launch.pooled_like(z, torch.uint8)
    assert calls.names == ["aten.empty.memory_format"] * 3
    assert z.shape == (2, 16, 7, 7)
    assert y.shape == places.shape == (2, 16, 4, 4)
    assert all(m.is_contiguous(memory_format=LAST) for m in (z, y, places))
