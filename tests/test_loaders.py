"""Batches from reading processes: the same as without them, whole, and given up without a hang."""

import time
from pathlib import Path

import pytest
import torch
from tiny import SIDE_PX, make_tiny_cohort

from datasets.bags import SamplingPlan, TrainBags
from datasets.instances import PixelSource
from datasets.labels import Sample
from datasets.loaders import LoaderOptions, TrainStream, shard, train_batches
from datasets.store import PatchStore
from datasets.views import ViewPlan
from utils.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    return PatchStore(make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=12).high)


def bags_of(store: PatchStore, pad: bool) -> TrainBags:
    samples = [Sample(s, s, (s,), {"label": i % 2}) for i, s in enumerate(store.slides)]
    views = ViewPlan("strong", 0.2, SIDE_PX, 28)
    return TrainBags(samples, [PixelSource(store)], SamplingPlan(7, pad=pad), views, seed=3)


def batches(store: PatchStore, workers: int, pad: bool) -> list[tuple]:
    stream = TrainStream(len(store.slides), 3, seed=1, epochs=(0, 3))
    read = train_batches(bags_of(store, pad), stream, LoaderOptions(workers, prefetch=2))
    return [(b.instances.clone(), b.sizes, b.index, b.draws, b.target["label"]) for b in read]


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_reading_processes_change_nothing(store, workers, pad):
    alone, shared = batches(store, 0, pad), batches(store, workers, pad)
    assert len(alone) == len(shared) > 8
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:3] == other[1:3]
        assert torch.equal(one[3], other[3])
        assert torch.equal(one[4], other[4])


def test_a_stream_that_is_given_up_ends_its_processes_at_once(store):
    stream = TrainStream(len(store.slides), 3, epochs=(0, 1000))
    read = train_batches(bags_of(store, True), stream, LoaderOptions(2, prefetch=2))
    next(read)
    begin = time.monotonic()
    read.close()
    del read
    assert time.monotonic() - begin < 4  # torch waits five seconds for a process that does not answer


def test_epochs_take_every_sample_once_whatever_the_number_of_processes():
    def order(world: int, batch: int) -> list[list[int]]:
        ranks = [list(TrainStream(12, batch, rank=r, world=world, seed=5, epochs=(2, 3))) for r in range(world)]
        return [sorted(p for rank in step for _, p in rank) for step in zip(*ranks, strict=True)]

    assert order(1, 6) == order(2, 3) == order(3, 2)
    assert sorted(sum(order(3, 2), [])) == list(range(12))
    assert [list(shard(7, r, 3)) for r in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]


def test_a_stream_goes_on_where_it_was():
    whole = list(TrainStream(10, 2, seed=1, epochs=(0, 3)))
    rest = list(TrainStream(10, 2, seed=1, epochs=(1, 3), start_step=2))
    assert rest == whole[7:]


def test_fewer_samples_than_a_step_takes_is_a_sentence(tmp_path: Path):
    with pytest.raises(UserError, match="fewer than one step takes"):
        TrainStream(3, 2, world=2)
    assert len(TrainStream(3, 2, world=2, drop_last=False)) == 1
