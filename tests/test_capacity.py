"""How many workers fit: against placing them one by one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixkvq.integrations.capacity import Need, Node, workers_that_fit

GIB = 1 << 30
NEED = Need(weights=2 * GIB, cache=GIB, process=GIB, cpus=2)


def placed(need: Need, nodes: list[Node], spare: float, keeper: int) -> int:
    """Workers placed one by one until none fits, with spare CPUs kept on one node."""
    count = 0
    for index, node in enumerate(nodes):
        memory, cpus = node.memory, node.cpus - (spare if index == keeper else 0)
        while memory >= need.memory and cpus >= need.cpus:
            memory, cpus, count = memory - need.memory, cpus - need.cpus, count + 1
    return count


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_as_many_as_can_be_placed(sizes: list[tuple[int, int]], memory: int, cpus: int, spare: int) -> None:
    nodes = [Node(f"n{i}", memory, cpus) for i, (memory, cpus) in enumerate(sizes)]
    need = Need(memory, 0, 0, cpus)
    best = max((placed(need, nodes, spare, i) for i, node in enumerate(nodes) if node.cpus >= spare), default=0)
    if best:
        assert workers_that_fit(need, nodes, spare) == best
    else:
        with pytest.raises(ValueError, match="no worker fits"):
            workers_that_fit(need, nodes, spare)


@pytest.mark.parametrize(
    ("nodes", "count"),
    [
        ([Node("a", 16 * GIB, 64)], 4),  # memory is the limit
        ([Node("a", 16 * GIB - 1, 64)], 3),
        ([Node("a", 64 * GIB, 8)], 3),  # the CPUs are: 8 - 1 spare make 3 pairs
        ([Node("a", 64 * GIB, 9)], 4),
        ([Node("a", 64 * GIB, 8), Node("b", 64 * GIB, 3)], 5),  # b keeps its odd CPU free
        ([Node("a", 3 * GIB, 8), Node("b", 3 * GIB, 8), Node("c", 5 * GIB, 8)], 1),  # not what their sum would hold
    ],
)
def test_what_limits(nodes: list[Node], count: int) -> None:
    assert workers_that_fit(NEED, nodes) == count


def test_workers_without_cpus_are_limited_by_memory() -> None:
    assert workers_that_fit(Need(GIB, 0, 0, 0), [Node("a", 3 * GIB, 1)]) == 3


@pytest.mark.parametrize("nodes", [[], [Node("a", 4 * GIB - 1, 8)], [Node("a", 64 * GIB, 2)]])
def test_none_fits(nodes: list[Node]) -> None:
    with pytest.raises(ValueError) as caught:
        workers_that_fit(NEED, nodes)
    message = str(caught.value)
    assert re.search(
        r"4,294,967,296 bytes \(weights 2,147,483,648, cache 1,073,741,824, process 1,073,741,824\)", message
    )
    assert "and 2 CPUs" in message and "batch_size" in message
    assert all(str(node) in message for node in nodes) and (nodes or "no node" in message)
