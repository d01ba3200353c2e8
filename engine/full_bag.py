"""Exact gradients for bags of any size in bounded memory (``--full_bag``).

With f the features of all patches of a batch, and L the loss,

    dL/dweights = sum over chunks c of (dL/df_c) (df_c/dweights).

The first pass encodes chunk by chunk without a graph and keeps f alone. The head, its loss and its backward pass give
dL/df. The second pass encodes every chunk again, now with a graph, and sends its dL/df_c through it. A step so has the
activations of one encoder call, however many patches there are, and the gradient of the plain step.

The second pass sees what the first saw: the same views, the same random numbers (the generators' states are kept),
and BatchNorm normalises by the statistics of the same chunk. Running statistics advance in the first pass only.
The last chunk's graph is kept from the first pass, so a batch of one chunk costs what it costs without this.

Shapes: P patches of all bags of a batch, D feature width, S stored size in px.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from datasets.bags import Bags
from datasets.full_bags import FullBags
from engine.learner import Learner
from engine.precision import fixed_kernels
from modules.model import SlideModel, frozen_statistics


class FullBagLearner(Learner):
    """A ``Learner`` that takes ``FullBags`` and never holds more than one chunk's activations.

    Several processes exchange gradients once per update, whatever their numbers of chunks.
    """

    @functools.cached_property
    def _intake(self) -> Intake:
        return Intake(self.processes.device)

    def _distributed(self, model: SlideModel) -> SlideModel:
        return model  # DistributedDataParallel would exchange gradients chunk by chunk

    def _backward(self, bags: Bags, divide_by: int, update: bool, counts: Sequence[int]) -> Tensor:
        assert isinstance(bags, FullBags)
        features, last, states = self._first_pass(bags)
        features.requires_grad_(last.requires_grad)
        loss = self._loss(self.model.aggregate, features, bags.to(self.processes.device), counts)
        self.scaler.scale(loss / divide_by).backward()
        if features.grad is not None:  # else the encoder is not trained
            gradients = features.grad.split(bags.chunks)
            with self._kernels(bags, -1):
                last.backward(gradients[-1])
            self._second_pass(bags, gradients, states)
        return loss

    def _first_pass(self, bags: FullBags) -> tuple[Tensor, Tensor, list[RandomState]]:
        """Features (P, D) without a graph, those of the last chunk with one, and what each chunk's randomness was."""
        features: list[Tensor] = []
        states: list[RandomState] = []
        for number in range(len(bags.chunks)):
            states.append(RandomState.now(self.processes.device))
            with torch.set_grad_enabled(number == len(bags.chunks) - 1), self._kernels(bags, number):
                last = self._encode(bags, number)
            features.append(last.detach().clone())  # a compiled encoder may use its output's memory again
        return torch.cat(features), last, states

    def _second_pass(self, bags: FullBags, gradients: Sequence[Tensor], states: Sequence[RandomState]) -> None:
        device = self.processes.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), frozen_statistics(self.model.encoder):
            for number in range(len(bags.chunks) - 1):
                states[number].restore(device)
                with self._kernels(bags, number):
                    self._encode(bags, number, again=True).backward(gradients[number])

    def _kernels(self, bags: FullBags, number: int) -> contextlib.AbstractContextManager[None]:
        """Where cuDNN may search for its fastest kernels: the last two chunks of a bag have sizes of their own."""
        return contextlib.nullcontext() if bags.chunks[number] == self.model.chunk else fixed_kernels()

    def _encode(self, bags: FullBags, number: int, again: bool = False) -> Tensor:
        """Features of one chunk. Each has an autocast of its own, which else would keep weights without their graph."""
        assert self.renderer is not None
        begin, end = bags.span(number)
        with self._intake.chunk(bags, number, again) as patches:
            inputs = self.renderer(patches, None if bags.draws is None else bags.draws[begin:end])
        with self.precision.autocast():
            return self.model.encode(inputs)

    def _update(self) -> None:
        if self.processes.world > 1:
            average_gradients(self.model.parameters(), self.processes.world)
        super()._update()


@dataclass(frozen=True)
class RandomState:
    """Where the random generators of the host and of the device stand."""

    host: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        cuda = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


class Intake:
    """Brings chunks to the device, on a stream of its own so that copies and computing overlap.

    It holds the chunks that stay for the second pass, and room for two others: one in use, one on its way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept, self._spare = torch.empty(0), torch.empty(2, 0)
        self._turns: Iterator[int] = itertools.cycle(range(2))
        self._read: dict[int, torch.cuda.Event] = {}  # spare room -> when the device has read it

    @contextlib.contextmanager
    def chunk(self, bags: FullBags, number: int, again: bool) -> Iterator[Tensor]:
        """The patches (n, S, S, 3) uint8 of chunk ``number`` on the device, good inside the block.

        Args:
            bags: hands on the patches; chunks are asked for in the order in which it has them.
            number: of the chunk in the batch.
            again: whether this is the second pass.
        """
        if number == 0 and not again:
            self._prepare(bags)
        begin, end = bags.span(number)
        kept = number < bags.kept
        turn = None if kept else next(self._turns)
        room = self._kept[begin:end] if turn is None else self._spare[turn, : end - begin]
        if not (kept and again):
            with self._copying(turn):
                bags.fill(room)
        yield room
        if self._copies is not None and turn is not None:
            self._read[turn] = torch.cuda.current_stream(self.device).record_event()

    def _prepare(self, bags: FullBags) -> None:
        """Makes room once for all batches, and lets copies wait for what still computes on the room's content."""
        shape = (bags.side_px, bags.side_px, 3)
        if len(self._kept) < bags.room:
            self._kept = torch.empty((bags.room, *shape), dtype=torch.uint8, device=self.device)
        if self._spare.shape[1] < bags.chunks[0]:
            self._spare = torch.empty((2, bags.chunks[0], *shape), dtype=torch.uint8, device=self.device)
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))

    @contextlib.contextmanager
    def _copying(self, turn: int | None) -> Iterator[None]:
        if self._copies is None:
            yield
            return
        if turn in self._read:
            self._copies.wait_event(self._read[turn])
        with torch.cuda.stream(self._copies):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self._copies)


def average_gradients(parameters: Iterable[nn.Parameter], world: int) -> None:
    """Replaces gradients by their mean over ``world`` processes, in one exchange.

    A parameter that no process has a gradient for keeps none; where only some have one, the others count as zero.
    """
    trained = [p for p in parameters if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([present.to(trained[0].device), *(g.flatten() for g in gradients)])
    dist.all_reduce(flat)
    held = flat[: len(trained)].tolist() if not bool(present.all()) else [1.0] * len(trained)
    means = (flat[len(trained) :] / world).split([g.numel() for g in gradients])
    for parameter, gradient, mean, holders in zip(trained, gradients, means, held, strict=True):
        if holders:
            parameter.grad = gradient.copy_(mean.view_as(gradient))
