"""Time and memory of A+ and of the whole DAttentionX on a CUDA device, and their values against float64.

    python benchmarks/abmilx_memory.py [check] [check_model] [tiles] [kernels] [lengths] [model]    (all by default)

Without a GPU it compares the whole head with the published N x N form on the CPU, in float32. The bags are
random features of width 1024, 8 heads of 64, as in docs/decisions/abmilx-attention-kernel.md.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modules import abmilx
from modules import attention_plus_triton as own
from modules.abmilx import DAttentionX

HEADS, WIDTH, INPUT = 8, 64, 1024
HALF = (torch.bfloat16, torch.float16)


def milliseconds(work: Callable[[], object], budget_ms: float = 400.0) -> float:
    """Median time of ``work`` by device events, after a warm-up."""
    work()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < 30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def peak_gib(work: Callable[[], object]) -> float:
    """Most memory allocated at once while ``work`` runs, inputs and weights included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def random_qkv(shape: tuple[int, ...], dtype: torch.dtype, wide: bool = False) -> tuple[Tensor, Tensor]:
    """Q and K (B, N, m, 2, d) in either memory layout, and V (B, m, N)."""
    bags, count, heads, width = shape
    qk = torch.randn(bags, count, *((2, heads) if wide else (heads, 2)), width, device="cuda", dtype=dtype)
    return (qk.transpose(2, 3) if wide else qk), torch.randn(bags, heads, count, device="cuda")


def check() -> None:
    print("\n# relative error against float64: forward, gradient of Q and K, gradient of V")
    shapes = [
        (1, 3000, 8, 64),
        (3, 517, 4, 32),
        (2, 1030, 2, 128),
        (2, 300, 2, 16),
        (1, 700, 1, 512),
        (2, 90, 3, 12),
    ]
    for shape in shapes:
        for dtype in (*HALF, torch.float32):
            for masked in (False, True):
                for kernel in ("torch", "flash", "memo_effi"):
                    errors = check_one(shape, dtype, masked, kernel)
                    print(
                        shape,
                        str(dtype)[6:],
                        "masked" if masked else "-",
                        kernel,
                        *(f"{e:.1e}" for e in errors),
                    )


def check_one(shape: tuple[int, ...], dtype: torch.dtype, masked: bool, kernel: str) -> list[float]:
    qk, v = random_qkv(shape, dtype, wide=shape[0] == 3)
    mask = torch.rand(shape[:2], device="cuda") > 0.4 if masked else None
    if mask is not None:
        mask[:, :256], mask[:, -2:] = False, True
    grad = torch.randn_like(v)
    results = []
    for form, kind in ((kernel, dtype), ("math", torch.float64)):
        a, b = (
            qk.detach().to(kind).requires_grad_(),
            v.detach().to(torch.float64 if form == "math" else v.dtype).requires_grad_(),
        )
        out = abmilx.propagate(a, b, mask, shape[-1] ** -0.5, form)
        out.backward(grad.to(out.dtype))
        results.append((out.detach(), a.grad, b.grad))
    return [relative(x, y) for x, y in zip(*results, strict=True)]


