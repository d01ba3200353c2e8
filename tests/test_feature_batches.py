"""Batches of features: the same whoever reads them, through whatever memory."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor

from datasets import loaders, ring
from datasets.bags import Bags, SamplingPlan, TrainBags
from datasets.eval_parts import WHOLE, EvalParts
from datasets.eval_reading import EvalReader
from datasets.features import FeatureFolder
from datasets.instances import FeatureSource
from datasets.labels.types import Sample
from datasets.loaders import LoaderOptions, TrainStream, read_by_threads, train_batches
from datasets.positions import Grid
from utils.errors import UserError

SIZES = (4, 9, 2, 7, 5)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of different length; every other one in half precision."""
    root = tmp_path_factory.mktemp("features")
    (root / "pt_files").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i, size in enumerate(SIZES):
        values = torch.randn(size, 3, generator=generator)
        torch.save(values.half() if i % 2 else values, root / "pt_files" / f"s{i}.pt")
    return root


def samples() -> list[Sample]:
    return [Sample(f"s{i}", f"s{i}", (f"s{i}",), {"label": i}) for i in range(len(SIZES))]


def stream_of(root: Path, plan: SamplingPlan, options: LoaderOptions, batch_size: int = 1) -> Iterator[Bags]:
    """Four epochs."""
    bags = TrainBags(samples(), [FeatureSource(FeatureFolder(root))], plan, seed=3)
    return train_batches(bags, TrainStream(len(SIZES), batch_size, seed=1, epochs=(0, 4)), options)


def batches(root: Path, plan: SamplingPlan, options: LoaderOptions, batch_size: int = 1) -> list[tuple]:
    read = stream_of(root, plan, options, batch_size)
    return [(b.instances.clone(), b.sizes, b.index, b.keep, b.target["label"].tolist()) for b in read]


def same(one: list[tuple], other: list[tuple]) -> bool:
    return len(one) == len(other) and all(
        x[0].dtype == y[0].dtype
        and torch.equal(x[0], y[0])
        and x[1:3] == y[1:3]
        and (x[3] is None) == (y[3] is None)
        and (x[3] is None or torch.equal(x[3], y[3]))
        and x[4] == y[4]
        for x, y in zip(one, other, strict=True)
    )


PLANS = (
    SamplingPlan(0),
    SamplingPlan(0, shuffle=True),
    SamplingPlan(3),
    SamplingPlan(6, pad=True, duplicates_in_head=False),
)


class Device:
    """A GPU that copies batches later than it is asked to: when it is waited for."""

    def __init__(self) -> None:
        self.batch: tuple[Tensor, Tensor] | None = None  # in its buffer, and as it was handed over
        self.copied = 0

    def takes(self, bags: Bags) -> Bags:
        self.batch = bags.instances, bags.instances.clone()
        return bags

    def event(self) -> SimpleNamespace:
        """As torch.cuda.Event: whoever waits for it knows that what was queued before is done."""
        seen: list[tuple[Tensor, Tensor]] = []

        def synchronize() -> None:
            for buffer, content in seen:
                assert torch.equal(buffer, content), "a buffer was filled again before it was copied"
                self.copied += 1

        return SimpleNamespace(record=lambda: seen.append(self.batch), synchronize=synchronize)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Memory can be page-locked and copied by itself only where there is a GPU; this is what the readers see of it."""
    own = Device()
    locked = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "Event", own.event)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: locked)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return own


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reading ahead"]


def h5_copy(features: Path, root: Path) -> Path:
    """The same features as .h5 files, with coordinates."""
    (root / "h5_files").mkdir()
    for file in (features / "pt_files").iterdir():
        with h5py.File(root / "h5_files" / f"{file.stem}.h5", "w") as h5:
            h5["features"] = torch.load(file, weights_only=True).numpy()
            h5["coords"] = [[256 * x, 256 * len(h5["features"])] for x in range(len(h5["features"]))]
    return root


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("pin", [False, True])
def test_threads_give_what_reading_here_gives(
    features: Path, plan: SamplingPlan, batch_size: int, pin: bool, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(features, plan, LoaderOptions(0), batch_size)
    assert len(expected) == 4 * (len(SIZES) // batch_size)
    monkeypatch.setattr(loaders, "DataLoader", None)  # no processes
    monkeypatch.setattr(loaders.BatchRing, "take", lambda own: own._free[0].get(timeout=5))
    for threads in (0, 1, 2, 6):
        options = LoaderOptions(threads, pin=pin)
        read = map(device.takes, stream_of(features, plan, options, batch_size))
        found = [(b.instances.clone(), b.sizes, b.index, b.keep, b.target["label"].tolist()) for b in read]
        assert same(found, expected)
        assert not own_threads()
    assert device.copied == (4 * (len(expected) - 1) if pin else 0)


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[3]])
def test_processes_give_what_reading_here_gives(features: Path, tmp_path: Path, plan: SamplingPlan) -> None:
    root = h5_copy(features, tmp_path)
    expected = batches(features, plan, LoaderOptions(0), 2)
    assert same(batches(root, plan, LoaderOptions(2), 2), expected)
    assert same(batches(root, plan, LoaderOptions(0), 2), expected)


@pytest.mark.parametrize("threads", [1, 2, 6])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_thread_ever_waits_for_a_buffer(
    features: Path, threads: int, prefetch: int, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enough of them for all bags under way, the one in use, and the one whose copy is not known to have ended."""

    def take(own: ring.BatchRing) -> int:
        try:
            return int(own._free[0].get(block=False))
        except Empty:
            raise AssertionError("no buffer was free") from None

    monkeypatch.setattr(ring.BatchRing, "take", take)
    seen = 0
    for bags in stream_of(features, SamplingPlan(0), LoaderOptions(threads, prefetch, pin=True)):
        device.takes(bags)
        time.sleep(0.003)  # all threads run as far ahead as they may
        seen += 1
    assert seen == 4 * len(SIZES)


