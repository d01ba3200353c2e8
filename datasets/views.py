"""From stored patches to what the encoder sees: crop, shift, flip, resize and normalise, for all patches at once.

Antialiased bilinear resizing is linear and separable, and so are cropping, flipping and shifting. One patch is
therefore rendered as ``R @ X @ C^T`` with a row matrix R (out, in) and a column matrix C (out, in) that hold the
filter weights of its own crop, built on the device from eight numbers a patch. On a GPU with Triton one kernel
(``datasets.views_triton``) computes the same without the matrices. The result equals torchvision's per-image transforms
(float input, antialias) with the same parameters.

Shapes: P patches, S stored size in px, C output size in px.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TOP, LEFT, HEIGHT, WIDTH, FLIP_X, FLIP_Y, SHIFT_X, SHIFT_Y = range(8)
"""Columns of a draw: crop box in px, flips as 0 or 1, shift in px (applied before the crop, zero fill)."""

ASPECT = (3 / 4, 4 / 3)
"""Aspect ratios of the random resized crop, as in torchvision."""


@dataclass(frozen=True)
class ViewPlan:
    """The random views of training patches.

    Attributes:
        transform: none, weak (crop), strong (flips, crop), weak_strong (shift, crop), strong_v2 (flips, shift, crop).
        crop_scale: lower bound of the crop's area as a share of the patch.
        stored_px: size of a stored patch.
        crop_px: size of a rendered patch; the random crop is taken only when it differs from ``stored_px``.
        crop_groups: with n > 0, n consecutive groups of a batch share one crop and shift (published behaviour).
    """

    transform: str
    crop_scale: float
    stored_px: int
    crop_px: int
    crop_groups: int = 0

    @property
    def flips(self) -> bool:
        return self.transform in ("strong", "strong_v2")

    @property
    def max_shift(self) -> float:
        """Largest shift as a share of the side (published values)."""
        return {"weak_strong": 100 / 256, "strong_v2": 0.5}.get(self.transform, 0.0)

    @property
    def crops(self) -> bool:
        return self.transform != "none" and self.stored_px != self.crop_px

    def describe(self) -> str:
        """One sentence for the log."""
        parts = ["flips"] if self.flips else []
        parts += [f"shifts up to {self.max_shift:.2f} of the side"] if self.max_shift else []
        if self.crops:
            parts.append(f"random resized crop ({self.crop_scale:g} to 1 of the area)")
        what = ", ".join(parts) or "none"
        return f"augmentation {self.transform}: {what}; {self.stored_px} px -> {self.crop_px} px"

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draws the views of ``count`` patches.

        Returns:
            (count, 8) float32, columns as named above.
        """
        draws = np.zeros((count, 8), np.float32)
        draws[:, HEIGHT] = draws[:, WIDTH] = self.stored_px
        if self.crops:
            draws[:, TOP : WIDTH + 1] = random_boxes(count, self.stored_px, self.crop_scale, rng)
        if self.flips:
            draws[:, FLIP_X : FLIP_Y + 1] = rng.random((count, 2)) < 0.5
        if self.max_shift:
            most = self.max_shift * self.stored_px
            draws[:, SHIFT_X : SHIFT_Y + 1] = np.round(rng.uniform(-most, most, (count, 2)))
        return draws


def random_boxes(count: int, side_px: int, least_area: float, rng: np.random.Generator) -> np.ndarray:
    """Boxes of torchvision's RandomResizedCrop on square images: (count, 4) as top, left, height, width in px.

    Ten attempts draw area and aspect; the first that fits is taken, else the largest centred box.
    """
    area = side_px**2 * rng.uniform(least_area, 1.0, (count, 10))
    aspect = np.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), (count, 10)))
    width = np.round(np.sqrt(area * aspect))
    height = np.round(np.sqrt(area / aspect))
    fits = (width > 0) & (width <= side_px) & (height > 0) & (height <= side_px)
    first = fits.argmax(1)
    rows = np.arange(count)
    ok = fits[rows, first]
    width = np.where(ok, width[rows, first], side_px)
    height = np.where(ok, height[rows, first], side_px)
    top = np.floor(rng.random(count) * (side_px - height + 1))
    left = np.floor(rng.random(count) * (side_px - width + 1))
    return np.stack([top, left, height, width], 1)


def share_per_chunk(draws: Tensor, chunks: int) -> Tensor:
    """Gives the patches of each of ``chunks`` consecutive groups one crop and one shift; flips stay per patch.

    This is what the published program does with ``img_trans_chunk``.
    """
    if chunks < 1:
        return draws
    shared = draws.clone()
    common = [TOP, LEFT, HEIGHT, WIDTH, SHIFT_X, SHIFT_Y]
    for group in shared.chunk(chunks):
        group[:, common] = group[:1, common].clone()
    return shared


