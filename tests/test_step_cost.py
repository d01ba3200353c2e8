"""What a training step must not cost: seeds are set without looking at the call stack."""

from __future__ import annotations

import random
import traceback

import numpy as np
import pytest
import torch

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
