"""Stacks of JPEGs: the same patches as alone, and nothing in a stack that would spoil its neighbours."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from jpeg_planes import planes_of
from PIL import Image

from datasets.gpu_jpeg.planes import interleaved
from datasets.gpu_jpeg.stacks import HEAD, StackForm, heads, jpegs_of, pack, unstacked
from datasets.jpeg import decode, encode


def picture(side_px: int, seed: int) -> np.ndarray:
    """Saturated colours in small blocks, with noise: chroma has edges, and values leave 0..255 when interpolated."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (side_px // 4, side_px // 4, 3)).repeat(4, 0).repeat(4, 1)
    return np.clip(blocks + rng.normal(0, 30, (side_px, side_px, 3)), 0, 255).astype(np.uint8)


def jpeg_of(side_px: int, seed: int, quality: int = 80) -> bytes:
    return encode(picture(side_px, seed), quality)


def saved(side_px: int = 32, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(side_px, 0)).save(file, "JPEG", **options)
    return file.getvalue()


def form_of(jpeg: bytes) -> StackForm:
    form = StackForm.of(jpeg)
    assert form is not None
    return form


@pytest.mark.parametrize("side_px", [16, 48, 256])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_pixels_of_planes_are_those_of_libjpeg(side_px: int, order: str) -> None:
    jpegs = [jpeg_of(side_px, seed, quality) for seed, quality in ((0, 80), (1, 95), (2, 20))]
    planes = [torch.stack(kind) for kind in zip(*map(planes_of, jpegs), strict=True)]
    result = interleaved(*planes, torch.empty(3, side_px, side_px, 3, dtype=torch.uint8), order == "bgr")
    assert np.array_equal(result.numpy(), np.stack([decode(j, order=order) for j in jpegs]))


def test_a_stack_has_the_planes_of_its_patches() -> None:
    jpegs = [jpeg_of(48, seed) for seed in range(20)]  # restart markers are numbered to 7 and begin again
    stack = form_of(jpegs[0]).stacked(jpegs)
    whole = planes_of(stack)
    for plane, alone in zip(whole, zip(*map(planes_of, jpegs), strict=True), strict=True):
        assert torch.equal(plane, torch.cat(alone))
    assert unstacked(stack) == jpegs


def test_neighbours_of_one_form_are_stacked() -> None:
    jpegs = [jpeg_of(32, seed) for seed in range(5)] + [jpeg_of(32, 9, quality=60)] + [jpeg_of(32, 5)]
    rows = pack(jpegs)
    assert heads(rows)["patches"].tolist() == [5, 1, 1]
    assert heads(rows)["stacked"].tolist() == [1, 1, 1]
    assert list(jpegs_of(rows)) == jpegs


def test_no_stack_is_taller_than_the_engines_take() -> None:
    jpegs = [jpeg_of(2048, 0)] * 9 + [jpeg_of(16, 1)] * 3
    rows = pack(jpegs)
    assert heads(rows)["patches"].tolist() == [8, 1, 3]
    assert Image.open(io.BytesIO(form_of(jpegs[0]).stacked(jpegs[:8]))).size == (2048, 16384)


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_blocks": 1},
        {"keep_rgb": True},
        {"side_px": 40},
    ],
)
def test_other_jpegs_travel_alone(options: dict[str, object]) -> None:
    other = saved(**options)  # type: ignore[arg-type]
    assert StackForm.of(other) is None
    grey = io.BytesIO()
    Image.fromarray(picture(32, 0)[..., 0]).save(grey, "JPEG")
    jpegs = [saved(), other, other, grey.getvalue(), saved()]
    rows = pack(jpegs)
    assert heads(rows)["stacked"].tolist() == [1, 0, 0, 0, 1]
    assert list(jpegs_of(rows)) == jpegs


def test_pillows_jpegs_are_stacked_and_so_are_those_with_tables_of_their_own() -> None:
    for options in ({}, {"optimize": True}, {"quality": 30}):
        one = saved(**options)
        assert unstacked(form_of(one).stacked([one, one])) == [one, one]


def test_a_damaged_patch_is_not_stacked() -> None:
    good = jpeg_of(32, 0)
    form = form_of(good)
    middle = (len(form.head) + len(good)) // 2
    marker = good[:middle] + b"\xff\xd3" + good[middle + 2 :]
    behind = good + b"\0"
    headless = good[: form.scan]
    for other in (marker, behind, headless, b"\xff\xd8", b""):
        rows = pack([good, other, good])
        assert heads(rows)["stacked"].tolist() == [1, 0, 1]
        assert list(jpegs_of(rows)) == [good, other, good]


def test_a_row_holds_its_jpeg_as_it_is() -> None:
    jpegs = [b"abc", b"defgh" * 60_000]
    rows = pack(jpegs)
    assert heads(rows)["bytes"].tolist() == [3, 300_000]
    assert bytes(rows[1, HEAD.itemsize :].numpy()) == jpegs[1]
    assert rows.shape == (2, HEAD.itemsize + 300_000)
