"""Rows of a fold, with their slides and targets, become the samples of its splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from datasets.labels.bags import Labelled, make_bags
from datasets.labels.classes import Classes
from datasets.labels.match import Matches
from datasets.labels.options import LabelOptions
from datasets.labels.splits import SplitRows
from datasets.labels.survival_bins import bin_of, cut_edges
from datasets.labels.table import Row, Table, rows_text
from datasets.labels.types import Fold, Sample
from datasets.labels.values import UNKNOWN, multilabel_targets, value_targets
from utils.errors import Faults, UserError

Targets = dict[int, dict[str, float]]
"""Row number to target; rows whose label is a fault have none."""


@dataclass(frozen=True)
class Draft:
    """A fold before its slides are known."""

    index: int
    table: Table
    rows: SplitRows

    @property
    def where(self) -> str:
        return f"{self.table.name} fold {self.index}"


@dataclass
class FoldBuilder:
    """Makes folds; what goes wrong goes into ``faults``, what must be said into ``notes``."""

    options: LabelOptions
    classes: Classes | None
    faults: Faults
    notes: list[str] = field(default_factory=list)

    def build(self, draft: Draft, matches: Matches) -> Fold:
        """The fold of ``draft`` with the slides that were found for its csv."""
        edges = self._edges(draft) if self.options.survival else None
        targets = self._targets(draft, edges)
        own = draft.rows.own()
        self._check_kinds(draft, matches, targets)
        bags = {split: self._bags(draft, split, matches, targets) for split in own}
        missing = {
            split: tuple(name for row in rows for name in matches.missing.get(row.number, ()))
            for split, rows in own.items()
        }
        return Fold(
            index=draft.index,
            seed=self.options.fold_seed(draft.index),
            train=bags["train"],
            val=bags.get("val", bags["test"]),
            test=bags["test"],
            selection=draft.rows.selection,
            bin_edges=edges,
            missing=missing,
        )

    def _targets(self, draft: Draft, edges: tuple[float, ...] | None) -> Targets:
        if edges is not None:
            return self._survival_targets(draft, edges)
        if self.classes is not None:
            return _class_targets(draft.table, self.classes)
        if self.options.kind == "multilabel":
            return multilabel_targets(draft.table, self.options.classes)
        return value_targets(draft.table)

    def _bags(self, draft: Draft, split: str, matches: Matches, targets: Targets) -> tuple[Sample, ...]:
        rows = [row for row in draft.rows.own()[split] if row.number in targets]
        labelled = [Labelled(row, matches.slides[row.number], targets[row.number]) for row in rows]
        samples = make_bags(labelled, self.options.bag_level, f"{draft.where} {split}", self.faults)
        repeated = len(samples) - len({sample.id for sample in samples})
        if repeated:
            effect = "oversampling" if split == "train" else "they count more than once in its metrics"
            self.notes.append(f"{draft.where}: {repeated} bags of the {split} set are repeated ({effect}).")
        return samples

    def _edges(self, draft: Draft) -> tuple[float, ...]:
        """Edges from the checkpoint in a test, from the training patients, or from every row as published."""
        if draft.index in self.options.edges:
            return self.options.edges[draft.index]
        published = self.options.bins == "published"
        rows: Sequence[Row] = draft.table.rows if published else draft.rows.train
        cases = list(rows) if published else list({row.case: row for row in rows}.values())
        if not cases:
            return ()
        try:
            times = [row.time or 0.0 for row in cases]
            return cut_edges(times, [row.event or 0 for row in cases], self.options.n_bins)
        except UserError as error:
            part = "the whole table" if published else "the training rows"
            self.faults.add(f"{draft.where}: in {part}, {error}")
            return ()

    def _survival_targets(self, draft: Draft, edges: tuple[float, ...]) -> Targets:
        rows = draft.table.rows
        bins = {row.number: bin_of(row.time or 0.0, edges) for row in rows}
        if "label" in draft.table.columns and edges:
            bins = self._stored_bins(draft, bins)
        return {
            row.number: {"label": bins[row.number], "time": row.time or 0.0, "event": row.event or 0} for row in rows
        }

    def _stored_bins(self, draft: Draft, bins: dict[int, int]) -> dict[int, int]:
        """The csv's Label column under bins "published"; else ``bins`` and a note on how many differ."""
        table = draft.table
        texts = {str(i): i for i in range(self.options.n_bins)}
        stored = {row.number: texts.get((row.label or "").removesuffix(".0"), -1) for row in table.rows}
        differ = sum(stored[number] != bins[number] for number in bins)
        if self.options.bins != "published":
            self.notes.append(
                f"{draft.where}: the Label column is not used; bins are cut on the training rows, and "
                f"{differ} of {len(bins)} Labels differ from them. --surv_bins=published uses the column."
            )
            return bins
        bad = [number for number, value in stored.items() if value < 0]
        if bad:
            self.faults.add(
                f"{table.name} {rows_text(bad)}: the Label is not a bin from 0 to {self.options.n_bins - 1}. "
                "Correct it, set --n_classes, or cut bins anew with --surv_bins=train."
            )
        elif differ:
            self.notes.append(
                f"{table.name}: {differ} stored Labels differ from bins cut on the whole table; the stored "
                "ones are used."
            )
        return stored

    def _check_kinds(self, draft: Draft, matches: Matches, targets: Targets) -> None:
        """A split without slides, one class only, or no event: a fault in training, a note elsewhere."""
        for split, rows in draft.rows.own().items():
            kept = [row for row in rows if self.options.missing == "error" or matches.slides[row.number]]
            if rows and not kept:
                self.faults.add(
                    f"{draft.where}: none of the {len(rows)} rows of the {split} set has a slide in the "
                    "store. Compare the names in the csv with those in the store."
                )
                continue
            labelled = [targets[row.number] for row in kept if row.number in targets]
            if len(labelled) == len(kept):
                self._check_spread(draft, split, labelled)

    def _check_spread(self, draft: Draft, split: str, targets: list[dict[str, float]]) -> None:
        """Targets of a split that are all alike: a fault in training, a note elsewhere."""
        for key, metric in self._judged():
            lacking = _lacking(key, {target[key] for target in targets})
            if lacking and split == "train":
                self.faults.add(f"{draft.where}: the train set holds {lacking}. Add rows, or correct the labels.")
            elif lacking:
                self.notes.append(f"{draft.where}: the {split} set holds {lacking}, so its {metric} is undefined.")

    def _judged(self) -> list[tuple[str, str]]:
        """Keys of a target that must vary, and the metric that is undefined where they do not."""
        if self.options.kind == "multilabel":
            return [(name, f"AUC of {name}") for name in self.options.classes]
        if self.options.kind == "regression":
            return [("value", "R2")]
        return [("event", "C-index") if self.options.survival else ("label", "AUC")]


def _lacking(key: str, kinds: set[float]) -> str:
    if key == "event":
        return "no event (every Status is 0)" if kinds == {0} else ""
    if key in ("label", "value"):
        return ("one class only" if key == "label" else "one value only") if len(kinds) == 1 else ""
    return f"one value of {key} only" if kinds and len(kinds - {UNKNOWN}) < 2 else ""


def _class_targets(table: Table, classes: Classes) -> Targets:
    targets: Targets = {}
    for row in table.rows:
        label = classes.index(row.label or "")
        if label is not None:
            targets[row.number] = {"label": label}
    return targets
