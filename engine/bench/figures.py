"""What ``main.py bench`` measured, and its table."""

from __future__ import annotations

from dataclasses import dataclass

from engine.bench.supply import Rate, Supply


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the run is set up, as far as advice depends on it.

    Attributes:
        device: "cuda" or "cpu".
        name: of the device, for people.
        unit: "patches" or "features".
        processes: of the whole run.
        nodes: machines that they run on.
        cores: that may be used, on all machines together.
        workers: reading processes of each process; 0 reads in the training process.
        stored_px, crop_px: size of a stored patch and of what the encoder sees; None for features.
        random_crop: whether a random part of each patch is taken, which needs stored patches larger than the crop.
        amp, channels_last, compiled, determ, pinned, kept: the options of these names (kept: persistence).
        data_bytes: size of the files that an epoch may touch.
        free_bytes: memory of this machine that could hold them; None where the system does not say.
        staged: whether the files are copied to a local disk beforehand.
    """

    device: str
    name: str
    unit: str
    processes: int
    nodes: int
    cores: int
    workers: int
    stored_px: int | None
    crop_px: int | None
    random_crop: bool
    amp: bool
    channels_last: bool
    compiled: bool
    determ: bool
    pinned: bool
    kept: bool
    data_bytes: int
    free_bytes: int | None
    staged: bool

    @property
    def readers(self) -> int:
        """Processes that read: the training processes themselves where there are no others."""
        return max(self.workers, 1) * self.processes

    @property
    def room(self) -> int:
        """Reading processes for which there are cores, when each training process has one."""
        return max(self.cores - self.processes, 0)

    @property
    def fits(self) -> bool | None:
        """Whether the files fit into the memory of each machine; None where it is not known."""
        return None if self.free_bytes is None else self.data_bytes < self.free_bytes


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured; instances per second of all processes together.

    Attributes:
        supply: reading and decoding alone.
        start_seconds: until the first batch was there.
        loader: batches that nobody uses.
        copy: host memory to GPU; None on a CPU.
        step: training step on batches that are on the device already.
        render_share, ema_share: shares of that step; None where nothing is rendered in one go.
        loop: everything together.
        data_wait: share of the loop's time spent waiting for a batch.
        evaluate: evaluation, reading included; None where there is nothing to evaluate.
        memory_gib: peak memory of the device; None on a CPU.
    """

    setting: Setting
    supply: Supply
    start_seconds: float
    loader: float
    copy: float | None
    step: float
    render_share: float | None
    ema_share: float
    loop: float
    data_wait: float
    evaluate: float | None
    memory_gib: float | None = None


def number(rate: float) -> str:
    """A rate as people read it: 12,345 or 1.23."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def table(f: Figures) -> list[str]:
    """The figures as lines of a table."""
    s, supply = f.setting, f.supply
    crowd = f"{s.readers} reader(s)"
    rows: list[tuple[str, float | None, str]] = [
        ("read, one process, first time", supply.read_first.per_s, _of_files(supply.read_first)),
        ("read, one process, again", supply.read_again.per_s, _of_files(supply.read_again)),
        (f"read, {crowd}", supply.read_all.per_s, _of_files(supply.read_all)),
        ("decode, one process", supply.decode_one.per_s if supply.decode_one else None, ""),
        (f"decode, {crowd}", supply.decode_all.per_s if supply.decode_all else None, ""),
        ("decode, GPU", supply.decode_gpu.per_s if supply.decode_gpu else None, "doing nothing else"),
        ("batches, nobody using them", f.loader, f"the first one came after {f.start_seconds:.1f} s"),
        ("copy to the device", f.copy, "page-locked" if s.pinned else "not page-locked"),
        ("training step alone", f.step, _parts_of_step(f)),
        ("everything together", f.loop, f"waits for data {f.data_wait:.0%} of the time"),
        ("evaluation, reading included", f.evaluate, ""),
    ]
    head = f"{s.name}; {s.cores} core(s), {s.processes} training process(es), {s.workers} reader(s) each"
    memory = "" if f.memory_gib is None else f"; peak memory {f.memory_gib:.1f} GiB"
    lines = [head + memory, f"{'stage':34}{s.unit + '/s':>12}  of step"]
    return lines + [
        f"{name:34}{number(rate):>12}{rate / f.step:9.2f}  {note}".rstrip()
        for name, rate, note in rows
        if rate is not None
    ]


def _of_files(rate: Rate) -> str:
    return f"{rate.mb_s:.0f} MB/s, {rate.from_disk:.0%} from disk"


def _parts_of_step(f: Figures) -> str:
    views = "" if f.render_share is None else f"views {f.render_share:.0%}, "
    return f"{views}EMA {f.ema_share:.0%} of it"
