"""What it takes to decode an image file, read from its headers.

Decoders differ: most write rows as they read them, others must hold the whole image in their own memory first
(progressive JPEG: all coefficients; lossless WebP: all pixels).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 20
CUT = "the file ends before the image does"

SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG frames, except those that share their range: Huffman tables, extensions, conditioning."""

SEQUENTIAL = frozenset({0xC0, 0xC1})
ALONE = frozenset({0x01, *range(0xD0, 0xD9)})
"""JPEG markers without a segment after them."""


def held_bytes(path: Path, kind: str) -> int:
    """Bytes that a decoder must hold in memory at once, apart from a few rows.

    Args:
        path: the file.
        kind: Pillow's name of its format: PNG, JPEG or WEBP.

    Raises:
        ValueError: the file is damaged.
    """
    probe = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp}[kind]
    try:
        with path.open("rb") as file:
            return probe(file)
    except (struct.error, IndexError) as error:
        raise ValueError("the file ends within its headers") from error


def _png(file: BinaryIO) -> int:
    """The largest chunk: it is read whole."""
    largest = 0
    file.seek(8)
    while len(head := file.read(8)) == 8:
        (length,) = struct.unpack(">I", head[:4])
        largest = max(largest, length)
        file.seek(length + 4, 1)
    return largest


def png_depth(path: Path) -> int:
    """Bits a sample."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _jpeg(file: BinaryIO) -> int:
    """Two bytes a coefficient, where they arrive in several scans; else nothing.

    ITU-T T.81, B.2: a frame lists its components with their sampling factors, a scan those that it brings.
    """
    blocks = components = 0
    sequential = True
    for marker, body in _segments(file):
        if marker in FRAMES:
            height, width, components = struct.unpack(">HHB", body[1:6])
            factors = [(body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(components)]
            most_x, most_y = max(f[0] for f in factors), max(f[1] for f in factors)
            units = -(-width // (8 * most_x)) * -(-height // (8 * most_y))
            blocks, sequential = units * sum(x * y for x, y in factors), marker in SEQUENTIAL
        if marker == SOS:
            return 0 if sequential and body[0] == components else blocks * 64 * 2
    raise ValueError("the file ends before its first scan")


def _segments(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Markers with their segments, up to and including the first scan's header."""
    while True:
        if file.read(1) != b"\xff":
            raise ValueError("a JPEG marker is missing")
        marker = 0xFF
        while marker == 0xFF:
            (marker,) = struct.unpack("B", file.read(1))
        if marker in ALONE:
            yield marker, b""
            continue
        (length,) = struct.unpack(">H", file.read(2))
        yield marker, file.read(length - 2)
        if marker in (SOS, EOI):
            return


def damage(path: Path, kind: str) -> str:
    """What is wrong with the file as far as its structure tells; empty where nothing is.

    Decoders of damaged files tend to invent the rest of the picture, or to leave it black, and to say nothing.
    """
    probe = {"PNG": _png_damage, "JPEG": _jpeg_damage, "WEBP": _webp_damage}[kind]
    with path.open("rb") as file:
        return probe(file)


def _png_damage(file: BinaryIO) -> str:
    """Every chunk carries a checksum, and the last one is called IEND."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        checksum = zlib.crc32(kind)
        while length and (block := file.read(min(length, CHUNK_BYTES))):
            checksum, length = zlib.crc32(block, checksum), length - len(block)
        stored = file.read(4)
        if length or len(stored) < 4:
            break
        if stored != struct.pack(">I", checksum):
            return f"the checksum of its chunk {kind.decode('ascii', 'replace')} is wrong"
        if kind == b"IEND":
            return ""
    return CUT


def _jpeg_damage(file: BinaryIO) -> str:
    """The end marker follows the first scan."""
    for _ in _segments(file):
        pass
    last = b""
    while block := file.read(CHUNK_BYTES):
        if b"\xff\xd9" in last + block:
            return ""
        last = block[-1:]
    return CUT


def _webp_damage(file: BinaryIO) -> str:
    (length,) = struct.unpack("<4xI", file.read(8))
    return CUT if length + 8 > file.seek(0, 2) else ""


def _webp(file: BinaryIO) -> int:
    """The file itself, and the pixels of a lossless, transparent or animated image (4 bytes each).

    A simple lossy file starts with a chunk VP8; VP8L is lossless, VP8X announces more than one chunk.
    """
    head = file.read(30)
    size = file.seek(0, 2)
    if not re.fullmatch(rb"RIFF....WEBPVP8[ LX]", head[:16], re.DOTALL):
        raise ValueError("is no WebP file")
    if head[12:16] == b"VP8 ":
        return size
    if head[12:16] == b"VP8L":
        (bits,) = struct.unpack("<I", head[21:25])
        return size + 4 * ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    width, height = (int.from_bytes(head[i : i + 3], "little") + 1 for i in (24, 27))
    return size + 4 * width * height
