"""Pickled values without a free unpickler: bytes, 1-D uint8 arrays and flat containers, nothing else.

A pickle is a program; ``pickle.loads`` on a downloaded file runs it. Here the few global names that such
values need are replaced by stand-ins of our own, so that not even numpy's reconstruction code is called, and
every other name is refused (see docs/decisions/store-values.md).
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any

from utils.errors import UserError

JPEG_START = b"\xff\xd8"
# numpy.frombuffer(bytearray(<8-byte length> ...), "u1"), pickle protocol 5.
_HEAD = b"\x80\x05cnumpy\nfrombuffer\n\x96"
_TAIL = b"X\x02\x00\x00\x00u1\x86R."
_DATA_START = len(_HEAD) + 8
# Bytes after each opcode; negative: as many bytes of a length come first; None: text up to the end of the line.
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: -1,
    pickletools.TAKEN_FROM_ARGUMENT4: -4,
    pickletools.TAKEN_FROM_ARGUMENT4U: -4,
    pickletools.TAKEN_FROM_ARGUMENT8U: -8,
    pickletools.UP_TO_NEWLINE: None,
}
_ARGUMENTS = {
    ord(op.code): 0 if op.arg is None else _LENGTH_BYTES.get(op.arg.n, op.arg.n) for op in pickletools.opcodes
}
_STOP, _PUT, _LONG_PUT, _TWO_LINES = pickle.STOP[0], pickle.PUT[0], pickle.LONG_BINPUT[0], pickle.GLOBAL + pickle.INST


def pack_bytes(data: bytes) -> bytes:
    """Pickle of a writable 1-D uint8 array holding ``data``, read by ``pickle.loads`` under numpy 1 and 2."""
    return b"".join((_HEAD, struct.pack("<Q", len(data)), data, _TAIL))


def unpack_bytes(value: bytes) -> bytes:
    """The bytes inside a stored value: a pickled 1-D uint8 array, pickled ``bytes``, or a raw JPEG.

    Raises:
        UserError: the value is something else, is damaged, or names code outside the allow-list.
    """
    if value[:2] == JPEG_START:
        return value
    if value.startswith(_HEAD) and value.endswith(_TAIL):
        data = value[_DATA_START : -len(_TAIL)]
        if struct.unpack_from("<Q", value, len(_HEAD))[0] == len(data):
            return data
    content = load(value)
    if isinstance(content, _Array):
        return content.raw()
    if isinstance(content, (bytes, bytearray)):
        return bytes(content)
    raise UserError(f"the value holds a {type(content).__name__}, not the bytes of an image.")


def load(value: bytes) -> Any:
    """Unpickles plain values (str, bytes, numbers, containers), arrays as stand-ins; refuses the rest."""
    try:
        _check_sizes(value)
        return _Restricted(io.BytesIO(value)).load()
    except UserError:
        raise
    # Damaged or hostile opcodes end in any of these; all mean the same to the reader.
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        EOFError,
    ) as error:
        raise UserError(f"the value is not a readable pickle: {error}") from error
    except (OverflowError, MemoryError, RecursionError, ImportError, struct.error) as error:
        raise UserError(f"the value is not a sane pickle: {type(error).__name__}: {error}") from error


def _check_sizes(value: bytes) -> None:
    """Refuses lengths and memo numbers beyond the value, for which the unpickler would take memory at once.

    This takes up to 10 us for a patch in another form than ours; pickletools.genops takes three to ten times as long.
    """
    place, end = 0, len(value)
    while place < end:
        opcode = value[place]
        place += 1
        if opcode == _STOP or opcode not in _ARGUMENTS:  # the unpickler refuses the others
            return
        size, number = _ARGUMENTS[opcode], 0
        if size is None:
            start, place = place, value.find(b"\n", place) + 1 or end + 1
            if opcode in _TWO_LINES:
                place = value.find(b"\n", place) + 1 or end + 1
            elif opcode == _PUT:
                number = int(value[start:place])
        elif size < 0:
            place += int.from_bytes(value[place : place - size], "little") - size
        else:
            if opcode == _LONG_PUT:
                number = int.from_bytes(value[place : place + size], "little")
            place += size
        if place > end or number > end:
            raise pickle.UnpicklingError("it says that there is more than there is")


def load_count(value: bytes) -> int:
    """An int, also where numpy wrote it."""
    return _as_int(load(value), "the value")


def load_names(value: bytes) -> list[str]:
    """A list of names (``str`` or ``bytes``) as ``str``."""
    content = load(value)
    if not isinstance(content, (list, tuple)):
        raise UserError(f"expected a list of names, found a {type(content).__name__}.")
    return [_as_str(item) for item in content]


def load_counts(value: bytes) -> dict[str, int]:
    """A mapping of names to counts."""
    content = load(value)
    if not isinstance(content, dict):
        raise UserError(f"expected a mapping of slides to counts, found a {type(content).__name__}.")
    return {
        name: _as_int(v, f"the count of {name!r}")
        for name, v in zip(map(_as_str, content), content.values(), strict=True)
    }


def _as_str(item: Any) -> str:
    if isinstance(item, _Scalar):
        item = item.value
    if isinstance(item, bytes):
        item = item.decode("utf-8", errors="strict")
    if not isinstance(item, str):
        raise UserError(f"expected a name, found a {type(item).__name__}.")
    return item


def _as_int(item: Any, what: str) -> int:
    if isinstance(item, _Scalar):
        item = item.value
    if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 2**48:
        shown = str(item) if isinstance(item, (int, float)) else type(item).__name__
        raise UserError(f"{what} is not a count of patches: {shown[:40]}.")
    return item


class _Stand:
    """Base of the stand-ins: no attribute can be set from inside a pickle."""

    __slots__: tuple[str, ...] = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state is not allowed here")


class _Dtype(_Stand):
    """Stand-in for numpy.dtype: keeps the kind ('u1', 'i8', 'U5'), nothing else."""

    __slots__ = ("kind",)

    def __init__(self, kind: Any, *_flags: Any) -> None:
        self.kind = kind.lstrip("<|=") if isinstance(kind, str) else ""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|"):
            raise pickle.UnpicklingError("only little-endian plain dtypes are allowed")


class _Array(_Stand):
    """Stand-in for a 1-D uint8 array."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | bytearray = b"") -> None:
        self.data = data

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, _fortran, data = state
        self.data = _checked(data, dtype, shape)

    def raw(self) -> bytes:
        return bytes(self.data)


