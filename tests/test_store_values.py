"""Stored values: what plain readers get, what ours accepts, and what a hostile file cannot do."""

from __future__ import annotations

import builtins
import os
import pickle
import pickletools
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from datasets import jpeg
from datasets.store import PatchStore, StoreHeader, StoreWriter, safe_pickle
from utils.errors import UserError

DATA = b"\xff\xd8" + bytes(range(256)) * 300 + b"\xff\xd9"


def test_a_plain_reader_gets_a_writable_uint8_array() -> None:
    array = pickle.loads(safe_pickle.pack_bytes(DATA))
    assert (type(array), array.dtype, array.ndim) == (np.ndarray, np.uint8, 1)
    assert array.flags.writeable
    assert array.tobytes() == DATA


def test_our_value_names_one_public_function_only() -> None:
    """numpy.frombuffer exists under numpy 1 and 2; private modules moved between the two."""
    value = safe_pickle.pack_bytes(DATA)
    names = [arg for op, arg, _ in pickletools.genops(value) if op.name in ("GLOBAL", "STACK_GLOBAL")]
    assert names == ["numpy frombuffer"]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "content",
    [DATA, bytearray(DATA), np.frombuffer(DATA, np.uint8), np.frombuffer(DATA, np.uint8).copy()],
    ids=["bytes", "bytearray", "readonly array", "array"],
)
def test_every_pickled_form_is_read(protocol: int, content: Any) -> None:
    assert safe_pickle.unpack_bytes(pickle.dumps(content, protocol)) == DATA


@pytest.mark.parametrize("old", [b"numpy.core", b"numpy._core"])
def test_arrays_of_numpy_1_and_2_are_read(old: bytes) -> None:
    value = pickle.dumps(np.frombuffer(DATA, np.uint8).copy(), 2)
    for name in (b"numpy._core", b"numpy.core"):
        value = value.replace(b"c" + name, b"c" + old)
    assert b"c" + old + b".multiarray" in value
    assert safe_pickle.unpack_bytes(value) == DATA


def test_raw_jpeg_and_own_form_are_read() -> None:
    assert safe_pickle.unpack_bytes(DATA) == DATA
    assert safe_pickle.unpack_bytes(safe_pickle.pack_bytes(DATA)) == DATA


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_counts_and_names_are_read(protocol: int) -> None:
    assert safe_pickle.load_count(pickle.dumps(np.int64(70_000), protocol)) == 70_000
    assert safe_pickle.load_names(pickle.dumps([np.str_("é"), "b", b"c"], protocol)) == ["é", "b", "c"]
    counts = safe_pickle.load_counts(pickle.dumps({"a": np.int32(3), np.str_("b"): 4}, protocol))
    assert counts == {"a": 3, "b": 4}


class Hostile:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


