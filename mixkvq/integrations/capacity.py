"""How many workers fit into a cluster: pure arithmetic on what each needs and what each node has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What one worker reserves.

    Attributes
    ----------
    weights, cache, process : int
        Bytes of the model's weights; of the cache of one batch at its longest; of everything else (the interpreter,
        torch, activations).
    cpus : float
    """

    weights: int
    cache: int
    process: int
    cpus: float

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.process

    def __str__(self) -> str:
        return (
            f"{self.memory:,} bytes (weights {self.weights:,}, cache {self.cache:,}, process {self.process:,}) "
            f"and {self.cpus:g} CPUs"
        )


@dataclass(frozen=True)
class Node:
    """What one machine has: bytes of memory for workers, and CPUs."""

    name: str
    memory: int
    cpus: float

    def fits(self, need: Need) -> int:
        """Workers that fit, whatever else there is."""
        by_memory = self.memory // need.memory
        return int(by_memory if need.cpus == 0 else min(by_memory, self.cpus // need.cpus))

    def __str__(self) -> str:
        return f"{self.name}: {self.memory:,} bytes and {self.cpus:g} CPUs"


def workers_that_fit(need: Need, nodes: Sequence[Node], spare_cpus: float = 1) -> int:
    """Workers that fit into a cluster where one node, whichever costs least, keeps CPUs free for reading and writing.

    An engine that reads its input while the workers run never starts if the workers hold all CPUs.

    Parameters
    ----------
    need : Need
        Of each worker.
    nodes : sequence of Node
    spare_cpus : float
        CPUs that stay free, all on the same node.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ValueError
        If none fits, naming what is needed and what is there.
    """
    full = [node.fits(need) for node in nodes]
    spared = [
        full[i] - Node(node.name, node.memory, node.cpus - spare_cpus).fits(need)
        for i, node in enumerate(nodes)
        if node.cpus >= spare_cpus
    ]
    count = sum(full) - min(spared) if spared else 0
    if count < 1:
        there = "\n  ".join(map(str, nodes)) or "no node"
        raise ValueError(
            f"no worker fits: each needs {need}, and {spare_cpus:g} CPUs of one node stay free for reading and "
            f"writing; there is\n  {there}\n"
            f"Lower batch_size, max_prompt_tokens, max_new_tokens or num_cpus, or add nodes"
        )
    return count
