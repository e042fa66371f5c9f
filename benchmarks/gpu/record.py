"""`Row`: one result as a line of JSON. The first line of a program is about the machine.

``python -m gpu.record FILE STEP CASE name=number ... [--note TEXT]`` appends one, for shell scripts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STEPS = ("machine", "build", "test", "sanitize", "rate", "kernels", "verbs", "model", "cpu")
_KEYS = {"step": str, "case": str, "where": dict, "values": dict, "facts": dict, "device": str}


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes
    ----------
    step : str
        One of `STEPS`.
    case : str
        What was measured or done.
    where : dict
        Sizes that all cases of a comparison have in common.
    values : dict
        Numbers; None where there is none, with the reason in ``facts``.
    facts : dict
        Texts that belong to it.
    device : str
        Name of the device.
    """

    step: str
    case: str
    where: dict[str, Any] = field(default_factory=dict)
    values: dict[str, float | None] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    device: str = ""


def problem(line: Any) -> str | None:
    """Why a parsed line is no `Row`, or None."""
    if not isinstance(line, dict) or set(line) != set(_KEYS):
        return f"keys are {sorted(line) if isinstance(line, dict) else line}, must be {sorted(_KEYS)}"
    for key, kind in _KEYS.items():
        if not isinstance(line[key], kind):
            return f"{key} is {line[key]!r}, must be of type {kind.__name__}"
    if line["step"] not in STEPS:
        return f"step is {line['step']!r}, must be one of {', '.join(STEPS)}"
    for name, value in line["values"].items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            return f"values: {name} is {value!r}, must be a finite number or null"
    return None


def read(*paths: Path) -> list[Row]:
    """The rows of some files. Raises ValueError, naming file and line, for what is none."""
    rows = []
    for path in paths:
        for number, text in enumerate(path.read_text().splitlines(), 1):
            line = json.loads(text)
            if why := problem(line):
                raise ValueError(f"{path}:{number}: {why}")
            rows.append(Row(**line))
    return rows


class Log:
    """Appends rows to a file (None: to nothing) and remembers them; a row is on disk when `add` returns."""

    def __init__(self, path: Path | None, device: str) -> None:
        self.path, self.device, self.rows = path, device, list[Row]()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, step: str, case: str, where: dict[str, Any], values: dict[str, float | None], **facts: Any) -> Row:
        """Keep a row. Raises ValueError for one that `read` would refuse."""
        row = Row(step, case, where, values, facts, self.device)
        if why := problem(asdict(row)):
            raise ValueError(why)
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        return row


def _smi(fields: str) -> list[str]:
    """What nvidia-smi says of the first device; nothing where it is not there."""
    try:
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        out = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [part.strip() for part in out[0].split(",")] if out else []


def machine(log: Log) -> None:
    """A row about device, driver, versions and clocks, which are left as they are."""
    import torch

    values: dict[str, float | None] = {}
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "host": platform.machine(),
        "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if torch.cuda.is_available() and log.device != "cpu":
        about = torch.cuda.get_device_properties(0)
        values = {
            "memory": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "l2": getattr(about, "L2_cache_size", 0),
        }
        facts["capability"] = f"{about.major}.{about.minor}"
        for name, value in zip(
            ("driver", "clocks, SM and memory, at the start", "power limit"),
            _regroup(_smi("driver_version,clocks.sm,clocks.mem,power.limit")),
            strict=False,
        ):
            facts[name] = value
    log.add("machine", log.device, {}, values, **facts)


def _regroup(parts: list[str]) -> list[str]:
    return [parts[0], f"{parts[1]}, {parts[2]}", parts[3]] if len(parts) == 4 else []


def device_name(device: str) -> str:
    """Name of a torch device for people."""
    import torch

    return torch.cuda.get_device_name(0) if device == "cuda" else device


def main(arguments: list[str] | None = None) -> None:
    """Append one row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("case")
    parser.add_argument("values", nargs="*", metavar="name=number")
    parser.add_argument("--device", default="")
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)
    values: dict[str, float | None] = {}
    for text in options.values:
        name, _, number = text.partition("=")
        values[name] = float(number)
    facts = {"note": options.note} if options.note else {}
    Log(options.file, options.device).add(options.step, options.case, {}, values, **facts)


if __name__ == "__main__":
    main()
