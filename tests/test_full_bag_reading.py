"""The patches of full bags: which are read when, and that reading processes change nothing."""

from __future__ import annotations

import pytest
import torch
from tiny import SIDE_PX
from torch import nn
from whole_bags import CHUNK, COUNTS, bags_of, encoder, full, learner_of, stores_in

from datasets.full_bags import PART, ChunkPlan, rehearsal
from datasets.loaders import TrainStream
from datasets.store import PatchStore
from engine.full_bag import FullBagLearner
from modules.model import SlideModel


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[PatchStore, PatchStore]:
    return stores_in(tmp_path_factory.mktemp("stores"))


@pytest.mark.parametrize("keep", [0, 4, 5, 12, 100])
@pytest.mark.parametrize("count", [1, 5, 6, 23, 1600])
def test_all_patches_come_first_and_then_those_that_were_not_kept(count: int, keep: int) -> None:
    plan = ChunkPlan(CHUNK if count < 1000 else 700, keep)
    sizes = plan.sizes(count)
    calls: list[int] = []
    model = SlideModel(nn.Identity(), nn.Identity(), plan.chunk)
    model.encoder.register_forward_hook(lambda m, inputs, out: calls.append(len(out)))  # type: ignore
    model.encode(torch.zeros(count, 1))
    assert sizes == calls
    read = [i for begin, end in plan.spans(count) for i in range(begin, end)]
    stay = sum(sizes[: plan.kept(sizes)])
    assert stay <= keep
    assert read == [*range(count), *range(stay, count - sizes[-1])]
    assert plan.read(count) == len(read)
    assert all(end - begin <= PART for begin, end in plan.spans(count))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_chunks_are_the_patches_of_the_plain_batch_however_they_are_read(stores, workers: int) -> None:
    bags = bags_of(stores)
    stream = TrainStream(len(COUNTS), 2, seed=1, epochs=(0, 2))
    for keys, batch in zip(stream, full(bags_of(stores), 2, keep=6, workers=workers), strict=True):
        whole = bags[keys]
        assert (batch.sizes, batch.index) == (whole.sizes, whole.index)
        assert torch.equal(batch.draws, whole.draws)
        again = range(batch.kept, len(batch.chunks) - 1)
        for number in (*range(len(batch.chunks)), *again):
            begin, end = batch.span(number)
            patches = torch.empty(end - begin, SIDE_PX, SIDE_PX, 3, dtype=torch.uint8)
            batch.fill(patches)
            assert torch.equal(patches, whole.instances[begin:end])
        assert next(batch.parts, None) is None
        assert batch.waited > 0


def test_patches_that_nobody_asks_for_are_passed_over(stores) -> None:
    batches = full(bags_of(stores), 1, workers=2)
    indices = [batch.index for batch in batches]
    assert len(indices) == 8
    assert all(len(index) == 1 for index in indices)


def test_a_rehearsed_batch_can_be_stepped_on_again_and_again(stores) -> None:
    bags = bags_of(stores)
    keys = [(0, 2), (0, 0)]
    batch, seconds = rehearsal(bags, keys, ChunkPlan(CHUNK, 11))
    ours = learner_of(FullBagLearner, encoder(nn.BatchNorm2d(4)))
    assert batch.sizes == bags[keys].sizes
    assert seconds > 0
    losses = [float(ours.step(batch, 1, update=False)) for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
