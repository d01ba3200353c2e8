"""Which column of a label csv means what: the accepted forms."""

from __future__ import annotations

FORMS_CLASSIFICATION = (
    "case,slide,label,fold (four columns, by position), ID,Label,Split (any further columns), "
    "ID,Label (two columns, by position), or named columns slide and label with case and fold as wanted"
)
FORMS_SURVIVAL = (
    "ID,Event,Status with Label, Split and WSI as wanted (Event is the time, Status 1 = event, "
    "0 = censored), or named columns case, slide, time, event, fold"
)
NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "slide", "slide_id", "slide_name", "image", "image_id"),
    "case": ("case", "case_id", "patient", "patient_id", "block", "group"),
    "label": ("label",),
    "split": ("split", "fold"),
    "time": ("time", "survival_months", "months"),
    "event": ("status", "event"),
    "wsi": ("wsi",),
}
"""Role of a column to the names it goes by, whatever their case."""

LABEL_ROLE = "label "
"""Role of a multi-label column: this and its name."""

SPLIT_WORDS = ("train", "val", "test")


def find_columns(header: list[str], survival: bool) -> dict[str, int] | str:
    """Maps roles (id, case, label, split, time, event, wsi) to positions in the header.

    Args:
        header: names in the first line.
        survival: whether time and event are needed.

    Returns:
        The mapping, or a sentence saying what is missing and which forms are accepted.
    """
    named = by_name(header)
    if survival:
        return _survival(header, named)
    if {"ID", "Label", "Split"} <= set(header):
        return _patient_only(named, header) | {
            "id": header.index("ID"),
            "label": header.index("Label"),
            "split": header.index("Split"),
        }
    if len(header) == 2 and not {"id", "label"} <= set(named):
        return {"id": 0, "label": 1}
    positions = {"case": 0, "id": 1, "label": 2, "split": 3}
    if len(header) == 4 and not (len(named) > 2 and named.items() - positions.items()):
        return positions
    if {"id", "label"} <= set(named):
        return named
    return f"the columns {', '.join(header)} are not understood. Accepted forms: {FORMS_CLASSIFICATION}."


def find_multilabel_columns(header: list[str], names: tuple[str, ...]) -> dict[str, int] | str:
    """Maps the roles id, case, split and wsi, and ``LABEL_ROLE`` + name for every label, to positions in the header.

    Args:
        header: names in the first line.
        names: the label columns, written as in the header.

    Returns:
        The mapping, or a sentence saying what is missing.
    """
    missing = [name for name in names if name not in header]
    roles = {role: at for role, at in by_name(header).items() if role in ("id", "case", "split", "wsi")}
    if missing or "id" not in roles:
        absent = ", ".join([*([] if "id" in roles else ["slide (or ID)"]), *missing])
        return (
            f"the columns {', '.join(header)} lack {absent}. Several labels per bag need a column slide and one column "
            "of 1, 0 or nothing (unknown) for each name in --classes."
        )
    return roles | {LABEL_ROLE + name: header.index(name) for name in names}


def _patient_only(named: dict[str, int], header: list[str]) -> dict[str, int]:
    """Without a block or group as the case: beside the published columns it may be any further one."""
    return {role: at for role, at in named.items() if role != "case" or header[at].lower() not in ("block", "group")}


def by_name(header: list[str]) -> dict[str, int]:
    """Roles to positions, by the names of the columns alone."""
    lower = [name.lower() for name in header]
    found = {}
    for role, names in NAMES.items():
        position = next((lower.index(name) for name in names if name in lower), None)
        if position is not None:
            found[role] = position
    return found


def _survival(header: list[str], named: dict[str, int]) -> dict[str, int] | str:
    """The published files call the time Event; beside a column called time, event is the status."""
    roles = dict(named)
    if {"event", "status"} <= {name.lower() for name in header} and "time" in roles:
        return (
            f"the csv has the columns Event, Status and {header[roles['time']]}: beside Status, Event is the time, as "
            f"in the published files, so there are two times. Remove or rename one. Accepted forms: {FORMS_SURVIVAL}."
        )
    if "time" not in roles and "event" in roles:
        lower = [name.lower() for name in header]
        published = {"time": "event", "event": "status"}
        roles |= {role: lower.index(name) for role, name in published.items() if name in lower}
        if "status" not in lower:
            del roles["event"]
    if "id" not in roles and "case" in roles:
        roles["id"] = roles["case"]
    missing = [
        name
        for role, name in (
            ("id", "ID"),
            ("time", "Event (the time)"),
            ("event", "Status (1 = event, 0 = censored)"),
        )
        if role not in roles
    ]
    if missing:
        return (
            f"survival needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}; the csv has "
            f"{', '.join(header)}. Accepted forms: {FORMS_SURVIVAL}."
        )
    return roles
