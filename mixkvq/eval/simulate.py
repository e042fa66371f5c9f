"""`SimulatedCache`: a cache whose blocks are coded and decoded at once, on the NumPy reference or by any other method.

The model reads full-precision tensors in which coded blocks are replaced by their decoded values, on the schedule of
`MixKVQCache`. Nothing gets smaller; `report()` says what the records would take. For comparing methods, never for use.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .. import reference
from ..cache import MixKVQCache
from ..config import MixKVQConfig
from ..layer import MixKVQLayer
from ..reasons import SIMULATED, Reason
from ..report import LayerReport, Ledger, Report
from ..states import DTYPES

Floats = NDArray[np.float32]


class Simulator(Protocol):
    """How one block of one layer and batch row is coded."""

    @property
    def config(self) -> MixKVQConfig:
        """Says when blocks are coded (sink_length, residual_length, block_length) and which salience is collected."""
        ...

    def code(
        self, k: Floats, v: Floats, importance: Floats | None, state: dict[str, Any]
    ) -> tuple[Floats, Floats, float]:
        """Code a block.

        Parameters
        ----------
        k, v : ndarray, float32, [H, T, D]
        importance : ndarray, float32, [H, D], or None
            I_d of the queries so far.
        state : dict
            Of this layer and row, kept from block to block; "dtype" is the model's, "layer" the layer's index, "block"
            the block's number.

        Returns
        -------
        k, v : ndarray, float32, [H, T, D]
            Decoded.
        nbytes : float
            What the coded block takes, everything counted.
        """
        ...


class ReferenceSimulator:
    """Any `MixKVQConfig` on the NumPy reference."""

    def __init__(self, config: MixKVQConfig) -> None:
        self.config = config

    def code(
        self, k: Floats, v: Floats, importance: Floats | None, state: dict[str, Any]
    ) -> tuple[Floats, Floats, float]:
        """As in `Simulator`."""
        codec = self.config.codec(k.shape[-1], state["dtype"])
        x, y = (reference.narrow(states, codec.dtype) for states in (k, v))
        heads, state["mu"], _ = reference.pack_heads(codec, x, y, importance, state.get("mu"))
        records = [head[0] for head in heads]
        decoded = [reference.unpack(r, mu) for r, mu in zip(records, state["mu"], strict=True)]
        keys, values = (np.stack([pair[i] for pair in decoded]) for i in (0, 1))
        return keys, values, float(sum(map(len, records)))


class SimulatedLayer(MixKVQLayer):
    """A layer that stays plain; blocks that are due are replaced by their decoded values."""

    def __init__(self, simulator: Simulator, index: int, ledger: Ledger) -> None:
        self.simulator = simulator
        super().__init__(simulator.config, ledger)
        self.index: int = index

    def _clear(self, reason: Reason) -> None:
        self._states: list[dict[str, Any]] = []  # per batch row
        super()._clear(reason)

    @property
    def _threshold(self) -> int:
        """Never packed for real, so the first tensors are copied: blocks are replaced in place."""
        return 1 << 62

    def overlooked(self) -> None:
        """The attention hook saw nothing: code what is due without knowing the queries."""
        if self.waiting:
            self.pack()
        self.waiting = False

    def pack(self) -> None:
        """Code every block that is due."""
        if self._k is None or self._v is None or self._k.dim() != 4 or self._k.shape != self._v.shape:
            return
        batch, heads, _, dim = self._k.shape
        starts = [0] * batch if self.start is None else self.start.tolist()
        importance = self.queries.importance()
        config, length = self.mixkvq_config, self.mixkvq_config.block_length
        while len(self._states) < batch:
            self._states.append(
                {"dtype": DTYPES[self._k.dtype], "layer": self.index, "block": 0, "nbytes": 0.0, "elements": 0}
            )
        for row, (start, state) in enumerate(zip(starts, self._states, strict=True)):
            weights = None if importance is None else importance[row].numpy()
            at = start + config.sink_length + state["block"] * length
            while self.length - at >= config.residual_length:
                block = (row, slice(None), slice(at, at + length))
                k, v = (t[block].detach().float().numpy() for t in (self._k, self._v))
                new_k, new_v, nbytes = self.simulator.code(k, v, weights, state)
                self._k[block], self._v[block] = torch.from_numpy(new_k), torch.from_numpy(new_v)
                state["nbytes"] += nbytes
                state["elements"] += 2 * heads * length * dim
                state["block"] += 1
                at += length

    def crop(self, tokens_to_remove: Any) -> None:
        """Not offered."""
        raise NotImplementedError("a simulated cache cannot be cropped: coded blocks have lost their exact values")

    def _gather(self, rows: torch.Tensor) -> None:
        super()._gather(rows)
        if self._states:
            self._states = [dict(self._states[i]) for i in rows.tolist()]

    def report(self, index: int) -> LayerReport:
        """What the layer would hold: records, and the rest as it is."""
        elements = sum(t.numel() for t in (self._k, self._v) if t is not None)
        item = 0 if self._k is None else self._k.element_size()
        record_bytes = round(sum(state["nbytes"] for state in self._states))
        coded = sum(state["elements"] for state in self._states)
        nbytes = record_bytes + item * (elements - coded)
        return LayerReport(
            index,
            "simulated",
            SIMULATED,
            self.length,
            nbytes,
            elements,
            record_bytes=record_bytes,
            record_elements=coded,
        )


class SimulatedCache(MixKVQCache):
    """A cache of `SimulatedLayer`.

    Parameters
    ----------
    simulator : Simulator
    config : transformers.PreTrainedConfig, optional
        The model's.
    """

    def __init__(self, simulator: Simulator, *, config: Any = None) -> None:
        self.simulator = simulator
        super().__init__(simulator.config, config=config)

    def _new_layer(self, index: int) -> MixKVQLayer:
        return SimulatedLayer(self.simulator, index, self.ledger)

    def report(self) -> Report:
        """As `MixKVQCache.report`, of what the records would take."""
        layers = super().report().layers
        nbytes = sum(layer.nbytes for layer in layers)
        return Report(getattr(self.simulator, "name", self.mixkvq_config.name), layers, nbytes, nbytes)
