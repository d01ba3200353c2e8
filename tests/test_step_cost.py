"""What a training step must not cost: seeds are set without looking at the call stack."""

from __future__ import annotations

import random
import traceback

import numpy as np
import pytest
import torch

from engine.progress import LossMeter
from utils.errors import UserError
from utils.host_copy import HostCopy
from utils.seed import seed_all, step_seed


def test_seeds_are_those_of_torch_and_cost_no_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    seed = step_seed(2021, 3, 14, 0)
    torch.manual_seed(seed)
    large = torch.rand(3)

    def refused() -> None:
        raise AssertionError("a stack trace was written")

    monkeypatch.setattr(traceback, "format_stack", refused)
    seed_all(7)
    assert torch.equal(torch.rand(3), expected)
    first = random.random(), np.random.rand()
    seed_all(7)
    assert first == (random.random(), np.random.rand())
    seed_all(seed)
    assert torch.equal(torch.rand(3), large)


@pytest.mark.gpu
def test_seeds_on_a_gpu_are_those_of_torch() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3, device="cuda")
    seed_all(7)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


@pytest.mark.gpu
def test_a_number_does_not_wait_for_what_was_queued_behind_it() -> None:
    number = HostCopy(torch.tensor(2.5, device="cuda"))
    torch.cuda._sleep(1_000_000_000)
    behind = torch.cuda.Event()
    behind.record()
    assert number.value() == 2.5
    assert not behind.query()


def test_a_number_of_the_cpu() -> None:
    assert HostCopy(torch.tensor(2.5)).value() == 2.5


def test_numbers_one_behind_another() -> None:
    number = HostCopy(torch.tensor(2.5))
    number.take(torch.tensor(3.5))
    assert number.value() == 3.5


@pytest.mark.gpu
def test_the_next_number_takes_the_same_memory() -> None:
    number = HostCopy(torch.tensor(2.5, device="cuda"))
    memory, event = number._number.data_ptr(), number._there
    assert number.value() == 2.5
    torch.cuda._sleep(100_000_000)
    number.take(torch.tensor(3.5, device="cuda"))
    assert number.value() == 3.5
    assert number._number.data_ptr() == memory
    assert number._there is event


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_losses_are_summed_and_one_that_is_not_finite_names_its_bags(device: str) -> None:
    meter = LossMeter()
    for step, loss in enumerate((0.5, 0.25, 4.0)):
        meter.add(torch.tensor(loss, device=device), [f"bag {step}"])
    assert meter.total() == (4.75, 3)
    meter.add(torch.tensor(float("nan"), device=device), ["bag 3"])
    with pytest.raises(UserError, match="became nan on the bags bag 3"):
        meter.add(torch.tensor(1.0, device=device), ["bag 4"])
    meter.check()  # said once
