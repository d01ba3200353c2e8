"""A whole run: all folds, then the summary in ``results.json``."""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from datasets.labels.report import describe as describe_cohort
from datasets.labels.report import split_card, write_split
from engine.agreement import check_processes, check_same_input
from engine.dryrun import dry_run
from engine.fold import FoldRun
from engine.fold_files import check_states, forget_folds
from engine.metrics.bootstrap import bootstrap, summarise
from engine.records import GIVE_ANOTHER, Records, environment, open_folder
from engine.run_names import run_folder, split_path
from engine.setup import Setup, build_model, prepare
from engine.staging import report_plan, staged
from engine.tasks import Task, task_builder
from engine.testing import FoldResult, write_means
from engine.trackers import fold_values, open_trackers, summary_values
from engine.trained import need_training_rows
from utils.config import Config
from utils.dist import Processes
from utils.errors import UserError
from utils.files import MAKE_ROOM, writing
from utils.log import duration, set_up_logging
from utils.seed import seed_all
from utils.stop import RESTARTS

log = logging.getLogger(__name__)


def check(config: Config, processes: int = 1) -> None:
    """Reads and checks all that a run of so many processes would read, builds its models, prints the split cards.

    Raises:
        UserError: for faults in what the user gave.
    """
    setup = prepare(config)
    show_cohort(setup)
    report_plan(setup)
    if config.run.trains:
        check_processes(setup, processes)
    for fold in setup.cohort.folds:
        task = task_builder.build(config, setup.cohort, fold, processes)
        build_model(setup, task.outputs, fold.index)
    log.info("Everything that the run reads is in order.")


def run(config: Config, processes: Processes, notes: list[str]) -> dict[str, Any]:
    """Trains and tests every fold, or lets the models of a run predict.

    Args:
        config: the options.
        processes: this process among its peers.
        notes: sentences from reading the options, for the log.

    Returns:
        What ``results.json`` holds; nothing for predictions.

    Raises:
        UserError: for faults in what the user gave, before the first epoch wherever possible.
    """
    begin = time.perf_counter()
    check_restarts(config)
    set_precision(config)
    setup = prepare(config)
    if config.run.trains:
        check_processes(setup, processes.world)
    check_same_input(setup, processes)
    if config.run.dry_run:
        need_training_rows(setup.cohort, "--dry_run")
        report_plan(setup)
        dry_run(setup, processes)
        return {}
    with open_records(config, processes) as records:
        for note in notes:
            log.info("%s", note)
        show_cohort(setup)
        return _all_folds(staged(setup, processes), processes, records, begin)


def _all_folds(setup: Setup, processes: Processes, records: Records, begin: float) -> dict[str, Any]:
    config = setup.config
    results, scores = list[FoldResult](), list[dict[str, torch.Tensor]]()
    for fold in setup.cohort.folds:
        fold_run = FoldRun(setup, fold, processes, records)
        if fold is setup.cohort.folds[0]:
            _begin(setup, processes, records)
        records.selection = fold_run.task.selection
        if processes.is_main and not config.run.predicts:
            path = split_path(records.folder, fold.index)
            with writing(path, MAKE_ROOM):
                write_split(fold, path)
        if config.run.trains:
            fold_run.train()
        if config.run.predicts:
            scores.append(fold_run.predict())
        elif config.run.script_mode != "no_test":
            results.append(fold_run.test())
            records.tracker.log(fold_values(results[-1].test), step=fold.index)
    if config.run.predicts:
        write_means(scores, setup.cohort, fold_run.task, records)
        summary = dict[str, Any]()
    else:
        summary = summary_of(setup, results, fold_run.task) if results else {}
        summary["seconds"] = time.perf_counter() - begin
        records.json("results.json", summary)
    if processes.is_main and results:
        records.tracker.log(summary_values(summary))
        show_summary(summary, fold_run.task)
        log.info("Results are in %s (%s).", records.folder, duration(summary["seconds"]))
    records.tracker.finish()
    return summary


def _begin(setup: Setup, processes: Processes, records: Records) -> None:
    """Replaces what a run before this one has said of itself, once nothing is left that would refuse this one."""
    config = setup.config
    if config.run.resume != "never":
        check_states(setup, setup.cohort.folds[1:], records.folder, processes)
    elif config.run.trains:
        forget_folds(records.folder, (fold.index for fold in setup.cohort.folds), processes)
    records.start(config, {"processes": processes.world, "device": str(processes.device)})
    if processes.is_main:
        records.tracker = open_trackers(config, records.folder, {"git_hash": environment()["git_hash"]})


def check_restarts(config: Config) -> None:
    """Refuses ``--resume=never`` in a run that is started again when a process dies: it would begin anew each time."""
    restarts = int(os.environ.get(RESTARTS, "0"))
    if restarts and config.run.resume == "never":
        raise UserError(
            f"--resume=never with MAX_RESTARTS={restarts}: every restart would begin anew. Leave --resume=never out "
            f"and give another --title, or remove {run_folder(config.run)} first."
        )


