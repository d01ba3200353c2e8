"""Evaluation: parts of any size, read by whoever, give the encoder calls that the options name, in order."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_store
from torch import Tensor, nn

from datasets.eval_parts import WHOLE, EvalParts, PartPlan
from datasets.eval_reading import EvalReader, on_device
from datasets.features import FeatureFolder
from datasets.instances import FeatureSource, PixelSource
from datasets.jpeg import decode
from datasets.labels import Sample
from datasets.loaders import LoaderOptions
from datasets.positions import Grid
from datasets.store import PatchStore
from engine.evaluate import predict, predict_all
from engine.precision import Precision
from modules.model import SlideModel
from utils.dist import Processes
from utils.errors import UserError

CPU = torch.device("cpu")
COUNTS = {"a": 13, "b": 1, "c": 7, "d": 10}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    path = tmp_path_factory.mktemp("store") / "high.lmdb"
    write_store(path, dict.fromkeys(COUNTS, 0), COUNTS, seed=1)
    return PatchStore(path)


def parts_of(store: PatchStore, plan: PartPlan) -> EvalParts:
    """Three bags, the second of two slides, with positions."""
    samples = [Sample(s[0], s[0], tuple(s), {"label": i}) for i, s in enumerate(("a", "bc", "d"))]
    return EvalParts(samples, PixelSource(store, grid=Grid(store, store)), plan, range(3))


def patches(store: PatchStore, *slides: str) -> np.ndarray:
    return np.stack([decode(jpeg) for s in slides for jpeg in store.read(s, range(COUNTS[s]))])


def seen(reader: EvalReader, split: str = "val") -> list[tuple[Tensor, list[int], bool, Tensor]]:
    calls = []
    for bags in reader.read(split):
        assert len(bags.instances) == sum(bags.sizes)
        assert bags.pos is not None
        calls.append((bags.instances.clone(), bags.index, bags.last, bags.pos.clone()))
    return calls


@pytest.mark.parametrize(
    ("count", "run", "call", "expected"),
    [
        (10_000, 2048, 512, [512] * 18 + [392] * 2),
        (13, 5, 512, [5, 5, 3]),
        (13, 8, 3, [3, 3, 2, 3, 2]),
        (4, 100, 100, [4]),
    ],
)
def test_encoder_calls_of_a_bag(count: int, run: int, call: int, expected: list[int]) -> None:
    assert PartPlan(run, call).calls(count) == expected


@pytest.mark.parametrize(("workers", "read"), [(0, 128), (0, 2), (1, 3), (2, 2), (2, 128)])
def test_calls_hold_every_patch_once_in_order(store: PatchStore, workers: int, read: int) -> None:
    plan = PartPlan(run=8, call=3, read=read)
    with closing(EvalReader({"val": parts_of(store, plan)}, LoaderOptions(workers), CPU)) as reader:
        for _ in range(2):
            calls = seen(reader)
            expected = [(i, n) for i, count in enumerate((13, 8, 10)) for n in plan.calls(count)]
            assert [(index[0], len(x)) for x, index, _, _ in calls] == expected
            for i, slides in enumerate(("a", "bc", "d")):
                own = [call for call in calls if call[1] == [i]]
                assert [last for _, _, last, _ in own] == [False] * (len(own) - 1) + [True]
                assert np.array_equal(torch.cat([x for x, *_ in own]).numpy(), patches(store, *slides))
                assert len(torch.cat([pos for *_, pos in own]).unique(dim=0)) == sum(COUNTS[s] for s in slides)


class closing:  # noqa: N801 - as contextlib's
    """Ends the processes of a reader in the test that started them."""

    def __init__(self, reader: EvalReader) -> None:
        self.reader = reader

    def __enter__(self) -> EvalReader:
        return self.reader

    def __exit__(self, *_: object) -> None:
        self.reader._stop()


def test_reading_processes_serve_all_splits_and_live_on(store: PatchStore) -> None:
    plan = PartPlan(8, 8, 4)
    before = {p.pid for p in multiprocessing.active_children()}
    with closing(EvalReader({"val": parts_of(store, plan), "test": parts_of(store, plan)}, LoaderOptions(2), CPU)) as r:
        first, own = seen(r), {p.pid for p in multiprocessing.active_children()} - before
        second, then = seen(r, "test"), {p.pid for p in multiprocessing.active_children()} - before
        assert own == then
        assert len(own) == 2
        assert all(torch.equal(x[0], y[0]) for x, y in zip(first, second, strict=True))
        ring = r._ring
        assert ring is not None
        assert sum(_free(ring)) == len(ring.buffers), "every buffer came back"


def _free(ring: object) -> Iterator[int]:
    for queue in ring._free:  # type: ignore[attr-defined]
        count = 0
        while not queue.empty():
            queue.get()
            count += 1
        yield count


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_that_is_given_up_does_not_harm_the_next(store: PatchStore, workers: int) -> None:
    with closing(EvalReader({"val": parts_of(store, PartPlan(8, 3, 2))}, LoaderOptions(workers), CPU)) as reader:
        for _ in range(3):
            calls = reader.read("val")
            next(calls)
            begin = time.monotonic()
            calls.close()  # type: ignore[attr-defined]
            assert time.monotonic() - begin < 4  # torch waits five seconds for a process that does not answer
        assert len(seen(reader)) == 5 + 3 + 4


def test_a_damaged_patch_is_named_from_a_reading_process(tmp_path: Path) -> None:
    write_store(tmp_path / "s.lmdb", {"a": 0}, {"a": 3}, seed=1)
    source = PixelSource(PatchStore(tmp_path / "s.lmdb"))
    parts = EvalParts([Sample("a", "a", ("a",), {"label": 0})], source, PartPlan(8, 8, 1), [0])
    parts.parts[1] = type(parts.parts[1])(0, 5, 6, 3, False)
    with (
        closing(EvalReader({"val": parts}, LoaderOptions(1), CPU)) as reader,
        pytest.raises(UserError, match="patch 5 of slide 'a' is missing"),
    ):
        list(reader.read("val"))


class Mean(nn.Module):
    """An encoder and head whose logits are exact sums, so that they do not depend on how patches are grouped."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x.sum(1)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double().sum((1, 2))


