"""A cohort small enough for unit tests: stores of striped patches (the class is the stripes' direction) and labels."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.jpeg import encode
from datasets.store import StoreHeader, StoreWriter

SIDE_PX = 32


@dataclass(frozen=True)
class TinyCohort:
    """Paths of a tiny cohort: two stores and a csv in the published four-column form."""

    high: Path
    low: Path
    csv: Path
    survival_csv: Path

    def options(self, *extra: str) -> list[str]:
        """Options of a run on this cohort that takes a second or two on a CPU."""
        return [
            f"--dataset_root={self.high}",
            f"--csv_path={self.csv}",
            "--datasets=stripes",
            "--cv_fold=1",
            "--model=e2e_r18_abmilx",
            "--no_enc_pt",
            f"--crop_size={SIDE_PX}",
            "--inner_dim=32",
            "--n_heads=2",
            "--mil_norm=ln",
            "--same_psize=4",
            "--batch_size=4",
            "--num_epoch=2",
            "--num_workers=0",
            "--num_bootstrap=20",
            "--device=cpu",
            *extra,
        ]


def striped(rng: np.random.Generator, vertical: bool, side_px: int = SIDE_PX) -> np.ndarray:
    """One RGB patch (side, side, 3) of stripes with random phase, period and colour."""
    wave = np.sin(np.arange(side_px) * rng.uniform(0.6, 1.2) + rng.uniform(0, 6))
    plane = np.tile(wave, (side_px, 1)) if vertical else np.tile(wave[:, None], (1, side_px))
    colour = rng.uniform(60, 120, 3)
    return np.clip(128 + plane[..., None] * colour + rng.normal(0, 8, (side_px, side_px, 3)), 0, 255).astype(np.uint8)


def write_store(path: Path, labels: dict[str, int], counts: dict[str, int], seed: int) -> None:
    """Writes a store in which slide s holds ``counts[s]`` patches of class ``labels[s]``."""
    rng = np.random.default_rng(seed)
    header = StoreHeader(mpp=0.5, level=0, patch_size_px=SIDE_PX, image_size_px=SIDE_PX, jpeg_quality=90)
    with StoreWriter(path, header) as writer:
        for slide, label in labels.items():
            patches = [encode(striped(rng, bool(label)), 90) for _ in range(counts[slide])]
            coords = np.stack([np.arange(counts[slide]) * SIDE_PX, np.zeros(counts[slide])], 1).astype(np.int64)
            writer.put_slide(slide, patches, coords)


def make_tiny_cohort(folder: Path, patients: int = 24) -> TinyCohort:
    """Builds the stores and label files of ``patients`` patients, two thirds of them for training."""
    labels = {f"P{p:02d}-{s}": p % 2 for p in range(patients) for s in range(1 + p % 3 // 2)}
    counts = {slide: 5 + i % 4 for i, slide in enumerate(labels)}
    write_store(folder / "high.lmdb", labels, counts, seed=1)
    write_store(folder / "low.lmdb", labels, {s: max(n // 2, 1) for s, n in counts.items()}, seed=2)
    splits = {f"P{p:02d}": "train" if p < patients * 2 // 3 else ("val", "test")[p // 2 % 2] for p in range(patients)}
    rows = [(s.split("-")[0], s, str(label), splits[s.split("-")[0]]) for s, label in labels.items()]
    _write_csv(folder / "labels.csv", ["case", "slide", "label", "fold"], rows)
    rng = np.random.default_rng(3)
    survival = [
        (
            "tiny",
            s,
            f"{rng.uniform(1, 20) + 30 * label:.2f}",
            str(int(rng.random() < 0.8)),
            splits[s.split("-")[0]],
        )
        for s, label in labels.items()
        if s.endswith("-0")
    ]
    _write_csv(folder / "survival.csv", ["Study", "ID", "Event", "Status", "Split"], survival)
    return TinyCohort(folder / "high.lmdb", folder / "low.lmdb", folder / "labels.csv", folder / "survival.csv")


def _write_csv(path: Path, header: list[str], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
