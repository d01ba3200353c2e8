"""Whether an LMDB file is as long as its data. LMDB does not look, and reading beyond the end kills the program.

A whole file may be shorter than its last page number says: pages at its end that were taken and freed within one
transaction are never written. They are in LMDB's list of free pages, which it shows to nobody, so where a file is short
the list is read here, from the file (LMDB 0.9, 64 bits, little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError

PAGE_HEADER_BYTES = 16
BRANCH, BIG_VALUE = 0x01, 0x01
NO_PAGE = 2**64 - 1
# In the two first pages: the root of the tree of free pages, and the transaction that wrote it.
_ROOT_AND_TRANSACTION = struct.Struct("<80xQ56xQ")
_PAGE_HEADER = struct.Struct("<10xHH2x")
# A value's size or, in a branch, a page's number in three parts; then the size of the key.
_NODE = struct.Struct("<HHHH")


def check_length(file: Path, env: Any) -> None:
    """Refuses a file whose end is missing.

    Args:
        file: what ``env`` has open.
        env: the LMDB environment; closed when the file is refused.

    Raises:
        UserError: pages that hold data are missing.
    """
    facts, page_bytes = env.info(), env.stat()["psize"]
    said = (facts["last_pgno"] + 1) * page_bytes
    # Looked at after LMDB's own page: a writer at work writes that last, and makes the file longer only.
    found = file.stat().st_size
    if found >= said:
        return
    try:
        absent = set(range(found // page_bytes, facts["last_pgno"] + 1)).difference(_free_pages(file, page_bytes))
    except (struct.error, ValueError):  # the list is cut off, too
        absent = {facts["last_pgno"]}
    if absent and env.info()["last_txnid"] == facts["last_txnid"]:  # otherwise a writer changed what was read here
        env.close()
        raise UserError(
            f"{file}: is {said - found:,} bytes shorter than it says: a copy of it was interrupted, or is not finished "
            "yet. Copy it again."
        )


def _free_pages(file: Path, page_bytes: int) -> Iterator[int]:
    with file.open("rb") as data:
        firsts = [_ROOT_AND_TRANSACTION.unpack_from(_read(data, number * page_bytes, page_bytes)) for number in (0, 1)]
        root, _ = max(firsts, key=lambda first: first[1])
        waiting, seen = [] if root == NO_PAGE else [root], set[int]()
        while waiting:
            number = waiting.pop()
            if number in seen:
                raise ValueError("the tree of free pages has a circle")
            seen.add(number)
            page = _read(data, number * page_bytes, page_bytes)
            flags, end = _PAGE_HEADER.unpack_from(page)
            for (place,) in struct.iter_unpack("<H", page[PAGE_HEADER_BYTES:end]):
                low, high, more, key_bytes = _NODE.unpack_from(page, place)
                if flags & BRANCH:
                    waiting.append(low | high << 16 | more << 32)
                    continue
                value = page[place + _NODE.size + key_bytes :]
                if more & BIG_VALUE:
                    start = struct.unpack_from("<Q", value)[0] * page_bytes + PAGE_HEADER_BYTES
                    value = _read(data, start, low | high << 16)
                yield from struct.unpack_from(f"<{struct.unpack_from('<Q', value)[0]}Q", value, 8)


def _read(data: IO[bytes], start: int, count: int) -> bytes:
    data.seek(start)
    return data.read(count)
