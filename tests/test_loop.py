"""What the loop offers: groups of parameters, recomputed activations, sampling, faults with names, the dry run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SIDE_PX, TinyCohort, make_tiny_cohort
from torch import nn

import main
from datasets.bags import Bags, pick
from datasets.instances import PixelSource, load_instances
from datasets.sampling import Regions, bag_limit, regional_order
from datasets.store import PatchStore
from engine.attention_sampling import elect, reduced
from engine.learner import Learner
from engine.optim import build_schedule, parameter_groups
from engine.progress import EpochMeters
from engine.selection import Best, EarlyStopping, Progress
from engine.tasks import ClassificationTask
from engine.training_options import check_training_options
from modules.heads import build_mil
from modules.model import SlideModel
from utils.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from utils.dist import Processes
from utils.errors import UserError
from utils.options import parse
from utils.stop import StopRequest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"))


def run(tiny: TinyCohort, out: Path, *extra: str) -> int:
    encoder = "--model=e2e_timm:test_resnet_abmilx"
    return main.main(tiny.options(encoder, "--num_epoch=1", f"--output_path={out}", *extra))


def folder(out: Path) -> Path:
    return out / "default" / "default"


class Mean(nn.Module):
    """A head without parameters: the mean of the features."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x.mean(1)


def small_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


# Parameters


def test_encoder_and_head_have_their_own_rates_and_norms_may_be_spared() -> None:
    model = SlideModel(nn.Linear(2, 2), small_encoder())
    options = TrainConfig(lr=0.1, encoder_lr=0.01, weight_decay=0.5, decay_all=False)
    found = {(g["name"], g["lr"], g["weight_decay"]): len(g["params"]) for g in parameter_groups(model, options)}
    assert found == {
        ("encoder", 0.01, 0.5): 2,  # weights of the convolution and of the linear layer
        ("encoder", 0.01, 0.0): 4,  # their biases, and two of the norm
        ("head", 0.1, 0.5): 1,
        ("head", 0.1, 0.0): 1,
    }
    published = parameter_groups(model, TrainConfig(lr=0.1, weight_decay=0.5))
    assert {(g["lr"], g["weight_decay"]) for g in published} == {(0.1, 0.5)}


def test_a_frozen_encoder_stays_as_it_is(tiny: TinyCohort, tmp_path: Path) -> None:
    assert run(tiny, tmp_path / "a", "--freeze_enc", "--save_iter=1", "--num_epoch=2") == 0
    states = [torch.load(folder(tmp_path / "a") / f"fold_0_epoch_{e}_model.pt", weights_only=True) for e in (0, 1)]
    same = {k: torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items()}
    assert all(v for k, v in same.items() if k.startswith("encoder."))
    assert not all(same.values())
    assert [g["name"] for g in states[0]["optimizer"]["param_groups"]] == ["head"]


def test_warm_up_lies_inside_the_cosine_as_published() -> None:
    options = TrainConfig(lr=8e-5, num_epoch=75, warmup_epochs=10)
    optimizer = torch.optim.Adam(parameter_groups(nn.Linear(1, 1), options), lr=options.lr)
    schedule = build_schedule(optimizer, options)
    assert schedule is not None
    rates = [optimizer.param_groups[0]["lr"]]
    for epoch in range(74):
        schedule.step(epoch + 1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == options.warmup_lr
    assert max(rates) == pytest.approx(1e-7 + (8e-5 - 1e-7) * (1 + math.cos(math.pi * 10 / 75)) / 2)  # 7.65e-5
    assert rates[-1] < 2e-7


# Recomputed activations


def test_recomputing_changes_neither_gradients_nor_batch_statistics() -> None:
    patches = torch.randn(11, 3, 8, 8)
    results = []
    for recompute in (False, True):
        model = SlideModel(Mean(), small_encoder(), chunk=4, recompute=recompute).train()
        model(patches, [11])[0].square().sum().backward()
        results.append([p.grad for p in model.parameters()] + list(model.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert int(results[1][-1]) == 3  # batches that BatchNorm has counted: one per chunk


def test_chunks_are_full_but_the_last_two() -> None:
    sizes: list[int] = []
    encoder = small_encoder()
    encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    SlideModel(Mean(), encoder, chunk=4).encode(torch.randn(13, 3, 8, 8))
    assert sizes == [4, 4, 3, 2]


# Sampling


def test_every_region_comes_first_and_the_rest_is_random() -> None:
    regions = Regions(4).of(10)
    assert regions.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    orders = [regional_order(regions, np.random.default_rng(seed)) for seed in range(50)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(10))
        assert sorted(regions[order[:4]].tolist()) == [0, 1, 2, 3]
    assert len({tuple(order.tolist()) for order in orders}) == 50
    assert {int(order[0]) for order in orders} == set(range(10))


def test_grid_regions_follow_the_positions_and_not_the_list() -> None:
    positions = np.array([[x, y] for x in (10, 19) for y in (3, 4, 8)])
    assert Regions(2, grid=True).of(6, positions).tolist() == [0, 0, 1, 2, 2, 3]


def test_training_bags_take_every_region() -> None:
    regions = Regions(2).of(8)
    for seed in range(20):
        drawn, fresh = pick(8, 3, False, np.random.default_rng(seed), regions)
        assert (len(drawn), fresh) == (3, 3)
        assert drawn.min() < 4 <= drawn.max()


def test_the_smaller_limit_holds() -> None:
    limits = [(0, None, 0), (5, None, 5), (0, 3, 3), (5, 3, 3), (2, 3, 2)]
    assert [bag_limit(DataConfig(same_psize=s, max_patch_train=m)) for s, m, _ in limits] == [n for *_, n in limits]


def test_votes_of_the_heads_count_before_their_weights() -> None:
    attention = torch.tensor([[0.50, 0.30, 0.20, 0.00], [0.00, 0.45, 0.15, 0.40], [0.0, 0.1, 0.46, 0.44]])
    # votes for two each: head 0: 0, 1; head 1: 1, 3; head 2: 2, 3
    assert elect(attention, 2).tolist() == [1, 3]
    assert elect(attention, 9).tolist() == [0, 1, 2, 3]
    equal_votes = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.3, 0.7]])
    assert elect(equal_votes, 1).tolist() == [1 if 0.7 / 2 > 0.7 else 2]  # one vote each for 0 and 2; 2 weighs more