@pytest.mark.parametrize("plan", [PartPlan(1000, 1000), PartPlan(8, 3, 2), PartPlan(1, 1)])
def test_logits_are_those_of_whole_bags(store: PatchStore, plan: PartPlan) -> None:
    parts = parts_of(store, plan)
    with closing(EvalReader({"val": parts}, LoaderOptions(2), CPU)) as reader:
        model, alone = SlideModel(_Flat(), Sum()), Processes(0, 1, CPU)
        found = predict(model, reader.read("val"), None, Precision("cpu", None), alone)
    expected = [patches(store, *s).astype(np.int64).sum((0, 1, 2)) for s in ("a", "bc", "d")]
    assert np.array_equal(found.logits.numpy(), np.stack(expected).astype(np.float32))
    assert found.index.tolist() == found.target["label"].tolist() == [0, 1, 2]


def test_several_sets_of_weights_are_evaluated_in_one_pass(store: PatchStore) -> None:
    torch.manual_seed(0)
    models = {name: SlideModel(_Linear(), Sum()) for name in ("main", "ema")}
    alone, exact, plan = Processes(0, 1, CPU), Precision("cpu", None), PartPlan(8, 3, 2)
    source = parts_of(store, plan)
    read = on_device([source[i] for i in range(len(source))], CPU)
    calls = [replace(bags, instances=bags.instances.clone()) for bags in read]
    asked = iter(calls)  # can be gone through once
    together = predict_all(models, asked, None, exact, alone)
    for name, model in models.items():
        one = predict(model, calls, None, exact, alone)
        assert torch.equal(one.logits, together[name].logits)
        assert torch.equal(one.index, together[name].index)
    assert not torch.equal(together["main"].logits, together["ema"].logits)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor) -> Tensor:
        return x.sum(1) * self.weight


class _Flat(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, pos: Tensor) -> Tensor:
        assert pos.shape[:2] == x.shape[:2]
        return x.sum(1)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_come_a_bag_at_a_time(tmp_path: Path, workers: int) -> None:
    values = {f"s{n}": torch.randn(n, 3) for n in (4, 9, 2)}
    for slide, x in values.items():
        torch.save(x.half() if slide == "s9" else x, tmp_path / f"{slide}.pt")
    samples = [Sample(s, s, (s,), {"label": 0}) for s in values]
    parts = EvalParts(samples, FeatureSource(FeatureFolder(tmp_path)), WHOLE, range(3))
    with closing(EvalReader({"val": parts}, LoaderOptions(workers), CPU)) as reader:
        found = [bags.instances.clone() for bags in reader.read("val")]
    assert [x.dtype for x in found] == [torch.float32, torch.float16, torch.float32]
    assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(values.values(), found, strict=True))


def test_an_empty_share_of_a_split_gives_no_calls(store: PatchStore) -> None:
    parts = EvalParts([], PixelSource(store), PartPlan(8, 8), [])
    assert list(EvalReader({"val": parts}, LoaderOptions(2), CPU).read("val")) == []


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_calls_on_a_gpu_are_those_on_a_cpu(store: PatchStore, workers: int) -> None:
    device = torch.device("cuda")
    plan = PartPlan(8, 3, 2)
    parts = parts_of(store, plan)
    expected = [bags.instances.clone() for bags in on_device([parts[i] for i in range(len(parts))], CPU)]
    reader = EvalReader({"val": parts_of(store, plan)}, LoaderOptions(workers, pin=True), device)
    with closing(reader):
        for _ in range(3):
            calls = reader.read("val")
            found = []
            for bags in calls:
                torch.cuda._sleep(20_000_000)  # the device is behind: rooms must not be filled while it works on them
                found.append(bags.instances.clone())
            assert all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))
