"""Training steps of 1, 2 and 3 processes on the same bags: equal losses, gradients, statistics, weights.

The last steps hold fewer bags than three processes can share evenly, and fewer than there are processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import results_of
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import modules.heads  # noqa: F401  (fills the registry)
from datasets.bags import Bags
from datasets.loaders import TrainStream, shard
from engine.learner import Learner
from engine.tasks import ClassificationTask, CoxTask, SurvivalTask, Task
from engine.tasks.multilabel import MultilabelTask
from engine.tasks.regression import RegressionTask
from modules.heads import build_mil
from modules.model import SlideModel
from modules.registry import mils
from modules.sync_batchnorm import JoinedBatchNorm, synchronised
from utils.config import ModelConfig, TrainConfig
from utils.dist import Processes

WIDTH = 12
STEPS = (6, 5, 1, 2)
"""Bags of the steps of all processes together."""

RANDOM = {"dtfd"}
"""Heads that draw random numbers in training, which every process does on its own."""

TASKS: dict[str, Task] = {
    "classes": ClassificationTask(("a", "b", "c"), "auc", class_weights=(0.5, 1.0, 3.0)),
    "survival": SurvivalTask(4),
    "cox": CoxTask(),
    "labels": MultilabelTask(("label", "event", "other"), positive_weights=(1.0, 2.0, 0.5)),
    "value": RegressionTask(mean=2.0, sd=3.0),
}


@dataclass(frozen=True)
class Case:
    """One learner: task, head, options; with ``px`` bags hold patches of that side, which an encoder sees."""

    task: str
    head: str
    options: dict[str, Any] = field(default_factory=dict)
    px: int = 0
    model: dict[str, Any] = field(default_factory=dict)


SYNC = {"sync_bn": True, "accumulation_steps": 1}
CASES = {
    **{f"classes-{head}": Case("classes", head) for head in sorted(mils.names())},
    **{f"{task}-{head}": Case(task, head) for task in ("cox", "labels", "value") for head in ("abmilx", "dsmil")},
    "survival-clam_mb": Case("survival", "clam_mb"),
    "encoder": Case("classes", "abmilx", SYNC, px=6),
    "encoder-recomputed": Case("classes", "abmil", SYNC | {"grad_checkpointing": True}, px=6),
    "head with bn": Case("classes", "abmil", SYNC, model={"mil_norm": "bn"}),
    "several calls": Case("classes", "abmil", SYNC | {"p_batch_size": 3}, px=6),
}


class Recorder(Learner):
    """Keeps the gradient of every update; the weights hardly move, so that all of them are comparable."""

    gradients: list[dict[str, Tensor]]

    def _update(self) -> None:
        parameters = self.model.named_parameters()
        self.gradients.append({k: p.grad.clone().cpu() for k, p in parameters if p.grad is not None})
        super()._update()


def encoder() -> nn.Module:
    """Two kinds of batch normalisation, the second of which holds an activation."""
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, WIDTH, 3, bias=False)]
    return nn.Sequential(*layers, BatchNormAct2d(WIDTH, act_layer=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def bags_of(step: int, mine: Sequence[int], case: Case) -> Bags:
    """Bags ``mine`` of a step; every bag is a function of its place alone."""
    px = case.px
    instances, sizes, targets = [], [], []
    for place in mine:
        draw = torch.Generator().manual_seed(100 * step + place)
        sizes.append(2 + int(torch.randint(0, 9, (), generator=draw)))
        instances.append(torch.randn(sizes[-1], *((3, px, px) if px else (WIDTH,)), generator=draw))
        label, event = int(torch.randint(0, 3, (), generator=draw)), int(torch.rand((), generator=draw) < 0.7)
        value = float(torch.rand((), generator=draw)) + 1
        targets.append({"label": label, "event": event, "time": value, "value": value, "other": place % 3 - 1})
    target = {k: torch.tensor([t[k] for t in targets]) for k in targets[0]}
    places = [torch.stack([torch.arange(n) % 3, torch.arange(n) // 3], 1) for n in sizes]
    return Bags(
        torch.cat(instances), sizes, list(mine), target, pos=torch.cat(places) if case.head == "2dmamba" else None
    )


def learner_of(case: Case, processes: Processes) -> Recorder:
    torch.manual_seed(0)
    task = TASKS[case.task]
    model = ModelConfig(inner_dim=16, n_heads=2, n_layers=1, dropout=0, **case.model)
    options = TrainConfig(
        lr=1e-9, weight_decay=0, clip_grad=0.5, warmup_epochs=0, **{"p_batch_size": 512, **case.options}
    )
    mil = build_mil(case.head, WIDTH, task.outputs, model)
    slide_model = SlideModel(
        mil, encoder() if case.px else None, options.p_batch_size, recompute=options.grad_checkpointing
    )
    slide_model.to(processes.device)
    learner = Recorder(slide_model, task, None, options, processes, with_ema=False)
    learner.gradients = []
    learner.model.train()
    for layer in learner.model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # some heads have one that no option turns off
    return learner


def trained(processes: Processes, case: Case) -> dict[str, Any]:
    """The steps, two of which share an update unless the case says otherwise: what was measured and learnt."""
    learner, values = learner_of(case, processes), []
    group = case.options.get("accumulation_steps", 2)
    for step, size in enumerate(STEPS if group == 2 else STEPS[:2]):
        counts = [len(shard(size, rank, processes.world)) for rank in range(processes.world)]
        mine = list(shard(size, processes.rank, processes.world)) or [99]
        torch.manual_seed(step)
        loss = learner.step(bags_of(step, mine, case), group, (step + 1) % group == 0, counts)
        norm = learner.grad_norm if learner.grad_norm is not None else torch.zeros(())
        aux = learner.aux_loss if learner.aux_loss is not None else torch.zeros(())
        values.append([float(loss), float(aux), float(norm)])
    every = torch.tensor(processes.gather(values)).mean(0)
    buffers = {k: v.clone().cpu() for k, v in learner.model.named_buffers()}
    return {"values": every, "gradients": learner.gradients, "buffers": buffers}


def all_cases(processes: Processes, names: list[str]) -> dict[str, Any]:
    return {name: trained(processes, CASES[name]) for name in names}


def normalised(processes: Processes) -> dict[str, Any]:
    """Rows of processes one of which has none: output, gradients and running statistics of the joined norm."""
    norm = JoinedBatchNorm(nn.BatchNorm2d(4)).to(processes.device)
    x, _ = ROWS[processes.rank].to(processes.device), norm.train()
    x.requires_grad_()
    y = norm(x)
    (y * torch.arange(y.numel(), device=y.device).view_as(y)).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    own = {"y": y.detach(), "x": x.grad, "weight": norm.weight.grad}
    own |= {"mean": norm.running_mean, "var": norm.running_var, "batches": norm.num_batches_tracked}
    return {name: value.cpu() for name, value in own.items()}


def residual() -> nn.Module:
    """Layers with two ways that join, each with a norm: a compiler could exchange their sums in another order."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.beside, self.norm_beside = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.first(x)) + self.norm_beside(self.beside(x))).mean((2, 3))

    return Block()


