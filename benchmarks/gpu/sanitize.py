"""compute-sanitizer over `gpu.small`: findings of memcheck, racecheck, initcheck and synccheck.

A tool first has to find the mistake of its kind in `planted.cu`. One that does not is said not to work on this machine,
and its findings are unknown, not 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .record import Log, device_name
from .timing import Deadline

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_PLANTED = 60
"""Seconds for a planted mistake at most."""


def findings(output: str) -> int | None:
    """What a run of compute-sanitizer counted, or None where it has no summary."""
    found = _SUMMARY.findall(output)
    return int(found[-1]) if found else None


def reason(output: str) -> str:
    """The most telling line of output without findings."""
    lines = [line.strip("= ").strip() for line in output.splitlines() if line.strip("= ").strip()]
    telling = [line for line in lines if re.search(r"error|not supported|unable|fail", line, re.IGNORECASE)]
    return (telling or lines or ["no output"])[0]


def run(sanitizer: str, tool: str, command: Sequence[str], seconds: float) -> str:
    """Output of a command under a tool; that it was stopped is part of it."""
    asked = [sanitizer, "--tool", tool, "--target-processes", "all", "--print-limit", "20", *command]
    try:
        environment = {"MIXKVQ_EMULATOR": "device", **os.environ}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(asked, **output, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        return (out.decode(errors="replace") if isinstance(out, bytes) else out) + "\nerror: stopped, no time left\n"
    except OSError as error:
        return f"error: {error}\n"
    return done.stdout


def check(
    sanitizer: str, tool: str, planted: str, command: Sequence[str], deadline: Deadline, share: float
) -> tuple[int | None, str]:
    """Findings of one tool and a note; None where it does not work here or the workload did not get through."""
    output = run(sanitizer, tool, [planted, tool], min(_PLANTED, deadline.left))
    if not findings(output):
        why = "missed" if findings(output) == 0 else reason(output)
        return None, f"does not work on this machine: the planted error: {why}"
    output = run(sanitizer, tool, command, max(deadline.left * share, 1))
    print(output, flush=True)
    found, right = findings(output), re.search(r"^small: (\d+) calls right", output, re.MULTILINE)
    if found is None:
        return None, f"no result: {reason(output)}"
    if not right:
        wrong = re.search(r"^small: .+", output, re.MULTILINE)
        return found or None, wrong[0] if wrong else f"the workload did not end: {reason(output)}"
    return found, f"{right[1]} calls, all right; finds the planted error"


def main(arguments: list[str] | None = None) -> None:
    """All tools."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--planted", required=True, help="what nvcc made of planted.cu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--sanitizer", default=shutil.which("compute-sanitizer") or "compute-sanitizer")
    parser.add_argument("--small", default=None, help="another workload, in place of gpu.small")
    options = parser.parse_args(arguments)
    log = Log(options.out, device_name("cpu" if options.rehearse else "cuda"))
    deadline, said = Deadline(options.seconds), []
    for at, tool in enumerate(TOOLS):
        share = 1 / (len(TOOLS) - at)
        part = deadline.left * share * 0.7
        command = [options.small] if options.small else [sys.executable, "-m", "gpu.small", "--seconds", f"{part:.0f}"]
        found, note = check(options.sanitizer, tool, options.planted, command, deadline, share)
        log.add("sanitize", tool, {}, {"findings": found}, note=note)
        said.append(f"{tool} {'unknown' if found is None else found}")
        print(f"{tool}: {'unknown' if found is None else found} ({note})", flush=True)
    print(f"== findings: {', '.join(said)}")
    broken = ("differs", "did not end")  # the workload, that is: a tool that does not work is no failure
    sys.exit(any(row.values["findings"] or any(text in row.facts["note"] for text in broken) for row in log.rows))


if __name__ == "__main__":
    main()