HOSTILE = {
    "os.system": lambda mark: Hostile(os.system, f"touch {mark}"),
    "eval": lambda mark: Hostile(eval, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Hostile(builtins.open, str(mark), "w"),
    "getattr": lambda mark: Hostile(getattr, "a", "upper"),
    "numpy.fromfile": lambda mark: Hostile(np.fromfile, "/etc/hostname", np.uint8),
    "numpy.load": lambda mark: Hostile(np.load, "/etc/hostname", None, True),
    "subprocess": lambda mark: Hostile(subprocess.Popen, ["touch", str(mark)]),
    "nested": lambda mark: [b"x", {"a": (Hostile(os.system, f"touch {mark}"),)}],
    "object array": lambda mark: np.array([Hostile(os.system, f"touch {mark}")], dtype=object),
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
@pytest.mark.parametrize("protocol", [2, 5])
def test_hostile_pickles_are_refused_and_run_nothing(kind: str, protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    value = pickle.dumps(HOSTILE[kind](mark), protocol)
    for load in (
        safe_pickle.unpack_bytes,
        safe_pickle.load_counts,
        safe_pickle.load_names,
        safe_pickle.load_count,
    ):
        with pytest.raises(UserError):
            load(value)
    assert not mark.exists()


@pytest.mark.parametrize("where", ["__pn__", "__slide__", "a-0", "__header__"])
def test_hostile_stores_are_refused(where: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "bad.lmdb"
    with StoreWriter(path, StoreHeader()) as writer:
        writer.put_slide("a", [DATA])
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.put(where.encode(), pickle.dumps(Hostile(os.system, f"touch {mark}")))
    with pytest.raises(UserError, match=r"bad\.lmdb"):
        PatchStore(path).read("a", [0])
    assert not mark.exists()


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x80",
        b"garbage",
        b"\x80\x05.",
        pickle.dumps(np.zeros((2, 2), np.uint8)),
        pickle.dumps(np.zeros(4, np.int64)),
        pickle.dumps(np.zeros(4, np.uint8), 5)[:-9],
        pickle.dumps({"a": 1}),
        b"\x80\x05cnumpy\nndarray\nK\x01b.",
        b"\x80\x05cnumpy\nfrombuffer\n}X\x08\x00\x00\x00functionNs\x86b.",
        b"\x80\x04P1\n.",
        b"\x80\x04\x82\x01.",
    ],
)
def test_other_content_is_refused_with_a_sentence(value: bytes) -> None:
    with pytest.raises(UserError):
        safe_pickle.unpack_bytes(value)


@pytest.mark.parametrize(
    "value",
    [
        b"\x80\x04Nr\xff\xff\xff\x07.",
        b"\x80\x04Np134217727\n.",
        b"\x80\x05\x96" + (2**31).to_bytes(8, "little") + b".",
        b"\x80\x04cnumpy\ndtype\nr\xff\xff\xff\x07.",
        b"\x80\x04C\x02ab0Nr\xff\xff\xff\x07.",
    ],
)
def test_a_few_bytes_do_not_take_gigabytes(value: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="it says that there is more than there is"):
            safe_pickle.unpack_bytes(value)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(6))
def test_sizes_of_sound_pickles_are_sound(protocol: int) -> None:
    content = {"é\n": [b"x" * 300, 2.5, None, True, (1, 2**90)], "many": [f"name {i}" for i in range(400)]}
    assert safe_pickle.load(pickle.dumps(content, protocol)) == content


def test_state_cannot_change_the_stand_ins() -> None:
    """BUILD on a named callable would otherwise set attributes that later pickles use."""
    attack = b"\x80\x02cnumpy\nfrombuffer\n(dX\x08\x00\x00\x00functioncbuiltins\nbytes\nstb."
    with pytest.raises(UserError):
        safe_pickle.load(attack)
    assert safe_pickle.unpack_bytes(pickle.dumps(np.frombuffer(DATA, np.uint8), 5)) == DATA


@pytest.mark.parametrize("content", [{"a": -1}, {"a": True}, {"a": 2.0}, {"a": "3"}, {"a": 2**60}, {1: 1}, [1]])
def test_counts_must_be_counts(content: Any) -> None:
    with pytest.raises(UserError):
        safe_pickle.load_counts(pickle.dumps(content))


def readme_snippet() -> str | None:
    """The published loading example, from the specification beside the data; None where it is absent."""
    spec = Path(__file__).resolve().parents[1] / os.environ.get("ABMILX_DATA", "../shared/data")
    readme = spec.parent / "spec" / "user-readme.md"
    if not readme.is_file():
        return None
    blocks = readme.read_text(encoding="utf-8").split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if "imfrombytes" in block)


COPY_OF_SNIPPET = """
import lmdb
import torch
import pickle
from datasets.utils import imfrombytes

slide_name = "xxxx"
path_to_lmdb = "YOUR_PATH_TO_LMDB_FILE"
env = lmdb.open(path_to_lmdb, subdir=False, readonly=True, lock=False,
                readahead=False, meminit=False, map_size=100 * (1024**3))
with env.begin(write=False) as txn:
    pn_dict = pickle.loads(txn.get(b'__pn__'))
    num_patches = pn_dict[slide_name]
    patch_ids = [f"{slide_name}-{i}" for i in range(num_patches)]
    patches_tensor = torch.empty((len(patch_ids), 3, 224, 224), dtype=torch.float32)
    for i, key_str in enumerate(patch_ids):
        patch_bytes = txn.get(key_str.encode('ascii'))
        img_array = imfrombytes(pickle.loads(patch_bytes).tobytes())
        patches_tensor[i] = torch.from_numpy(img_array.transpose(2, 0, 1))
mean = torch.tensor([0.485, 0.456, 0.406]).view((1, 3, 1, 1)) * 255.0
std = torch.tensor([0.229, 0.224, 0.225]).view((1, 3, 1, 1)) * 255.0
patches_tensor = (patches_tensor.float() - mean) / std
env.close()
"""


def test_the_published_loading_example_runs_as_printed(tmp_path: Path) -> None:
    image = np.zeros((224, 224, 3), np.uint8)
    image[..., 0], image[..., 2] = 200, 50
    path = tmp_path / "my.lmdb"
    with StoreWriter(path, StoreHeader()) as writer:
        writer.put_slide("slide", [jpeg.encode(image), jpeg.encode(image[::-1])])
    code = (readme_snippet() or COPY_OF_SNIPPET).replace("xxxx", "slide").replace("YOUR_PATH_TO_LMDB_FILE", str(path))
    code += "\nimport numpy\nnumpy.save(r'%s', patches_tensor.mean((0, 2, 3)).numpy())\n" % (tmp_path / "mean.npy")
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = (np.array([200, 0, 50]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(np.load(tmp_path / "mean.npy"), expected, atol=0.05)
