"""Which machines take part in a run: read from NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, or from SLURM.

Needs the standard library only: faults are found before torch is imported and anything is started.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from utils.errors import Faults

EXPLICIT = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
ALL_FOUR = "For several machines set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on each of them"
SRUN = "srun --ntasks-per-node=1 bash train_dist.sh <processes per machine> ..."
# Below the ports that Linux gives to outgoing connections (32768 and up).
FIRST_PORT, PORTS = 15_000, 15_000


@dataclass(frozen=True)
class Nodes:
    """The machines of a run.

    Attributes:
        count: number of machines.
        rank: number of this one, 0 .. count - 1.
        address, port: where machine 0 listens; unused with one machine.
        restarts: how often the run is started again when a process dies.
    """

    count: int = 1
    rank: int = 0
    address: str = ""
    port: int = 0
    restarts: int = 0


def read_nodes(environment: Mapping[str, str]) -> Nodes:
    """Reads the machines from environment variables; explicit ones beat those of SLURM.

    Raises:
        UserError: naming every variable that is missing or makes no sense.
    """
    faults = Faults("machines of the run")
    given = {name: environment[name].strip() for name in EXPLICIT if environment.get(name, "").strip()}
    complete = given.get("NNODES") == "1" or len(given) == len(EXPLICIT)
    values = given if complete else _slurm(environment, given, faults) | given
    if given and "NNODES" not in values:
        names = ", ".join(given)
        faults.add(f"{names} without NNODES: is it one machine or several? {ALL_FOUR}; for one machine unset {names}")
    if ":" in values.get("NNODES", ""):
        most = values["NNODES"].rpartition(":")[2]
        faults.add(
            f"NNODES is {values['NNODES']!r}, a range, but a run has a fixed number of machines: the global batch, and "
            f"with it the result, depends on the number of processes. Give one number, such as NNODES={most}"
        )
    nodes = Nodes() if faults.messages else _checked(values, faults)
    restarts = _number("MAX_RESTARTS", environment.get("MAX_RESTARTS", "").strip() or "0", (0, 1000), faults)
    faults.raise_if_any()
    return dataclasses.replace(nodes, restarts=restarts)


def _checked(values: Mapping[str, str], faults: Faults) -> Nodes:
    count = _number("NNODES", values.get("NNODES", "1"), (1, 10_000), faults)
    rank = _number("NODE_RANK", values.get("NODE_RANK", "0"), (0, count - 1), faults)
    if count == 1:
        return Nodes()
    missing = [name for name in EXPLICIT if name not in values]
    if missing:
        faults.add(f"NNODES is {count}, and there is no {', '.join(missing)}. {ALL_FOUR}")
    port = _number("MASTER_PORT", values.get("MASTER_PORT", "1"), (1, 65_535), faults)
    address = values.get("MASTER_ADDR", "")
    if not re.fullmatch(r"[A-Za-z0-9._:%-]*", address):
        faults.add(f"MASTER_ADDR is {address!r}, but must be a host name or an IP address of machine 0")
    return Nodes(count, rank, address, port)


def _number(name: str, text: str, limits: tuple[int, int], faults: Faults) -> int:
    low, high = limits
    if re.fullmatch(r"[0-9]{1,9}", text) and low <= int(text) <= high:
        return int(text)
    allowed = f"{low}" if low == high else f"a whole number from {low} to {high}"
    faults.add(f"{name} is {text!r}, but must be {allowed}")
    return low


# SLURM


def _first(environment: Mapping[str, str], *names: str) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def _slurm(environment: Mapping[str, str], given: Mapping[str, str], faults: Faults) -> dict[str, str]:
    """What SLURM says of the machines; nothing outside of SLURM."""
    job = re.match(r"[0-9]+", environment.get("SLURM_JOB_ID", ""))
    if not job:
        return {}
    text = _first(environment, "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES") or "1"
    count = _number("the number of machines of the SLURM job", text, (1, 10_000), faults)
    _check_step(environment, count, faults)
    if count == 1:
        return {"NNODES": "1"}
    values = {"NNODES": str(count), "MASTER_PORT": str(FIRST_PORT + int(job[0]) % PORTS)}
    if environment.get("SLURM_NODEID"):
        values["NODE_RANK"] = environment["SLURM_NODEID"]
    listed = _first(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if listed and "MASTER_ADDR" not in given:
        values["MASTER_ADDR"] = _first_host(listed)
        if not values["MASTER_ADDR"]:
            faults.add(f"the first machine of the SLURM node list {listed!r} cannot be read from it. Set MASTER_ADDR")
    return values


def _check_step(environment: Mapping[str, str], count: int, faults: Faults) -> None:
    """Notes a job of several machines that was not started by srun, and several tasks per machine."""
    if count > 1 and not _first(environment, "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_NODES"):
        faults.add(
            f"the SLURM job has {count} machines, but this script runs on one of them only. Start it with {SRUN}; to "
            "use this machine alone set NNODES=1"
        )
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if (tasks.isdigit() and int(tasks) > count) or environment.get("SLURM_LOCALID", "0") != "0":
        faults.add(
            f"srun starts {tasks or 'several'} tasks on {count} machine(s), but train_dist.sh starts the processes "
            f"itself, from one task per machine. Start it with {SRUN}"
        )


def _first_host(listed: str) -> str:
    """The first host of a SLURM node list: asks scontrol, or reads lists such as ``gpu[003-007,9],cpu1`` itself."""
    scontrol = shutil.which("scontrol")
    if scontrol:
        command = [scontrol, "show", "hostnames", listed]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        except (OSError, subprocess.SubprocessError):
            answer = []
        if answer:
            return answer[0]
    found = re.match(r"([A-Za-z0-9._-]+)(?:\[([0-9]+)[0-9,-]*\]([A-Za-z0-9._-]*))?(?:,|$)", listed)
    return "".join(part or "" for part in found.groups()) if found else ""
