"""Patches that the GPU decodes: the same bags as from the reading processes, and the same errors."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jpeg_planes import planes_of
from PIL import Image
from tiny import SIDE_PX, make_tiny_cohort
from torch import Tensor

from datasets.bags import Bags, SamplingPlan, TrainBags
from datasets.eval_parts import EvalParts, PartPlan
from datasets.eval_reading import EvalReader
from datasets.full_bags import ChunkPlan, full_bag_batches
from datasets.gpu_jpeg.coded import GpuDecoder, decode_rows, decoded, is_coded
from datasets.gpu_jpeg.nvjpeg import Images, NvJpeg, NvJpegError
from datasets.gpu_jpeg.stacks import heads, pack
from datasets.instances import CodedSource, PixelSource, Source
from datasets.jpeg import decode, encode
from datasets.labels import Sample
from datasets.loaders import LoaderOptions, TrainStream, train_batches
from datasets.store import PatchStore, StoreHeader, StoreWriter
from datasets.views import ViewPlan
from engine.decoding import cores_of, gpu_decoder
from engine.sources import check_paths
from utils.config import DataConfig
from utils.dist import Processes
from utils.errors import Faults, UserError

VIEWS = ViewPlan("strong", 0.2, SIDE_PX, 28)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PatchStore:
    return PatchStore(make_tiny_cohort(tmp_path_factory.mktemp("tiny"), patients=12).high)


def on_cpu(rows: Tensor) -> Tensor:
    return decode_rows(rows, SIDE_PX, "rgb")


def samples_of(store: PatchStore) -> list[Sample]:
    """Bags of one and of two slides."""
    slides = list(store.slides)
    pairs = [tuple(slides[i : i + 1 + i % 2]) for i in range(len(slides) - 1)]
    return [Sample(f"{i}", f"{i}", pair, {"label": i % 2}) for i, pair in enumerate(pairs)]


def bags_of(store: PatchStore, source: Source, total: int = 7) -> TrainBags:
    return TrainBags(samples_of(store), [source], SamplingPlan(total), VIEWS, seed=3)


def content(batches: Iterator[Bags]) -> list[tuple[Tensor, list[int], list[int]]]:
    return [(b.instances.clone(), b.sizes, b.index) for b in batches]


def assert_same(
    ours: list[tuple[Tensor, list[int], list[int]]], theirs: list[tuple[Tensor, list[int], list[int]]]
) -> None:
    assert len(ours) == len(theirs) > 4
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:] == other[1:]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_the_same_whoever_decodes(store: PatchStore, workers: int) -> None:
    seen: list[list[int]] = []

    def counted(rows: Tensor) -> Tensor:
        seen.append(heads(rows)["patches"].tolist())
        return on_cpu(rows)

    def batches(
        source: Source, decoder: Callable[[Tensor], Tensor] | None
    ) -> list[tuple[Tensor, list[int], list[int]]]:
        bags = bags_of(store, source)
        stream = TrainStream(len(bags), 3, seed=1, epochs=(0, 3))
        return content(train_batches(bags, stream, LoaderOptions(workers, decoder=decoder)))

    plain = batches(PixelSource(store), None)
    assert_same(batches(CodedSource(store), counted), plain)
    assert seen == [[sum(sizes)] for _, sizes, _ in plain]  # one stack for the bags of a batch


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_and_whole_bags_are_the_same_whoever_decodes(store: PatchStore, workers: int) -> None:
    def evaluated(source: Source, options: LoaderOptions) -> list[tuple[Tensor, list[int], list[int]]]:
        parts = EvalParts(samples_of(store), source, PartPlan(8, 5, 2), range(6))
        return content(EvalReader({"test": parts}, options, torch.device("cpu")).read("test"))

    def whole(source: Source, options: LoaderOptions) -> list[Tensor]:
        bags, found = bags_of(store, source, total=0), []
        for full in full_bag_batches(bags, TrainStream(len(bags), 2), options, ChunkPlan(4, 0)):
            for size in full.chunks:
                found.append(torch.empty(size, SIDE_PX, SIDE_PX, 3, dtype=torch.uint8))
                full.fill(found[-1])
        return found

    plain, ours = LoaderOptions(workers), LoaderOptions(workers, decoder=on_cpu)
    assert_same(evaluated(CodedSource(store), ours), evaluated(PixelSource(store), plain))
    for one, other in zip(whole(CodedSource(store), ours), whole(PixelSource(store), plain), strict=True):
        assert torch.equal(one, other)


def test_no_buffers_are_made_for_patches_that_the_gpu_decodes(
    store: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr("datasets.loaders.BatchRing", lambda *_: made.append("training"))
    monkeypatch.setattr("datasets.eval_reading.ring_for", lambda *_: made.append("evaluation"))
    bags, options = bags_of(store, CodedSource(store)), LoaderOptions(1, decoder=on_cpu)
    assert len(content(train_batches(bags, TrainStream(len(bags), 3), options))) == len(bags) // 3
    parts = EvalParts(samples_of(store), CodedSource(store), PartPlan(8, 5, 2), range(6))
    assert content(EvalReader({"test": parts}, options, torch.device("cpu")).read("test"))
    assert not made


def test_packed_rows_are_told_from_patches_and_features() -> None:
    assert is_coded(pack([b"abc", b"defgh"]))
    assert not is_coded(torch.zeros(3, 8, 8, 3, dtype=torch.uint8))
    assert not is_coded(torch.zeros(3, 8))


def one_slide(path: Path, jpegs: list[bytes]) -> PatchStore:
    header = StoreHeader(mpp=0.5, level=0, patch_size_px=SIDE_PX, image_size_px=SIDE_PX, jpeg_quality=80)
    with StoreWriter(path, header) as writer:
        writer.put_slide("s", jpegs, np.zeros((len(jpegs), 2), np.int64))
    return PatchStore(path)


def test_what_the_gpu_must_not_see_is_refused_by_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good, large = (encode(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in (SIDE_PX, 2 * SIDE_PX))
    source = CodedSource(one_slide(tmp_path / "a.lmdb", [good, large]))
    with pytest.raises(UserError, match=r"patch 1 of slide 's' is no JPEG of the store's size.*holds 64 x 64 px"):
        source.jpegs(["s"], np.array([0, 1]))
    source = CodedSource(one_slide(tmp_path / "b.lmdb", [good, good[:-40]]))
    with pytest.raises(UserError, match="patch 1 of slide 's'.*truncated"):
        source.jpegs(["s"], np.array([0, 1]))


def test_an_error_of_the_decoding_thread_reaches_the_run_and_ends_it(store: PatchStore) -> None:
    def failing(rows: Tensor) -> Tensor:
        raise UserError("no more")

    bags = bags_of(store, CodedSource(store))
    with pytest.raises(UserError, match="no more"):
        next(train_batches(bags, TrainStream(len(bags), 3), LoaderOptions(0, decoder=failing)))


def test_batches_without_coded_patches_pass(store: PatchStore) -> None:
    features = Bags(torch.randn(4, 3), [4], [0], {})
    (same,) = decoded([features], on_cpu)
    assert torch.equal(same.instances, features.instances)


def test_the_gpu_is_chosen_where_few_could_decode(store: PatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, made = Processes(0, 1, torch.device("cpu")), []
    decoder = SimpleNamespace(engines=True)
    monkeypatch.setattr("engine.decoding.GpuDecoder", lambda *args: made.append(args) or decoder)
    with pytest.raises(UserError, match="computes on the CPU"):
        gpu_decoder(DataConfig(jpeg_decoder="gpu"), PixelSource(store), cpu, 1)
    assert gpu_decoder(DataConfig(), PixelSource(store), cpu, 1) is None
    gpu = replace(cpu, device=torch.device("cuda", 0))
    for cores, peers, workers, engines, chosen in (
        (32, 1, 30, True, False),
        (32, 1, 14, True, True),
        (32, 2, 30, True, True),
        (32, 2, 30, False, False),
        (32, 1, 6, False, False),
        (32, 1, 0, False, True),
        (32, 8, 14, False, True),
        (2, 1, 14, True, True),
    ):
        decoder.engines = engines
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)))
        own = replace(gpu, local_world=peers)
        assert cores_of(own) == cores / peers
        assert (gpu_decoder(DataConfig(), PixelSource(store), own, workers) is not None) == chosen
        assert gpu_decoder(DataConfig(jpeg_decoder="cpu"), PixelSource(store), own, workers) is None


def test_processes_that_train_in_step_decode_themselves_earlier(
    store: PatchStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.decoding.GpuDecoder", lambda *_: SimpleNamespace(engines=True))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32)))
    for world, workers, in_step, chosen in (
        (2, 14, True, False),
        (2, 12, True, True),
        (2, 14, False, True),
        (1, 14, True, True),
    ):
        own = Processes(0, world, torch.device("cuda", 0), local_world=world)
        decoder = gpu_decoder(DataConfig(), PixelSource(store), own, workers, in_step)
        assert (decoder is not None) == chosen


def test_jpegs_that_do_not_stack_are_left_to_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.decoding.GpuDecoder", lambda *_: SimpleNamespace(engines=True))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    gpu, image = Processes(0, 1, torch.device("cuda", 0)), Image.fromarray(np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8))
    for sampling, workers, chosen in ((2, 14, True), (0, 14, False), (1, 14, False), (1, 4, True)):
        file = io.BytesIO()
        image.save(file, "JPEG", subsampling=sampling)
        path = tmp_path / f"{sampling} {workers}.lmdb"
        with StoreWriter(path, StoreHeader(image_size_px=SIDE_PX)) as writer:
            for slide in ("s0", "s1"):
                writer.put_slide(slide, [file.getvalue()] * 3)
        source = PixelSource(PatchStore(path))
        assert (gpu_decoder(DataConfig(), source, gpu, workers) is not None) == chosen
        assert gpu_decoder(DataConfig(jpeg_decoder="gpu"), source, gpu, workers) is not None


def test_features_need_no_decoder(tmp_path: Path) -> None:
    faults = Faults("input")
    (tmp_path / "labels.csv").touch()
    data = DataConfig(jpeg_decoder="gpu", dataset_root=str(tmp_path), csv_path=str(tmp_path / "labels.csv"))
    check_paths(data, False, faults)
    with pytest.raises(UserError, match="jpeg_decoder is for patches, and this model takes features"):
        faults.raise_if_any()


def tissue(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    coarse = [
        rng.normal(128, 50, (32, 32, 3)).repeat(8, 0).repeat(8, 1) + rng.normal(0, 8, (256, 256, 1))
        for _ in range(count)
    ]
    return [encode(np.clip(image, 0, 255).astype(np.uint8), 80) for image in coarse]


class PlainNvJpeg:
    """What nvJPEG does, by libjpeg and in host memory; refuses what the engines refuse."""

    backend = NvJpeg.ENGINES
    worst = 0

    def __init__(self, device: torch.device) -> None:
        self.calls: list[tuple[int, int]] = []

    def decode(self, addresses: np.ndarray, sizes: np.ndarray, images: Images) -> None:
        self.calls.append((len(addresses), images.form))
        jpegs = [ctypes.string_at(int(a), int(n)) for a, n in zip(addresses, sizes, strict=True)]
        if any(Image.open(io.BytesIO(j)).info.get("progressive") for j in jpegs):
            raise NvJpegError("nvjpegDecodeBatched answers 2")
        for row, jpeg in enumerate(jpegs):
            if images.form == NvJpeg.PLANES:
                channels = [plane.numpy() for plane in planes_of(jpeg)]
            else:
                channels = [decode(jpeg, order="bgr" if images.form == NvJpeg.BGR else "rgb")]
            for channel, begins, pitch in zip(channels, images.addresses, images.pitches, strict=True):
                assert pitch == channel[0].size
                content = (channel + self.worst).astype(np.uint8).tobytes()
                ctypes.memmove(int(begins[row]), content, len(content))


@pytest.fixture
def plain_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """GpuDecoder without a GPU."""
    monkeypatch.setattr(
        "datasets.gpu_jpeg.coded.NvJpeg", type("Fake", (PlainNvJpeg, NvJpeg), {"__del__": lambda self: None})
    )
    stream = SimpleNamespace(synchronize=lambda: None)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_every_mixture_of_jpegs_comes_back_in_order(plain_gpu: None, order: str) -> None:
    decoder, jpegs = GpuDecoder(torch.device("cpu"), 256, order), tissue(12)
    alone = full_chroma(jpegs[0])
    assert decoder.engines
    for batch in (jpegs, [alone], [alone, *jpegs, alone, alone, encode(decode(jpegs[1]), 60), *jpegs[:3]]):
        want = np.stack([decode(j, order=order) for j in batch])
        assert np.array_equal(decoder(pack(batch)).numpy(), want)
    assert [count for count, _ in decoder.codec.calls] == [1, 1, 1, 3, 3]  # the first one is the trial


def test_what_the_engines_refuse_comes_all_the_same_and_is_said_once(
    plain_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    decoder, jpegs = GpuDecoder(torch.device("cpu"), 256, "rgb"), tissue(3)
    batch = [*jpegs, progressive(jpegs[0])]
    for _ in range(2):
        assert np.array_equal(decoder(pack(batch)).numpy(), np.stack([decode(j) for j in batch]))
    assert [r.getMessage() for r in caplog.records] == [
        "The GPU refused a batch of JPEGs (nvjpegDecodeBatched answers 2); one CPU core decodes such batches, slowly."
    ]


def test_a_gpu_that_decodes_stacks_to_something_else_is_not_used(
    plain_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainNvJpeg, "worst", 20)
    with pytest.raises(NvJpegError, match="to other pixels than the CPU"):
        GpuDecoder(torch.device("cpu"), 256, "rgb")


def full_chroma(jpeg: bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(decode(jpeg)).save(file, "JPEG", subsampling=0, quality=90)
    return file.getvalue()


def progressive(jpeg: bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(decode(jpeg)).save(file, "JPEG", progressive=True, quality=90)
    return file.getvalue()


def assert_decodes(decoder: GpuDecoder, jpegs: list[bytes]) -> None:
    got = decoder(pack(jpegs)).cpu().int()
    want = torch.from_numpy(np.stack([decode(j, order=decoder.order) for j in jpegs])).int()
    assert (got - want).abs().max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_gpu_decodes_as_the_cpu_does(order: str) -> None:
    jpegs = tissue(40)
    unlike = [encode(decode(j), 70) for j in jpegs[:3]]
    alone = full_chroma(jpegs[0])
    decoder = GpuDecoder(torch.device("cuda"), 256, order)
    for count in (40, 7, 1, 40):
        assert_decodes(decoder, (jpegs * 4)[: 4 * count])
    assert_decodes(decoder, [*jpegs[:5], *unlike, alone, *jpegs[5:9]])
    assert_decodes(decoder, [alone] * 3)


@pytest.mark.gpu
def test_what_the_gpu_refuses_the_cpu_decodes() -> None:
    jpegs = tissue(4)
    assert_decodes(GpuDecoder(torch.device("cuda"), 256, "rgb"), [*jpegs, progressive(jpegs[0]), *jpegs])


@pytest.mark.gpu
def test_two_decoders_work_side_by_side() -> None:
    """Training goes on preparing batches while an evaluation begins."""
    jpegs = tissue(128)
    rows, want = pack(jpegs * 4), GpuDecoder(torch.device("cuda"), 256, "rgb")(pack(jpegs)).repeat(4, 1, 1, 1)

    def many(decoder: GpuDecoder) -> bool:
        return all(torch.equal(decoder(rows), want) for _ in range(8))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(many, [GpuDecoder(torch.device("cuda"), 256, "rgb") for _ in range(2)]))
