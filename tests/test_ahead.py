"""Work that threads do in advance: in order, with a bounded lead, and with an end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datasets.ahead import in_thread, in_threads

ROOT = Path(__file__).resolve().parent.parent
LEFT_OPEN = """
import torch
from datasets.ahead import in_threads

def work(number):
    values = torch.ones(100_000)
    for _ in range(1000):
        values = values.mul(2).sqrt().index_select(0, torch.arange(100_000))
    return number

items = in_threads(work, range(1000), threads=3, ahead=5)
print(next(items))
"""


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reading ahead"]


@pytest.mark.parametrize("threads", [1, 2, 6])
@pytest.mark.parametrize("ahead", [1, 2, 13])
def test_results_come_in_the_order_of_the_items(threads: int, ahead: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (-number % 3))  # later ones are ready earlier
        return number**2

    assert list(in_threads(work, range(40), threads, ahead)) == [n**2 for n in range(40)]
    assert not own_threads()


def test_threads_work_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=5)
    assert len(list(in_threads(lambda _: together.wait(), range(9), threads=3, ahead=3))) == 9


def test_the_lead_is_bounded() -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            asked.append(number)
            yield number

    results = in_threads(lambda n: n, items(), threads=3, ahead=4)
    for number in range(3):
        assert next(results) == number
        time.sleep(0.05)
        assert len(asked) == number + 1 + 4
    assert list(results) == list(range(3, 20))


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_comes_in_the_place_of_its_result_and_ends_the_threads(threads: int) -> None:
    def work(number: int) -> int:
        if number == 5:
            raise ValueError("number 5")
        time.sleep(0.01)
        return number

    results = in_threads(work, range(10**9), threads, ahead=8)
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="number 5"):
        next(results)
    assert not own_threads()


def test_closing_ends_the_threads_and_waits_for_what_they_are_about() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        time.sleep(0.1)
        done.append(number)
        return number

    results = in_threads(work, range(10**9), threads=3, ahead=20)
    next(results)
    results.close()
    assert not own_threads()
    assert len(done) <= 6  # nobody began another one


def test_an_iterator_that_nobody_asked_has_no_threads() -> None:
    results = in_threads(lambda n: n, range(3), threads=2, ahead=2)
    assert not own_threads()
    results.close()


def test_threads_of_torch_are_divided_and_those_of_others_stay() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert set(in_threads(lambda _: torch.get_num_threads(), range(9), threads=2, ahead=3)) == {2}
        assert set(in_threads(lambda _: torch.get_num_threads(), range(9), threads=6, ahead=3)) == {1}
        assert set(in_thread((torch.get_num_threads() for _ in range(3)), ahead=1)) == {4}
        assert torch.get_num_threads() == 4
        found: list[int] = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert found == [4]
    finally:
        torch.set_num_threads(before)


def test_a_program_that_leaves_threads_at_work_ends_well() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


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


CLEARED_AT_THE_END = """
import threading, time
from datasets.ahead import in_thread

begun = threading.Event()

class Slow:
    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(0.2)  # the iterator is closed meanwhile, so the thread is the last to hold this
        return 1

    def __del__(self):
        begun.set()
        time.sleep(0.5)
        print("cleared", flush=True)

items = in_thread(Slow(), ahead=1)
next(items)
items.close()
del items
begun.wait()
"""


def test_the_program_waits_for_a_closed_iterators_thread_to_clear_away_what_it_read_from() -> None:
    command = [sys.executable, "-c", CLEARED_AT_THE_END]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleared\n", "")
