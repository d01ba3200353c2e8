"""What the first layers of a ResNet cost, plain and fused, alone and in a whole training step.

    python -m benchmarks.stem [errors] [kernels] [steps] [forms] [r50] [compiled] [--patches 1024] [--size 224]

* errors: of values and gradients, against float64;
* kernels: every kernel of ``modules.stem_kernels`` with several tiles, and where the memory's speed would put it; what
  comes later uses the best ones;
* steps, r50: the bare compiled training step of R18, R50 (bf16, channels-last) with and without the fused stem, what it
  keeps in memory, and evaluation;
* forms, compiled: convolution, and what follows it, in torch and ours, eager or compiled by torch.

Without a GPU it says so and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules import stem_launch as own
from modules.encoders import build_encoder
from modules.stem_triton import stem

LAST = torch.channels_last
BYTES_PER_MS = 3.0e9
"""What an H100's memory moves in a copy, roughly."""


def milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Median by device events, after two calls to warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def line(name: str, *figures: object) -> None:
    print(f"{name:58}" + "".join(f"{f:>10.3f}" if isinstance(f, float) else f"  {f}" for f in figures), flush=True)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).detach().norm() / want.double().detach().norm())


class Case:
    """One batch of patches and the parameters of a stem, bf16 and channels-last."""

    def __init__(self, patches: int, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(patches, 3, size, size, dtype=dtype, device="cuda").contiguous(memory_format=LAST)
        self.w = (torch.randn(64, 3, 7, 7, device="cuda") * 0.1).requires_grad_()
        self.weight = torch.rand(64, device="cuda").add_(0.5).requires_grad_()
        self.bias = torch.randn(64, device="cuda").requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.w, self.weight, self.bias]

    def maps(self) -> tuple[Tensor, Tensor, Tensor, own.Norm]:
        """Gradient of y, places of the maxima, z, statistics."""
        weight, bias = self.weight.detach(), self.bias.detach()
        _, mean, var, _, z, where = stem(self.x, self.w.detach(), weight, bias, 1e-5, False)
        grad = torch.randn(where.shape, device="cuda", dtype=z.dtype).contiguous(memory_format=LAST)
        return grad, where, z, own.Norm(mean, var, weight, bias, 1e-5)


def variants() -> dict[str, list[own.Tiles]]:
    """The tiles that are tried for every kernel, the current ones first; most promising kernels first."""
    t = own.Tiles
    table = {
        "weights": [t(16, 196, 8, 2), t(16, 196, 8, 3), t(16, 196, 8, 1), t(32, 98, 8, 1), t(32, 98, 8, 2)]
        + [t(64, 49, 8, 2), t(16, 196, 4, 2)],
        "convolve": [t(128, 7, 4, 1), t(128, 7, 8, 3), t(64, 14, 4, 3), t(256, 7, 8, 2), t(64, 14, 4, 1, 8)]
        + [t(128, 7, 8, 1, 8), t(128, 7, 8, 1, 4)],
        "pool": [t(8, 28, 2), t(8, 7, 2), t(16, 14, 4), t(64, 14, 8), t(4, 28, 1)],
        "reduce": [t(8, 49, 4), t(16, 14, 4), t(16, 49, 8), t(8, 49, 2)],
    }
    return {name: [own.TILES[name], *(v for v in tiles if v != own.TILES[name])] for name, tiles in table.items()}


Call = Callable[[own.Tiles], object]


def kernel_calls(case: Case) -> dict[str, tuple[float, Call]]:
    """By kernel: the ms that reading and writing its operands once would take, and a call of it."""
    grad, where, z, norm = case.maps()
    maps = grad, where, z
    sums = own.reduce_gradient(maps, norm)
    x, w = case.x, case.w.detach()
    size = {name: t.numel() * t.element_size() / BYTES_PER_MS for name, t in (("x", x), ("z", z), ("y", grad))}
    small = size["y"] * 1.5
    return {
        "convolve": (size["x"] + size["z"], lambda tiles: own.convolve(x, w, tiles)),
        "pool": (size["z"] + small, lambda tiles: own.pool(z, norm, tiles)),
        "reduce": (size["z"] + small, lambda tiles: own.reduce_gradient(maps, norm, tiles)),
        "weights": (size["x"] + size["z"] + small, lambda tiles: own.weight_gradient(x, maps, norm, sums, tiles)),
    }


