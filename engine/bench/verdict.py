"""From the figures of ``main.py bench`` to sentences: what limits training, by how much, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterator

from engine.bench.figures import Figures, Setting, number

WAIT = 0.05
"""A device that waits less than this share of the time for data would gain less than this by faster data."""

NEAR = 0.9
"""Rates of a few seconds on a shared machine scatter by some per cent: a loop at 0.9 of the bare step is as fast."""

FROM_DISK = 0.05
"""Below this share of patches fetched from the disk a rate tells how fast memory is, not the disk."""

HALF = 0.5
"""What takes more than half of the time that a batch needs on its way is what limits the way."""

SPARE = 1.2
"""Data that come this much faster than they are used keep the queue filled in spite of bags of unequal size."""

WORTH_SAYING = 0.1
"""Shares of a step from which on they are worth a sentence."""

SCALES = 1.5
"""Several processes that read this much faster than one would gain by still more of them: a disk that answers late."""

LITTLE = 0.25
"""Where reading for the device takes less than this part of a core, it cannot be what keeps the cores busy."""

DEVICE, DISK, DECODING, READING, PASSING_ON, COPYING, CORES, OTHERS = (
    "device",
    "disk",
    "decoding",
    "reading",
    "passing on",
    "copying",
    "cores",
    "others",
)
"""What may limit training."""


def limit_of(f: Figures) -> str:
    """What limits training in the long run: one of the names above."""
    if disk_is_slow(f) and f.setting.fits is False:
        return DISK
    if f.loop >= NEAR * f.step:
        return DEVICE
    if _copies_limit(f):
        return COPYING
    if f.data_wait <= WAIT or _fast_alone(f):
        return DECODING if f.supply.decode_gpu is not None else _crowd(f)
    return _slowest_supply(f)


def _slowest_supply(f: Figures) -> str:
    """What takes most of the way of a batch from the disk to the device, where batches come too slowly."""
    supply = f.supply
    decode = supply.decode_gpu or supply.decode_all
    if disk_is_slow(f) and f.loader >= NEAR * supply.read_all.per_s:
        return DISK
    if decode is not None and f.loader >= HALF * decode.per_s:
        return DECODING
    return READING if f.loader >= HALF * supply.read_all.per_s else PASSING_ON


def _copies_limit(f: Figures) -> bool:
    """Page-locked memory is copied while the device computes, other memory while it waits."""
    if f.copy is None:
        return False
    if f.setting.pinned:
        return f.copy < f.step and f.loop >= NEAR * f.copy
    return f.data_wait <= WAIT and f.loop >= NEAR / (1 / f.step + 1 / f.copy)


def disk_is_slow(f: Figures) -> bool:
    """Whether what came from the disk came more slowly than the device takes it."""
    return f.supply.read_all.from_disk >= FROM_DISK and f.supply.read_all.per_s < NEAR * f.step


def _crowd(f: Figures) -> str:
    """Who else uses the cores where everything alone is fast enough: reading, or programs that are none of ours."""
    shared = f.setting.device == "cpu" or f.setting.readers > f.setting.room
    return CORES if shared and _cores_to_read(f) >= LITTLE else OTHERS


def _cores_to_read(f: Figures) -> float:
    """Reading processes that would feed the device."""
    return f.step * f.setting.readers / f.loader


def _fast_alone(f: Figures) -> bool:
    """Whether data come fast enough while the device rests, so that only sharing the cores can make them slow."""
    if f.setting.workers > 0:
        return f.loader * NEAR >= f.step
    return f.loop < NEAR / (1 / f.step + 1 / f.loader)


def verdict(f: Figures) -> list[str]:
    """Sentences: what limits training, by how much, what to change, and what the figures do not tell."""
    limit = limit_of(f)
    return [_headline(f, limit), *_doubt(f), *_advice(f, limit), *_about_the_disk(f, limit)]


def _headline(f: Figures, limit: str) -> str:
    s = f.setting
    what = {
        DEVICE: f"the {_place(s)}. Data come fast enough",
        DISK: f"the disk, which gives {number(f.supply.read_all.per_s)} {s.unit}/s to {s.readers} reader(s)",
        DECODING: "decoding" + _rates_of_decoding(f),
        READING: f"reading, {number(f.supply.read_all.per_s)} {s.unit}/s to {s.readers} reader(s)",
        PASSING_ON: f"putting batches together and passing them on, {number(f.loader)} {s.unit}/s",
        COPYING: f"copying to the GPU, {number(f.copy or 0)} {s.unit}/s, during which it does not compute",
        OTHERS: "other programs on this machine, or what is done between two steps: everything alone is fast enough",
        CORES: f"the {s.cores} CPU core(s), which {s.readers} reading and {s.processes} training process(es) share",
    }[limit]
    share = f.loop / f.step
    return (
        f"What limits training: {what}. The loop runs at {number(f.loop)} {s.unit}/s, {share:.2f} of the bare step's "
        f"{number(f.step)}, and waits for data {f.data_wait:.0%} of the time."
    )


def _doubt(f: Figures) -> Iterator[str]:
    if f.loop * NEAR > f.step:
        yield (
            "The loop was faster than its own step, so other programs used this machine meanwhile, or the bags differ "
            "much in size: bench again, with more --seconds."
        )


def _rates_of_decoding(f: Figures) -> str:
    if f.supply.decode_gpu is not None:
        return f" on the GPU, which decodes {number(f.supply.decode_gpu.per_s)} patches/s when it does nothing else"
    if f.supply.decode_one is None or f.supply.decode_all is None:
        return ""
    one, every = number(f.supply.decode_one.per_s), number(f.supply.decode_all.per_s)
    return f", {one} patches/s a core and {every} by {f.setting.readers} reader(s)"


def _advice(f: Figures, limit: str) -> Iterator[str]:
    if limit == DEVICE:
        yield from _faster_device(f)
    if limit in (READING, PASSING_ON) or (limit == DECODING and f.supply.decode_gpu is None):
        yield from _more_processes(f)
    if limit in (DECODING, CORES):
        yield from _less_decoding(f)
    if limit == CORES:
        yield from _fewer_processes(f)
    if limit == COPYING:
        yield from _faster_copies(f)
    if limit == DISK:
        yield from _faster_disk(f)
    if f.setting.unit == "features" and limit in (DISK, READING, PASSING_ON):
        yield from _features_in_memory(f)


def _faster_device(f: Figures) -> Iterator[str]:
    s = f.setting
    if s.device == "cpu":
        yield "It computes on a CPU: a GPU is what helps."
        return
    offers = [
        "" if s.amp else "--amp (half precision)",
        "" if s.channels_last or s.stored_px is None else "--channels_last",
        "" if s.compiled or s.stored_px is None else "--torchcompile",
        "" if not s.determ or s.stored_px is None else "--no_determ (cuDNN chooses the fastest kernels)",
    ]
    given = [offer for offer in offers if offer]
    if given:
        yield f"Not in use, and worth a second bench: {', '.join(given)}."
    if f.render_share is not None and f.render_share > WORTH_SAYING:
        yield f"Rendering the random views takes {f.render_share:.0%} of the step."
    if f.ema_share > WORTH_SAYING:
        yield f"The moving average of the weights takes {f.ema_share:.0%} of the step; --test_type=main needs none."


def _more_processes(f: Figures) -> Iterator[str]:
    s = f.setting
    if s.kept:
        return
    each = f.loader / s.readers
    wanted = math.ceil(SPARE * _cores_to_read(f) / s.processes) * s.processes
    if s.workers == 0 and s.room < s.processes:
        yield f"The training process reads, and there is no second core for a reading process ({s.cores} in all)."
    elif wanted <= s.room:
        yield (
            f"Give --num_workers={max(wanted // s.processes, 1)} (now {s.workers}): a process prepares "
            f"{number(each)} {s.unit}/s, and {s.cores} core(s) may be used."
        )
    elif s.room // s.processes > s.workers:
        most = s.room // s.processes
        yield (
            f"Give --num_workers={most} (now {s.workers}): with the {s.cores} core(s) that may be used, about "
            f"{number(each * most * s.processes)} {s.unit}/s. It would take {wanted} of them to feed the device."
        )
    else:
        yield (
            f"More readers do not help: {s.readers} of them and {s.processes} training process(es) have "
            f"{s.cores} core(s), and {wanted} would be needed."
        )


def _less_decoding(f: Figures) -> Iterator[str]:
    s = f.setting
    if s.stored_px is None or s.crop_px is None:
        return
    if f.supply.decode_gpu is not None:
        yield from _decoding_on_cores(f)
    elif s.device == "cuda" and f.loader / s.readers * max(s.room, s.readers) < f.step:
        yield "Let the GPU decode: --jpeg_decoder=gpu."
    if s.stored_px > s.crop_px:
        yield (
            f"The store holds {s.stored_px} px and the encoder sees {s.crop_px} px: a training store of {s.crop_px} px "
            f"(--img_size {s.crop_px} of CLAM/save_patches.py) has {(s.crop_px / s.stored_px) ** 2:.2f} of the pixels "
            "to decode." + (" The random crop is then no longer taken." if s.random_crop else "")
        )


def _decoding_on_cores(f: Figures) -> Iterator[str]:
    s, one = f.setting, f.supply.decode_one
    if one is not None and one.per_s * s.room > SPARE * f.loop:
        yield (
            f"The {s.cores} core(s) could decode about {number(one.per_s * s.room)} patches/s: try --jpeg_decoder=cpu "
            f"--num_workers={s.room // s.processes}."
        )


def _fewer_processes(f: Figures) -> Iterator[str]:
    s = f.setting
    fewer = max(s.room // s.processes, 1)
    if s.device == "cpu":
        yield "Computing on a CPU takes the same cores as decoding: a GPU is what helps."
    elif fewer < s.workers:
        yield f"There are more processes than cores: try --num_workers={fewer} (now {s.workers})."
    else:
        yield "More CPU cores are what helps."


def _faster_copies(f: Figures) -> Iterator[str]:
    if not f.setting.pinned:
        yield (
            "Leave --no_pin_memory out (or give --pin_memory): from page-locked memory the GPU fetches a batch faster, "
            "and while it computes."
        )
    else:
        yield "The batches are page-locked already: what is left is the way between memory and GPU."


def _faster_disk(f: Figures) -> Iterator[str]:
    s = f.setting
    if not s.staged:
        yield "Copy the files to a disk of this machine, best an SSD: --stage_to=FOLDER does it before training."
    if f.supply.read_all.per_s > SCALES * f.supply.read_first.per_s and s.room > s.readers and not s.kept:
        yield (
            f"The disk answers several processes at once ({number(f.supply.read_first.per_s)} {s.unit}/s for one, "
            f"{number(f.supply.read_all.per_s)} for {s.readers}): more --num_workers ask it more at a time."
        )
    if s.stored_px is not None and s.crop_px is not None and s.stored_px > s.crop_px:
        yield f"A training store of {s.crop_px} px rather than {s.stored_px} px is smaller, too."


def _features_in_memory(f: Figures) -> Iterator[str]:
    s = f.setting
    each = s.data_bytes * s.processes / max(s.nodes, 1)
    if not s.kept and s.free_bytes is not None and each < s.free_bytes:
        pinned = " --pin_memory" if s.device == "cuda" and not s.pinned else ""
        yield (
            f"Give --persistence{pinned}: the features ({_gib(each)} for all processes of a machine) fit into "
            f"the {_gib(s.free_bytes)} of free memory."
        )
    elif not s.kept:
        yield "Features in half precision take half the bytes and stay half precision until they reach the device."


def _about_the_disk(f: Figures, limit: str) -> Iterator[str]:
    s = f.setting
    if s.kept:
        yield "The features are in memory: the disk plays no part after the start."
        return
    size = _gib(s.data_bytes)
    if f.supply.read_all.from_disk < FROM_DISK:
        yield (
            f"The disk was not measured: what was read lay in memory already ({f.supply.read_all.from_disk:.0%} did "
            f"not), or the system does not say. {_if_it_fits(s)}"
        )
    elif not disk_is_slow(f):
        yield (
            f"The disk is fast enough: {f.supply.read_all.from_disk:.0%} of the {s.unit} came from it, at "
            f"{number(f.supply.read_all.per_s)} {s.unit}/s."
        )
    elif limit != DISK:
        until = "until all has been read once" if s.fits else "as long as not all of it lies in memory"
        yield (
            f"The disk will limit the first epoch: {f.supply.read_all.from_disk:.0%} of the {s.unit} came from it, at "
            f"{number(f.supply.read_all.per_s)} {s.unit}/s, {until} (training reads from {size})."
            + ("" if s.staged else " A copy on a disk of this machine, --stage_to=FOLDER, is made in one go.")
        )
    else:
        yield _if_it_fits(s)


def _if_it_fits(s: Setting) -> str:
    size = _gib(s.data_bytes)
    if s.fits is None:
        return f"Training reads from {size} of files; how much memory is free is not known."
    free = _gib(s.free_bytes or 0)
    if s.fits:
        return f"Training reads from {size} of files, which fit into {free} of free memory: they are read once."
    return f"Training reads from {size} of files, more than the {free} of free memory: they are read in every epoch."


def _place(s: Setting) -> str:
    return "GPU" if s.device == "cuda" else "CPU as the computing device"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
