"""`AssignedStates`: keys and values as attributes of a layer, which other code reads, and replaces one by one."""

from __future__ import annotations

import torch

from . import reasons
from .handle import KEYS, VALUES
from .reasons import Reason
from .store import PackedStore


class AssignedStates:
    """The part of a layer that serves its attributes ``keys`` and ``values``; `MixKVQLayer` has the rest.

    The layer has tokens when both are there and fit together; None takes one away.
    """

    store: PackedStore | None
    _k: torch.Tensor | None
    _v: torch.Tensor | None
    epoch: int
    length: int
    decoded_for: Reason | None

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys; decoded if packed. Assigning makes the layer plain again."""
        return self._read()[KEYS]

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._assign(states, self._held()[VALUES])

    @property
    def values(self) -> torch.Tensor | None:
        """All values; decoded if packed. Assigning makes the layer plain again."""
        return self._read()[VALUES]

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._assign(self._held()[KEYS], states)

    def _read(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.store is not None:
            self.decoded_for = reasons.READ
        return self._held()

    def _held(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (self._k, self._v) if self.store is None else self.decode()

    def _assign(self, key: torch.Tensor | None, value: torch.Tensor | None) -> None:
        fallen = self.store is not None
        self._clear(reasons.EMPTY if key is None and value is None else reasons.ASSIGNED)
        self._k, self._v = key, value
        self.epoch += 1
        if key is not None and value is not None and key.shape[-2] == value.shape[-2] and len(key) == len(value):
            self.lazy_initialization(key, value)
            if reason := self._obstacle(key, value):
                self.become_native(reason)
            self.length = key.shape[-2]
        self._account()
        if fallen:
            self.warn("went from packed to full precision: ", reasons.ASSIGNED)

    def _check_assigned(self) -> None:
        """Refuse to go on from keys without values, or the other way round."""
        if not self.length and (self._k is not None or self._v is not None):
            shapes = (None if t is None else list(t.shape) for t in (self._k, self._v))
            raise ValueError(
                "keys {} and values {} were assigned to a layer, must be of the same tokens".format(*shapes)
            )

    # ---- of the layer ----------------------------------------------------------------------------------------------
    def decode(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        raise NotImplementedError

    def become_native(self, reason: Reason) -> None:
        raise NotImplementedError

    def warn(self, effect: str, reason: Reason) -> None:
        raise NotImplementedError

    def _clear(self, reason: Reason) -> None:
        raise NotImplementedError

    def _obstacle(self, key: torch.Tensor, value: torch.Tensor) -> Reason | None:
        raise NotImplementedError

    def _account(self) -> None:
        raise NotImplementedError