def compile_all(size: int) -> None:
    """Compiles every variant on one patch, side by side."""
    calls = kernel_calls(Case(1, size))
    jobs = [(name, tiles) for name, all_tiles in variants().items() for tiles in all_tiles]

    def try_one(job: tuple[str, own.Tiles]) -> None:
        # What a tile too large raises depends on Triton's version; it is reported where it is timed.
        with contextlib.suppress(Exception):
            calls[job[0]][1](job[1])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(try_one, jobs))
    torch.cuda.synchronize()


def kernels(case: Case) -> None:
    compile_all(case.x.shape[-1])
    calls = kernel_calls(case)
    for name, all_tiles in variants().items():
        floor, call = calls[name]
        found = []
        for tiles in all_tiles:
            try:
                took = milliseconds(functools.partial(call, tiles), 5)
            except Exception as reason:  # noqa: BLE001
                line(f"  {name} {tiles}", type(reason).__name__, str(reason).splitlines()[0][:60])
                continue
            found.append((took, tiles))
            line(f"  {name} {tiles}", took)
        if found:
            took, own.TILES[name] = min(found, key=lambda pair: pair[0])  # what follows is measured with the best
            line(f"{name}: best; floor", took, floor, str(own.TILES[name]))


def convolve_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """``conv2d(x, weight, stride=2, padding=3)`` of 7 x 7 as one of 4 x 4 with stride 1 over blocks of 2 x 2 pixels.

    An eighth row and column of zeros in front of the kernel make it cover whole blocks. A block has 12 numbers, 16
    with zeros, which the matrix units take as they are; three channels they do not.

    Args:
        x: (P, 3, H, W) with even H and W.
        weight: (C, 3, 7, 7).
    """
    x = functional.pixel_unshuffle(functional.pad(x, (4, 2, 4, 2)), 2)
    kernel = functional.pixel_unshuffle(functional.pad(weight, (1, 0, 1, 0)), 2)
    zeros = (0, 0, 0, 0, 0, 4)
    x, kernel = functional.pad(x, zeros), functional.pad(kernel, zeros)
    return functional.conv2d(x.contiguous(memory_format=LAST), kernel.contiguous(memory_format=LAST))


