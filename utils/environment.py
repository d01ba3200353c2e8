"""Checks the environment that a user has activated and adds what it lacks, changing nothing that is there.

``python utils/environment.py`` needs only the standard library and pip. A package of requirements.txt or
requirements-dev.txt that is missing is installed in the version of requirements.lock, under the constraint
that every package already installed stays as it is; one that is too old or too new is reported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def packaging_part(name: str) -> Any:
    """``packaging.<name>``, the installed one or the copy that pip carries."""
    try:
        return importlib.import_module(f"packaging.{name}")
    except ModuleNotFoundError:
        return importlib.import_module(f"pip._vendor.packaging.{name}")


def requirements(path: Path) -> list[Any]:
    """The requirements of one file that apply to this Python; ``-r`` lines are followed."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if text.startswith("-r "):
            found += requirements(path.parent / text[3:].strip())
        elif text:
            found.append(packaging_part("requirements").Requirement(text))
    return [r for r in found if r.marker is None or r.marker.evaluate()]


def installed_versions() -> dict[str, str]:
    """Canonical package names and their versions in this environment."""
    canonical = packaging_part("utils").canonicalize_name
    return {canonical(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}


def split_faults(wanted: list[Any], have: dict[str, str]) -> tuple[list[str], list[str]]:
    """Names that are missing, and sentences about installed versions outside the range."""
    canonical = packaging_part("utils").canonicalize_name
    missing, wrong = [], []
    for item in wanted:
        version = have.get(canonical(item.name))
        if version is None:
            missing.append(item.name)
        elif not item.specifier.contains(version, prereleases=True):
            wrong.append(f"{item.name} is {version}, but ABMILX needs {item.specifier}")
    return missing, wrong


def add_missing(missing: list[str], have: dict[str, str]) -> int:
    """Runs pip for the missing names; returns its exit status."""
    canonical = packaging_part("utils").canonicalize_name
    pins = [f"{name}=={version}" for name, version in have.items()]
    pins += [str(r) for r in requirements(ROOT / "requirements.lock") if canonical(r.name) not in have]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--constraint", str(constraints), *missing]
        return subprocess.run(command, check=False).returncode


def main() -> int:
    """Returns 0 when the environment holds everything (perhaps after adding it), 1 otherwise."""
    try:
        wanted = requirements(ROOT / "requirements-dev.txt")
    except ModuleNotFoundError:
        sys.stderr.write(
            f"{sys.executable} has neither pip nor packaging, so its packages cannot be checked. "
            "Run `python -m ensurepip` in it, or deactivate it and let make create .venv.\n"
        )
        return 1
    have = installed_versions()
    missing, wrong = split_faults(wanted, have)
    if wrong:
        sys.stderr.write("\n".join([*wrong, f"Change that in {sys.prefix}, or deactivate it.", ""]))
        return 1
    if not missing:
        return 0
    sys.stderr.write(f"adding to {sys.prefix} (what is there stays as it is): {', '.join(missing)}\n")
    return add_missing(missing, have)


if __name__ == "__main__":
    sys.exit(main())
