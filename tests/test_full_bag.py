"""Full bags: the step in two passes has the gradient of the plain step, in memory for one encoder call."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import results_of
from timm.layers import DropPath
from torch import Tensor, nn
from whole_bags import CHUNK, CLASSES, COUNTS, CROP_PX, NORMS, bags_of, encoder, full, learner_of, stores_in

from datasets.bags import TrainBags
from datasets.full_bags import ChunkPlan, full_bag_batches
from datasets.loaders import LoaderOptions, TrainStream
from datasets.store import PatchStore
from engine.full_bag import FullBagLearner, average_gradients
from engine.learner import Learner
from engine.tasks import CoxTask, SurvivalTask, Task
from modules.registry import mils
from utils.dist import Processes


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[PatchStore, PatchStore]:
    return stores_in(tmp_path_factory.mktemp("stores"))


def steps(learner: Learner, bags: TrainBags, batch: int, count: int = 1, **more: Any) -> list[Tensor]:
    """Losses of the first steps, of which every two share an update; gradients and weights are the learner's."""
    stream = TrainStream(len(COUNTS), batch, seed=1, epochs=(0, 2))
    batches = full(bags, batch, **more) if isinstance(learner, FullBagLearner) else (bags[keys] for keys in stream)
    losses = []
    for number, one in enumerate(itertools.islice(batches, count)):
        torch.manual_seed(number)
        losses.append(learner.step(one, divide_by=2, update=number % 2 == 1))
    return losses


def gradients(learner: Learner) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in learner.model.named_parameters()}


def assert_equal_gradients(one: Learner, other: Learner, tolerance: float = 1e-10) -> None:
    ours, theirs = gradients(one), gradients(other)
    largest = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    assert largest > 1e-3
    for name, gradient in theirs.items():
        own = ours[name]
        assert (own is None) == (gradient is None), name
        if own is not None and gradient is not None:
            torch.testing.assert_close(
                own, gradient, rtol=0, atol=tolerance * largest, msg=lambda m, n=name: f"{n}: {m}"
            )


# Exactness