def test_chosen_patches_are_taken_bag_by_bag() -> None:
    bags = Bags(torch.arange(5.0).unsqueeze(1), [2, 3], [0, 1], {}, draws=torch.arange(5))
    small = reduced(bags, [torch.tensor([1]), torch.tensor([0, 2])])
    assert small.instances.flatten().tolist() == [1, 2, 4]
    assert small.sizes == [1, 2]
    assert small.draws is not None
    assert small.draws.tolist() == [1, 2, 4]


KINDS = [["--sel_type=ema"], ["--num_group_2d=2"], ["--num_group_1d=3", "--max_patch_train=2"]]


@pytest.mark.parametrize("extra", KINDS)
def test_runs_with_every_kind_of_sampling(tiny: TinyCohort, tmp_path: Path, extra: list[str]) -> None:
    assert run(tiny, tmp_path, *extra) == 0


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (["--sel_type=ema", "--same_psize=0"], "keeps --same_psize patches of a bag, and that is 0"),
        (["--sel_type=ema", "--pad_enc_bs"], "give --no_pad_enc_bs"),
        (["--sel_type=ema", "--model=e2e_timm:test_resnet_meanP"], "FeatureMean has no attention"),
        (["--num_group_1d=2", "--num_group_2d=2"], "give one of them"),
        (["--num_group_1d=0"], "num_group_1d is 0, but must be at least 1"),
        (["--num_group_1d=2", "--same_psize=0"], "every patch is taken"),
    ],
)
def test_sampling_that_cannot_be_is_refused(tiny, tmp_path, caplog, extra: list[str], sentence: str) -> None:
    assert run(tiny, tmp_path, *extra) == 2
    assert sentence in caplog.text


# Faults


def test_a_loss_that_is_not_finite_names_the_bags(tiny: TinyCohort, tmp_path: Path, caplog) -> None:
    assert run(tiny, tmp_path, "--lr=1e30", "--num_epoch=3") == 2
    assert "the loss became nan on the bags P" in caplog.text
    assert not (folder(tmp_path) / "results.json").exists()


def test_a_loss_that_is_not_finite_is_never_saved() -> None:
    meters = EpochMeters()
    meters.loss.add(torch.tensor(float("inf")), ["P1"])
    with pytest.raises(UserError, match="inf on the bags P1"):
        meters.state_dict()


@pytest.mark.parametrize(("training", "option"), [(True, "--grad_checkpointing"), (False, "Lower --p_batch_size_v")])
def test_too_little_memory_names_bags_patches_and_options(
    tiny: TinyCohort, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch, training: bool, option: str
) -> None:
    encode = SlideModel.encode

    def full(self: SlideModel, instances: torch.Tensor) -> torch.Tensor:
        if self.training == training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encode(self, instances)

    monkeypatch.setattr(SlideModel, "encode", full)
    assert run(tiny, tmp_path) == 2
    assert "ran out of memory while" in caplog.text
    assert ("(16 instances, 512 per encoder call)" in caplog.text) == training
    assert option in caplog.text


# Values of an epoch


def test_metrics_hold_every_rate_and_the_norm_where_it_is_clipped(tiny: TinyCohort, tmp_path: Path) -> None:
    assert run(tiny, tmp_path, "--clip_grad=0.5", "--encoder_lr=1e-5", "--lr=1e-4", "--profile") == 0
    line = json.loads((folder(tmp_path) / "metrics.jsonl").read_text())
    assert (line["lr"], line["lr_encoder"]) == (1e-4, 1e-5)
    assert line["grad_norm"] > 0.5
    trace = json.loads((folder(tmp_path) / "trace_rank0.json").read_text())
    assert any("conv" in str(event.get("name")) for event in trace["traceEvents"])