def compiled_encoder(processes: Processes) -> dict[str, Any]:
    """Features, gradients and statistics of a compiled encoder; of three processes one has no patches."""
    torch.manual_seed(0)
    task, patches = TASKS["classes"], torch.randn(7, 3, 6, 6)
    model = SlideModel(build_mil("abmil", 8, task.outputs, ModelConfig(inner_dim=8)), residual(), 512)
    if processes.world > 1:
        model.synchronise()
        model.compile_encoder(backend="aot_eager", fullgraph=True)
    begins = [0, 4, 4, 7] if processes.world > 1 else [0, 7]
    mine = slice(*begins[processes.rank : processes.rank + 2])
    features = model.train().encode(patches[mine])
    (features * torch.randn(7, 8)[mine]).sum().backward()
    gradients = {k: p.grad for k, p in model.encoder.named_parameters()}
    return {"features": features.detach(), "gradients": gradients, "buffers": dict(model.encoder.named_buffers())}


def fused_encoder(processes: Processes) -> dict[str, Any]:
    """Features and gradients of a ResNet on GPUs, half precision, with joined statistics of either kind."""
    from modules.encoders import build_encoder

    found = {}
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        patches, slope = torch.randn(24, 3, 96, 96), torch.randn(24, 256)
        encoder = build_encoder("r18", pretrained=False)
        model = SlideModel(build_mil("abmil", encoder.width, 3, ModelConfig(inner_dim=8)), encoder, 512)
        model = model.to(processes.device, memory_format=torch.channels_last)
        if processes.world > 1:
            model.synchronise()
        if name == "compiled":
            model.compile_encoder()
        mine = slice(*((0, 24) if processes.world == 1 else ((0, 10), (10, 24))[processes.rank]))
        inputs = patches[mine].to(processes.device, memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16):
            features = model.train().encode(inputs)
        (features.float() * slope[mine].to(processes.device)).sum().backward()
        gradients = {k: p.grad.float().cpu() for k, p in encoder.named_parameters()}
        buffers = {k: b.cpu() for k, b in model.encoder.named_buffers() if b.is_floating_point()}
        found[name] = {"features": features.detach().float().cpu(), "gradients": gradients, "buffers": buffers}
    return found


