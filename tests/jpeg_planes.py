"""The planes of a 4:2:0 JPEG by libjpeg, for tests of those who make them in another way."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image


def planes_of(jpeg: bytes) -> list[torch.Tensor]:
    """Y, Cb and Cr as they are coded: at half scale libjpeg does not interpolate chroma of half resolution."""
    image, chroma = Image.open(io.BytesIO(jpeg)), Image.open(io.BytesIO(jpeg))
    image.draft("L", image.size)
    chroma.draft("YCbCr", (chroma.width // 2, chroma.height // 2))
    c = np.asarray(chroma)
    return [torch.from_numpy(plane.copy()) for plane in (np.asarray(image), c[..., 1], c[..., 2])]
