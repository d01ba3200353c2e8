"""``main.py bench``: what the figures are taken to mean, what is measured, and whole runs of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import TinyCohort, make_tiny_cohort

import main
from datasets.bags import SamplingPlan
from datasets.features import FeatureFolder
from datasets.instances import FeatureSource, PixelSource
from datasets.jpeg import encode
from datasets.labels import Sample
from datasets.store import PatchStore
from engine.bench import verdict as v
from engine.bench.figures import Figures, Setting, table
from engine.bench.run import split_arguments
from engine.bench.supply import (
    PIECE,
    Amount,
    Decoding,
    Rate,
    Reading,
    Supply,
    by_readers,
    bytes_to_read,
    first_and_again,
    flow,
    sample_jpegs,
)
from engine.bench.verdict import limit_of, verdict
from utils.cores import usable_cores
from utils.errors import UserError

ROOT = Path(main.__file__).parent
GIB = 2**30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCohort:
    return make_tiny_cohort(tmp_path_factory.mktemp("tiny"))


# Verdict

SETTING = Setting(
    device="cuda",
    name="a GPU",
    unit="patches",
    processes=1,
    nodes=1,
    cores=16,
    workers=4,
    stored_px=256,
    crop_px=224,
    random_crop=True,
    amp=True,
    channels_last=True,
    compiled=True,
    determ=False,
    pinned=True,
    kept=False,
    data_bytes=40 * GIB,
    free_bytes=100 * GIB,
    staged=False,
)

BALANCED = Figures(
    setting=SETTING,
    supply=Supply(Rate(50_000, 750, 1), Rate(90_000, 1350), Rate(200_000, 3000, 1), Rate(3_000), Rate(12_000)),
    start_seconds=2.0,
    loader=11_000,
    copy=100_000,
    step=10_000,
    render_share=0.05,
    ema_share=0.02,
    loop=9_800,
    data_wait=0.01,
    evaluate=30_000,
)
"""A GPU that nothing keeps waiting: four processes decode a little more than it takes."""


def figures(setting: dict | None = None, supply: dict | None = None, **changes: object) -> Figures:
    """``BALANCED`` with some figures changed."""
    return dataclasses.replace(
        BALANCED,
        setting=dataclasses.replace(SETTING, **(setting or {})),
        supply=dataclasses.replace(BALANCED.supply, **(supply or {})),
        **changes,
    )


def text(f: Figures) -> str:
    return "\n".join(verdict(f))


def decoding_limits(**setting: object) -> Figures:
    return figures(setting, step=20_000, loop=10_500, loader=11_000, data_wait=0.45)


def test_a_device_that_never_waits_is_the_limit_and_gets_no_advice_it_follows_already() -> None:
    assert limit_of(BALANCED) == v.DEVICE
    assert "0.98 of the bare step's 10,000" in text(BALANCED)
    assert "--amp" not in text(BALANCED)
    assert "--num_workers" not in text(BALANCED)


def test_a_limiting_device_is_told_each_option_that_is_not_in_use() -> None:
    idle = figures({"amp": False, "channels_last": False, "compiled": False, "determ": True})
    for option in ("--amp", "--channels_last", "--torchcompile", "--no_determ"):
        assert option in text(idle)
    features = figures({"amp": False, "stored_px": None, "crop_px": None, "compiled": False, "unit": "features"})
    assert "--amp" in text(features)
    assert "--torchcompile" not in text(features)
    assert "a GPU is what helps" in text(figures({"device": "cpu"}, copy=None))


def test_shares_of_the_step_are_said_where_they_matter() -> None:
    assert "moving average" not in text(BALANCED)
    assert "moving average of the weights takes 15%" in text(figures(ema_share=0.15))
    assert "Rendering the random views takes 20%" in text(figures(render_share=0.2))


def test_decoding_limits_and_cores_are_free() -> None:
    f = decoding_limits()
    assert limit_of(f) == v.DECODING
    # 11,000 / 4 a process; 1.2 x 20,000 / 2,750 = 8.7
    assert "--num_workers=9 (now 4)" in text(f)
    assert "0.77 of the pixels" in text(f)  # (224 / 256) squared
    assert "random crop is then no longer taken" in text(f)


def test_decoding_limits_and_too_few_cores_are_free() -> None:
    f = decoding_limits(cores=8)
    assert "--num_workers=7 (now 4)" in text(f)
    assert "19,250" in text(f)  # 7 x 2,750
    assert "--jpeg_decoder=gpu" in text(f)


def test_decoding_limits_and_no_core_is_free() -> None:
    f = decoding_limits(cores=5)
    assert "More readers do not help" in text(f)
    assert "--num_workers=" not in text(f)
    assert "--jpeg_decoder=gpu" in text(f)


def test_stores_of_the_size_that_the_encoder_sees_are_not_asked_to_be_smaller() -> None:
    assert "--img_size" not in text(decoding_limits(stored_px=224))


def test_reading_in_the_training_process() -> None:
    alone = {"step": 20_000, "loader": 2_750, "loop": 2_400, "data_wait": 0.88}
    f = figures({"workers": 0}, {"decode_all": Rate(3_000)}, **alone)
    assert limit_of(f) == v.DECODING
    assert "--num_workers=9 (now 0)" in text(f)
    assert "no second core" in text(figures({"workers": 0, "cores": 1}, {"decode_all": Rate(3_000)}, **alone))


def test_several_training_processes_share_the_cores() -> None:
    f = decoding_limits(processes=2, workers=2, cores=16)
    # four reading processes in all; 8.7 wanted, five for each of two
    assert "--num_workers=5 (now 2)" in text(f)


def disk_limits(**setting: object) -> Figures:
    slow = {"read_first": Rate(500, 7.5, 1), "read_all": Rate(1_900, 28, 0.9)}
    return figures(setting, slow, loader=1_800, loop=1_700, data_wait=0.8)


def test_a_slow_disk_limits_every_epoch_where_the_store_is_larger_than_memory() -> None:
    f = disk_limits(data_bytes=400 * GIB)
    assert limit_of(f) == v.DISK
    assert "--stage_to" in text(f)
    assert "read in every epoch" in text(f)
    assert "answers several processes at once" in text(f)
    assert "--stage_to" not in text(disk_limits(data_bytes=400 * GIB, staged=True))


def test_a_slow_disk_limits_the_first_epoch_where_the_store_fits() -> None:
    warm = figures(supply={"read_all": Rate(1_900, 28, 0.9)})  # the loop ran on what lay in memory already
    assert limit_of(warm) == v.DEVICE
    assert "The disk will limit the first epoch" in text(warm)
    larger = figures({"data_bytes": 400 * GIB}, {"read_all": Rate(1_900, 28, 0.9)})
    assert limit_of(larger) == v.DISK


def test_what_lay_in_memory_says_nothing_about_the_disk() -> None:
    cached = figures(supply={"read_all": Rate(1_900, 28, 0.0)})
    assert "The disk was not measured" in text(cached)
    assert "--stage_to" not in text(cached)
    assert "not known" in text(figures({"free_bytes": None}, {"read_all": Rate(1_900, 28, 0.0)}))


def test_copies_that_the_device_waits_for() -> None:
    f = figures({"pinned": False}, copy=20_000, loop=6_600, data_wait=0.02)  # 1 / (1 / 10,000 + 1 / 20,000) = 6,667
    assert limit_of(f) == v.COPYING
    assert "--pin_memory" in text(f)
    assert limit_of(figures(copy=20_000, loop=6_600, data_wait=0.02)) == v.OTHERS  # page-locked: copied meanwhile
    pinned = figures(copy=7_000, loop=6_600, data_wait=0.3)
    assert limit_of(pinned) == v.COPYING
    assert "page-locked already" in text(pinned)


def test_a_gpu_that_decodes_and_trains() -> None:
    by_gpu = {"decode_gpu": Rate(25_000)}
    shared = figures({"cores": 4, "workers": 3}, by_gpu, loader=24_000, loop=8_000, data_wait=0.2)
    assert limit_of(shared) == v.DECODING
    assert "on the GPU, which decodes 25,000" in text(shared)
    assert "--jpeg_decoder" not in text(shared)  # three cores decode 9,000, hardly more than 8,000
    assert "--num_workers" not in text(shared)
    assert "--jpeg_decoder=cpu --num_workers=15" in text(
        figures(None, by_gpu, loop=8_000, loader=24_000, data_wait=0.2)
    )
    slow = figures({"cores": 4}, by_gpu, step=40_000, loader=24_000, loop=22_000, data_wait=0.4)
    assert limit_of(slow) == v.DECODING


def test_cores_that_reading_and_training_share() -> None:
    crowded = figures({"workers": 16}, loader=20_000, loop=7_000, data_wait=0.2)
    assert limit_of(crowded) == v.CORES
    assert "--num_workers=15 (now 16)" in text(crowded)
    quiet = figures(loader=20_000, loop=7_000, data_wait=0.2)  # four reading processes, fifteen cores
    assert limit_of(quiet) == v.OTHERS
    assert "other programs" in text(quiet)
    on_cpu = figures({"device": "cpu"}, copy=None, loop=6_000, data_wait=0.02)
    assert limit_of(on_cpu) == v.CORES
    assert "a GPU is what helps" in text(on_cpu)
    slow_cpu = figures({"device": "cpu"}, copy=None, step=100, loop=60, data_wait=0.02)  # reading takes 0.04 of a core
    assert limit_of(slow_cpu) == v.OTHERS
    assert "--img_size" not in text(slow_cpu)


def test_passing_batches_on_limits_where_neither_reading_nor_decoding_does() -> None:
    f = figures(supply={"decode_all": Rate(100_000)}, step=20_000, loop=10_500, loader=11_000, data_wait=0.45)
    assert limit_of(f) == v.PASSING_ON
    assert "--img_size" not in text(f)


FEATURES = {"unit": "features", "stored_px": None, "crop_px": None, "random_crop": False, "pinned": False}
NO_JPEGS = {"decode_one": None, "decode_all": None, "read_all": Rate(1_200_000, 4_800)}


def test_features_are_kept_in_memory_where_they_fit() -> None:
    slow = {"step": 4_000_000, "loader": 1_100_000, "loop": 1_000_000, "data_wait": 0.7}
    f = figures(FEATURES, NO_JPEGS, **slow)
    assert limit_of(f) == v.READING
    assert "--persistence --pin_memory" in text(f)
    assert "half precision" in text(figures(FEATURES | {"data_bytes": 400 * GIB}, NO_JPEGS, **slow))
    kept = text(figures(FEATURES | {"kept": True, "workers": 0}, NO_JPEGS, **slow))
    assert "--persistence" not in kept
    assert "--num_workers" not in kept


def test_a_loop_faster_than_its_step_is_doubted() -> None:
    assert "bench again" in text(figures(loop=12_000))
    assert "bench again" not in text(BALANCED)


def test_the_table_leaves_out_what_there_is_not() -> None:
    lines = "\n".join(table(figures(FEATURES, NO_JPEGS, copy=None, evaluate=None)))
    assert "decode" not in lines
    assert "copy" not in lines
    assert "evaluation" not in lines
    assert "decode, 4 reader(s)" in "\n".join(table(BALANCED))


# Supply


def test_rates_of_several_processes_add_up() -> None:
    joined = Rate.joined([Rate(100, 1, 0.5), Rate(300, 3, 0.1)])
    assert (joined.per_s, joined.mb_s) == (400, 4)
    assert joined.from_disk == pytest.approx(0.2)  # 50 + 30 of 400


def test_flow_does_not_count_what_was_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def pieces() -> Iterator[Amount]:
        for number in range(1000):
            clock[0] += 0.0 if number < 6 else 0.5
            yield Amount(10, 1_000_000, 1)

    monkeypatch.setattr("engine.bench.supply.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    rate = flow(pieces(), ready=6, together=2, seconds=2.0)
    assert (rate.per_s, rate.mb_s, rate.from_disk) == (20, 2, 0.1)


def samples(names: list[str]) -> list[Sample]:
    return [Sample(name, name, (name,), {"label": 0}) for name in names]


def test_reading_draws_what_training_draws(tiny: TinyCohort) -> None:
    low, high = (PixelSource(PatchStore(path)) for path in (tiny.low, tiny.high))
    names = high.store.slides[:3]
    reading = Reading(samples(names), [low, high], SamplingPlan(4, 2.0), [0])
    draws = list(reading.draws(5))
    assert {slide for _, slide, _ in draws} <= set(names)
    assert all(len(picks) <= 2 and len(set(picks.tolist())) == len(picks) for _, _, picks in draws)
    assert all(picks.max() < source.count(slide) for source, slide, picks in draws)
    amount = reading[5]
    assert amount.instances == sum(len(picks) for _, _, picks in draws) >= 64
    assert amount.bytes == sum(len(j) for source, slide, picks in draws for j in source.store.read(slide, picks))
    assert [d[2].tolist() for d in draws] == [d[2].tolist() for d in reading.draws(5)]
    assert bytes_to_read(samples(high.store.slides), [high]) == pytest.approx(tiny.high.stat().st_blocks * 512, abs=1)


def test_the_second_reading_repeats_the_first(tiny: TinyCohort) -> None:
    high = PixelSource(PatchStore(tiny.high))
    first, again = first_and_again(Reading(samples(high.store.slides), [high], SamplingPlan(4), [0]), 0.05)
    assert first.mb_s / first.per_s == pytest.approx(again.mb_s / again.per_s)  # the same patches


def test_features_are_looked_at_and_counted(tmp_path: Path) -> None:
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.randn(9, 16), tmp_path / "pt_files" / "a.pt")
    source = FeatureSource(FeatureFolder(tmp_path))
    whole = Reading(samples(["a"]), [source], SamplingPlan(0), [0])
    assert (whole[0].instances, whole[0].bytes) == (9, 9 * 16 * 4)
    assert Reading(samples(["a"]), [source], SamplingPlan(4), [0])[0].instances == 4
    assert sample_jpegs(whole) is None
    assert bytes_to_read(samples(["a"]), [source]) == (tmp_path / "pt_files" / "a.pt").stat().st_size


def test_features_are_read_by_threads_where_training_does_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.zeros(9, 16), tmp_path / "pt_files" / "a.pt")
    reading = Reading(samples(["a"]), [FeatureSource(FeatureFolder(tmp_path))], SamplingPlan(0), [0])
    seen: set[str] = set()
    read = Reading.__getitem__
    monkeypatch.setattr(
        Reading, "__getitem__", lambda own, k: (seen.add(threading.current_thread().name), read(own, k))[1]
    )
    rate = by_readers(reading, 2, 0.05)
    assert rate.per_s > 0
    assert rate.mb_s == pytest.approx(rate.per_s * 64 / 1e6)
    assert seen == {"reading ahead"}


def test_decoding_repeats_the_same_patches() -> None:
    image = np.full((8, 8, 3), 200, np.uint8)
    source = SimpleNamespace(order="rgb", store=SimpleNamespace(image_size_px=8))
    decoding = Decoding([encode(image, 95)], source)  # type: ignore[arg-type]
    assert decoding[0].instances == PIECE
    assert decoding._room is not None
    assert np.abs(decoding._room.astype(int) - 200).max() <= 2


@pytest.mark.parametrize(("content", "most"), [("150000 100000", 1), ("max 100000", None), ("400000 100000", 4)])
def test_a_quota_of_the_container_counts(tmp_path: Path, content: str, most: int | None) -> None:
    quota, absent = tmp_path / "cpu.max", tmp_path / "absent"
    quota.write_text(content)
    everything = usable_cores(absent)
    assert usable_cores(quota) == (everything if most is None else min(everything, most))


# The command


def test_seconds_are_taken_off_the_command_line() -> None:
    assert split_arguments(["--lr=1", "--seconds=3", "-c", "a.yaml"]) == (3.0, ["--lr=1", "-c", "a.yaml"])
    assert split_arguments(["--lr=1"])[0] == 40.0
    for wrong in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(UserError, match="above 0"):
            split_arguments([f"--seconds={wrong}"])


def bench(tiny: TinyCohort, out: Path, *extra: str) -> dict:
    options = tiny.options("--model=e2e_timm:test_resnet_abmilx", f"--output_path={out}", *extra)
    assert main.main(["bench", "--seconds=1", *options]) == 0
    folder = out / "default" / "default"
    assert sorted(p.name for p in folder.iterdir()) == [".lock", "bench.json"]
    return json.loads((folder / "bench.json").read_text())


def test_two_magnifications_and_a_reading_process(tiny: TinyCohort, tmp_path: Path, caplog) -> None:
    extra = ("--mul_scale_input", f"--dataset_sub_root={tiny.low}", "--num_workers=1", "--test_type=both_ema")
    report = bench(tiny, tmp_path, *extra, "--accumulation_steps=2", "--img_transform=strong", "--crop_size=28")
    found = report["figures"]
    assert found["setting"]["workers"] == 1
    assert (found["setting"]["stored_px"], found["setting"]["random_crop"]) == (32, True)
    rates = [found["supply"][k]["per_s"] for k in ("read_first", "read_again", "read_all", "decode_one", "decode_all")]
    assert all(rate > 0 for rate in [*rates, found["loader"], found["step"], found["loop"], found["evaluate"]])
    assert found["ema_share"] > 0
    assert 0 <= found["data_wait"] <= 1
    assert report["limit"] in (v.DEVICE, v.DISK, v.DECODING, v.READING, v.PASSING_ON, v.COPYING, v.CORES, v.OTHERS)
    assert report["verdict"][0] in caplog.text
    assert "everything together" in caplog.text


def test_survival_and_whole_bags(tiny: TinyCohort, tmp_path: Path) -> None:
    survival = bench(tiny, tmp_path / "a", "--datasets=surv_tiny", f"--csv_path={tiny.survival_csv}")
    assert survival["figures"]["loop"] > 0
    whole = bench(tiny, tmp_path / "b", "--full_bag", "--same_psize=0", "--p_batch_size=8", "--full_bag_keep=8")
    assert whole["figures"]["render_share"] is None
    assert whole["figures"]["loop"] > 0


def test_features(tiny: TinyCohort, tmp_path: Path) -> None:
    (tmp_path / "pt_files").mkdir()
    rng = np.random.default_rng(0)
    for slide, count in PatchStore(tiny.high).counts.items():
        torch.save(torch.from_numpy(rng.normal(size=(count, 8)).astype(np.float32)), tmp_path / f"pt_files/{slide}.pt")
    options = ("--model=abmil", f"--dataset_root={tmp_path}", "--same_psize=0")
    for kept in ([], ["--persistence"]):
        found = bench(tiny, tmp_path / f"out{len(kept)}", *options, *kept)["figures"]
        assert found["supply"]["decode_one"] is None
        assert found["setting"]["unit"] == "features"
        assert found["evaluate"] > 0


@pytest.mark.slow
def test_two_processes_measure_together(tiny: TinyCohort, tmp_path: Path) -> None:
    options = tiny.options("--model=e2e_timm:test_resnet_abmilx", "--batch_size=2", f"--output_path={tmp_path}")
    done = subprocess.run(
        ["bash", str(ROOT / "train_dist.sh"), "2", "bench", "--seconds=1", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "default" / "default" / "bench.json").read_text())
    assert report["figures"]["setting"]["processes"] == 2
    assert done.stderr.count("everything together") == 2  # stage and table, from one process


def test_a_fault_of_the_input_is_named_and_nothing_is_written(tiny: TinyCohort, tmp_path: Path, caplog) -> None:
    options = tiny.options("--model=e2e_timm:test_resnet_abmilx", f"--output_path={tmp_path}", "--dataset_root=nowhere")
    assert main.main(["bench", *options]) == 2
    assert "nowhere" in caplog.text
    assert not tmp_path.joinpath("default").exists()
