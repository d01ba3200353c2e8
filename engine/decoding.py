"""Who decodes the JPEGs of patches: the reading processes or the GPU (``--jpeg_decoder``)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from datasets.gpu_jpeg.coded import GpuDecoder
from datasets.gpu_jpeg.nvjpeg import NvJpegError
from datasets.gpu_jpeg.stacks import pack
from datasets.instances import CodedSource, PixelSource, Source
from utils.config import DataConfig
from utils.cores import usable_cores
from utils.dist import Processes
from utils.errors import UserError

log = logging.getLogger(__name__)

FEW = 16
"""With so many reading processes or fewer, a GPU with JPEG engines decodes in their place. Sixteen cores decode
25,000 to 30,000 patches of 256 px a second; a step of ResNet-18 on an H100 takes as many, ``--full_bag`` more."""

FEW_IN_STEP = 12
"""The same for processes that train in step with each other: on two H200 the loop reached 0.99 of the bare step with 14
reading processes each, and 0.93 with the engines."""

FEW_WHERE_SLOW = 5
"""The same for a GPU that has to decode on its multiprocessors, and for JPEGs that do not stack."""

SAMPLE = 8
"""Patches of a slide that are tried."""


def cores_of(processes: Processes) -> float:
    """CPU cores that this process may use."""
    return usable_cores() / processes.local_world


def gpu_decoder(
    data: DataConfig, source: Source, processes: Processes, workers: int, in_step: bool = False
) -> GpuDecoder | None:
    """The decoder for the patches of ``source``; None where the reading processes decode, and for features.

    Args:
        data: says who decodes; "auto" leaves it to the figures that follow.
        source: what the patches come from.
        processes: this process among those that share the machine's cores.
        workers: reading processes of this process.
        in_step: whether processes exchange something for each batch, as in training.

    Raises:
        UserError: when the GPU is asked for and cannot do it.
    """
    if not isinstance(source, PixelSource) or data.jpeg_decoder == "cpu":
        return None
    asked, able = data.jpeg_decoder == "gpu", min(cores_of(processes), workers)
    if processes.device.type != "cuda":
        if asked:
            raise UserError("jpeg_decoder is gpu, but this run computes on the CPU. Remove --jpeg_decoder=gpu.")
        return None
    few = FEW_IN_STEP if in_step and processes.world > 1 else FEW
    if not asked and able > (few if _stack(source) else FEW_WHERE_SLOW):
        return None
    try:
        decoder = GpuDecoder(processes.device, source.store.image_size_px, source.order)
        return decoder if asked or decoder.engines or able <= FEW_WHERE_SLOW else None
    except NvJpegError as error:
        if asked:
            raise UserError(
                f"jpeg_decoder is gpu, but nvJPEG does not work here: {error}. Install torchvision's CUDA wheel, or "
                "remove --jpeg_decoder=gpu."
            ) from error
        log.info("The reading processes decode the patches, because nvJPEG does not work here: %s.", error)
        return None


def _stack(source: PixelSource) -> bool:
    """Whether the JPEGs of a store are of one form, from some of the first, the middle and the last slide."""
    store = source.store
    slides = [slide for slide in store.slides if store.counts[slide]]
    chosen = [slides[i] for i in sorted({0, len(slides) // 2, len(slides) - 1})] if slides else []
    return all(len(pack(store.read(s, range(min(store.counts[s], SAMPLE))))) == 1 for s in chosen)


def coded(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The same stores as sources of JPEGs, for a GPU that decodes them."""
    return tuple(CodedSource(s.store, s.order, s.grid) for s in sources if isinstance(s, PixelSource))
