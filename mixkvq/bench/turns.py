"""Timing by turns: all cases of a comparison run one after the other, round by round, in an order drawn anew each time.

What else happens on the machine hits neighbours in time alike, so ratios inside a round are steadier than times.
"""

from __future__ import annotations

import math
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDS = 64
FEWEST = 8

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
"""Seconds that pass, and seconds that the calling thread computes: all there is with one thread, however busy the
machine."""

Times = list[float | None]
"""Seconds of one case by round; None where it did not take part."""


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes
    ----------
    name : str
    call : callable
    before : callable, optional
        Called, untimed, before every timed call.
    """

    name: str
    call: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass
class Taken:
    """Timed calls of one case.

    Attributes
    ----------
    seconds : Times
    preempted : int
        Calls in which the system gave the processor to another program, which long calls suffer more than short ones.
    """

    seconds: Times
    preempted: int = 0


def preemptions() -> int:
    """How often the system took the processor away from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def stride(cost: float, budget: float, rounds: int, fewest: int) -> int:
    """Every how many rounds a case takes part, a power of two: rounds of slow cases are rounds of all faster ones.

    Parameters
    ----------
    cost, budget : float
        Seconds of one call, and for all calls.
    rounds, fewest : int
        Most and fewest calls.
    """
    turns = min(max(budget / max(cost, 1e-9), fewest), rounds)
    step = 1 << math.ceil(math.log2(rounds / turns))
    while step > 1 and math.ceil(rounds / step) < fewest:
        step //= 2
    return step


def take_turns(
    cases: Sequence[Case],
    seconds: float,
    *,
    rounds: int = ROUNDS,
    fewest: int = FEWEST,
    warm_up: bool = True,
    shuffle: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    switches: Callable[[], int] = preemptions,
    passed: Callable[[int], None] = lambda done: None,
) -> dict[str, Taken]:
    """Time all cases.

    Parameters
    ----------
    cases : sequence of Case
        With different names.
    seconds : float
        For all, in equal shares; a case too slow for its share still runs ``fewest`` times.
    rounds, fewest : int
        Most and fewest timed calls of a case.
    warm_up : bool
        Call every case twice before anything is timed; without, every case takes part in every round.
    shuffle : bool
        Draw the order of every round; without, it is that of ``cases``.
    clock, switches : callable
        Seconds, and involuntary context switches so far.
    passed : callable
        Told how many rounds are done.

    Returns
    -------
    dict
        What every case took, over ``rounds`` rounds.
    """
    steps, budget = {case.name: 1 for case in cases}, seconds / max(len(cases), 1)
    for case in cases if warm_up else ():  # memory is mapped, libraries choose their kernels
        case.call()
        begin = clock()
        case.call()
        steps[case.name] = stride(clock() - begin, budget, rounds, fewest)
    taken = {case.name: Taken([None] * rounds) for case in cases}
    order, draw = list(cases), random.Random(1)
    for i in range(rounds):
        if shuffle:
            draw.shuffle(order)
        for case in order:
            if i % steps[case.name]:
                continue
            if case.before is not None:
                case.before()
            found, before, begin = taken[case.name], switches(), clock()
            case.call()
            found.seconds[i] = clock() - begin
            found.preempted += switches() > before
        passed(i + 1)
    return taken