@pytest.mark.parametrize("keep", [0, 11, 10_000])
@pytest.mark.parametrize(("scales", "batch"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("norm", NORMS)
def test_gradient_is_that_of_one_big_batch(stores, norm: str, scales: int, batch: int, keep: int) -> None:
    """Without statistics of chunks: plain autograd through one encoder call on all patches of all bags."""
    bags = bags_of(stores[-scales:])
    plain = learner_of(Learner, encoder(NORMS[norm]()), chunk=10_000)
    ours = learner_of(FullBagLearner, encoder(NORMS[norm]()))
    assert torch.equal(steps(plain, bags, batch)[0], steps(ours, bags, batch, keep=keep)[0])
    assert_equal_gradients(ours, plain)


@pytest.mark.parametrize("batch", [1, 2])
def test_statistics_are_those_of_a_chunk_and_advance_once(stores, batch: int) -> None:
    bags, noise = bags_of(stores), (nn.Dropout(0.3), DropPath(0.4))
    plain = learner_of(Learner, encoder(nn.BatchNorm2d(4), *noise), dropout=0.4)
    ours = learner_of(FullBagLearner, encoder(nn.BatchNorm2d(4), *noise), dropout=0.4)
    assert torch.equal(steps(plain, bags, batch)[0], steps(ours, bags, batch)[0])
    assert_equal_gradients(ours, plain)
    for (name, own), (_, theirs) in zip(ours.model.named_buffers(), plain.model.named_buffers(), strict=True):
        assert torch.equal(own, theirs), name
    patches = sum(next(full(bags, batch)).sizes)
    assert int(ours.model.encoder[1].num_batches_tracked) == -(-patches // CHUNK)  # type: ignore[index,union-attr]


def test_dropout_of_the_encoder_is_drawn_anew_in_every_step_and_replayed_in_the_second_pass(stores) -> None:
    """The second pass must see the masks of the first: with others, this gradient would not be that of the loss."""
    ours = learner_of(FullBagLearner, encoder(nn.Identity(), nn.Dropout(0.5)))
    seen: list[Tensor] = []
    ours.model.encoder.register_forward_hook(lambda m, i, out: seen.append(out.detach().clone()))  # type: ignore
    steps(ours, bags_of(stores), 1)
    chunks = (len(seen) + 1) // 2
    assert chunks > 2
    assert all(torch.equal(a, b) for a, b in zip(seen[: chunks - 1], seen[chunks:], strict=True))
    generator = torch.get_rng_state()
    steps(ours, bags_of(stores), 1)
    assert torch.equal(generator, torch.get_rng_state())
    assert not torch.equal(seen[0], learner_output_with_other_seed(stores))


def learner_output_with_other_seed(stores) -> Tensor:
    ours = learner_of(FullBagLearner, encoder(nn.Identity(), nn.Dropout(0.5)))
    seen: list[Tensor] = []
    ours.model.encoder.register_forward_hook(lambda m, i, out: seen.append(out.detach().clone()))  # type: ignore
    torch.manual_seed(99)
    ours.step(next(full(bags_of(stores), 1)), divide_by=1, update=False)
    return seen[0]


@pytest.mark.parametrize("head", mils.names())
def test_every_head_has_the_plain_step_s_gradient(stores, head: str) -> None:
    """Heads with an auxiliary loss, with positions, with random numbers of their own; bags of unequal length."""
    bags = bags_of(stores, positions=head == "2dmamba")
    pair = [
        learner_of(kind, encoder(nn.BatchNorm2d(4)), head, dtype=torch.float32, dropout=0.2)
        for kind in (FullBagLearner, Learner)
    ]
    losses = [steps(learner, bags, 2)[0] for learner in pair]
    torch.testing.assert_close(*losses)
    assert (pair[0].aux_loss is None) == (pair[1].aux_loss is None)
    assert_equal_gradients(pair[0], pair[1], tolerance=2e-5)


@pytest.mark.parametrize("task", [CLASSES, SurvivalTask(4)], ids=lambda task: task.name)
def test_accumulated_clipped_updates_and_their_average_are_the_plain_ones(stores, task: Task) -> None:
    bags, more = bags_of(stores), {"task": task, "clip_grad": 0.1, "lr": 1e-2}
    plain = learner_of(Learner, encoder(nn.BatchNorm2d(4)), **more)
    ours = learner_of(FullBagLearner, encoder(nn.BatchNorm2d(4)), **more)
    torch.testing.assert_close(steps(plain, bags, 1, count=5), steps(ours, bags, 1, count=5), rtol=1e-6, atol=0)
    assert plain.grad_norm is not None
    torch.testing.assert_close(ours.grad_norm, plain.grad_norm)
    for name in ("main", "ema"):
        theirs = plain.weights()[name].state_dict()
        for key, value in ours.weights()[name].state_dict().items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-8)
    assert_equal_gradients(ours, plain, tolerance=1e-6)


def test_scaled_losses_give_the_same_update(stores) -> None:
    updated = []
    for scale in (None, 2.0**14):
        ours = learner_of(FullBagLearner, encoder(nn.BatchNorm2d(4)), clip_grad=0.1, lr=1e-2)
        if scale is not None:
            ours.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        steps(ours, bags_of(stores), 1, count=4)
        updated.append(ours.model.state_dict())
    for key, value in updated[0].items():
        torch.testing.assert_close(updated[1][key], value, rtol=1e-9, atol=1e-12)


def test_mixed_precision_is_that_of_the_plain_step(stores) -> None:
    bags, more = bags_of(stores), {"dtype": torch.float32, "amp": True}
    plain = learner_of(Learner, encoder(nn.BatchNorm2d(4)), **more)
    ours = learner_of(FullBagLearner, encoder(nn.BatchNorm2d(4)), **more)
    assert ours.precision.dtype == torch.bfloat16
    torch.testing.assert_close(steps(plain, bags, 2), steps(ours, bags, 2))
    assert_equal_gradients(ours, plain, tolerance=1e-2)


def test_a_frozen_encoder_is_called_once_per_chunk(stores) -> None:
    bags, calls = bags_of(stores), []
    plain = learner_of(Learner, encoder(nn.BatchNorm2d(4)), frozen=True)
    ours = learner_of(FullBagLearner, encoder(nn.BatchNorm2d(4)), frozen=True)
    ours.model.encoder.register_forward_hook(lambda m, inputs, out: calls.append(len(out)))  # type: ignore
    steps(plain, bags, 2)
    steps(ours, bags, 2, keep=0, twice=False)
    assert_equal_gradients(ours, plain)
    assert calls == next(full(bags, 2)).chunks


# Memory and exchange between processes


class Live:
    """Numbers in the encoder's activations that graphs hold, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        if tensor.dim() != 4 or tensor.shape[-1] not in (CROP_PX, CROP_PX - 2, CROP_PX - 4):
            return tensor
        copy, size = tensor.detach().clone(), tensor.numel()  # one that nobody else holds
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(copy, self._gone, size)
        return copy

    def _gone(self, size: int) -> None:
        self.now -= size


def most_activations(kind: type[Learner], bags: TrainBags, batch: int) -> int:
    live, learner = Live(), learner_of(kind, encoder(nn.BatchNorm2d(4)))
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda tensor: tensor):
        steps(learner, bags, batch)
    assert live.now == 0
    return live.most


def test_activations_are_those_of_one_chunk_whatever_the_bag(stores) -> None:
    bags, one_call = bags_of(stores), Live()
    with torch.autograd.graph.saved_tensors_hooks(one_call.pack, lambda tensor: tensor):
        encoder(nn.BatchNorm2d(4))(torch.randn(CHUNK, 3, CROP_PX, CROP_PX)).sum().backward()
    assert most_activations(FullBagLearner, bags, 1) <= one_call.most
    assert most_activations(FullBagLearner, bags, 4) == one_call.most
    assert most_activations(Learner, bags, 4) == one_call.most * sum(next(full(bags, 4)).sizes) / CHUNK


def test_gradients_are_exchanged_once_per_update(stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the same bags: their mean is what each of them has."""
    exchanged: list[int] = []

    def twins(tensor: Tensor, *_: Any) -> None:
        exchanged.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", twins)
    bags = bags_of(stores)
    alone = learner_of(FullBagLearner, encoder(nn.BatchNorm2d(4)), lr=1e-2)
    twin = learner_of(FullBagLearner, encoder(nn.BatchNorm2d(4)), lr=1e-2, world=2)
    for learner in (alone, twin):
        steps(learner, bags, 1, count=4)
    trained = list(twin.model.parameters())
    assert exchanged == [sum(p.numel() for p in trained) + len(trained)] * 2
    for own, theirs in zip(trained, alone.model.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)


def test_parameters_without_a_gradient_anywhere_keep_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has a gradient of ones for the second parameter and none for the third."""
    mine = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    mine[0].grad = torch.tensor([1.0, 3.0])
    theirs = torch.tensor([1.0, 1.0, 0.0, 3.0, 5.0, 1.0, 1.0, 0.0, 0.0])
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(theirs))
    average_gradients(mine, 2)
    assert mine[0].grad.tolist() == [2.0, 4.0]
    assert mine[1].grad is not None
    assert mine[1].grad.tolist() == [0.5, 0.5]
    assert mine[2].grad is None


def updates(processes: Processes, folder: str, task: str) -> list[dict[str, Tensor]]:
    """The gradients of every update of two epochs: steps of three bags and of one, two of which share an update."""
    bags = bags_of([PatchStore(Path(folder) / name) for name in ("low.lmdb", "high.lmdb")])
    more = {"task": {"classes": CLASSES, "cox": CoxTask()}[task], "mil_norm": "ln", "lr": 1e-12, "weight_decay": 0}
    learner = learner_of(FullBagLearner, encoder(nn.GroupNorm(2, 4)), processes=processes, **more)
    found: list[dict[str, Tensor]] = []
    learner.optimizer.register_step_pre_hook(
        lambda *_: found.append({k: g.clone() for k, g in gradients(learner).items() if g is not None})
    )
    place = {"rank": processes.rank, "world": processes.world}
    stream = TrainStream(len(COUNTS), 3 // processes.world, seed=1, epochs=(0, 2), drop_last=False, **place)
    for number, batch in enumerate(full_bag_batches(bags, stream, LoaderOptions(), ChunkPlan(CHUNK, 6))):
        learner.step(batch, 2, number % 2 == 1, stream.counts(number % stream.steps_per_epoch))
    return found


@pytest.mark.parametrize("task", ["classes", "cox"])
def test_three_processes_equal_one_though_two_of_them_run_out_of_bags(stores, tmp_path: Path, task: str) -> None:
    folder = str(stores[0].path.parent)
    alone, *three = (found for w in (1, 3) for found in results_of(updates, w, tmp_path / str(w), folder, task))
    assert len(alone) == 2
    for found in three:
        for ours, theirs in zip(found, alone, strict=True):
            assert ours.keys() == theirs.keys()
            largest = max(float(g.abs().max()) for g in theirs.values())
            assert largest > 1e-3
            for name, gradient in theirs.items():
                torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-6 * largest)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16", None])
@pytest.mark.parametrize("pin", [True, False])
def test_on_a_gpu_it_is_the_plain_step_too(stores, pin: bool, amp: str | None) -> None:
    """Copies overlap with computing there; the rest of the test suite cannot see a race between them."""
    bags, device = bags_of(stores), torch.device("cuda", 0)
    more = {"dtype": torch.float32, "device": device, "amp": amp is not None, "amp_dtype": amp or "auto"}
    pair = [
        learner_of(kind, encoder(nn.BatchNorm2d(4), nn.Dropout(0.2)), clip_grad=1.0, **more)
        for kind in (FullBagLearner, Learner)
    ]
    for learner in pair if amp == "fp16" else ():
        learner.scaler = torch.amp.GradScaler("cuda", init_scale=64.0)  # the usual one overflows at first
    stream = TrainStream(len(COUNTS), 2, seed=1, epochs=(0, 2))
    plan = ChunkPlan(CHUNK, 11)
    for number, one in enumerate(full_bag_batches(bags_of(stores), stream, LoaderOptions(2, pin=pin), plan)):
        losses = []
        for learner, batch in zip(pair, (one, bags[[(number // 2, i) for i in one.index]]), strict=True):
            torch.manual_seed(number)
            losses.append(float(learner.step(batch, 1, update=False)))
        assert losses[0] == pytest.approx(losses[1], rel=1e-2 if amp else 1e-4)
    assert_equal_gradients(pair[0], pair[1], tolerance=3e-2 if amp else 1e-3)