def check_model() -> None:
    print("\n# whole model: largest difference of logits from CPU float64 (padded batch, single bags, compiled)")
    torch.manual_seed(0)
    model = DAttentionX(INPUT, 2, mil_bias=True, attn_bias=True).eval()
    bags = [torch.randn(n, INPUT) for n in (700, 5000, 33)]
    want = torch.cat([model.double()(b.double()) for b in bags]).float().cuda()
    model = model.float().cuda()
    x = torch.nn.utils.rnn.pad_sequence([b.cuda() for b in bags], batch_first=True)
    mask = torch.arange(5000, device="cuda") < torch.tensor([[700], [5000], [33]], device="cuda")
    for name, dtype in (("float32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with torch.no_grad(), torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            batch, single = model(x, mask), torch.cat([model(b.cuda()) for b in bags])
            compiled = torch.compile(model, fullgraph=True)(x, mask)
        differences = [(t.float() - want).abs().max().item() for t in (batch, single, compiled)]
        print(name, *(f"{d:.1e}" for d in differences))


# The tile of a kernel's own rows or columns, the tile of what it loops over, warps, stages.
CANDIDATES = {
    "forward": "64,128,4,2 64,128,4,3 128,64,4,3 64,64,4,3 128,64,8,3 64,64,8,2 64,256,4,2 64,128,4,4 64,64,4,2",
    "queries": "128,64,4,3 128,32,4,3 64,64,4,3 64,128,4,3 64,32,4,3 64,64,8,2 128,64,4,4 128,32,4,4 64,64,4,2",
    "keys": "64,128,4,3 128,64,4,2 128,32,4,3 64,32,4,3 64,64,4,3 64,64,8,2 128,32,4,4 128,64,8,3 128,32,8,3"
    " 128,16,4,4 64,32,4,2 64,16,4,4",
}


def tiles() -> None:
    """Times the candidates and uses the fastest in what runs after this."""
    count = 20_000
    print(f"\n# tiles (rows, cols, warps, stages) at N = {count}: ms")
    for heads, width in ((8, 64), (8, 32), (4, 128), (2, 256)):
        qk, v = random_qkv((1, count, heads, width), torch.bfloat16)
        inputs = (qk, v, torch.randn_like(v), width**-0.5)
        outputs = own.forward(qk, v, None, width**-0.5, own.Tiles(64, 64, 4, 2))
        best = {}
        for name, listed in CANDIDATES.items():
            sizes = [tuple(map(int, t.split(","))) for t in listed.split()][: None if width == 64 else 6]
            chosen = [own.Tiles(*((b, a) if name == "keys" else (a, b)), *rest) for a, b, *rest in sizes]
            works = [one_kernel(name, tile, inputs, outputs) for tile in chosen]
            with ThreadPoolExecutor(12) as pool:  # compiles them side by side
                usable = list(pool.map(runs, works))
            times = [milliseconds(w, 60.0) if good else float("inf") for w, good in zip(works, usable, strict=True)]
            ranked = sorted(zip(times, chosen, strict=True), key=lambda pair: pair[0])
            best[name] = ranked[0][1]
            print(
                f"{heads} x {width} {name}",
                *(f"{t:.2f} {tile}" for t, tile in ranked[:4]),
                sep="\n    ",
                flush=True,
            )
        own.PLANS[width] = own.Plan(**best)
        print(f"{heads} x {width} flash forward + backward:", wide_heads(heads, width))


def wide_heads(heads: int, width: int) -> str:
    """The best library kernels at other widths, for comparison."""
    shape = (1, 20_000, heads, width)
    names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return ", ".join(f"{name} {one_form(library(b, width), shape, False)}" for name, b in names.items())


def one_kernel(
    name: str, tile: own.Tiles, inputs: tuple[Tensor, Tensor, Tensor, float], outputs: tuple[Tensor, Tensor]
) -> Callable[[], object]:
    qk, v, grad, scale = inputs
    if name == "forward":
        return lambda: own.forward(qk, v, None, scale, tile)
    launch = own.launch_queries if name == "queries" else own.launch_keys
    results = (torch.empty_like(qk), torch.empty_like(v))
    return lambda: launch(grad, (qk, v, None), outputs, results, (scale, tile))


def runs(work: Callable[[], object]) -> bool:
    """A tile can need more shared memory or registers than there are."""
    try:
        work()
    except Exception as error:  # noqa: BLE001
        print("    ", type(error).__name__, str(error)[:80])
        return False
    return True


def library(backend: SDPBackend, padded: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    def attend(qk: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k = (t.transpose(1, 2) for t in qk.unbind(3))
        wide = F.pad(v.unsqueeze(-1).to(q.dtype), (0, padded - 1))
        keys = None if mask is None else mask[:, None, None, :]
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, wide, attn_mask=keys)[..., 0]

    return attend


def triton_kernel(qk: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return own.attention_plus(qk, v, mask, qk.shape[-1] ** -0.5)[0]


def kernels() -> None:
    print("\n# A+ alone, bf16, 8 heads of 64: ms forward, ms forward + backward, GiB of the latter")
    for count, masked in ((2_000, False), (20_000, False), (20_000, True), (100_000, False)):
        for name, attend in forms(masked).items():
            print(count, "masked" if masked else "-", name, one_form(attend, (1, count, HEADS, WIDTH), masked))


def lengths() -> None:
    """Bags differ in N, and a library may prepare something for every N that it has not met."""
    print("\n# every bag of another N (8 heads of 64, bf16): ms forward + backward by the clock, median of 8 new N")
    chosen = {name: forms(False)[name] for name in ("triton", "cudnn, V of 8", "flash, V of 64")}
    for around in (2_000, 20_000):
        for name, attend in chosen.items():
            print(f"about {around} {name}: {new_lengths(attend, around):.2f} ms", flush=True)


def new_lengths(attend: Callable[[Tensor, Tensor, Tensor | None], Tensor], around: int) -> float:
    """Median milliseconds of bags, each of an N that was not there before; the first four do not count."""
    times = []
    for step in range(12):
        qk, v = random_qkv((1, around + 37 * step + 1, HEADS, WIDTH), torch.bfloat16)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        attend(qk.requires_grad_(), v.requires_grad_(), None).sum().backward()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[4:])


def forms(masked: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]]:
    found = {
        "triton": triton_kernel,
        "efficient, V of 8": library(SDPBackend.EFFICIENT_ATTENTION, 8),
        "cudnn, V of 64": library(SDPBackend.CUDNN_ATTENTION, WIDTH),
        "cudnn, V of 8": library(SDPBackend.CUDNN_ATTENTION, 8),
    }
    return found if masked else found | {"flash, V of 64": library(SDPBackend.FLASH_ATTENTION, WIDTH)}


def one_form(attend: Callable[[Tensor, Tensor, Tensor | None], Tensor], shape: tuple[int, ...], masked: bool) -> str:
    qk, v = random_qkv(shape, torch.bfloat16)
    mask = torch.rand(shape[:2], device="cuda") > 0.1 if masked else None
    grad = torch.randn_like(v)

    def both() -> None:
        a, b = qk.detach().requires_grad_(), v.detach().requires_grad_()
        out = attend(a, b, mask)
        out.backward(grad.to(out.dtype))

    try:
        with torch.no_grad():
            forward = milliseconds(lambda: attend(qk, v, mask))
        return f"{forward:.2f} ms, {milliseconds(both):.2f} ms, {peak_gib(both):.2f} GiB"
    except RuntimeError as error:
        return f"not possible: {str(error).splitlines()[0][:80]}"


def model_rows() -> Iterable[tuple[int, str, torch.dtype | None, int]]:
    """N, kernel, autocast type (None: float32), bags."""
    for count in (1_000, 10_000, 20_000, 50_000, 100_000, 200_000):
        yield count, "torch", torch.bfloat16, 1
    yield 20_000, "torch", torch.float16, 1
    yield 20_000, "torch", None, 1
    yield 2_000, "torch", torch.bfloat16, 8
    for kernel in ("flash", "memo_effi", "math"):
        yield 20_000, kernel, torch.bfloat16, 1
    yield 100_000, "flash", torch.bfloat16, 1


def model() -> None:
    print("\n# whole DAttentionX(1024 -> 512, 8 heads): eval, then training (forward + backward)")
    for count, kernel, dtype, bags in model_rows():
        for norm in (None, "ln") if count == 100_000 and kernel == "torch" else (None,):
            label = f"{bags} x {count} {kernel} {str(dtype or torch.float32)[6:]} norm={norm}"
            print(label, one_model(count, kernel, dtype, (bags, norm)), flush=True)


def one_model(count: int, kernel: str, dtype: torch.dtype | None, options: tuple[int, str | None]) -> str:
    bags, norm = options
    torch.manual_seed(0)
    net = DAttentionX(INPUT, 2, mil_bias=True, attn_bias=True, sdpa_type=kernel, mil_norm=norm).cuda()
    x = torch.randn(bags, count, INPUT, device="cuda")
    mask = torch.rand(bags, count, device="cuda") > 0.3 if bags > 1 else None

    def evaluate() -> None:
        with torch.no_grad(), torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            net(x, mask)

    def train() -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = net(x, mask).float().square().sum()
        loss.backward()

    parts = []
    for switch, work in ((net.eval, evaluate), (net.train, train)):
        switch()
        try:
            parts.append(f"{milliseconds(work):.2f} ms {peak_gib(work):.2f} GiB")
        except torch.OutOfMemoryError:
            parts.append("out of memory")
    return ", ".join(parts)


def cpu() -> None:
    """Without a GPU: the whole head beside the published form, in float32."""
    print(f"{torch.get_num_threads()} CPU thread(s), torch {torch.__version__}, 8 heads of 64, milliseconds")
    print("| N | form | evaluation | training |\n| --- | --- | --- | --- |")
    for count in (1000, 4000):
        x = torch.randn(1, count, INPUT)
        for form, kernel in (("ours", "torch"), ("published, N x N", "math")):
            head = DAttentionX(INPUT, 2, sdpa_type=kernel).eval()
            with torch.no_grad():
                evaluation = seconds(lambda head=head, x=x: head(x))
            training = seconds(lambda head=head, x=x: head(x).sum().backward())
            print(f"| {count:,} | {form} | {1000 * evaluation:.0f} | {1000 * training:.0f} |")


def seconds(work: Callable[[], object]) -> float:
    """The shortest of three runs."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def main() -> None:
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        cpu()
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    named = (check, check_model, tiles, kernels, lengths, model)
    parts = {part.__name__: part for part in named}
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