def test_skipped_updates_do_not_count_in_the_mean_norm() -> None:
    meters = EpochMeters()
    for value in (1.0, float("inf"), 3.0):
        meters.norm.add(torch.tensor(value))
    again = EpochMeters()
    again.load_state_dict(meters.state_dict(), torch.device("cpu"))
    assert again.norm.mean == 2.0


def test_a_dry_run_reports_and_leaves_nothing(tiny: TinyCohort, tmp_path: Path, caplog) -> None:
    assert run(tiny, tmp_path, "--dry_run", "--num_epoch=100") == 0
    for text in ("peak memory", "instances/s trained", "for 100 epoch(s) of 1 fold(s)", "GiB of checkpoints"):
        assert text in caplog.text
    assert not list(tmp_path.iterdir())


# Selection and stopping


def test_equal_metrics_are_told_apart_by_the_loss() -> None:
    best = Best()
    assert [best.update(*epoch) for epoch in ((0.9, 0.5, 0), (0.9, 0.6, 1), (0.9, 0.4, 2), (0.8, 0.1, 3))] == [
        True,
        False,
        True,
        False,
    ]
    assert best.epoch == 2


def test_progress_inside_an_epoch_survives_a_round_trip() -> None:
    progress = Progress(EarlyStopping(3, 1), best={"main": Best(0.5, 1.0, 1)}, epoch=2, step=7)
    again = Progress(EarlyStopping(3, 1))
    again.load_state_dict(progress.state_dict())
    assert again == progress
    assert not again.between_epochs
    again.finish_epoch()
    assert (again.epoch, again.between_epochs) == (3, True)


def test_a_signal_is_a_wish_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # at once after another signal: not a second Ctrl-C
        assert stop.by == "SIGTERM"
        stop._since -= 10
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_numbers_out_of_range_are_named_together(tiny: TinyCohort, tmp_path: Path, caplog) -> None:
    wrong = ["--accumulation_steps=0", "--clip_grad=-1", "--mm=1", "--lr=0", "--seed=-1", "--crop_size=0"]
    assert run(tiny, tmp_path, *wrong) == 2
    named = "accumulation_steps is 0", "clip_grad is -1.0", "mm is 1.0", "lr is 0.0", "seed is -1", "crop_size is 0"
    for text in named:
        assert text in caplog.text


def test_a_run_shorter_than_its_warm_up_is_told_so(tiny: TinyCohort, tmp_path: Path, caplog) -> None:
    """Published recipes with a warm-up of ten epochs are tried out with --num_epoch=1."""
    assert run(tiny, tmp_path, "--warmup_epochs=10") == 0
    assert "the whole run is warm-up" in caplog.text


def test_a_state_of_another_precision_is_refused() -> None:
    task, processes = ClassificationTask(("0", "1"), "accuracy_macro"), Processes(0, 1, torch.device("cpu"))
    model = SlideModel(build_mil("meanmil", 4, 2, ModelConfig()))
    learner = Learner(model, task, None, TrainConfig(), processes, with_ema=False)
    learner.load_state_dict(learner.state_dict())
    with pytest.raises(UserError, match="computed in fp16, and on this device it would go on in bf16 or float32"):
        learner.load_state_dict(learner.state_dict() | {"scaler": {"scale": 65536.0}})


def test_a_magnification_of_which_a_bag_takes_nothing(tiny: TinyCohort) -> None:
    nothing = load_instances(PixelSource(PatchStore(tiny.high)), ("P00-0", "P02-0"), np.zeros(0, np.int64))
    assert nothing.shape == (0, SIDE_PX, SIDE_PX, 3)


def test_options_that_others_switch_off_are_named(caplog) -> None:
    schedule = ["--lr_sche=const", "--warmup_epochs=2", "--amp_dtype=bf16"]
    check_training_options(parse([*schedule, "--freeze_enc", "--encoder_lr=1", "--no_enc_pt"])[0])
    for text in ("lr_sche const has no warm-up", "without --amp", "trains no encoder", "random weights"):
        assert text in caplog.text


def test_always_test_adds_test_metrics_and_changes_nothing_else(tiny: TinyCohort, tmp_path: Path) -> None:
    lines = []
    for name, extra in (("plain", []), ("tested", ["--always_test"])):
        assert run(tiny, tmp_path / name, *extra) == 0
        lines.append(json.loads((folder(tmp_path / name) / "metrics.jsonl").read_text()))
    plain, tested = lines
    expected = {k.replace("val_", "te_") for k in plain if k.startswith("val_") and k != "val_loss"}
    assert tested.keys() - plain.keys() == expected
    assert all(tested[k] == plain[k] for k in plain if k.startswith("val_"))


def test_the_page_on_training_has_a_row_for_every_option() -> None:
    page = (Path(main.__file__).parent / "docs/training.md").read_text()
    groups = (TrainConfig, EvalConfig, RunConfig)
    missing = [f.name for group in groups for f in dataclasses.fields(group) if f"\n| `{f.name}`" not in page]
    assert not missing
