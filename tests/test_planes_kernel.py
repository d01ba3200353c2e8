"""The Triton kernel of the planes, in Triton's interpreter on the CPU, and on a GPU: equal to the plain form."""

from __future__ import annotations

import pytest
import torch
from interpreted import mend_interpreter, run_interpreted

from datasets.gpu_jpeg.planes import WEIGHTS, _pixels


def compare_all(device: str, sizes: tuple[int, ...]) -> None:
    from datasets.gpu_jpeg.planes_triton import interleave

    for side_px in sizes:
        shapes = ((3, side_px, side_px), *[(3, side_px // 2, side_px // 2)] * 2)
        planes = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
        for bgr in (False, True):
            result = torch.empty(3, side_px, side_px, 3, dtype=torch.uint8, device=device)
            luma, blue, red = (p.to(device) for p in planes)
            got = interleave((luma, blue, red), result, bgr, WEIGHTS)
            assert torch.equal(got.cpu(), _pixels(*planes, bgr))


@pytest.mark.gpu
def test_the_kernel_on_the_gpu_equals_the_plain_form() -> None:
    compare_all("cuda", (16, 48, 224, 256, 1024))


def test_the_kernel_equals_the_plain_form() -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    mend_interpreter()
    compare_all("cpu", (16, 48))
