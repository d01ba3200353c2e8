"""Times the vectorised bootstrap against a loop of plain metrics, on one core, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.bootstrap

The set has the size of the PANDA test set (2,040 slides, 6 classes), the survival set that of a BRCA fold
(336 patients). The loop is run for a few resamples and scaled up; it makes the same metrics with scikit-learn
and scikit-survival. The published program needs 3.6 s per 100 resamples of a set of the first size.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.metrics.bootstrap import Statistics, bootstrap
from engine.metrics.classification import ClassificationStatistics, classification_metrics
from engine.metrics.survival import SurvivalStatistics, survival_metrics


def best_of(times: int, work: Callable[[], object]) -> float:
    """Shortest of several runs, in seconds of wall time."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def report(
    name: str,
    build: Callable[[], Statistics],
    plain: Callable[[NDArray[np.int64]], object],
    resamples: int,
    looped: int,
) -> None:
    """Prints seconds of both forms and their ratio."""
    statistics = build()
    statistics.point()  # imports the libraries
    vectorised = best_of(5, lambda: bootstrap(build(), resamples=resamples))
    draws = np.random.default_rng(0).integers(statistics.size, size=(looped, statistics.size))
    loop = best_of(3, lambda: [plain(draw) for draw in draws]) * resamples / looped
    print(
        f"{name:15} N {statistics.size}  metrics {len(statistics.point().values):2}  {resamples} resamples: "
        f"vectorised {vectorised:.3f} s  loop {loop:.1f} s (from {looped})  ratio {loop / vectorised:.0f}"
    )


def time_classification(args: argparse.Namespace) -> None:
    """Random logits that know something of the label."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, args.classes, args.slides)
    logits = rng.normal(size=(args.slides, args.classes))
    logits[np.arange(args.slides), label] += 2
    report(
        "classification",
        lambda: ClassificationStatistics(logits, label),
        lambda i: classification_metrics(logits[i], label[i]),
        args.resamples,
        args.looped,
    )


def time_survival(args: argparse.Namespace) -> None:
    """Exponential times whose rate follows the risk; about three in four patients are censored."""
    rng = np.random.default_rng(0)
    risk = rng.normal(size=args.patients)
    death, leave = rng.exponential(8 * np.exp(-risk)), rng.exponential(3, args.patients)
    years, event = np.minimum(death, leave), death <= leave
    report(
        "survival",
        lambda: SurvivalStatistics(risk, years, event, years, event),
        lambda i: survival_metrics(risk[i], years[i], event[i], years, event),
        args.resamples,
        args.looped,
    )


def main() -> None:
    """Prints one line for each set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--looped", type=int, default=10, help="resamples of the plain loop")
    parser.add_argument("--slides", type=int, default=2040)
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--patients", type=int, default=336)
    args = parser.parse_args()
    time_classification(args)
    time_survival(args)


if __name__ == "__main__":
    main()
