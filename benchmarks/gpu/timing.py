"""Timing on a device by turns: all cases of a comparison run one after the other, in an order drawn anew every round.

Each turn is a run of launches between two events, so that what is timed is the device, not the host; `graphed` replays
the same launches from a CUDA graph, without the host's part between them. On the CPU (rehearsals) the clock stands in.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

TURN = 4e-3
"""Seconds that a turn lasts at least, if the case may be called often enough."""

FEWEST = 3
"""Rounds at least."""

Call = Callable[[], Any]


@dataclass
class Case:
    """Something to time.

    Attributes
    ----------
    name : str
    call : callable
        Launches the work.
    before : callable, optional
        Called, untimed, before every turn.
    most : int
        Calls per turn at most.
    seconds : list of float
        Of one call, by round.
    """

    name: str
    call: Call
    before: Call | None = None
    most: int = 64
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds)


def on(device: str, call: Call, times: int) -> float:
    """Seconds that some calls in a row take on the device."""
    if device == "cpu":
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(cases: Sequence[Case], device: str, rounds: int, deadline: Deadline | None = None) -> None:
    """Time all cases: ``rounds`` more ``seconds`` of each, or `FEWEST` if there is no time for more."""
    times: dict[str, int] = {}
    for case in cases:  # libraries choose kernels, the allocator takes its memory
        case.call()
        if case.before:
            case.before()
        one = max(on(device, case.call, 1), 1e-7)
        times[case.name] = max(1, min(case.most, int(TURN / one) + 1))
    order, draw = list(cases), random.Random(1)
    for i in range(rounds):
        if i >= FEWEST and deadline is not None and deadline.passed():
            break
        draw.shuffle(order)
        for case in order:
            if case.before:
                case.before()
            case.seconds.append(on(device, case.call, times[case.name]) / times[case.name])


def times_faster(case: Case, rival: Case) -> float:
    """How many times as long the rival takes: the median over rounds of the ratio of the same round."""
    return statistics.median(theirs / ours for ours, theirs in zip(case.seconds, rival.seconds, strict=True))


def graphed(call: Call, device: str) -> tuple[Call | None, str]:
    """The same launches replayed from a CUDA graph, or None and why that is not possible."""
    if device == "cpu":
        return None, "no graphs on the CPU"
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, f"capture failed: {str(error).splitlines()[0]}"
    return graph.replay, ""


class Deadline:
    """Seconds that a program may still use."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, not below 0."""
        return max(0.0, self._end - time.monotonic())

    def passed(self, needed: float = 0.0) -> bool:
        """Whether what needs this many seconds comes too late."""
        return self.left <= needed


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that device memory was too small, wherever it comes from."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