def plain_rest(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed = functional.batch_norm(z, None, None, weight, bias, training=True)
    return functional.max_pool2d(functional.relu(normed), 3, 2, 1)


def plain_stem(x: Tensor, w: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain_rest(functional.conv2d(x, w.to(x.dtype), stride=2, padding=3), weight, bias)


def blocks_stem(x: Tensor, w: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain_rest(convolve_blocks(x, w.to(x.dtype)), weight, bias)


def own_stem(x: Tensor, w: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return stem(x, w, weight, bias, 1e-5, False)[0]


def forms(case: Case, compiled: bool) -> None:
    """Milliseconds of forward, and of forward and backward."""
    convolutions: dict[str, Callable[..., Tensor]] = {
        "7 x 7 of 3 channels": lambda x, w: functional.conv2d(x, w.to(x.dtype), stride=2, padding=3),
        "4 x 4 of 16 channels": lambda x, w: convolve_blocks(x, w.to(x.dtype)),
    }
    stems = {"plain": plain_stem, "blocks": blocks_stem, "ours": own_stem}
    how = "compiled" if compiled else "eager"

    def ready(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(form) if compiled else form

    for name, form in convolutions.items():
        line(f"convolution, {name}, {how}", *timed(ready(form), [case.x], [case.w]))
    z = functional.conv2d(case.x, case.w.detach().to(case.x.dtype), stride=2, padding=3).requires_grad_()
    line(f"norm, ReLU, pool, {how}", *timed(ready(plain_rest), [], [z, case.weight, case.bias]))
    for name, form in stems.items():
        line(f"stem: {name}, {how}", *timed(ready(form), [case.x], case.parameters))


def timed(call: Callable[..., Tensor], fixed: list[Tensor], trained: list[Tensor]) -> tuple[float, float]:
    grad = torch.randn_like(call(*fixed, *trained))

    def both() -> None:
        torch.autograd.grad(call(*fixed, *trained), trained, grad)

    return milliseconds(lambda: call(*fixed, *trained)), milliseconds(both)


def errors(patches: int, size: int) -> None:
    """Of y and the gradients of w, weight and bias, relative, with the same rounded patches."""
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(patches, size, dtype)
        exact = [p.detach().double().requires_grad_() for p in case.parameters]
        want = plain_stem(case.x.double(), *exact)
        grad = torch.randn_like(want)
        wanted = [want, *torch.autograd.grad(want, exact, grad)]
        for name, form in (("plain", plain_stem), ("blocks", blocks_stem), ("ours", own_stem)):
            got = form(case.x, *case.parameters)
            slopes = torch.autograd.grad(got, case.parameters, grad.to(dtype))
            found = [f"{error(a, b):.1e}" for a, b in zip((got, *slopes), wanted, strict=True)]
            line(f"errors {str(dtype).removeprefix('torch.')}: {name}", *found)
        again = torch.autograd.grad(own_stem(case.x, *case.parameters), case.parameters, grad.to(dtype))
        line("  ours, twice the same", str(all(torch.equal(a, b) for a, b in zip(slopes, again, strict=True))))


class Training:
    """An encoder with a linear head, its optimiser, and a batch."""

    def __init__(self, name: str, patches: int, size: int, fused: bool) -> None:
        torch.manual_seed(0)
        x = torch.randn(patches, 3, size, size, device="cuda", dtype=torch.bfloat16)
        self.x = x.contiguous(memory_format=LAST)
        self.encoder = build_encoder(name, pretrained=False).cuda()
        for parameter in self.encoder.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=LAST)
        self.encoder.fused_stem = fused
        self.head = nn.Linear(self.encoder.width, 2).cuda()
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.head.parameters()], fused=True)
        self.encoder.compile()

    def step(self) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = self.head(self.encoder(self.x)).float().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def evaluate(self) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            features: Tensor = self.encoder.forward(self.x)
        return features


def steps(name: str, patches: int, size: int, deadline: float) -> None:
    """Milliseconds of the bare step, of evaluation that is not compiled, memory, and the first loss."""
    for fused in (True, False):
        if time.perf_counter() > deadline:
            line(f"{name}, {'fused' if fused else 'plain'} stem: left out, the time is over")
            return
        torch.compiler.reset()
        training = Training(name, patches, size, fused)
        first = float(training.step().detach())
        torch.cuda.reset_peak_memory_stats()
        took = milliseconds(training.step)
        memory = torch.cuda.max_memory_allocated() / 2**30
        training.encoder.eval()
        test = milliseconds(training.evaluate)
        what = f"{name}, {patches} patches, {'fused' if fused else 'plain'} stem: step, evaluation, GiB"
        line(what, took, test, memory, f"{patches / took * 1000:.0f} patches/s", f"first loss {first:.5f}")
        del training


def main() -> int:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["errors", "kernels", "steps", "forms", "compiled"])
    parser.add_argument("--patches", type=int, default=1024)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=600, help="nothing new is begun after so many")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU, and this measures nothing else.")
        return 0
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.patches} patches of {args.size} px")
    deadline = begin + args.seconds
    parts: dict[str, Callable[[], None]] = {
        "errors": lambda: errors(16, args.size),
        "kernels": lambda: kernels(Case(args.patches, args.size)),
        "steps": lambda: steps("r18", args.patches, args.size, deadline),
        "forms": lambda: forms(Case(args.patches, args.size), compiled=False),
        "r50": lambda: steps("r50", args.patches // 2, args.size, deadline),
        "compiled": lambda: forms(Case(args.patches, args.size), compiled=True),
    }
    for name in args.parts:
        if time.perf_counter() < deadline:
            parts[name]()
            line(f"-- {name}, seconds since the start", time.perf_counter() - begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
