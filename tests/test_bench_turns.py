"""Turns: who runs when, and what is timed, with a clock that only calls move."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

pytest.importorskip("torch")

from mixkvq.bench.turns import CLOCKS, Case, preemptions, stride, take_turns


class Clock:
    """Stands still but for calls."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, cost: float) -> Case:
        return Case(name, self.spend(name, cost))

    def spend(self, name: str, cost: float) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now += cost

        return call


@pytest.mark.parametrize(
    ("cost", "step"),
    [(1e-6, 1), (1 / 64, 1), (1 / 63, 2), (1 / 32, 2), (1 / 31, 4), (1 / 9, 8), (100.0, 8)],
)
def test_stride_spends_the_budget_but_runs_at_least_eight_times(cost: float, step: int) -> None:
    assert stride(cost, budget=1.0, rounds=64, fewest=8) == step


def test_stride_of_rounds_that_are_no_power_of_two() -> None:
    assert stride(100.0, budget=1.0, rounds=10, fewest=4) == 2  # rounds 0, 2, 4, 6, 8
    assert stride(100.0, budget=1.0, rounds=3, fewest=3) == 1


def test_slow_cases_run_less_often_and_only_with_the_fast_ones() -> None:
    clock = Clock()
    cases = [clock.case("fast", 0.001), clock.case("middling", 0.05), clock.case("slow", 5.0)]
    taken = take_turns(cases, 3.0, rounds=64, fewest=8, clock=clock)
    times = {name: found.seconds for name, found in taken.items()}
    ran = {name: {i for i, t in enumerate(found) if t is not None} for name, found in times.items()}
    assert len(ran["fast"]) == 64 and len(ran["slow"]) == 8 and len(ran["middling"]) == 16
    assert ran["slow"] < ran["middling"] < ran["fast"]
    assert all(t == pytest.approx(5.0) for t in times["slow"] if t is not None)
    assert all(t == pytest.approx(0.001) for t in times["fast"] if t is not None)


def test_every_round_has_its_own_order() -> None:
    clock = Clock()
    take_turns([clock.case(name, 1e-6) for name in "abcd"], 1.0, rounds=32, clock=clock)
    rounds = [tuple(clock.calls[i : i + 4]) for i in range(8, len(clock.calls), 4)]  # after two untimed calls each
    assert len(rounds) == 32 and all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 12


def test_what_comes_before_is_not_timed() -> None:
    clock = Clock()
    prepared = Case("a", clock.spend("a", 0.5), before=clock.spend("before", 7.0))
    taken = take_turns([prepared, clock.case("b", 0.5)], 0.1, rounds=8, clock=clock)
    assert clock.calls[4:] == [name for call in clock.calls[4:] if call in "ab" for name in _with_before(call)]
    assert clock.calls.count("before") == 8 and taken["a"].seconds == taken["b"].seconds == [0.5] * 8


def _with_before(call: str) -> list[str]:
    return ["before", "a"] if call == "a" else ["b"]


def test_calls_that_lost_the_processor_are_counted() -> None:
    clock = Clock()
    seen = iter([0, 0, 0, 3, 3, 3, 3, 4])  # before and after each of four calls
    taken = take_turns([clock.case("a", 1.0)], 9.0, rounds=4, fewest=1, clock=clock, switches=lambda: next(seen))
    assert taken["a"].preempted == 2
    assert preemptions() >= 0


def test_without_warming_up_or_shuffling() -> None:
    clock = Clock()
    cases = [clock.case(name, 100.0) for name in "abc"]
    taken = take_turns(cases, 0.0, rounds=3, fewest=1, warm_up=False, shuffle=False, clock=clock)
    assert clock.calls == list("abc") * 3 and all(len(found.seconds) == 3 for found in taken.values())


def test_the_clock_of_a_thread_stands_still_while_it_sleeps() -> None:
    taken = {
        name: take_turns([Case("a", lambda: time.sleep(0.02))], 0.0, rounds=2, fewest=2, clock=clock)["a"].seconds
        for name, clock in CLOCKS.items()
    }
    assert all(t is not None and t >= 0.02 for t in taken["wall"])
    assert all(t is not None and t < 0.01 for t in taken["cpu"])


def test_progress_counts_rounds() -> None:
    seen: list[int] = []
    take_turns([Clock().case("a", 0.0)], 1.0, rounds=5, fewest=2, clock=Clock(), passed=seen.append)
    assert seen == [1, 2, 3, 4, 5]