class _Scalar(_Stand):
    """Stand-in for numpy.int64(...) and numpy.str_(...)."""

    __slots__ = ("value",)

    def __init__(self, value: int | str) -> None:
        self.value = value


class _ArrayType(_Stand):
    """Stand-in for the class numpy.ndarray, which pickles name but need not call."""


class _Call(_Stand):
    """A callable that a pickle may name; its attributes are out of reach."""

    __slots__ = ("function",)
    function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("attributes cannot be set")

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _checked(data: Any, dtype: Any, shape: Any) -> bytes | bytearray:
    kind = dtype.kind if isinstance(dtype, _Dtype) else _Dtype(dtype).kind
    if kind not in ("u1", "uint8", "B") or not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("only uint8 arrays are allowed")
    if shape is not None and tuple(shape) != (len(data),):
        raise pickle.UnpicklingError("only one-dimensional arrays are allowed")
    return data


def _frombuffer(data: Any, dtype: Any = "", shape: Any = None, _order: Any = "C") -> _Array:
    return _Array(_checked(data, dtype, shape))


def _reconstruct(kind: Any, _shape: Any, _typecode: Any) -> _Array:
    if kind is not _ARRAY_TYPE:
        raise pickle.UnpicklingError("only arrays are allowed")
    return _Array()


def _scalar(dtype: Any, data: Any) -> _Scalar:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or len(data) > 4096:
        raise pickle.UnpicklingError("only small numpy scalars are allowed")
    if dtype.kind[:1] == "U":
        return _Scalar(data.decode("utf-32-le").rstrip("\0"))
    if dtype.kind[:1] in ("i", "u"):
        return _Scalar(int.from_bytes(data, "little", signed=dtype.kind[0] == "i"))
    raise pickle.UnpicklingError("only integer and string scalars are allowed")


def _latin1(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("only latin1 text stands for bytes")
    return text.encode("latin1")


def _bytes(data: Any = b"") -> bytes:
    if not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError("only bytes make bytes")
    return bytes(data)


_ARRAY_TYPE = _ArrayType()
_CORES = ("numpy.core", "numpy._core")
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _ARRAY_TYPE,
    ("numpy", "dtype"): _Call(_Dtype),
    ("numpy", "frombuffer"): _Call(_frombuffer),
    ("_codecs", "encode"): _Call(_latin1),
    **{(f"{core}.multiarray", "_reconstruct"): _Call(_reconstruct) for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _Call(_scalar) for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _Call(_frombuffer) for core in _CORES},
    **{(module, name): _Call(_bytes) for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
}


class _Restricted(pickle.Unpickler):
    """Finds only the names in ``_ALLOWED``, and gives the stand-in for each."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UserError(
                f"the value is a pickle that calls {module}.{name}, which is not allowed: "
                "the file is not a patch store, or someone has put code into it."
            ) from None
