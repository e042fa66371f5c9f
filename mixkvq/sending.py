"""What `multiprocessing` sends to another process of a cache: a copy, not memory that both share.

torch has every pickler of `multiprocessing` (queues, pools, executors, arguments of a process) move the tensors that it
meets into shared memory, in place. Kernels would go on with the old addresses (`PackedStore.core`), and both processes
would write their tokens into one window.
"""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any


class SentAsCopy:
    """Base of what holds tensors that are written in place, or whose addresses are kept."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ForkingPickler.register(cls, _as_bytes)  # it asks for the very class


def _as_bytes(thing: Any) -> tuple[Any, tuple[bytes]]:
    """How a copy is made from bytes. Of a whole cache while no other thread uses it: `Passes.alone`."""
    alone = getattr(thing, "alone", None)
    return pickle.loads, (pickle.dumps(thing) if alone is None else alone(lambda: pickle.dumps(thing)),)
