"""Bags of features: sampling, padding, positions, RAM, against cases computed by hand."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets.bags import Bags, SamplingPlan, TrainBags
from datasets.eval_parts import EvalParts, PartPlan
from datasets.features import FeatureFolder
from datasets.instances import FeatureSource
from datasets.labels.types import Sample
from datasets.positions import CoordinateFolder, Grid, grid_step_px
from modules.model import SlideModel
from utils.errors import Faults, UserError

STEP_PX = 256


class Corners:
    """Coordinates held in memory."""

    path = Path("memory")

    def __init__(self, corners: dict[str, list[tuple[int, int]]]) -> None:
        self.corners = corners

    def coords(self, slide: str) -> np.ndarray | None:
        return np.array(self.corners[slide], np.int64) if slide in self.corners else None


def features_of(slide: str, count: int) -> Tensor:
    """Row i of slide 's<n>' is (n, i)."""
    return torch.stack([torch.full((count,), float(slide[1:])), torch.arange(count).float()], 1)


@pytest.fixture
def folder(tmp_path: Path) -> FeatureFolder:
    (tmp_path / "pt_files").mkdir()
    for slide, count in (("s1", 6), ("s2", 4)):
        torch.save(features_of(slide, count), tmp_path / "pt_files" / f"{slide}.pt")
    return FeatureFolder(tmp_path)


def sample(*slides: str) -> Sample:
    return Sample(slides[0], "case", slides, {"label": 1})


def bag(source: FeatureSource, plan: SamplingPlan, *slides: str, epoch: int = 0) -> Bags:
    return TrainBags([sample(*slides)], [source], plan)[[(epoch, 0)]]


def test_same_psize_takes_a_new_subset_every_epoch(folder: FeatureFolder) -> None:
    drawn = [bag(FeatureSource(folder), SamplingPlan(3), "s1", epoch=e).instances[:, 1].tolist() for e in range(20)]
    assert all(len(set(rows)) == 3 for rows in drawn)
    assert {row for rows in drawn for row in rows} == set(range(6))
    assert len({tuple(rows) for rows in drawn}) > 5
    assert drawn[4] == bag(FeatureSource(folder), SamplingPlan(3), "s1", epoch=4).instances[:, 1].tolist()


def test_short_bags_stay_short_or_are_filled_with_duplicates(folder: FeatureFolder) -> None:
    short = bag(FeatureSource(folder), SamplingPlan(7), "s2")
    assert sorted(short.instances[:, 1].tolist()) == [0, 1, 2, 3]
    filled = bag(FeatureSource(folder), SamplingPlan(7, pad=True), "s2")
    assert len(filled.instances) == 7
    assert filled.keep is None
    assert set(filled.instances[:, 1].tolist()) == {0, 1, 2, 3}


def test_shuffle_changes_the_order_and_nothing_else(folder: FeatureFolder) -> None:
    plain = bag(FeatureSource(folder), SamplingPlan(0), "s1").instances
    assert torch.equal(plain, features_of("s1", 6))
    orders = {
        tuple(bag(FeatureSource(folder), SamplingPlan(0, shuffle=True), "s1", epoch=e).instances[:, 1].tolist())
        for e in range(5)
    }
    assert len(orders) > 1
    assert all(sorted(order) == list(range(6)) for order in orders)


def test_half_precision_reaches_the_model_as_float32(tmp_path: Path) -> None:
    torch.save(features_of("s1", 4).half(), tmp_path / "s1.pt")
    half = bag(FeatureSource(FeatureFolder(tmp_path)), SamplingPlan(0), "s1")
    assert half.instances.dtype == torch.float16
    seen: list[torch.dtype] = []

    class Head(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            seen.append(x.dtype)
            return x.mean(1)

    SlideModel(Head())(half.instances, half.sizes)
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("corners", "step"),
    [
        ([(0, 0), (256, 0), (1024, 0), (0, 256)], 256),
        ([(100, 7), (612, 7), (1124, 7), (1125, 519)], 512),
        ([(0, 0), (128, 0), (256, 0), (384, 0), (0, 128)], 128),
        ([(5, 5)], 1),
        ([(0, 0), (300, 300)], 1),
    ],
)
def test_the_step_of_a_grid(corners: list[tuple[int, int]], step: int) -> None:
    shuffled = np.random.default_rng(0).permutation(np.array(corners, np.int64))
    assert grid_step_px(shuffled) == step


def test_positions_follow_their_instances(folder: FeatureFolder) -> None:
    corners = Corners({"s1": [(256 * i, 512) for i in range(6)]})
    source = FeatureSource(folder, Grid(corners, corners))
    drawn = bag(source, SamplingPlan(4), "s1")
    assert drawn.pos is not None
    assert torch.equal(drawn.pos[:, 0], drawn.instances[:, 1].long())
    assert set(drawn.pos[:, 1].tolist()) == {2}
    whole = EvalParts([sample("s1")], source, PartPlan(4, 4), [0])
    pos = torch.cat([whole[0].pos, whole[1].pos])
    assert torch.equal(pos[:, 0], torch.arange(6))


def test_low_magnification_lies_on_the_same_grid(folder: FeatureFolder) -> None:
    high = Corners({"s1": [(256 * i, 0) for i in range(6)]})
    low = Corners({"s1": [(512 * i, 0) for i in range(6)]})
    sources = [FeatureSource(folder, Grid(low, high)), FeatureSource(folder, Grid(high, high))]
    drawn = TrainBags([sample("s1")], sources, SamplingPlan(0))[[(0, 0)]]
    assert drawn.pos is not None
    assert drawn.pos[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 0, 1, 2, 3, 4, 5]


def test_slides_of_one_bag_lie_side_by_side(folder: FeatureFolder) -> None:
    corners = Corners({"s1": [(256 * i, 0) for i in range(6)], "s2": [(256 * i, 256) for i in range(4)]})
    drawn = bag(FeatureSource(folder, Grid(corners, corners)), SamplingPlan(0), "s1", "s2")
    assert drawn.pos is not None
    cells = {tuple(cell) for cell in drawn.pos.tolist()}
    assert len(cells) == 10
    assert min(column for column, row in cells if row == 1) > max(column for column, row in cells if row == 0)


def test_batches_of_unequal_bags_score_as_bags_one_by_one(folder: FeatureFolder) -> None:
    """Zero rows of the published padding received attention (T56); here what fills up a batch is masked."""
    from modules.heads import build_mil
    from utils.config import ModelConfig

    corners = Corners({"s1": [(256 * i, 0) for i in range(6)], "s2": [(0, 256 * i) for i in range(4)]})
    source = FeatureSource(folder, Grid(corners, corners))
    one, two = (bag(source, SamplingPlan(5), slide) for slide in ("s1", "s2"))
    both = TrainBags([sample("s1"), sample("s2")], [source], SamplingPlan(5))[[(0, 0), (0, 1)]]
    assert both.sizes == [5, 4]
    torch.manual_seed(0)
    for name, options in (
        ("abmil", ModelConfig(inner_dim=8)),
        ("vitmil", ModelConfig(inner_dim=8, n_heads=2, pos="sincos")),
        ("2dmamba", ModelConfig(inner_dim=8)),
    ):
        model = SlideModel(build_mil(name, 2, 3, options)).eval()
        joined, _ = model(both.instances, both.sizes, pos=both.pos if name != "abmil" else None)
        for row, single in enumerate((one, two)):
            alone, _ = model(single.instances, single.sizes, pos=single.pos if name != "abmil" else None)
            torch.testing.assert_close(joined[row], alone[0], rtol=1e-4, atol=1e-5)


def test_positions_change_what_position_heads_say(folder: FeatureFolder) -> None:
    from modules.heads import build_mil
    from utils.config import ModelConfig

    model = SlideModel(build_mil("vitmil", 2, 3, ModelConfig(inner_dim=8, n_heads=2, pos="sincos"))).eval()
    x = features_of("s1", 6)
    near, far = torch.zeros(6, 2, dtype=torch.int64), torch.arange(12).view(6, 2)
    assert not torch.allclose(model(x, [6], pos=near)[0], model(x, [6], pos=far)[0])
    with pytest.raises(UserError, match="needs the grid position"):
        model(x, [6])


def test_dropped_duplicates_take_their_positions_with_them() -> None:
    got: list[Tensor] = []

    class Head(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor) -> Tensor:
            got.append(pos)
            return x.mean(1)

    keep = torch.tensor([True, False, True, True])
    pos = torch.arange(8).view(4, 2)
    SlideModel(Head())(torch.zeros(4, 3), [2, 2], keep, pos=pos)
    assert got[0].tolist() == [[[0, 1], [0, 0]], [[4, 5], [6, 7]]]


def test_coordinates_from_a_folder_of_h5(tmp_path: Path) -> None:
    (tmp_path / "patches").mkdir()
    with h5py.File(tmp_path / "patches" / "s1.h5", "w") as file:
        file["coords"] = np.array([[0, 0], [256, 0]])
    with h5py.File(tmp_path / "patches" / "bad.h5", "w") as file:
        file["imgs"] = np.zeros(2)
    folder = CoordinateFolder(tmp_path)
    assert folder.coords("s1").tolist() == folder.coords("s1.svs").tolist() == [[0, 0], [256, 0]]
    with pytest.raises(UserError, match="no s2.h5. Did you mean 's1'"):
        folder.coords("s2")
    with pytest.raises(UserError, match="no dataset 'coords'"):
        folder.coords("bad")
    with pytest.raises(UserError, match="no such folder"):
        CoordinateFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="coordinates of slide 's9' are not known"):
        Grid(Corners({}), Corners({})).cells("s9")


def test_features_in_memory_are_not_read_again(folder: FeatureFolder) -> None:
    assert folder.keep_in_memory(["s1", "s1"]) == 6 * 2 * 4
    folder.file("s1").unlink()
    assert torch.equal(folder.read("s1"), features_of("s1", 6))
    folder.file("s2").unlink()
    with pytest.raises(UserError, match="no such feature file"):
        folder.read("s2")


def test_features_that_do_not_fit_are_refused(folder: FeatureFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    size = folder.file("s1").stat().st_size
    monkeypatch.setattr("datasets.features.free_memory", lambda: 2 * size)
    folder.keep_in_memory(["s1"], processes=2)
    monkeypatch.setattr("datasets.features.free_memory", lambda: size)
    with pytest.raises(UserError, match="Leave --persistence out"):
        folder.keep_in_memory(["s2"], processes=3)


def test_all_bad_files_are_reported_at_once(folder: FeatureFolder) -> None:
    torch.save(torch.zeros(0, 2), folder.path / "pt_files" / "s3.pt")
    torch.save(torch.zeros(3, 5), folder.path / "pt_files" / "s4.pt")
    (folder.path / "pt_files" / "s5.pt").write_bytes(b"junk")
    opened, faults = FeatureFolder(folder.path), Faults("features")
    opened.check(opened.slides, faults)
    assert len(faults.messages) == 3
    for part in ("s3.pt: holds no instance", "s4.pt: features have width 5, those of 's1' 2", "s5.pt is damaged"):
        assert any(part in message for message in faults.messages)
