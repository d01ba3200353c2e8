"""Finds the store's slides of every label row: exact names first, never by substring.

1. The ID, or else each name in the row's WSI list, is a slide's name, exactly or once a file extension (.svs,
   .pt, ...) is removed from either.
2. An ID that is a TCGA or CPTAC barcode (TCGA-XX-XXXX and longer, C3L-00000) owns the slides whose name goes
   on with '-' or '.' after it.

A name that fits several slides, and a slide that fits the IDs of several patients, are faults.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from datasets.labels.table import Row, patient_of
from utils.errors import Faults

EXTENSIONS = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".dcm", ".czi",
    ".isyntax", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pt", ".h5", ".npy", ".npz",
)  # fmt: skip
"""Endings of slide and feature files that do not belong to a slide's name."""

_NUMBER = re.compile(r"0*(\d+?)(\.0+)?")


def stem(name: str) -> str:
    """``name`` without a known file extension; other dots stay (TCGA names hold one).

    >>> stem("A-01.svs"), stem("TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF")
    ('A-01', 'TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF')
    """
    lower = name.lower()
    return next((name[: -len(end)] for end in EXTENSIONS if lower.endswith(end) and len(name) > len(end)), name)


def _digits(name: str) -> str | None:
    """What a spreadsheet leaves of a name that it takes for a whole number, else None.

    >>> _digits("007"), _digits("7.0"), _digits("S7")
    ('7', '7', None)
    """
    match = _NUMBER.fullmatch(stem(name))
    return match.group(1) if match else None


@dataclass
class Matches:
    """What was found for the rows of one csv.

    Attributes:
        slides: slides of each row number; empty where nothing fits.
        missing: names that the store lacks, per row number.
        notes: sentences about rules that were needed.
    """

    slides: dict[int, tuple[str, ...]] = field(default_factory=dict)
    missing: dict[int, tuple[str, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Matcher:
    """Looks names up among the slides of a store; ``absent`` are slides that it should hold, with what lacks them."""

    def __init__(self, slides: Collection[str], absent: Mapping[str, str] | None = None) -> None:
        self.absent = absent or {}
        self.names = sorted(slides)
        self.known = set(self.names)
        self.by_stem: dict[str, list[str]] = {}
        self.by_digits: dict[str, list[str]] = {}
        for name in self.names:
            self.by_stem.setdefault(stem(name), []).append(name)
            digits = _digits(name)
            if digits is not None:
                self.by_digits.setdefault(digits, []).append(name)

    def match(self, table_name: str, rows: Sequence[Row], faults: Faults) -> Matches:
        """Slides of every row; ambiguities go into ``faults``, missing names into the result."""
        matches = Matches()
        rules = {"extension": 0, "barcode": 0, "wsi": 0, "fallback": 0}
        for row in rows:
            slides, missing, rule = self._row(row, table_name, faults)
            matches.slides[row.number] = slides
            if missing:
                matches.missing[row.number] = missing
            if rule:
                rules[rule] += 1
        matches.notes += _rule_notes(table_name, rules)
        self._check_claims(table_name, rows, matches, faults)
        unused = self.known.difference(*matches.slides.values())
        if unused:
            example = ", ".join(sorted(unused)[:3])
            matches.notes.append(
                f"{table_name}: {len(unused)} slides of the store have no row in it (such as {example})."
            )
        return matches

    def _row(self, row: Row, table: str, faults: Faults) -> tuple[tuple[str, ...], tuple[str, ...], str]:
        found = self._one(row.id, row, table, faults)
        if found:
            return (found,), (), "" if found == row.id else "extension"
        listed = [(name, self._one(name, row, table, faults)) for name in dict.fromkeys(row.wsi)]
        if any(slide for _, slide in listed):
            slides = tuple(dict.fromkeys(slide for _, slide in listed if slide))
            return slides, tuple(name for name, slide in listed if not slide), "wsi"
        slides = self._of_barcode(row.id)
        if slides:
            return slides, (), "fallback" if row.wsi else "barcode"
        return (), row.wsi or (row.id,), ""

    def _one(self, name: str, row: Row, table: str, faults: Faults) -> str | None:
        if name in self.known:
            return name
        fits = self.by_stem.get(stem(name), [])
        if len(fits) > 1:
            faults.add(
                f"{table} row {row.number}: {name!r} fits {len(fits)} slides of the store "
                f"({', '.join(fits[:3])}). Write the slide's full name."
            )
        return fits[0] if fits else None

    def _of_barcode(self, name: str) -> tuple[str, ...]:
        name = stem(name)
        if patient_of(name) is None:
            return ()
        start = bisect_left(self.names, name)
        found = []
        for slide in self.names[start:]:
            if not slide.startswith(name):
                break
            if slide[len(name) : len(name) + 1] in ("-", "."):
                found.append(slide)
        return tuple(found)

    def _check_claims(self, table: str, rows: Iterable[Row], matches: Matches, faults: Faults) -> None:
        claims: dict[str, Row] = {}
        for row in rows:
            for slide in matches.slides[row.number] or (row.id,):
                first = claims.setdefault(slide, row)
                if first.case != row.case:
                    faults.add(
                        f"{table}: slide {slide!r} belongs to patient {first.case!r} by row {first.number} "
                        f"and to {row.case!r} by row {row.number}. Give each slide one patient."
                    )
                elif first.id != row.id:
                    faults.add(
                        f"{table}: slide {slide!r} is meant by {first.id!r} (row {first.number}) and by "
                        f"{row.id!r} (row {row.number}). Name each slide once."
                    )

    def absence(self, name: str) -> str:
        """What lacks the slides that a missing name means: 'not in low.lmdb', or nothing where it is not known."""
        others = Matcher(self.absent)
        found = others.by_stem.get(stem(name)) or others._of_barcode(name)
        return "; ".join(dict.fromkeys(self.absent[slide] for slide in found))

    def as_number(self, name: str) -> list[str]:
        """Slides whose name a spreadsheet turns into ``name`` (001 into 1 or 1.0)."""
        digits = _digits(name)
        return self.by_digits.get(digits, []) if digits and name.removesuffix(".0") == digits else []

    def near(self, name: str) -> list[str]:
        """Up to three like names: but for case, zeros in front or a longer end, or alike in spelling."""
        plain = stem(name).lower().lstrip("0")
        alike = [n for n in self.names if stem(n).lower().lstrip("0") == plain]
        starts = [n for n in self.names if n.startswith(stem(name)) or (len(n) > 3 and name.startswith(n))]
        best = list(dict.fromkeys(self.as_number(name) + alike + starts))[:3]
        return best or get_close_matches(name, self.names, n=3, cutoff=0.8)


def _rule_notes(table: str, rules: dict[str, int]) -> list[str]:
    texts = {
        "extension": "rows matched a slide after a file extension was removed",
        "barcode": "rows matched slides by their barcode (names that go on with '-' or '.' after the ID)",
        "wsi": "rows matched slides by the names in the WSI column",
        "fallback": "rows matched slides by their barcode because none of their WSI names is in the store",
    }
    return [f"{table}: {rules[rule]} {text}." for rule, text in texts.items() if rules[rule]]
