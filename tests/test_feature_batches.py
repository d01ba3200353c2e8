"""Batches of features: the same whoever reads them, through whatever memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest
import torch

from datasets import loaders, ring
from datasets.ahead import in_thread
from datasets.bags import SamplingPlan, TrainBags
from datasets.features import FeatureFolder
from datasets.instances import FeatureSource
from datasets.label_types import Sample
from datasets.loaders import LoaderOptions, TrainStream, train_batches

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


def batches(root: Path, plan: SamplingPlan, options: LoaderOptions, batch_size: int = 1) -> list[tuple]:
    samples = [Sample(f"s{i}", f"s{i}", (f"s{i}",), {"label": i}) for i in range(len(SIZES))]
    bags = TrainBags(samples, [FeatureSource(FeatureFolder(root))], plan, seed=3)
    stream = TrainStream(len(SIZES), batch_size, seed=1, epochs=(0, 4))
    read = train_batches(bags, stream, options)
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


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_reading_processes_and_threads_give_what_reading_here_gives(
    features: Path, plan: SamplingPlan, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(features, plan, LoaderOptions(0), batch_size)
    assert len(expected) == 4 * (len(SIZES) // batch_size)
    assert same(batches(features, plan, LoaderOptions(2), batch_size), expected)
    unpinned = ring.ring_for  # memory can be page-locked only where there is a GPU
    monkeypatch.setattr(loaders, "ring_for", lambda workers, ahead, size, pin: unpinned(workers, ahead, size, False))
    assert same(batches(features, plan, LoaderOptions(0, pin=True), batch_size), expected)


@pytest.mark.parametrize("most", [1, 40 * 6, 60 * 6])
def test_bags_that_are_too_large_for_the_buffers_come_all_the_same(
    features: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(features, SamplingPlan(0), LoaderOptions(0))
    monkeypatch.setattr(ring, "MOST_BYTES", most)
    assert same(batches(features, SamplingPlan(0), LoaderOptions(2)), expected)


def test_h5_files_through_buffers(features: Path, tmp_path: Path) -> None:
    (tmp_path / "h5_files").mkdir()
    for file in (features / "pt_files").iterdir():
        with h5py.File(tmp_path / "h5_files" / f"{file.stem}.h5", "w") as h5:
            h5["features"] = torch.load(file, weights_only=True).numpy()
    expected = batches(features, SamplingPlan(0), LoaderOptions(0))
    assert same(batches(tmp_path, SamplingPlan(0), LoaderOptions(2)), expected)


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


def numbers(until: int, made: list[int], fail_at: int = -1) -> Iterator[int]:
    for i in range(until):
        if i == fail_at:
            raise ValueError(f"number {i}")
        made.append(i)
        yield i


def test_a_thread_keeps_the_order_and_a_bounded_lead() -> None:
    made: list[int] = []
    items = in_thread(numbers(20, made), ahead=3)
    assert next(items) == 0
    time.sleep(0.2)
    assert len(made) <= 1 + 3 + 1  # used, ready, and one waiting for room
    assert list(items) == list(range(1, 20))


def test_an_error_of_the_thread_comes_behind_what_was_made_before() -> None:
    items = in_thread(numbers(20, [], fail_at=3), ahead=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="number 3"):
        next(items)


def test_a_thread_that_is_not_needed_any_more_ends() -> None:
    before = threading.active_count()
    items = in_thread(numbers(10**9, []), ahead=2)
    next(items)
    items.close()  # type: ignore[attr-defined]
    limit = time.monotonic() + 3
    while threading.active_count() > before and time.monotonic() < limit:
        time.sleep(0.02)
    assert threading.active_count() == before
