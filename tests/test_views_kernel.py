"""The Triton kernel of the views in Triton's interpreter, on the CPU, and on a GPU, against the matrix products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from interpreted import mend_interpreter, run_interpreted

from datasets.views import Renderer, ViewPlan, whole_patch

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SIZES = ((32, 28), (32, 9), (20, 28), (24, 24))


def compare_all(device: str) -> None:
    from datasets.views_triton import render

    rng = np.random.default_rng(0)
    for stored, out in SIZES:
        x = torch.from_numpy(rng.integers(0, 256, (6, stored, stored, 3), dtype=np.uint8)).to(device)
        plain = Renderer(out, MEAN, STD)
        views = [torch.from_numpy(ViewPlan(name, 0.08, stored, out).draw(6, rng)) for name in ("strong", "strong_v2")]
        for draws in (*views, whole_patch(stored)):
            want = plain._products(x, draws)
            for layout in (torch.contiguous_format, torch.channels_last):
                result = torch.full((6, 3, out, out), torch.nan, device=device).to(memory_format=layout)
                torch.testing.assert_close(render(x, draws.to(device), result, MEAN, STD), want, atol=2e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_on_the_gpu_equals_the_products(dtype: torch.dtype) -> None:
    compare_all("cuda")
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.integers(0, 256, (40, 256, 256, 3), dtype=np.uint8))
    draws = torch.from_numpy(ViewPlan("strong", 0.08, 256, 224).draw(40, rng))
    want = Renderer(224, MEAN, STD)(x, draws)
    got = Renderer(224, MEAN, STD, dtype, channels_last=True)(x.cuda(), draws)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.float().cpu(), want, atol=2e-3 if dtype == torch.float32 else 2e-2, rtol=0)


def test_the_kernel_equals_the_products() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    mend_interpreter()
    compare_all("cpu")