def test_who_reads_what(features: Path, tmp_path: Path) -> None:
    h5, old = h5_copy(features, tmp_path), tmp_path / "old"
    old.mkdir()
    for file in (features / "pt_files").iterdir():
        torch.save(torch.load(file, weights_only=True), old / file.name, _use_new_zipfile_serialization=False)
    folders = [FeatureFolder(root) for root in (features, h5, old)]
    assert [folder.mapped for folder in folders] == [True, False, False]
    mapped, read, unmapped = map(FeatureSource, folders)
    placed = FeatureSource(folders[0], Grid(folders[1], folders[1]))
    assert read_by_threads([mapped, mapped])
    assert not any(read_by_threads([mapped, other]) for other in (read, unmapped, placed))
    expected = batches(features, SamplingPlan(0), LoaderOptions(0))
    assert same(batches(old, SamplingPlan(0), LoaderOptions(1)), expected)


@pytest.mark.parametrize("most", [1, 40 * 6, 60 * 15])
def test_bags_that_are_too_large_for_the_buffers_come_all_the_same(
    features: Path, tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(features, SamplingPlan(0), LoaderOptions(0))
    monkeypatch.setattr(ring, "MOST_BYTES", most)
    assert same(batches(features, SamplingPlan(0), LoaderOptions(2)), expected)
    assert same(batches(h5_copy(features, tmp_path), SamplingPlan(0), LoaderOptions(2)), expected)


def test_threads_leave_no_bag_in_the_mapped_file(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pages may be on disk, and the training thread would wait for them."""
    monkeypatch.setattr(ring, "MOST_BYTES", 1)
    folder = FeatureFolder(features)
    mapped = {folder.read(f"s{i}").data_ptr() for i in range(len(SIZES))}
    bags = TrainBags(samples(), [FeatureSource(folder)], SamplingPlan(0))
    read = train_batches(bags, TrainStream(len(SIZES), 1), LoaderOptions(2))
    assert not mapped & {batch.instances.data_ptr() for batch in read}


def failing_at(monkeypatch: pytest.MonkeyPatch, slide: str) -> None:
    read = FeatureFolder.read

    def failing(own: FeatureFolder, name: str) -> Tensor:
        if name == slide and own._layouts.keys() >= {"s0", "s1", "s2", "s3", "s4"}:  # not before training
            raise UserError(f"{slide} is gone")
        return read(own, name)

    monkeypatch.setattr(FeatureFolder, "read", failing)


@pytest.mark.parametrize("threads", [1, 6])
def test_an_error_of_a_thread_reaches_training_and_ends_it(
    features: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [i for ((_, i),) in TrainStream(len(SIZES), 1, seed=1)]
    failing_at(monkeypatch, f"s{order[3]}")
    read = stream_of(features, SamplingPlan(0), LoaderOptions(threads))
    assert [next(read).index for _ in range(3)] == [[i] for i in order[:3]]
    with pytest.raises(UserError, match=f"s{order[3]} is gone"):
        next(read)
    assert not own_threads()


@pytest.mark.parametrize("pin", [False, True])
def test_training_that_ends_early_ends_the_threads(features: Path, pin: bool, device: Device) -> None:
    read = stream_of(features, SamplingPlan(0), LoaderOptions(6, pin=pin))
    for _ in range(3):
        device.takes(next(read))
    assert len(own_threads()) == 6
    read.close()  # type: ignore[attr-defined]
    assert not own_threads()


def evaluated(reader: EvalReader) -> list[tuple[Tensor, list[int]]]:
    return [(bags.instances.clone(), bags.index) for bags in reader.read("val")]


def reader_of(folder: FeatureFolder, options: LoaderOptions) -> EvalReader:
    parts = EvalParts(samples(), FeatureSource(folder), WHOLE, range(len(SIZES)))
    return EvalReader({"val": parts}, options, torch.device("cpu"))


@pytest.mark.parametrize("most", [1, 1 << 20])
def test_evaluation_reads_mapped_features_by_threads(
    features: Path, most: int, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "MOST_BYTES", most)
    folder = FeatureFolder(features)
    mapped = {folder.read(f"s{i}").data_ptr() for i in range(len(SIZES))}
    for options in (LoaderOptions(1), LoaderOptions(2, 1), LoaderOptions(6), LoaderOptions(6, pin=True)):
        reader = reader_of(folder, options)
        for _ in range(3):
            found = evaluated(reader)
            assert [index for _, index in found] == [[i] for i in range(len(SIZES))]
            assert all(torch.equal(values, folder.read(f"s{i}")) for values, (i,) in found)
            assert not mapped & {bags.instances.data_ptr() for bags in reader.read("val")}
            assert not own_threads()
            assert not multiprocessing.active_children()
        assert reader._ring is not None
        assert reader._ring._free[0].qsize() == len(reader._ring.buffers), "every buffer came back"


def test_an_evaluation_that_fails_or_is_given_up_ends_its_threads(
    features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(FeatureFolder(features), LoaderOptions(4))
    calls = reader.read("val")
    next(calls)
    assert len(own_threads()) == 4
    calls.close()  # type: ignore[attr-defined]
    assert not own_threads()
    assert len(evaluated(reader)) == len(SIZES)
    failing_at(monkeypatch, "s2")
    with pytest.raises(UserError, match="s2 is gone"):
        evaluated(reader)
    assert not own_threads()


class Interrupted(EvalParts):
    """Another thread prepares the positions of bag 1 at the worst time."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_cells" and value[0] == 0:
            self._positions(1)


def test_positions_are_those_of_the_bag_whatever_other_threads_prepare(features: Path, tmp_path: Path) -> None:
    h5 = FeatureFolder(h5_copy(features, tmp_path))
    parts = Interrupted(samples(), FeatureSource(FeatureFolder(features), Grid(h5, h5)), WHOLE, range(len(SIZES)))
    found = parts[0].pos
    assert found is not None
    assert found.tolist() == [[x, SIZES[0]] for x in range(SIZES[0])]


def test_form_of_a_batch_holds_every_slide_exactly(features: Path) -> None:
    folder = FeatureFolder(features)
    assert [folder.layout(f"s{i}") for i in (0, 1)] == [(4, 3, torch.float32), (9, 3, torch.float16)]
    found = batches(features, SamplingPlan(0), LoaderOptions(2), batch_size=5)
    assert {x[0].dtype for x in found} == {torch.float32}


def test_a_mapped_file_is_opened_once(features: Path) -> None:
    folder = FeatureFolder(features)
    assert folder.read("s0").data_ptr() == folder.read("s0").data_ptr()
    assert not folder.holds_in_memory(["s0"])
    folder.keep_in_memory(["s0"])
    assert folder.holds_in_memory(["s0"])
    assert not folder.holds_in_memory(["s0", "s1"])
