"""Image helper of the published loading example (``from datasets.utils import imfrombytes``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from datasets import jpeg
from utils.errors import UserError

FLAGS = ("color", "grayscale")
# ITU-R BT.601, the weights with which JPEG itself makes luminance.
LUMA_RGB = np.array([0.299, 0.587, 0.114])


def imfrombytes(
    content: bytes, flag: str = "color", float32: bool = False, channel_order: str = "rgb"
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Decodes the bytes of a JPEG.

    Args:
        content: the file's bytes (``bytes``, or anything with the buffer protocol such as a 1-D uint8 array).
        flag: ``color`` or ``grayscale``.
        float32: give values in [0, 1] as float32 instead of 0..255 as uint8.
        channel_order: ``rgb``, or ``bgr`` for weights trained with the published code, which read BGR.

    Returns:
        (H, W, 3), or (H, W) for grayscale.

    Raises:
        JpegError: corrupt data.
    """
    if flag not in FLAGS:
        raise UserError(f"flag {flag!r} is not one of {', '.join(FLAGS)}.")
    image = jpeg.decode(bytes(content), order=channel_order)
    if flag == "grayscale":
        weights = LUMA_RGB if channel_order == "rgb" else LUMA_RGB[::-1]
        image = np.rint(image @ weights).astype(np.uint8)
    return image.astype(np.float32) / np.float32(255) if float32 else image