ROWS = [1e3 + 5 * torch.randn(n, 4, 2, 3, generator=torch.Generator().manual_seed(n)) for n in (5, 0, 1)]
"""Far from zero: a sum of squares in one pass would lose the variance."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Number of processes -> what each rank found, by case."""
    folder = tmp_path_factory.mktemp("steps")
    return {world: results_of(all_cases, world, folder / str(world), list(CASES)) for world in (1, 2, 3)}


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.head not in RANDOM and n != "several calls"])
def test_steps_of_several_processes_are_those_of_one(results: dict[int, Any], name: str) -> None:
    for found in (*results[2], *results[3]):
        assert_same(found[name], results[1][0][name])


def assert_same(found: dict[str, Any], alone: dict[str, Any], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found["values"], alone["values"], rtol=tolerance, atol=1e-6)
    assert len(found["gradients"]) == len(alone["gradients"])
    for own, whole in zip(found["gradients"], alone["gradients"], strict=True):
        assert own.keys() == whole.keys()
        size = max(float(g.abs().max()) for g in whole.values())
        for key, gradient in whole.items():
            torch.testing.assert_close(own[key], gradient, rtol=10 * tolerance, atol=0.2 * tolerance * size)
    for key, buffer in alone["buffers"].items():
        torch.testing.assert_close(found["buffers"][key], buffer, rtol=tolerance, atol=1e-6)


@pytest.mark.gpu
def test_steps_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    names = ["encoder", "encoder-recomputed", "head with bn", "several calls", "cox-dsmil", "labels-abmilx"]
    (alone,) = results_of(all_cases, 1, tmp_path / "1", names, device="cuda")
    for found in results_of(all_cases, 2, tmp_path / "2", names, device="cuda"):
        for name in names:
            if name != "several calls":  # there it is enough that it comes to an end
                assert_same(found[name], alone[name], tolerance=1e-2)


@pytest.mark.gpu
def test_a_fused_encoder_joins_the_statistics_of_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    (alone,) = results_of(fused_encoder, 1, tmp_path / "1", device="cuda")
    found = results_of(fused_encoder, 2, tmp_path / "2", device="cuda")

    def far(got: Tensor, want: Tensor) -> float:
        return float((got - want).norm() / (want.norm() + 1e-6))

    for name, want in alone.items():
        assert far(torch.cat([f[name]["features"] for f in found]), want["features"]) < 0.02
        for key, gradient in want["gradients"].items():
            assert far(sum(f[name]["gradients"][key] for f in found), gradient) < 0.1, key
        for own in found:
            for key, buffer in want["buffers"].items():
                assert far(own[name]["buffers"][key], buffer) < 0.01, key