def resize_matrix(start: Tensor, length: Tensor, sizes: tuple[int, int], flip: Tensor, shift: Tensor | None) -> Tensor:
    """Filter weights of antialiased bilinear resizing along one axis.

    Args:
        start: (P,) first px of the crop on the shifted patch.
        length: (P,) size of the crop in px.
        sizes: stored size S and output size C in px.
        flip: (P,) nonzero mirrors the output.
        shift: (P,) px by which the patch was moved before the crop, uncovered pixels counting as zero; None: not
            moved.

    Returns:
        (P, C, S) float32.
    """
    stored, out = sizes
    scale = (length / out).view(-1, 1, 1)
    begin, size = start.view(-1, 1, 1), length.view(-1, 1, 1)
    target = torch.arange(out, device=start.device, dtype=torch.float32).view(1, -1, 1)
    target = torch.where(flip.view(-1, 1, 1) > 0, out - 1 - target, target)
    source = torch.arange(stored, device=start.device, dtype=torch.float32).view(1, 1, -1)
    centre = begin + (target + 0.5) * scale
    inside = (source >= begin) & (source < begin + size)
    weight = (1 - (source + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0) * inside
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
    if shift is None:
        return weight
    moved = (source + shift.view(-1, 1, 1)).expand(-1, out, -1)
    covered = (moved >= 0) & (moved < stored)
    return weight.gather(2, moved.clamp(0, stored - 1).long()) * covered


@dataclass(frozen=True)
class Renderer:
    """Turns stored patches into encoder input on the device.

    Attributes:
        crop_px: size that the encoder sees.
        mean, std: per channel on the scale 0..1, from the encoder's own configuration.
        dtype: of the products and of the result; float32, or the autocast type on a GPU.
        channels_last: memory format of the result.
    """

    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __call__(self, patches: Tensor, draws: Tensor | None = None) -> Tensor:
        """Renders patches.

        Args:
            patches: (P, S, S, 3) uint8.
            draws: (P, 8) from ``ViewPlan.draw``, in host memory so that reading it never waits for the device; None
                takes the whole patch, resized to ``crop_px``.

        Returns:
            (P, 3, C, C) normalised.
        """
        kernel = _fused_kernel() if patches.is_cuda else None
        if kernel is None:
            return self._products(patches, draws)
        host = whole_patch(patches.shape[1]) if draws is None else draws
        result = self._empty(patches)
        return kernel(patches, host.to(patches.device, non_blocking=True), result, self.mean, self.std)

    def _empty(self, patches: Tensor) -> Tensor:
        shape = (len(patches), 3, self.crop_px, self.crop_px)
        return torch.empty(shape, dtype=self.dtype, device=patches.device, memory_format=self._layout)

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _products(self, patches: Tensor, draws: Tensor | None) -> Tensor:
        """The views by matrix products, on any device."""
        device, stored = patches.device, patches.shape[1]
        x = patches.permute(0, 3, 1, 2)  # (P, 3, S, S)
        if draws is not None or stored != self.crop_px:
            host = whole_patch(stored) if draws is None else draws
            shifted = bool(host[:, SHIFT_X:].any())
            d, sizes = host.to(device, non_blocking=True), (stored, self.crop_px)
            rows = resize_matrix(d[:, TOP], d[:, HEIGHT], sizes, d[:, FLIP_Y], d[:, SHIFT_Y] if shifted else None)
            columns = resize_matrix(d[:, LEFT], d[:, WIDTH], sizes, d[:, FLIP_X], d[:, SHIFT_X] if shifted else None)
            rows, columns = rows.to(self.dtype).unsqueeze(1), columns.to(self.dtype).unsqueeze(1)
            x = rows @ x.to(self.dtype) @ columns.transpose(-1, -2)  # (P, 3, C, C)
        mean, std = _grey_levels(self.mean, device), _grey_levels(self.std, device)
        return ((x - mean) / std).to(self.dtype, memory_format=self._layout)


@functools.lru_cache(maxsize=1)
def _fused_kernel() -> Callable[..., Tensor] | None:
    """The views as one kernel; None where Triton is not installed."""
    try:
        from datasets.views_triton import render
    except ImportError:
        return None
    return render


@functools.lru_cache(maxsize=16)
def _grey_levels(channels: tuple[float, float, float], device: torch.device) -> Tensor:
    """(1, 3, 1, 1) on the scale 0..255; kept, because a copy from the host makes the device wait."""
    return torch.tensor(channels, device=device).mul(255).view(1, 3, 1, 1)


def whole_patch(stored_px: int) -> Tensor:
    """The draw that takes the whole patch: (1, 8), shared by all patches."""
    draw = torch.zeros(1, 8)
    draw[:, HEIGHT] = draw[:, WIDTH] = stored_px
    return draw