def set_precision(config: Config) -> None:
    """Settings of torch that hold for the whole process."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.deterministic = config.train.determ
    torch.backends.cudnn.benchmark = not config.train.determ
    if config.train.deter_algo:
        torch.use_deterministic_algorithms(True, warn_only=True)
    seed_all(config.train.seed)


@contextmanager
def open_records(config: Config, processes: Processes) -> Iterator[Records]:
    """The run's folder, which belongs to this run alone; the log goes there too."""
    with open_folder(config.run, processes) as records:
        folder = records.folder
        check_shared(folder, processes)
        with writing(folder / "log.txt", GIVE_ANOTHER):
            set_up_logging(processes.rank, folder / "log.txt")
        yield records


def check_shared(folder: Path, processes: Processes) -> None:
    """Refuses a run folder that only the machine of process 0 sees: the others read its checkpoints.

    Raises:
        UserError: on every process, when one of them does not see it.
    """
    if processes.world == processes.local_world:
        return
    probe = folder / processes.gather(f".shared_{uuid.uuid4().hex}.tmp")[0]  # a name that no file system remembers
    if processes.is_main:
        probe.touch()
    processes.barrier()
    seen = processes.gather(probe.exists())
    for left in folder.glob(".shared_*.tmp") if processes.is_main else ():  # those of killed runs too
        left.unlink()
    if not all(seen):
        raise UserError(
            f"{folder} is there for {sum(seen)} of {len(seen)} processes. Give an --output_path on a disk that all "
            "machines of the run share, under the same name."
        )


def show_cohort(setup: Setup) -> None:
    """Logs the classes, the notes and the split card of every fold."""
    cohort = setup.cohort
    log.info("%s: %s", cohort.task, ", ".join(f"{i} = {name}" for i, name in enumerate(cohort.class_names)))
    for note in cohort.notes:
        log.info("%s", note)
    for fold in cohort.folds if not setup.config.run.predicts else ():
        log.info("fold %d\n%s", fold.index, split_card(cohort, fold, setup.sources.slides))


def summary_of(setup: Setup, results: list[FoldResult], task: Task) -> dict[str, Any]:
    """Everything that a person or a script wants to know of a finished run."""
    names = list(results[0].test)
    return {
        "task": task.name,
        "loss": task.facts()["loss"],
        "classes": list(setup.cohort.class_names),
        "selection": {"metric": task.selection, "split": sorted({r.selected_on for r in results})},
        "folds": [
            {
                "fold": r.fold.index,
                "seed": r.fold.seed,
                "epochs": r.epochs,
                "selected_on": r.selected_on,
                "test": r.test,
            }
            for r in results
        ],
        "summary": {
            name: summarise([{k: v["value"] for k, v in r.test[name]["metrics"].items()} for r in results])
            for name in names
        },
        "pooled": {name: pooled(results, name, task, setup.config.eval.num_bootstrap) for name in names},
        "config": setup.config.flat(),
        "cohort": describe_cohort(setup.cohort),
        "stores": setup.sources.fingerprints,
        "environment": environment(),
    }


def pooled(results: list[FoldResult], name: str, task: Task, resamples: int) -> dict[str, Any] | None:
    """Metrics over the test predictions of all folds together; None when a bag is tested in more than one fold."""
    ids = [r.fold.test[int(i)].id for r in results for i in r.predictions[name].index]
    if len(results) < 2 or len(set(ids)) < len(ids):
        return None
    parts = [r.predictions[name] for r in results]
    target = {k: torch.cat([p.target[k] for p in parts]) for k in parts[0].target}
    logits, task = torch.cat([p.logits for p in parts]), task.pooled()
    estimates = bootstrap(task.statistics(logits, target), resamples=resamples)
    report = {k: v for k, v in task.report(logits, target).items() if k != "lines"}
    return {"metrics": estimates.as_dict(), "notes": estimates.notes, "report": report}


def show_summary(summary: dict[str, Any], task: Task) -> None:
    """Logs the test metrics, and plainly which split chose the epochs."""
    for name, metrics in summary["summary"].items():
        several = len(summary["folds"]) > 1
        text = ", ".join(
            f"{k} {v['mean']:.4f}" + (f" +- {v['sd']:.4f}" if several else "")
            for k, v in metrics.items()
            if not math.isnan(v["mean"])
        )
        what = f"mean +- sd over {len(summary['folds'])} folds: " if several else ""
        log.info("test, %s weights: %s%s", name, what, text)
    if "test" in summary["selection"]["split"]:
        log.info(
            "The epoch was chosen by %s on the TEST set (validation equals test), so these numbers are optimistic.",
            task.selection,
        )
