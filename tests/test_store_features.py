"""Features and coordinates as CLAM, TRIDENT and the published program leave them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from datasets.features import FeatureFolder, read_features
from utils.errors import UserError

VALUES = torch.arange(12, dtype=torch.float32).reshape(4, 3)
COORDS = np.arange(8).reshape(4, 2) * 256


def write_h5(path: Path, values: np.ndarray, coords: np.ndarray | None, name: str = "features") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=values)
        if coords is not None:
            file.create_dataset("coords", data=coords)
    return path


def write_pt(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def test_clam_folder_takes_tensors_from_pt_and_coordinates_from_h5(tmp_path: Path) -> None:
    for slide, scale in (("b", 1.0), ("a", 2.0)):
        write_pt(tmp_path / "pt_files" / f"{slide}.pt", VALUES * scale)
        write_h5(tmp_path / "h5_files" / f"{slide}.h5", VALUES.numpy() * scale, COORDS)
    folder = FeatureFolder(tmp_path)
    assert folder.slides == ["a", "b"]
    assert (dict(folder.counts), folder.width) == ({"a": 4, "b": 4}, 3)
    assert torch.equal(folder.read("a"), VALUES * 2)
    assert np.array_equal(folder.coords("b"), COORDS)  # type: ignore[arg-type]


def test_h5_files_only(tmp_path: Path) -> None:
    write_h5(tmp_path / "h5_files" / "a.h5", VALUES.numpy(), COORDS.astype(np.int32))
    folder = FeatureFolder(tmp_path)
    assert torch.equal(folder.read("a"), VALUES)
    coords = folder.coords("a")
    assert coords is not None
    assert coords.dtype == np.int64


def test_trident_folder_with_a_leading_axis(tmp_path: Path) -> None:
    write_h5(tmp_path / "TCGA-1.2.h5", VALUES.numpy()[None], COORDS[None])
    folder = FeatureFolder(tmp_path)
    assert folder.slides == ["TCGA-1.2"]
    assert (folder.counts["TCGA-1.2"], folder.width) == (4, 3)
    assert torch.equal(folder.read("TCGA-1.2"), VALUES)
    assert np.array_equal(folder.coords("TCGA-1.2"), COORDS)  # type: ignore[arg-type]


def test_tensors_are_mapped_not_loaded(tmp_path: Path) -> None:
    """A private map of the file: a change of the file's bytes before use is seen."""
    path = write_pt(tmp_path / "a.pt", torch.zeros(1 << 18, 2))
    values = read_features(path).values
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(data) // 2 & ~4095)
        file.write(b"\0\0\x80\x3f" * 1024)
    assert values.max() == 1.0


def test_old_tensor_files_and_mappings_are_read(tmp_path: Path) -> None:
    torch.save(VALUES, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_features(tmp_path / "old.pt").values, VALUES)
    path = write_pt(tmp_path / "dict.pt", {"features": VALUES.half(), "coords": torch.from_numpy(COORDS)})
    values, coords = read_features(path)
    assert values.dtype == torch.float16
    assert np.array_equal(coords, COORDS)  # type: ignore[arg-type]


class Hostile:
    def __reduce__(self) -> object:
        return os.system, ("touch /tmp/should-not-exist-features",)


def test_bad_files_get_a_sentence(tmp_path: Path) -> None:
    write_pt(tmp_path / "int.pt", torch.zeros(3, 2, dtype=torch.int64))
    write_pt(tmp_path / "flat.pt", torch.zeros(3))
    write_pt(tmp_path / "list.pt", [1, 2])
    write_h5(tmp_path / "other.h5", VALUES.numpy(), None, name="imgs")
    write_h5(tmp_path / "short.h5", VALUES.numpy(), COORDS[:3])
    (tmp_path / "junk.h5").write_bytes(b"junk")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    write_pt(tmp_path / "cut.pt", torch.zeros(10_000, 2))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:20_000])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Hostile()))
    write_pt(tmp_path / "code.pt", [Hostile()])
    cases = {
        "int.pt": "torch.int64",
        "flat.pt": r"holds \(3,\)",
        "list.pt": "holds a list",
        "other.h5": "no dataset 'features'; it holds imgs",
        "short.h5": "4 features and 3 coordinates",
        "junk.h5": "not a readable HDF5",
        "junk.pt": r"^[^\n]*junk.pt is damaged or something else \(4 bytes\): extract [^\n]* again\.$",
        "cut.pt": r"^[^\n]*cut.pt is damaged or something else \(20,000 bytes\): extract [^\n]* again\.$",
        "empty.pt": r"empty.pt is damaged or something else \(0 bytes\)",
        "evil.pt": r"evil.pt is damaged or something else",
        "code.pt": r"^[^\n]*code.pt holds more than plain data, [^\n]* again\.$",
        "flatt.pt": "Did you mean 'flat.pt'",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            read_features(tmp_path / name)
    assert not Path("/tmp/should-not-exist-features").exists()


def test_folders_without_features_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pt_files/\*\.pt"):
        FeatureFolder(tmp_path)
    with pytest.raises(UserError, match="no such feature folder"):
        FeatureFolder(tmp_path / "nowhere")
    (tmp_path / "high.lmdb").touch()
    for path, what in ((tmp_path / "high.lmdb", "is a file, and features lie in a folder"), (tmp_path, "no features")):
        with pytest.raises(UserError, match=rf"{what}.*--model=e2e_<encoder>_<mil>"):
            FeatureFolder(path)
    write_pt(tmp_path / "slide-01.pt", VALUES)
    with pytest.raises(UserError, match="Did you mean 'slide-01'"):
        FeatureFolder(tmp_path).read("slide-1")
    assert "other" not in FeatureFolder(tmp_path).counts