@pytest.mark.parametrize(("device", "world"), [("cpu", 3), pytest.param("cuda", 2, marks=pytest.mark.gpu)])
def test_a_joined_norm_is_the_norm_of_the_joined_batch_also_of_a_process_without_rows(
    tmp_path: Path, device: str, world: int
) -> None:
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip("needs two CUDA devices")
    norm, x = nn.BatchNorm2d(4), torch.cat(ROWS[:world]).requires_grad_()
    y, begins = norm(x), [0, 5, 5]
    factors = [torch.arange(r.numel()).view_as(r) for r in ROWS[:world]]
    (y * torch.cat(factors)).sum().backward()
    assert x.grad is not None
    found = results_of(normalised, world, tmp_path / "norm", device=device)
    for own, begin, rows in zip(found, begins[:world], ROWS[:world], strict=True):
        mine = slice(begin, begin + len(rows))
        torch.testing.assert_close(own["y"], y[mine].detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own["x"], x.grad[mine], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own["mean"], norm.running_mean)
        torch.testing.assert_close(own["var"], norm.running_var, rtol=1e-4, atol=0)
        assert own["batches"] == 1
    assert norm.weight.grad is not None
    torch.testing.assert_close(sum(own["weight"] for own in found), norm.weight.grad, rtol=1e-3, atol=1e-2)


def test_a_compiled_encoder_joins_its_statistics(tmp_path: Path) -> None:
    (alone,) = results_of(compiled_encoder, 1, tmp_path / "1")
    found = results_of(compiled_encoder, 3, tmp_path / "3")
    torch.testing.assert_close(torch.cat([f["features"] for f in found]), alone["features"])
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(sum(f["gradients"][name] for f in found), gradient, rtol=1e-4, atol=1e-5)
    for own in found:
        torch.testing.assert_close(own["buffers"], alone["buffers"])


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.head in RANDOM or n == "several calls"])
def test_processes_agree_also_where_they_cannot_equal_one(results: dict[int, Any], name: str) -> None:
    """Every process draws its own numbers; encoder calls join the k-th part of every process's patches."""
    for world in (2, 3):
        first = results[world][0][name]
        assert first["values"].isfinite().all()
        for other in results[world][1:]:
            for key, buffer in first["buffers"].items():
                torch.testing.assert_close(other[name]["buffers"][key], buffer)
            for own, gradients in zip(other[name]["gradients"], first["gradients"], strict=True):
                for key, gradient in gradients.items():
                    torch.testing.assert_close(own[key], gradient)


@pytest.mark.parametrize(("count", "batch_size"), [(16, 2), (7, 1), (7, 3), (1, 4), (12, 2)])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_bag_counts_once_in_an_epoch_and_in_the_step_of_one_process(
    count: int, batch_size: int, world: int
) -> None:
    options = {"seed": 4, "drop_last": False, "epochs": (2, 3)}
    alone = list(TrainStream(count, batch_size * world, **options))
    streams = [TrainStream(count, batch_size, rank=rank, world=world, **options) for rank in range(world)]
    batches = [list(stream) for stream in streams]
    for step, whole in enumerate(alone):
        counts = streams[0].counts(step)
        assert max(counts) - min(counts) <= 1
        assert max(counts) <= batch_size
        assert all(batches[rank][step] for rank in range(world)), "a process without a batch would not take part"
        assert sum((batches[rank][step][: counts[rank]] for rank in range(world)), []) == whole
    assert sorted(p for batch in alone for _, p in batch) == list(range(count))


def test_a_compiled_encoder_exchanges_the_same_also_where_it_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without patches does; with other exchanges than the rest it would wait for them for ever."""
    monkeypatch.setattr("modules.model.largest_of_all", lambda number: number)
    model = SlideModel(nn.BatchNorm1d(WIDTH), encoder())
    model.synchronise()
    assert not any(layer.compiled for layer in model.modules() if isinstance(layer, JoinedBatchNorm))
    model.compile_encoder(backend="eager")
    assert [layer.compiled for layer in model.encoder.modules() if isinstance(layer, JoinedBatchNorm)] == [True, True]
    assert not model.mil.compiled


def test_synchronised_layers_keep_names_values_and_what_evaluation_says() -> None:
    plain = encoder().eval()
    with torch.no_grad():
        for buffer in plain.buffers():
            buffer.add_(1) if buffer.is_floating_point() else None
    x = torch.randn(4, 3, 6, 6)
    before, names = plain(x), {k: v.clone() for k, v in plain.state_dict().items()}
    joined = synchronised(plain)
    assert sum(isinstance(m, JoinedBatchNorm) for m in joined.modules()) == 2
    torch.testing.assert_close(joined(x), before)
    assert {k: v.shape for k, v in joined.state_dict().items()} == {k: v.shape for k, v in names.items()}
