"""Timing by turns: all cases of a comparison run one after the other, round by round, in an order drawn anew each time.

What else happens on the machine hits neighbours in time alike, so ratios inside a round are steadier than times.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDS = 64
FEWEST = 8

Times = list[float | None]
"""Seconds of one case by round; None where it did not take part."""


@dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes
    ----------
    name : str
    call : callable
    warm : bool
        Call it once more, untimed, before every timed call.
    """

    name: str
    call: Callable[[], Any]
    warm: bool = False


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
    clock: Callable[[], float] = time.perf_counter,
    passed: Callable[[int], None] = lambda done: None,
) -> dict[str, Times]:
    """Time all cases.

    Parameters
    ----------
    cases : sequence of Case
        With different names.
    seconds : float
        For all, in equal shares; a case too slow for its share still runs ``fewest`` times.
    rounds, fewest : int
        Most and fewest timed calls of a case.
    clock : callable
        Seconds.
    passed : callable
        Told how many rounds are done.

    Returns
    -------
    dict
        `Times` of every case, of length ``rounds``.
    """
    steps, budget = {}, seconds / max(len(cases), 1)
    for case in cases:  # untimed calls: memory is mapped, libraries choose their kernels
        case.call()
        begin = clock()
        case.call()
        steps[case.name] = stride((clock() - begin) * (1 + case.warm), budget, rounds, fewest)
    times: dict[str, Times] = {case.name: [None] * rounds for case in cases}
    order, draw = list(cases), random.Random(1)
    for i in range(rounds):
        draw.shuffle(order)
        for case in order:
            if i % steps[case.name]:
                continue
            if case.warm:
                case.call()
            begin = clock()
            case.call()
            times[case.name][i] = clock() - begin
        passed(i + 1)
    return times
