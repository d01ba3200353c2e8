"""What is where in a store: key names and the JSON records behind them (FORMAT.md has it in words)."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils.errors import UserError

FORMAT_VERSION = 1
KEYS, LEN, SLIDES, COUNTS = b"__keys__", b"__len__", b"__slide__", b"__pn__"
HEADER, PENDING, LISTED = b"__header__", b"__pending__", b"__listed__"
RECORDS = (KEYS, LEN, SLIDES, COUNTS, HEADER, PENDING, LISTED)
# Header fields that may differ between slides of one store.
MERGED = ("level", "patch_size_px")
# JSON types of the records' fields; all others are counts and sizes, or null.
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "mpp": (int, float, type(None)),
    "parameters": (dict,),
    "count": (int,),
    "source": (dict,),
    "fingerprint": (str,),
}
# LMDB allows keys of 511 bytes; the longest of ours is "__coords__/" + name, or name + "-" + index.
MAX_NAME_BYTES = 480


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """How the patches of a store were made; the same for all its slides.

    ``mpp`` and ``level`` are as requested, None where they differ from slide to slide or are unknown; the
    resolved values are in each slide's ``SlideInfo``. ``image_size_px`` is the side of the stored JPEGs,
    ``patch_size_px`` the side that was read at ``level``.
    """

    version: int = FORMAT_VERSION
    mpp: float | None = None
    level: int | None = None
    patch_size_px: int | None = None
    image_size_px: int | None = None
    jpeg_quality: int | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, other: StoreHeader) -> list[str]:
        """The fields that forbid joining two stores, as 'name: theirs, not ours'.

        Levels and read sizes may differ from slide to slide (scanners differ; ``mpp`` is what counts).
        """
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        names = [name for name in mine if name not in MERGED and mine[name] != theirs[name]]
        return [f"{name}: {theirs[name]!r}, not {mine[name]!r}" for name in names]

    def merged(self, other: StoreHeader) -> StoreHeader:
        """The header of both together: level and read size are None where they differ."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        unequal: dict[str, Any] = {name: None for name in MERGED if mine[name] != theirs[name]}
        return dataclasses.replace(self, **unequal)


@dataclass(frozen=True, kw_only=True)
class SlideInfo:
    """What is recorded for one finished slide.

    ``source`` says what the patches were read from (file name, size in bytes, modification time);
    ``fingerprint`` changes when the source, the coordinates or the parameters change. ``mpp`` and ``level``
    are the resolved values, ``patch_size_px`` the side that was read at ``level``.
    """

    count: int = 0
    mpp: float | None = None
    level: int | None = None
    patch_size_px: int | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


def dump_record(record: StoreHeader | SlideInfo) -> bytes:
    return json.dumps(dataclasses.asdict(record), sort_keys=True).encode()


def load_header(value: bytes) -> StoreHeader:
    header = StoreHeader(**_known_fields(value, StoreHeader))
    if header.version > FORMAT_VERSION:
        raise UserError(
            f"store format version {header.version} is newer than {FORMAT_VERSION}, the newest that "
            "this program reads: update the program."
        )
    return header


def load_info(value: bytes) -> SlideInfo:
    return SlideInfo(**_known_fields(value, SlideInfo))


def _known_fields(value: bytes, kind: type) -> dict[str, Any]:
    try:
        content = json.loads(value)
    except ValueError as error:
        raise UserError(f"a record of the store is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"a record of the store is a {type(content).__name__}, not a mapping.")
    names = {f.name for f in dataclasses.fields(kind)}
    known = {k: v for k, v in content.items() if k in names}
    for name, found in known.items():
        expected = FIELD_TYPES.get(name, (int, type(None)))
        if not isinstance(found, expected) or isinstance(found, bool):
            raise UserError(f"a record of the store has a {type(found).__name__} as {name}: damaged.")
    return known


def patch_key(slide: str, index: int) -> bytes:
    """The published key of a patch: ``{slide}-{index}``, unpadded; UTF-8, which is ASCII for ASCII names."""
    return f"{slide}-{index}".encode()


def coords_key(slide: str) -> bytes:
    return f"__coords__/{slide}".encode()


def sums_key(slide: str) -> bytes:
    return f"__crc32__/{slide}".encode()


def info_key(slide: str) -> bytes:
    return f"__info__/{slide}".encode()


def checksum(jpeg: bytes) -> int:
    """What is stored beside a patch, to know later that it is what was written."""
    return zlib.crc32(jpeg)


def check_name(slide: str) -> None:
    """Refuses names that cannot be keys."""
    size = len(slide.encode())
    if not 0 < size <= MAX_NAME_BYTES:
        raise UserError(
            f"slide name {slide[:60]!r} has {size} bytes; a store takes 1 to {MAX_NAME_BYTES}. Rename the slide."
        )


def pickle_keys(counts: Iterable[tuple[str, int]]) -> bytes:
    """Pickle of the list of all patch keys (bytes), made without the list: stores hold millions."""
    out = bytearray(b"\x80\x04](")
    for slide, count in counts:
        stem = f"{slide}-".encode()
        for index in range(count):
            key = stem + b"%d" % index
            # SHORT_BINBYTES has a one-byte length, BINBYTES a four-byte one.
            out += b"C%c" % len(key) if len(key) < 256 else b"B" + len(key).to_bytes(4, "little")
            out += key
    out += b"e."
    return bytes(out)
